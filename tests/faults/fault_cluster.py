"""A Ray cluster of several nodes on one machine, each a tree of processes that can be killed.

Nodes are started as users start them, with `ray start --block`. Every process of a cluster has
its mark in the environment, so that what is left behind is found wherever it hangs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from servers import RAY, REPOSITORY, free_ports, kill_tree

HOOKS = Path(__file__).parent / "hooks"
START_SECONDS = 300
_CLUSTER, _DRIVER = "HTS_FAULT_CLUSTER", "HTS_FAULT_DRIVER"
# Processes of the nodes' own, and workers that Ray keeps for the next driver.
_KEPT = re.compile(
    r"ray::(IDLE|DashboardAgent|RuntimeEnvAgent|_?AutoscalingCoordinator|_?UsageCollection|_?Stats"
    r"|TrainStateActor|ActorLocation)"
)


class Network:
    """Worker nodes behind links of their own that can be cut. Needs root and iproute2."""

    def __init__(self) -> None:
        number = os.getpid() % 250
        self.prefix = f"10.77.{number}"
        self.name = f"hts{number}"
        self.head = f"{self.prefix}.1"
        self._namespaces: list[str] = []

    @staticmethod
    def missing() -> str:
        """Return what this machine lacks, nothing where links can be made."""
        if os.geteuid() != 0:
            return "network namespaces need root"
        if shutil.which("ip") is None:
            return "network namespaces need iproute2 (the command ip)"
        probe = subprocess.run(
            ["ip", "netns", "add", "hts-probe"], capture_output=True, check=False
        )
        subprocess.run(["ip", "netns", "del", "hts-probe"], capture_output=True, check=False)
        return "" if probe.returncode == 0 else f"ip netns add: {probe.stderr.decode().strip()}"

    def __enter__(self) -> Network:
        _ip(f"link add {self.name} type bridge")
        _ip(f"addr add {self.head}/24 dev {self.name}")
        _ip(f"link set {self.name} up")
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in self._namespaces:
            _ip(f"netns del {namespace}")
        _ip(f"link del {self.name}")

    def host(self, number: int) -> tuple[str, list[str]]:
        """Return a host's address and what runs a command on it; make it if it is not there."""
        namespace, address = f"{self.name}-{number}", f"{self.prefix}.{number + 2}"
        if namespace not in self._namespaces:
            _ip(f"netns add {namespace}")
            self._namespaces.append(namespace)
            _ip(f"link add {self._link(number)} type veth peer name eth0 netns {namespace}")
            _ip(f"link set {self._link(number)} master {self.name} up")
            _ip(f"-n {namespace} addr add {address}/24 dev eth0")
            _ip(f"-n {namespace} link set eth0 up")
            _ip(f"-n {namespace} link set lo up")
            _ip(f"-n {namespace} route add default via {self.head}")
        return address, ["ip", "netns", "exec", namespace]

    def cut(self, number: int) -> None:
        """Take a host's link down."""
        _ip(f"link set {self._link(number)} down")

    def heal(self, number: int) -> None:
        """Take it up again."""
        _ip(f"link set {self._link(number)} up")

    def _link(self, number: int) -> str:
        return f"{self.name}v{number}"


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


class FaultCluster:
    """A head without GPUs, and worker nodes of one logical GPU each."""

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        *,
        environment: Mapping[str, str] | None = None,
        network: Network | None = None,
        head_cpus: int = 1,
        head_options: Callable[[int], Sequence[str]] = lambda port: (),
        store_bytes: int = 80_000_000,
    ) -> None:
        self.folder, self.network, self.store_bytes = folder, network, store_bytes
        self._head_cpus, self._head_options = head_cpus, head_options
        self.mark = uuid.uuid4().hex
        self.clock = folder / "clock"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))},
            "RAY_AUTH_MODE": "disabled",
            "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
            "RAY_DATA_USE_DATASOURCE_V2": "0",
            "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
            "RAY_agent_register_timeout_ms": "120000",
            "RAY_prestart_worker_first_driver": "0",  # a process a CPU, most of them unused
            "RAY_worker_niceness": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "15",  # until a driver gives a head up
            # A killed node refuses connections and is given up after three seconds instead of
            # fifteen; one that is only busy still has Ray's ten seconds for each answer.
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "HTS_FAULT_CLOCK": str(self.clock),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HOOKS), os.environ.get("PYTHONPATH")])),
            **(environment or {}),
        }
        self._temporary = Path(f"/tmp/hts-f{os.getpid()}-{self.mark[:4]}")  # short: for sockets
        self._head: subprocess.Popen | None = None
        self._nodes: list[subprocess.Popen | None] = [None] * nodes
        self._port = 0

    def __enter__(self) -> FaultCluster:
        try:
            self.repair()
        except BaseException:
            self.stop()  # nobody else will
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill all processes of the cluster, and remove what they wrote."""
        self.kill_head()
        for number in range(len(self._nodes)):
            self.kill_node(number)
        for process in self.strays():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def address(self) -> str:
        """Where drivers and nodes find the head."""
        return f"{self.network.head if self.network else '127.0.0.1'}:{self._port}"

    def repair(self) -> None:
        """Start what is not running, and wait until all nodes are there."""
        deadline = time.monotonic() + START_SECONDS
        while self.alive() != 1 + len(self._nodes):
            assert time.monotonic() < deadline, self.logs()
            if not _runs(self._head):  # Ray gives a node 30 s to start, too little for a busy one
                self._start_head()
                continue
            lost = [number for number, node in enumerate(self._nodes) if not _runs(node)]
            if lost and self.alive() == 1 + len(self._nodes) - len(lost):
                self.start_node(lost[0])  # one after the other, for the same reason
            time.sleep(0.5)

    def alive(self) -> int:
        """Return how many nodes the head believes in."""
        from ray._raylet import GcsClient

        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            nodes = GcsClient(address=self.address).get_all_node_info(timeout=5).values()
        except Exception:  # there is no head to ask
            return 0
        return sum(node.state == 0 for node in nodes)

    def kill_head(self) -> None:
        """Kill the head node; the workers' nodes cannot live without it for long."""
        if self._head is not None:
            kill_tree(self._head)

    def kill_node(self, number: int) -> None:
        """Kill all processes of a worker node at once."""
        node = self._nodes[number]
        if node is not None:
            kill_tree(node)

    def terminate_node(self, number: int) -> None:
        """Tell a worker node to go, as a cloud does before it takes a spot machine."""
        node = self._nodes[number]
        assert node is not None
        node.send_signal(signal.SIGTERM)

    def start_node(self, number: int) -> None:
        """Start a worker node in the place of the one of that number, and do not wait for it."""
        address, prefix = self.network.host(number) if self.network else ("127.0.0.1", [])
        self._nodes[number] = self._start(
            f"node-{number}", [*prefix, *RAY, "start", f"--address={self.address}"],
            address, "--num-cpus=2", "--num-gpus=1", f"--labels=place=node-{number}",
        )  # fmt: skip

    def node_runs(self, number: int) -> bool:
        """Tell whether a worker node's main process is there."""
        return _runs(self._nodes[number])

    def workers(self, node: int | None = None) -> dict[str, psutil.Process]:
        """Return the processes at work, of all nodes or one, by title and number."""
        roots = [self._head, *self._nodes] if node is None else [self._nodes[node]]
        found = {}
        for root in roots:
            for process in _tree(root):
                with contextlib.suppress(psutil.NoSuchProcess):
                    title = " ".join(process.cmdline()).strip()
                    if title.startswith("ray::") and not _KEPT.match(title):
                        found[f"{title} {process.pid}"] = process
        return dict(sorted(found.items()))

    def strays(self) -> list[psutil.Process]:
        """Return this cluster's processes that no running node has started."""
        mine = {p.pid for root in [self._head, *self._nodes] for p in _tree(root)}
        return [process for process in marked(_CLUSTER, self.mark) if process.pid not in mine]

    def logs(self) -> str:
        """Return the ends of what the nodes said."""
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))

    def _start_head(self) -> None:
        for number in range(len(self._nodes)):
            self.kill_node(number)  # they belong to the head that is gone
        self._port, dashboard, client = free_ports(3)
        # With a dashboard, as users have it: without, Ray Train's helper that outlives a killed
        # driver cannot find out that the training is gone, and stays.
        command = [
            *RAY, "start", "--head", f"--port={self._port}", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}", "--dashboard-host=127.0.0.1",
            f"--temp-dir={self._temporary}", *self._head_options(self._port),
        ]  # fmt: skip
        address = self.network.head if self.network else "127.0.0.1"
        cpus = f"--num-cpus={self._head_cpus}"
        self._head = self._start("head", command, address, cpus, "--num-gpus=0")
        while self.alive() == 0 and _runs(self._head):
            time.sleep(0.5)

    def _start(
        self, name: str, command: Sequence[str], address: str, *more: str
    ) -> subprocess.Popen:
        log = self.folder / f"{name}-{time.time_ns()}.log"
        with log.open("w") as stream:
            return subprocess.Popen(
                [*command, "--block", f"--node-ip-address={address}", *more,
                 f"--object-store-memory={self.store_bytes}", "--disable-usage-stats",
                 "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"],
                env={**self.environment, _CLUSTER: self.mark}, stdout=stream, stderr=stream,
            )  # fmt: skip


class Driver:
    """A command of `hts` in a process of its own, on a cluster."""

    def __init__(
        self, cluster: FaultCluster, log: Path, arguments: Sequence[str], **variables: str
    ) -> None:
        self.log, self.mark, self.killed = log, uuid.uuid4().hex, False
        environment = {
            **cluster.environment,
            "RAY_ADDRESS": cluster.address,
            "COLUMNS": "200",
            **variables,
            _DRIVER: self.mark,
        }
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hts_ray.cli", *arguments],
                env=environment, cwd=REPOSITORY, stdout=stream, stderr=stream,
            )  # fmt: skip

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def wait(self, seconds: float) -> int:
        """Return its exit code; a driver that hangs is a failure of the test."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds:g} s:\n{self.output}") from None

    def kill(self) -> None:
        """Kill it alone, without a chance to say good-bye."""
        self.killed = self.running
        self.process.kill()
        self.process.wait(60)

    def orphans(self) -> list[psutil.Process]:
        """Return the processes that it started and left behind."""
        return marked(_DRIVER, self.mark)


def marked(name: str, mark: str) -> list[psutil.Process]:
    """Return the processes, zombies aside, whose environment holds a mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(name) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@contextmanager
def stopped_at_the_end(driver: Driver) -> Iterator[Driver]:
    """Kill a driver that a failed test leaves running."""
    try:
        yield driver
    finally:
        if driver.running:
            driver.kill()


def _runs(process: subprocess.Popen | None) -> bool:
    return process is not None and process.poll() is None


def _tree(root: subprocess.Popen | None) -> list[psutil.Process]:
    if not _runs(root):
        return []
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(root.pid)
        return [top, *top.children(recursive=True)]
    return []
