"""Whether this machine, and every node of a cluster, can run the stages; what to change if not.

Each machine reports facts (`facts.py`), here or through Ray on every node. A check judges them: a
function that returns verdicts, without Ray. A `problem` would stop a run; a `warning` would make it
slow, fragile or open to others.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import click
from rich.markup import escape

from hts_ray.cluster.facts import SAME_EVERYWHERE, node_facts, probe_file, probe_path, token_facts
from hts_ray.config import HtsConfig
from hts_ray.engine.console import console
from hts_ray.engine.devices import on_node
from hts_ray.engine.room import check_paths, check_room, demands, joined_cluster, worker_paths
from hts_ray.engine.session import ray_cluster
from hts_ray.errors import ConfigError
from hts_ray.store import storage

Level = Literal["ok", "warning", "problem"]
Facts = Mapping[str, Any]

_DISTRIBUTION = "hts-ray"
_GIB = 1 << 30
_BREAKS_IF_OTHER = {"python", "hts_ray", "ray"}
_DISK_FULL = 0.95  # where Ray stops to start tasks
_LITTLE_DISK_GIB = 10.0
_FEW_FILES, _ENOUGH_FILES = 1024, 8192
_SKEW_WARNING_S, _SKEW_PROBLEM_S = 2.0, 300.0  # S3 refuses requests 15 minutes off
_SMALL_STORE_GIB = 1.0
_SLOW_STORAGE_S = 2.0
_NODE_TIMEOUT_S = 180.0
# Those that need room on a cluster, or may name its nodes.
_STAGES = ("prepare", "label", "filter", "train", "predict", "score")


class Finding(NamedTuple):
    """How a thing is, what was found, what to change, and the check that found it."""

    level: Level
    found: str
    remedy: str = ""
    check: str = ""


def examine(config: HtsConfig) -> list[Finding]:
    """Examine this machine or, when an address is set, the cluster behind it.

    Raises UserError when the cluster cannot be joined.
    """
    probe, names = probe_path(config.run_dir), list(_requirements())
    if not (config.ray.address or os.environ.get("RAY_ADDRESS")):
        facts = [node_facts(probe, names)]
        return [
            *_judge_machines(facts, config),
            *_named({"authentication": judge_auth(several_hosts=False)}),
        ]
    with ray_cluster(config.ray), probe_file(probe):
        return _examine_cluster(config, probe, names)


def _examine_cluster(config: HtsConfig, probe: str, names: Sequence[str]) -> list[Finding]:
    import ray

    cluster = joined_cluster(config.ray)
    facts, silent = _facts_of_all_nodes(probe, names)
    url = ray.init(ignore_reinit_error=True, logging_level=logging.WARNING).dashboard_url
    found = f"{cluster}{', autoscaling' if cluster.autoscaling else ''}"
    paths, shared = worker_paths(config, "pipeline"), config.ray.shared_paths
    seen = partial(check_paths, cluster, shared, paths)
    rooms = {stage: partial(check_room, cluster, demands(config, stage)) for stage in _STAGES}
    cluster_checks = {
        "clocks": judge_clocks(facts),
        "paths": _judge_as_stages_do(seen, "every node sees what the settings name"),
        **{f"room to {s}": _judge_as_stages_do(room, "enough") for s, room in rooms.items()},
        "authentication": judge_auth(several_hosts=cluster.several_hosts),
        "dashboard": judge_dashboard(url),
    }
    return [
        Finding("ok", found, check="cluster"),
        *silent,
        *_judge_machines(facts, config),
        *_named(cluster_checks),
    ]


def _named(checks: Mapping[str, Finding]) -> list[Finding]:
    return [finding._replace(check=name) for name, finding in checks.items()]


def _facts_of_all_nodes(
    probe: str, names: Sequence[str]
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Gather the facts of every live node at the same time, and name those that do not answer."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    pending = [on_node(node["NodeID"], node_facts).remote(probe, names) for node in nodes]
    facts, silent = [], []
    deadline = time.monotonic() + _NODE_TIMEOUT_S
    for node, reference in zip(nodes, pending, strict=True):
        try:
            answer = ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
            skew = _clock_skew(node["NodeID"])
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            found = f"no answer in {_NODE_TIMEOUT_S:g} s: {reason}"
            remedy = "look at its raylet's log, and at what runs on it; restart Ray there"
            name = f"node {node['NodeManagerHostname']}"
            silent.append(Finding("problem", found, remedy, name))
            continue
        answer["object_store"] = node["Resources"].get("object_store_memory", 0.0)
        answer["logical_gpus"] = node["Resources"].get("GPU", 0.0)
        facts.append({**answer, "clock_skew": skew})
    return facts, silent


def _clock_skew(node_id: str) -> float:
    """Return by how many seconds a node's clock is surely ahead of this one, or behind (< 0)."""
    import ray

    sent = time.time()
    there: float = ray.get(on_node(node_id, _now).remote(), timeout=_NODE_TIMEOUT_S)
    received = time.time()
    return max(0.0, there - received) + min(0.0, there - sent)


def _now() -> float:
    return time.time()


def _requirements() -> dict[str, Any]:
    """Return the supported versions of Python and of every package that this one needs."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return {}
    wanted = [Requirement(line) for line in distribution.requires or []]
    needed = {
        item.name: item.specifier
        for item in wanted
        if item.marker is None or item.marker.evaluate({"extra": ""})
    }
    return {"python": SpecifierSet(distribution.metadata["Requires-Python"] or ""), **needed}


def _judge_machines(facts: Sequence[Facts], config: HtsConfig) -> list[Finding]:
    """Make every check of versions and machines; nodes with the same verdict share a line."""
    findings = list(_judge_versions(facts))
    for name, check in _MACHINE_CHECKS.items():
        hosts: defaultdict[Finding, list[str]] = defaultdict(list)
        for fact in facts:
            hosts[check(fact, config)].append(fact["host"])
        for finding, where in hosts.items():
            shown = f" ({_hosts(where)})" if len(facts) > 1 else ""
            findings.append(finding._replace(found=finding.found + shown, check=name))
    return findings


def _hosts(hosts: Sequence[str]) -> str:
    named = list(dict.fromkeys(hosts))
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def _judge_versions(facts: Sequence[Facts]) -> Iterator[Finding]:
    requirements = _requirements()
    if not requirements:
        yield Finding("warning", f"{_DISTRIBUTION} is not installed", "pip install it", "python")
    judged = {
        name: judge_package(name, requirements.get(name), facts)
        for name in dict.fromkeys(["python", *SAME_EVERYWHERE, *requirements])
    }
    good = [name for name, finding in judged.items() if finding.level == "ok"]
    if good and facts:
        shown = ("python", "ray", "torch", "transformers", "pyarrow")
        versions = ", ".join(f"{name} {facts[0]['versions'].get(name)}" for name in shown)
        found = f"{versions}; {len(good)} packages are as they should be"
        yield Finding("ok", found, check="versions")
    yield from _named({name: found for name, found in judged.items() if found.level != "ok"})


def judge_package(name: str, supported: Any, facts: Sequence[Facts]) -> Finding:
    """Judge a package's versions: installed and supported on every node, and the same on all."""
    hosts: defaultdict[str, list[str]] = defaultdict(list)
    for fact in facts:
        hosts[fact["versions"].get(name) or ""].append(fact["host"])
    if "" in hosts and supported is not None:
        remedy = f"install {name}{supported} there, or use one image for all nodes"
        return Finding("problem", f"not installed on {_hosts(hosts[''])}", remedy)
    told = "; ".join(f"{version or 'none'} on {_hosts(where)}" for version, where in hosts.items())
    versions = [version for version in hosts if version]
    if supported is not None and not all(supported.contains(v, prereleases=True) for v in versions):
        found = f"{told}, supported is {supported}"
        return Finding("problem", found, f"install {name}{supported}")
    if len(versions) > 1 and name in {"python", *SAME_EVERYWHERE}:
        level: Level = "problem" if name in _BREAKS_IF_OTHER else "warning"
        return Finding(level, told, "use the same image or constraints.txt on all nodes")
    return Finding("ok", told)


def _wants_gpu(config: HtsConfig) -> str | None:
    """Return the setting that asks for a GPU, if one does."""
    wanted = {
        "label.pool.num_gpus": config.label.pool.gpus,
        "train.use_gpu": config.train.gpu,
        "predict.pool.num_gpus": config.predict.pool.gpus,
    }
    return next((name for name, value in wanted.items() if value), None)


def judge_gpu(fact: Facts, config: HtsConfig) -> Finding:
    """Judge what nvidia-smi and torch see of a node's GPUs against what the settings want."""
    gpus, torch, logical = fact["gpus"], fact["torch"], fact["logical_gpus"]
    setting = _wants_gpu(config)
    if "error" in torch:
        remedy = "install it again, its version as in constraints.txt"
        return Finding("problem", f"torch does not load: {torch['error']}", remedy)
    if not gpus and not logical:
        # On a cluster, nodes without GPUs are for the rest of the work.
        if setting is None or logical is not None:
            return Finding("ok", "none")
        off = "false" if setting == "train.use_gpu" else "0"
        remedy = f"set it to {off}, or use a machine with an NVIDIA GPU and driver"
        return Finding("problem", f"none, and {setting} asks for one", remedy)
    if gpus:
        names = ", ".join(sorted({f"{gpu['name']} {gpu['memory']}" for gpu in gpus}))
        driver = f"driver {gpus[0]['driver']} (CUDA {gpus[0]['cuda'] or '?'})"
        seen = f"{len(gpus)} x {names}, {driver}"
    else:
        seen = f"Ray counts {logical:g}, nvidia-smi finds none"
    trouble = _torch_trouble(gpus, torch)
    if trouble is None:
        return Finding("ok", f"{seen}; torch for CUDA {torch['cuda_build']} uses them")
    return Finding("problem" if setting else "warning", f"{seen}; {trouble[0]}", trouble[1])


def _torch_trouble(gpus: Sequence[Mapping[str, str]], torch: Facts) -> tuple[str, str] | None:
    """Return why torch does not use the GPUs and what to do, None where it does."""
    build = torch["cuda_build"]
    if build is None:
        return "torch is a CPU build", "install its CUDA build (make install TORCH_BACKEND=auto)"
    if not torch["available"]:
        driver = gpus[0]["cuda"] if gpus else ""
        remedy = "look at CUDA_VISIBLE_DEVICES, at /dev/nvidia*, and run nvidia-smi on the node"
        if driver and _major(driver) < _major(build):
            remedy = (
                f"the driver knows CUDA up to {driver}: update it, or install torch built for CUDA"
                f" {_major(driver)} (make install TORCH_BACKEND=auto)"
            )
        return f"torch for CUDA {build} cannot use them", remedy
    if torch["devices"] < len(gpus):
        remedy = "look at CUDA_VISIBLE_DEVICES, and at what else holds GPUs"
        return f"torch sees {torch['devices']}", remedy
    return None


def _major(version: str) -> int:
    return int(re.sub(r"\D.*", "", version) or 0)


def judge_object_store(fact: Facts, _config: HtsConfig) -> Finding:
    """Judge Ray's shared memory: what it has, or what it would have here."""
    shm, store = fact["shm"], fact["object_store"]
    if shm is None:
        return Finding("ok", "no /dev/shm on this system")
    if store is None:
        # Ray takes 30 % of the memory, but no more than fits into 95 % of /dev/shm.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        store = min(0.3 * memory, 0.95 * shm[1])
    size = f"{_gib(store)} of {_gib(shm[0])} GiB /dev/shm"
    grow = (
        "give containers more shared memory: docker run --shm-size=8g, or an emptyDir volume of"
        " medium Memory at /dev/shm"
    )
    if store > shm[0]:
        return Finding("warning", f"{size}: part of it lies on the disk", grow)
    if store < _SMALL_STORE_GIB * _GIB:
        return Finding("warning", f"{size}: images will spill to the disk", grow)
    return Finding("ok", size)


def judge_disk(fact: Facts, _config: HtsConfig) -> Finding:
    """Judge the disks of Ray's temporary files and of a local run directory."""
    places = {f"Ray's {fact['temporary_path']}": fact["temporary"], "run_dir": fact["run_dir"]}
    known = {name: space for name, space in places.items() if space is not None}
    found = "; ".join(
        f"{name}: {_gib(free)} of {_gib(total)} GiB free" for name, (total, free) in known.items()
    )
    if any(total and 1 - free / total > _DISK_FULL for total, free in known.values()):
        remedy = f"free some: above {_DISK_FULL:.0%} Ray starts no task; or set RAY_TMPDIR"
        return Finding("problem", found, remedy)
    if any(free < _LITTLE_DISK_GIB * _GIB for _, free in known.values()):
        return Finding("warning", found, f"have {_LITTLE_DISK_GIB:g} GiB free")
    return Finding("ok", found or "unknown")


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}"


def judge_storage(fact: Facts, config: HtsConfig) -> Finding:
    """Judge the probe file under the run directory."""
    probed, run_dir = fact["storage"], config.run_dir
    if "error" in probed:
        local = "choose another run_dir, or mend its permissions"
        found = f"cannot {probed['step']} under {run_dir}: {probed['error']}"
        return Finding("problem", found, "" if storage.is_remote(run_dir) else local)
    if fact["sees_driver"] is False and fact["object_store"] is not None:
        found = f"does not see what the driver writes under {run_dir}"
        return Finding(
            "problem", found, "mount the same folder on every node, or use s3:// or gs://"
        )
    if probed["seconds"] > _SLOW_STORAGE_S:
        found = f"{run_dir}: a file takes {probed['seconds']:.1f} s to write, read and delete"
        return Finding("warning", found, "use storage in the nodes' region")
    return Finding("ok", f"wrote, read and deleted a file under {run_dir}")


def judge_open_files(fact: Facts, _config: HtsConfig) -> Finding:
    """Judge the limit of open files; Ray raises the soft one to the hard one for itself."""
    soft, hard = (math.inf if limit < 0 else limit for limit in fact["files"])
    found = f"{soft:g}, at most {hard:g}"
    if hard >= _ENOUGH_FILES:
        return Finding("ok", found)
    remedy = "ulimit -n 65536 before `ray start` (docker run --ulimit nofile=65536:65536)"
    return Finding("problem" if hard < _FEW_FILES else "warning", found, remedy)


_MACHINE_CHECKS: dict[str, Callable[[Facts, HtsConfig], Finding]] = {
    "gpu": judge_gpu,
    "object store": judge_object_store,
    "disk": judge_disk,
    "storage": judge_storage,
    "open files": judge_open_files,
}


def judge_clocks(facts: Sequence[Facts]) -> Finding:
    """Judge the nodes' clocks against this one's."""
    if not facts:
        return Finding("warning", "no node answered")
    worst = max(facts, key=lambda fact: abs(fact["clock_skew"]))
    skew = worst["clock_skew"]
    if abs(skew) <= _SKEW_WARNING_S:
        return Finding("ok", f"at most {abs(skew):.1f} s apart")
    found = f"{worst['host']} is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}"
    level: Level = "problem" if abs(skew) > _SKEW_PROBLEM_S else "warning"
    return Finding(level, found, "run NTP (chrony) on all nodes")


def _judge_as_stages_do(check: Callable[[], Sequence[str] | None], fine: str) -> Finding:
    """Judge by a check that every stage makes first."""
    try:
        notes = check() or ()
    except ConfigError as error:
        return Finding("problem", str(error))
    return Finding("warning" if notes else "ok", "; ".join(notes) or fine)


def judge_auth(*, several_hosts: bool) -> Finding:
    """Judge the token of this process: whoever reaches a port of Ray's can run any code."""
    mode, token = os.environ.get("RAY_AUTH_MODE"), token_facts()
    if mode == "token" and token["source"] is None:
        remedy = "ray get-auth-token --generate, once; copy it to all nodes and clients"
        return Finding("problem", "RAY_AUTH_MODE=token, and no token", remedy)
    if token["open"]:
        found = f"{token['source']} can be read by others"
        return Finding("warning", found, f"chmod 600 {token['source']}")
    if mode == "token":
        return Finding("ok", f"token from {token['source']}")
    if several_hosts or mode == "disabled":
        state = f"RAY_AUTH_MODE={mode or 'not set'}"
        found = f"{state}: whoever reaches the cluster's ports can run code on it"
        return Finding("warning", found, "export RAY_AUTH_MODE=token on all nodes and clients")
    return Finding("ok", "local clusters ask for a token")


def judge_dashboard(url: str | None) -> Finding:
    """Judge where the dashboard, which takes jobs, listens."""
    if not url:
        remedy = "pip install 'ray[default]' on the head node"
        return Finding("warning", "not running: no jobs, no metrics", remedy)
    host = url.rpartition(":")[0].strip("[]")
    if host in {"localhost", "::1"} or host.startswith("127."):
        return Finding("ok", f"{url}, this machine only")
    tunnel = "a tunnel (ssh -L 8265:127.0.0.1:8265)"
    remedy = f"ray start --head --dashboard-host=127.0.0.1, and {tunnel}"
    return Finding("warning", f"{url}: open to the network, and it takes jobs", remedy)


_MARKS = {
    "ok": "[green]ok[/green]     ",
    "warning": "[yellow]warning[/yellow]",
    "problem": "[bold red]problem[/bold red]",
}


def print_findings(findings: Sequence[Finding], *, as_json: bool = False) -> int:
    """Print the report, as text or JSON, and return the exit code: 1 where there is a problem."""
    levels = [finding.level for finding in findings]
    problems, warnings = levels.count("problem"), levels.count("warning")
    if as_json:
        rows = [{"check": finding.check, **finding._asdict()} for finding in findings]
        report = {"findings": rows, "problems": problems, "warnings": warnings}
        click.echo(json.dumps(report, indent=2))
        return 1 if problems else 0
    for finding in findings:
        console.print(f"{_MARKS[finding.level]}  {finding.check:<15} {escape(finding.found)}")
        if finding.remedy and finding.level != "ok":
            console.print(f"{' ' * 9}[dim]->[/dim] {escape(finding.remedy)}")
    counted = f"{problems} problems, {warnings} warnings"
    console.print(counted if problems or warnings else "nothing to change")
    return 1 if problems else 0
