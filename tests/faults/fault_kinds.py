"""What can go wrong while a stage runs, and how it is put right again.

A fault is a context: it strikes when the context is entered, and leaving it, once the driver has
ended, mends what a user or a cloud would mend. It returns what happened in words.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from fault_cluster import Driver, FaultCluster
from servers import Fault, FaultyStore

from hts_ray.store import storage

STAGES = ("label", "train", "sweep")
# Workers whose death Ray makes up for; that of one who manages others ends the command.
_REPLACED = re.compile(
    r"ray::(MapWorker|Map|ReadParquet|Write|AttemptLog|RayTrainWorker|ImplicitFunc|bundle)"
)
# Stands by, and does nothing unless a driver dies.
_IDLE = "ray::PlacementGroupCleaner"
OUTAGE_SECONDS = 60.0


@dataclass
class Scene:
    """A stage at work: where it runs, and where it writes."""

    cluster: FaultCluster
    driver: Driver
    stage: str
    run_dir: str
    store: FaultyStore
    random: random.Random


@dataclass
class Struck:
    """What a fault did; `survives` tells whether the command has to end well all the same."""

    what: str
    survives: bool


Strike = Callable[[Scene], AbstractContextManager[Struck]]


def working(cluster: FaultCluster) -> dict[str, psutil.Process]:
    """Return the processes whose death a stage would notice."""
    return {t: process for t, process in cluster.workers().items() if not t.startswith(_IDLE)}


@contextmanager
def worker(scene: Scene) -> Iterator[Struck]:
    """Kill one of the processes at work, whichever."""
    deadline = time.monotonic() + 60
    while not (found := working(scene.cluster)):
        assert scene.driver.running, f"it ended before a worker was seen:\n{scene.driver.output}"
        assert time.monotonic() < deadline, "no worker was seen"
        time.sleep(0.05)
    title = scene.random.choice(list(found))
    with contextlib.suppress(psutil.NoSuchProcess):
        found[title].kill()
    yield Struck(f"kill -9 of {title}", bool(_REPLACED.match(title)))


@contextmanager
def node(scene: Scene) -> Iterator[Struck]:
    """Kill a worker node; another comes at once."""
    number = scene.random.randrange(2)
    scene.cluster.kill_node(number)
    scene.cluster.start_node(number)
    yield Struck(f"kill -9 of node {number}", True)


@contextmanager
def spot(scene: Scene) -> Iterator[Struck]:
    """Tell a worker node to go, take it away ten seconds later, and give another."""
    number = scene.random.randrange(2)
    scene.cluster.terminate_node(number)
    deadline = time.monotonic() + 10
    while scene.cluster.node_runs(number) and time.monotonic() < deadline:
        time.sleep(0.1)
    scene.cluster.kill_node(number)
    scene.cluster.start_node(number)
    yield Struck(f"SIGTERM of node {number}", True)


@contextmanager
def driver(scene: Scene) -> Iterator[Struck]:
    """Kill the driver."""
    scene.driver.kill()
    yield Struck("kill -9 of the driver", False)


@contextmanager
def head(scene: Scene) -> Iterator[Struck]:
    """Kill the head; the cluster is started anew when the driver has given up."""
    scene.cluster.kill_head()
    yield Struck("kill -9 of the head", False)


@contextmanager
def disk(scene: Scene) -> Iterator[Struck]:
    """Fill the disk that holds the run directory; somebody tidies up later."""
    ballast = Path(scene.run_dir) / "ballast"
    fill(ballast)
    try:
        yield Struck("the disk is full", False)
    finally:
        ballast.unlink()


@contextmanager
def clock(scene: Scene) -> Iterator[Struck]:
    """Set all processes' clocks an hour forward or back."""
    hours = scene.random.choice([-1, 1])
    scene.cluster.clock.write_text(str(3600 * hours))
    try:
        yield Struck(f"the clocks jump by {hours} h", True)
    finally:
        scene.cluster.clock.unlink()


@contextmanager
def s3(scene: Scene) -> Iterator[Struck]:
    """Let the object store answer a few requests with errors or late, and then be itself again."""
    status, code = scene.random.choice([(500, "InternalError"), (503, "SlowDown")])
    for method in ("GET", "HEAD", "PUT", "POST"):
        scene.store.faults.append(Fault(method, status, code, times=2))
        scene.store.faults.append(Fault(method, times=2, seconds=3.0))
    try:
        yield Struck(f"the store answers {status}, then late", True)
    finally:
        scene.store.faults.clear()


@contextmanager
def outage(scene: Scene) -> Iterator[Struck]:
    """Let the object store refuse everything until the driver has ended, or for a minute."""
    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        scene.store.faults.append(Fault(method, 503, "SlowDown", times=10_000))
    started = time.monotonic()
    try:
        while scene.driver.running and time.monotonic() < started + OUTAGE_SECONDS:
            time.sleep(0.1)
    finally:
        scene.store.faults.clear()
    yield Struck(f"the store was down for {time.monotonic() - started:.0f} s", False)


KINDS: dict[str, Strike] = {
    "worker": worker, "node": node, "spot": spot, "driver": driver, "head": head, "disk": disk,
    "clock": clock, "s3": s3, "outage": outage,
}  # fmt: skip
ON_S3 = ("s3", "outage")
# Faults with a test of their own.
ALONE = ("images", "memory", "network", "autoscaling", "placement", "search")


def fill(ballast: Path) -> None:
    """Write a file until its disk has no room left."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"0" * 65536):
            pass
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.write(b"0"):
            pass


@contextmanager
def small_disk(folder: Path, mebibytes: int = 64) -> Iterator[Path]:
    """Mount a small disk of memory at a folder. Needs root."""
    folder.mkdir()
    option = f"size={mebibytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


class Progress:
    """How far a stage has come: blocks of images, checkpoints of a training, trials of a sweep."""

    def __init__(self, stage: str, run_dir: str) -> None:
        self.stage, self.run_dir = stage, run_dir
        self._seen: set[str] = set()

    def steps(self) -> int:
        """Return the number of steps that were seen to end."""
        for folder in self._folders():
            self._seen.update(
                name
                for name in storage.list_names(folder)
                if not name.startswith(".") and ".pending." not in name
            )
        if self.stage == "train":
            return sum(name.startswith("checkpoint_") for name in self._seen)
        return len(self._seen)

    def _folders(self) -> list[str]:
        table, inner = {
            "label": ("region_scores-", "checkpoint"),
            "train": ("student-", "ray_train"),
            "sweep": ("sweep-", "trials"),
        }[self.stage]
        stages = [n for n in storage.list_names(self.run_dir) if n.startswith(table)]
        folders = [storage.join(self.run_dir, name, inner) for name in stages]
        if self.stage != "train":
            return folders
        return [
            storage.join(folder, name)
            for folder in folders
            for name in storage.list_names(folder)
            if name.startswith("train-")
        ]


def await_moment(scene: Scene, steps: int, seconds: float) -> None:
    """Wait until a stage has made so many steps, and some seconds more."""
    progress = Progress(scene.stage, scene.run_dir)
    deadline = time.monotonic() + 200
    while progress.steps() < steps:
        assert scene.driver.running, f"it ended before its moment:\n{scene.driver.output}"
        assert time.monotonic() < deadline, f"no {steps} steps in time:\n{scene.driver.output}"
        time.sleep(0.05)
    time.sleep(seconds)
    assert scene.driver.running, f"it ended before its moment:\n{scene.driver.output}"
