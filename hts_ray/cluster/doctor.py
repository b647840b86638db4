"""Whether this machine, and every node of a cluster, can run the stages; what to change if not.

Facts are gathered by one function that runs here or, through Ray, on every node, and judged by
functions without Ray. A `problem` would stop a run; a `warning` would make it slow, fragile or
open to others.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click
from rich.markup import escape

import hts_ray
from hts_ray.config import HtsConfig
from hts_ray.engine.console import console
from hts_ray.engine.room import (
    Cluster,
    check_paths,
    check_room,
    demands,
    joined_cluster,
    worker_paths,
)
from hts_ray.errors import ConfigError, UserError
from hts_ray.store import storage
from hts_ray.store.provenance import command_output

Level = Literal["ok", "warning", "problem"]

_DISTRIBUTION = "hts-ray"
_GIB = 1 << 30
# Other versions on another node pickle, score or write differently.
_SAME_EVERYWHERE = (
    "hts_ray",
    "ray",
    "torch",
    "transformers",
    "open_clip_torch",
    "pyarrow",
    "numpy",
)
_BREAKS_IF_OTHER = {"python", "hts_ray", "ray"}
_DISK_FULL = 0.95  # where Ray stops to start tasks
_LITTLE_DISK_GIB = 10.0
_FEW_FILES, _ENOUGH_FILES = 1024, 8192
_SKEW_WARNING_S, _SKEW_PROBLEM_S = 2.0, 300.0  # S3 refuses requests 15 minutes off
_SMALL_STORE_GIB = 1.0
_SLOW_STORAGE_S = 2.0
_NODE_TIMEOUT_S = 180.0
_PROBE_FOLDER = ".hts-doctor"


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, what was found, what to change."""

    check: str
    level: Level
    found: str
    remedy: str = ""


def examine(config: HtsConfig) -> list[Finding]:
    """Examine this machine or, when an address is set, the cluster behind it.

    Raises UserError when the cluster cannot be joined.
    """
    probe, names = probe_path(config.run_dir), [name for name, _ in _requirements()]
    if not (config.ray.address or os.environ.get("RAY_ADDRESS")):
        facts = [node_facts(probe, names)]
        return [*_judge_versions(facts), *judge_nodes(facts, config), judge_auth(facts, False)]
    from hts_ray.engine.session import ray_cluster

    with ray_cluster(config.ray), _mark(probe):
        return _examine_cluster(config, probe, names)


@contextlib.contextmanager
def _mark(probe: str) -> Iterator[None]:
    """Leave a file for the nodes to find, as far as storage lets this machine."""
    kept = _existing_folder(probe)
    with contextlib.suppress(OSError, UserError):
        storage.write_bytes(probe, b"hts doctor")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, UserError):
            storage.delete_file(probe)
        if kept is not None:
            _remove_empty_folders(Path(storage.resolve(probe)[1]).parent, Path(kept))


def _examine_cluster(config: HtsConfig, probe: str, names: Sequence[str]) -> list[Finding]:
    import ray

    cluster = joined_cluster(config.ray)
    facts, silent = _facts_of_all_nodes(probe, names)
    url = ray._private.worker.global_worker.node.address_info.get("webui_url")
    return [
        Finding("cluster", "ok", f"{cluster}{', autoscaling' if cluster.autoscaling else ''}"),
        *silent,
        *_judge_versions(facts),
        *judge_nodes(facts, config),
        *judge_clocks(facts),
        *_judge_cluster_fit(cluster, config),
        judge_auth(facts, cluster.several_hosts),
        judge_dashboard(url),
    ]


def _facts_of_all_nodes(
    probe: str, names: Sequence[str]
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Gather the facts of every live node at the same time, and name those that do not answer."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    pending = [_on_node(node["NodeID"], node_facts).remote(probe, names) for node in nodes]
    facts, silent = [], []
    deadline = time.monotonic() + _NODE_TIMEOUT_S
    for node, reference in zip(nodes, pending, strict=True):
        try:
            answer = ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
            skew = _clock_skew(node["NodeID"])
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            silent.append(
                Finding(
                    f"node {node['NodeManagerHostname']}",
                    "problem",
                    f"no answer in {_NODE_TIMEOUT_S:g} s: {reason}",
                    "look at its raylet's log, and at what runs on it; restart Ray there",
                )
            )
            continue
        resources = node["Resources"]
        answer["object_store"] = resources.get("object_store_memory", 0.0)
        answer["logical_gpus"] = resources.get("GPU", 0.0)
        facts.append({**answer, "clock_skew": skew})
    return facts, silent


def _on_node(node_id: str, function: Callable[..., Any]) -> Any:
    """Return a remote function that runs on one node and takes no CPU from anything."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=here)


def _clock_skew(node_id: str) -> float:
    """Return by how many seconds a node's clock is surely ahead of this one, or behind (< 0)."""
    import ray

    sent = time.time()
    there: float = ray.get(_on_node(node_id, _now).remote(), timeout=_NODE_TIMEOUT_S)
    received = time.time()
    return max(0.0, there - received) + min(0.0, there - sent)


def _now() -> float:
    return time.time()


# ---- what a node tells of itself; runs anywhere, needs no Ray


def node_facts(probe: str, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return what one machine tells of itself, JSON-able, sizes in bytes.

    `probe` is a file that the driver may have written, and whose namesakes are written and removed;
    `names` are the packages whose versions are asked for.
    """
    folder = _existing_folder(probe)
    return {
        "host": socket.gethostname(),
        "versions": _versions(names),
        "gpus": _gpus(),
        "torch": _torch_facts(),
        "shm": _space("/dev/shm"),  # noqa: S108
        "temporary": _space(_ray_temporary()),
        "temporary_path": _ray_temporary(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "auth_mode": os.environ.get("RAY_AUTH_MODE"),
        "token": _token_facts(),
        "run_dir": None if folder is None else _space(folder),
        "storage": probe_storage(probe),
        "sees_driver": _sees(probe),
        "object_store": None,
        "logical_gpus": None,
    }


def _versions(names: Sequence[str]) -> dict[str, str | None]:
    # Of this package what runs, which a job may have brought, and not what is installed.
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "hts_ray": hts_ray.__version__,
    }
    for name in sorted({*names, *_SAME_EVERYWHERE} - found.keys()):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _requirements() -> list[tuple[str, Any]]:
    """Return (name, versions that are supported) of what this package needs."""
    from packaging.requirements import Requirement

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
        wanted = [Requirement(line) for line in lines]
        return [
            (item.name, item.specifier)
            for item in wanted
            if item.marker is None or item.marker.evaluate({"extra": ""})
        ]
    return []


def _gpus() -> list[dict[str, str]]:
    """Return name, memory and driver of the GPUs that the driver sees, and the newest CUDA."""
    listed = command_output(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    )
    if not listed:
        return []
    newest = re.search(r"CUDA Version:\s*([\d.]+)", command_output(["nvidia-smi"]) or "")
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines()]
    return [
        {
            "name": row[0], "memory": row[1], "driver": row[2],
            "cuda": newest.group(1) if newest else "",
        }
        for row in rows
        if len(row) == 3
    ]  # fmt: skip


def _torch_facts() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a CUDA library that does not load
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {
        "cuda_build": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }


def _ray_temporary() -> str:
    return os.environ.get("RAY_TMPDIR") or os.path.join(
        os.environ.get("TMPDIR", "/tmp"),  # noqa: S108
        "ray",
    )


def _existing_folder(path: str) -> str | None:
    """Return the nearest folder above a local path that exists; None for a remote one."""
    if storage.is_remote(path):
        return None
    return next((str(p) for p in Path(storage.resolve(path)[1]).parents if p.is_dir()), None)


def _space(path: str) -> tuple[int, int] | None:
    """Return (total, free) bytes of the file system that a path is or will be on."""
    place = next((p for p in (Path(path), *Path(path).parents) if p.exists()), None)
    if place is None:
        return None
    usage = shutil.disk_usage(place)
    return usage.total, usage.free


def _token_facts() -> dict[str, Any]:
    """Return where a token would come from, and whether others may read its file."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return {"source": "RAY_AUTH_TOKEN", "open": False}
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    try:
        mode = path.stat().st_mode
    except OSError:
        return {"source": None, "open": False}
    return {"source": str(path), "open": bool(mode & (stat.S_IRWXG | stat.S_IRWXO))}


def probe_path(run_dir: str) -> str:
    """Return a new file's path below a run directory."""
    return storage.join(storage.absolute(run_dir), _PROBE_FOLDER, uuid.uuid4().hex)


def probe_storage(probe: str) -> dict[str, Any]:
    """Write, read and remove a file; returns the seconds, or the error and the step it came in.

    Folders that were made for it are removed again where they are local.
    """
    path = f"{probe}-{socket.gethostname()}-{os.getpid()}"
    kept = _existing_folder(path)
    started, step = time.monotonic(), "write"
    try:
        storage.write_bytes(path, b"hts doctor")
        step = "read"
        if storage.read_bytes(path) != b"hts doctor":
            return {"step": step, "error": "other bytes came back"}
        step = "delete"
        storage.delete_file(path)
    except (OSError, UserError) as error:
        reason = str(error).replace(path, "it") or type(error).__name__
        return {"step": step, "error": reason.removeprefix("it: ")}
    finally:
        if kept is not None:
            _remove_empty_folders(Path(storage.resolve(path)[1]).parent, Path(kept))
    return {"seconds": time.monotonic() - started}


def _sees(path: str) -> bool:
    with contextlib.suppress(OSError, UserError):
        return storage.exists(path)
    return False


def _remove_empty_folders(folder: Path, kept: Path) -> None:
    with contextlib.suppress(OSError):  # another node's probe is in it
        while folder != kept and kept in folder.parents:
            folder.rmdir()
            folder = folder.parent


# ---- judgement of the facts


def _judge_versions(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    findings = [_judge_python(facts)]
    for name, supported in _requirements():
        findings.append(_judge_package(name, supported, facts))
    bad = [finding for finding in findings if finding.level != "ok"]
    good = len(findings) - len(bad)
    shown = (
        ", ".join(
            f"{name} {facts[0]['versions'].get(name)}"
            for name in ("python", "ray", "torch", "transformers", "pyarrow")
        )
        if facts
        else ""
    )
    fine = Finding("versions", "ok", f"{shown}; {good} packages are as they should be")
    return [*([fine] if good and facts else []), *bad, *judge_same(facts)]


def _judge_python(facts: Sequence[Mapping[str, Any]]) -> Finding:
    from packaging.specifiers import SpecifierSet

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        wanted = SpecifierSet(
            importlib.metadata.metadata(_DISTRIBUTION)["Requires-Python"] or ">=3.10"
        )
        return _judge_package("python", wanted, facts)
    return Finding("python", "warning", f"{_DISTRIBUTION} is not installed", "pip install it")


def _judge_package(name: str, supported: Any, facts: Sequence[Mapping[str, Any]]) -> Finding:
    for fact in facts:
        version = fact["versions"].get(name)
        if version is None:
            return Finding(
                name,
                "problem",
                f"not installed on {fact['host']}",
                f"install {name}{supported} there, or use one image for all nodes",
            )
        if not supported.contains(version, prereleases=True):
            return Finding(
                name,
                "problem",
                f"{version} on {fact['host']}, supported is {supported}",
                f"install {name}{supported}",
            )
    return Finding(name, "ok", str(facts[0]["versions"].get(name)) if facts else "")


def judge_same(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Compare the versions of all nodes with the first one's."""
    findings = []
    for name in ("python", *_SAME_EVERYWHERE):
        by_version: dict[str, list[str]] = {}
        for fact in facts:
            version = fact["versions"].get(name)
            if version is not None:
                by_version.setdefault(version, []).append(fact["host"])
        if len(by_version) > 1:
            told = "; ".join(
                f"{version} on {_hosts(hosts)}" for version, hosts in by_version.items()
            )
            findings.append(
                Finding(
                    f"{name} everywhere",
                    "problem" if name in _BREAKS_IF_OTHER else "warning",
                    told,
                    "use the same image or constraints.txt on all nodes",
                )
            )
    return findings


def judge_nodes(facts: Sequence[Mapping[str, Any]], config: HtsConfig) -> list[Finding]:
    """Judge GPUs, object store, disks, storage and limits; nodes that agree share a line."""
    judges: tuple[Callable[[Mapping[str, Any], HtsConfig], Finding], ...] = (
        judge_gpu,
        judge_object_store,
        judge_disk,
        judge_storage,
        judge_open_files,
    )
    findings = []
    for judge in judges:
        found = [(fact["host"], judge(fact, config)) for fact in facts]
        for finding in dict.fromkeys(finding for _, finding in found):
            hosts = [host for host, other in found if other == finding]
            where = f" ({_hosts(hosts)})" if len(facts) > 1 else ""
            findings.append(
                Finding(finding.check, finding.level, finding.found + where, finding.remedy)
            )
    return findings


def _hosts(hosts: Sequence[str]) -> str:
    named = list(dict.fromkeys(hosts))
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def _wants_gpu(config: HtsConfig) -> str | None:
    """Return the setting that asks for a GPU, if one does."""
    if config.label.pool.num_gpus:
        return "label.pool.num_gpus"
    if config.train.use_gpu:
        return "train.use_gpu"
    return "predict.pool.num_gpus" if config.predict.pool.num_gpus else None


def judge_gpu(fact: Mapping[str, Any], config: HtsConfig) -> Finding:
    """Judge what nvidia-smi and torch see of a node's GPUs against what the settings want."""
    gpus, torch, logical = fact["gpus"], fact["torch"], fact["logical_gpus"]
    setting = _wants_gpu(config)
    if "error" in torch:
        told = f"torch does not load: {torch['error']}"
        return Finding(
            "gpu", "problem", told, "install it again, its version as in constraints.txt"
        )
    if not gpus and not logical:
        # On a cluster, nodes without GPUs are for the rest of the work.
        if setting is None or logical is not None:
            return Finding("gpu", "ok", "none")
        off = "false" if setting == "train.use_gpu" else "0"
        remedy = f"set it to {off}, or use a machine with an NVIDIA GPU and driver"
        return Finding("gpu", "problem", f"none, and {setting} asks for one", remedy)
    seen = _seen_gpus(gpus, logical)
    trouble = _torch_trouble(gpus, torch)
    if trouble is None:
        return Finding("gpu", "ok", f"{seen}; torch for CUDA {torch['cuda_build']} uses them")
    return Finding("gpu", "problem" if setting else "warning", f"{seen}; {trouble[0]}", trouble[1])


def _seen_gpus(gpus: Sequence[Mapping[str, str]], logical: float | None) -> str:
    if not gpus:
        return f"Ray counts {logical:g}, nvidia-smi finds none"
    names = ", ".join(sorted({f"{gpu['name']} {gpu['memory']}" for gpu in gpus}))
    return f"{len(gpus)} x {names}, driver {gpus[0]['driver']} (CUDA {gpus[0]['cuda'] or '?'})"


def _torch_trouble(
    gpus: Sequence[Mapping[str, str]], torch: Mapping[str, Any]
) -> tuple[str, str] | None:
    """Return why torch does not use the GPUs and what to do, None where it does."""
    build = torch["cuda_build"]
    if build is None:
        return "torch is a CPU build", "install its CUDA build (make install TORCH_BACKEND=auto)"
    if not torch["available"]:
        remedy = _driver_remedy(build, gpus[0]["cuda"] if gpus else "")
        return f"torch for CUDA {build} cannot use them", remedy
    if torch["devices"] < len(gpus):
        remedy = "look at CUDA_VISIBLE_DEVICES, and at what else holds GPUs"
        return f"torch sees {torch['devices']}", remedy
    return None


def _driver_remedy(build: str, driver: str) -> str:
    if driver and _numbers(driver)[0] < _numbers(build)[0]:
        return (
            f"the driver knows CUDA up to {driver}: update it, or install torch built for CUDA"
            f" {driver.partition('.')[0]} (make install TORCH_BACKEND=auto)"
        )
    return "look at CUDA_VISIBLE_DEVICES, at /dev/nvidia*, and run nvidia-smi on the node"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)] or [0]


def judge_object_store(fact: Mapping[str, Any], _config: HtsConfig) -> Finding:
    """Judge Ray's shared memory: what it has, or what it would have here."""
    shm, store = fact["shm"], fact["object_store"]
    if shm is None:
        return Finding("object store", "ok", "no /dev/shm on this system")
    if store is None:
        # Ray takes 30 % of the memory, but no more than fits into 95 % of /dev/shm.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        store = min(0.3 * memory, 0.95 * shm[1])
    size = f"{_gib(store)} of {_gib(shm[0])} GiB /dev/shm"
    grow = "give containers more shared memory: docker run --shm-size=8g, or an emptyDir volume of\
 medium Memory at /dev/shm"
    if store > shm[0]:
        return Finding("object store", "warning", f"{size}: part of it lies on the disk", grow)
    if store < _SMALL_STORE_GIB * _GIB:
        return Finding("object store", "warning", f"{size}: images will spill to the disk", grow)
    return Finding("object store", "ok", size)


def judge_disk(fact: Mapping[str, Any], _config: HtsConfig) -> Finding:
    """Judge the disks of Ray's temporary files and of a local run directory."""
    places = {f"Ray's {fact['temporary_path']}": fact["temporary"], "run_dir": fact["run_dir"]}
    told, remedy = [], ""
    level: Level = "ok"
    for name, space in places.items():
        if space is None:
            continue
        total, free = space
        told.append(f"{name}: {_gib(free)} of {_gib(total)} GiB free")
        if total and 1 - free / total > _DISK_FULL:
            level = "problem"
            remedy = f"free some: above {_DISK_FULL:.0%} Ray starts no task; or set RAY_TMPDIR"
        elif free < _LITTLE_DISK_GIB * _GIB and level == "ok":
            level, remedy = "warning", f"have {_LITTLE_DISK_GIB:g} GiB free"
    return Finding("disk", level, "; ".join(told) or "unknown", remedy)


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}"


def judge_storage(fact: Mapping[str, Any], config: HtsConfig) -> Finding:
    """Judge the probe file under the run directory."""
    found, run_dir = fact["storage"], config.run_dir
    if "error" in found:
        return Finding(
            "storage", "problem", f"cannot {found['step']} under {run_dir}: {found['error']}",
            "" if storage.is_remote(run_dir) else "choose another run_dir, or mend its permissions",
        )  # fmt: skip
    if fact["sees_driver"] is False and fact["object_store"] is not None:
        return Finding(
            "storage", "problem", f"does not see what the driver writes under {run_dir}",
            "mount the same folder on every node, or use s3:// or gs://",
        )  # fmt: skip
    if found["seconds"] > _SLOW_STORAGE_S:
        return Finding(
            "storage", "warning", f"{run_dir}: a file takes {found['seconds']:.1f} s to write, read"
            " and delete", "use storage in the nodes' region",
        )  # fmt: skip
    return Finding("storage", "ok", f"wrote, read and deleted a file under {run_dir}")


def judge_open_files(fact: Mapping[str, Any], _config: HtsConfig) -> Finding:
    """Judge the limit of open files; Ray raises the soft one to the hard one for itself."""
    soft, hard = (math.inf if limit < 0 else limit for limit in fact["files"])
    told = f"{soft:g}, at most {hard:g}"
    remedy = "ulimit -n 65536 before `ray start` (docker run --ulimit nofile=65536:65536)"
    if hard < _FEW_FILES:
        return Finding("open files", "problem", told, remedy)
    if hard < _ENOUGH_FILES:
        return Finding("open files", "warning", told, remedy)
    return Finding("open files", "ok", told)


def judge_clocks(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Judge the nodes' clocks against this one's."""
    if not facts:
        return []
    worst = max(facts, key=lambda fact: abs(fact["clock_skew"]))
    skew = worst["clock_skew"]
    if abs(skew) <= _SKEW_WARNING_S:
        return [Finding("clocks", "ok", f"at most {abs(skew):.1f} s apart")]
    level: Level = "problem" if abs(skew) > _SKEW_PROBLEM_S else "warning"
    told = f"{worst['host']} is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}"
    return [Finding("clocks", level, told, "run NTP (chrony) on all nodes")]


def _judge_cluster_fit(cluster: Cluster, config: HtsConfig) -> Iterator[Finding]:
    """Ask what the stages would ask when they start: paths that all nodes see, and room."""
    try:
        check_paths(cluster, config.ray.shared_paths, worker_paths(config, "pipeline"))
        yield Finding("paths", "ok", "every node sees what the settings name")
    except ConfigError as error:
        yield Finding("paths", "problem", str(error))
    for stage in ("label", "train", "predict"):
        try:
            notes = check_room(cluster, demands(config, stage))
            yield Finding(
                f"room to {stage}", "warning" if notes else "ok", "; ".join(notes) or "enough"
            )
        except ConfigError as error:
            yield Finding(f"room to {stage}", "problem", str(error))


def judge_auth(facts: Sequence[Mapping[str, Any]], several_hosts: bool) -> Finding:
    """Judge the token authentication of this process: a port of Ray's runs any code it is sent."""
    if not facts:
        return Finding("authentication", "warning", "no node answered")
    mode, token = os.environ.get("RAY_AUTH_MODE"), _token_facts()
    if mode == "token" and token["source"] is None:
        return Finding(
            "authentication", "problem", "RAY_AUTH_MODE=token, and no token",
            "ray get-auth-token --generate, once; copy it to all nodes and clients",
        )  # fmt: skip
    if token["open"]:
        return Finding(
            "authentication", "warning", f"{token['source']} can be read by others",
            f"chmod 600 {token['source']}",
        )  # fmt: skip
    if mode == "token":
        return Finding("authentication", "ok", f"token from {token['source']}")
    if several_hosts or mode == "disabled":
        return Finding(
            "authentication", "warning", f"RAY_AUTH_MODE={mode or 'not set'}: whoever reaches the"
            " cluster's ports can run code on it",
            "export RAY_AUTH_MODE=token on all nodes and clients",
        )  # fmt: skip
    return Finding("authentication", "ok", "local clusters ask for a token")


def judge_dashboard(url: str | None) -> Finding:
    """Judge where the dashboard, which takes jobs, listens."""
    if not url:
        return Finding(
            "dashboard",
            "warning",
            "not running: no jobs, no metrics",
            "pip install\
 'ray[default]' on the head node",
        )
    host = url.rpartition(":")[0].strip("[]")
    if host in {"localhost", "::1"} or host.startswith("127."):
        return Finding("dashboard", "ok", f"{url}, this machine only")
    return Finding(
        "dashboard", "warning", f"{url}: open to the network, and it takes jobs",
        "ray start --head --dashboard-host=127.0.0.1, and a tunnel (ssh -L 8265:127.0.0.1:8265)",
    )  # fmt: skip


def summary(findings: Iterable[Finding]) -> dict[str, Any]:
    """Return the findings JSON-able, with how many there are of each level."""
    rows = [asdict(finding) for finding in findings]
    levels = [row["level"] for row in rows]
    return {
        "findings": rows,
        "problems": levels.count("problem"),
        "warnings": levels.count("warning"),
    }


_MARKS = {"ok": "[green]ok[/green]", "warning": "[yellow]warning[/yellow]"}
_PROBLEM = "[bold red]problem[/bold red]"


def print_findings(findings: Sequence[Finding], *, as_json: bool = False) -> int:
    """Print the report, as text or JSON, and return the exit code: 1 where there is a problem."""
    counted = summary(findings)
    if as_json:
        click.echo(json.dumps(counted, indent=2))
    else:
        for finding in findings:
            console.print(_line(finding))
        console.print(
            f"{counted['problems']} problems, {counted['warnings']} warnings"
            if counted["problems"] or counted["warnings"]
            else "nothing to change"
        )
    return 1 if counted["problems"] else 0


def _line(finding: Finding) -> str:
    mark = _MARKS.get(finding.level, _PROBLEM)
    pad = " " * (len("problem") - len(finding.level))
    line = f"{mark}{pad}  {finding.check:<15} {escape(finding.found)}"
    if finding.remedy and finding.level != "ok":
        line += f"\n{' ' * 9}[dim]->[/dim] {escape(finding.remedy)}"
    return line
