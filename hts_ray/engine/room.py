"""What a cluster must have before a stage starts on it: paths that its nodes see, and room.

A missing folder fails late, on a worker of another node, and Ray waits in silence for resources
that never come. Both are reported here in figures: by the client before a job is submitted, and by
the driver before a stage starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import HtsConfig, PoolConfig, RayConfig, TrainConfig
from hts_ray.engine.compat import autoscaler_status
from hts_ray.errors import ConfigError
from hts_ray.images.manifest import Manifest
from hts_ray.store import storage

# Tasks that must find a CPU while all actors of a pool hold theirs: reading, decoding, and the
# filter of a resumed run. Without them Ray waits for ever.
CPUS_BESIDE = 3
# A label that KubeRay, the cluster launcher and autoscalers set.
_NODE_GROUP = "ray.io/node-group"
_ANONYMOUS_NODE = "node_"  # Ray's prefix for nodes that were started by hand
_GIB = 1 << 30


@dataclass(frozen=True)
class Node:
    """A live node: its address and what it has in all (`CPU`, `GPU`, `memory` in bytes, ...)."""

    host: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Cluster:
    """The nodes of a cluster, and whether it adds more on demand."""

    nodes: tuple[Node, ...]
    autoscaling: bool

    @property
    def several_hosts(self) -> bool:
        """Whether workers may run on another machine than the driver."""
        return self.autoscaling or len({node.host for node in self.nodes}) > 1

    def total(self, resource: str) -> float:
        """How much of a resource all nodes have together."""
        return sum(node.resources.get(resource, 0.0) for node in self.nodes)

    def __str__(self) -> str:
        cpus, gpus = _count(self.total("CPU"), "CPU"), _count(self.total("GPU"), "GPU")
        return f"{_count(len(self.nodes), 'node')} with {cpus} and {gpus}"

    @classmethod
    def of_nodes(
        cls,
        nodes: Iterable[Mapping[str, Any]],
        config: RayConfig,
        status: str | bytes | None = None,
    ) -> Cluster:
        """Make a cluster from Ray's rows of live nodes: `host`, `resources`, `labels`.

        `status` is the autoscaler's report, if there is one (JSON). Whether the cluster scales is
        derived from both, unless `ray.autoscaling` is set.
        """
        rows = list(nodes)
        found = config.autoscaling
        if found is None:
            grouped = any(_NODE_GROUP in (row.get("labels") or {}) for row in rows)
            found = grouped or _reports_node_types(status)
        return cls(tuple(Node(row["host"], dict(row["resources"])) for row in rows), found)


def _count(number: float, name: str) -> str:
    return f"{number:g} {name}{'' if number == 1 else 's'}"


def _reports_node_types(status: str | bytes | None) -> bool:
    """Return whether an autoscaler's report knows nodes by a type that somebody gave them."""
    try:
        active = json.loads(status or "{}")["autoscaler_report"]["active_nodes"]
    except (ValueError, KeyError, TypeError):
        return False
    return any(not name.startswith(_ANONYMOUS_NODE) for name in active)


def joined_cluster(config: RayConfig) -> Cluster:
    """Return the cluster that this process has joined."""
    import ray

    rows = [
        {
            "host": node["NodeManagerAddress"],
            "resources": node.get("Resources", {}),
            "labels": node.get("Labels", {}),
        }
        for node in ray.nodes()
        if node["Alive"]
    ]
    return Cluster.of_nodes(rows, config, autoscaler_status())


@dataclass(frozen=True)
class Demand:
    """What must run at the same time for a stage to go on: equal workers, and tasks beside them.

    `setting` is the field to lower; `memory` is in bytes.
    """

    setting: str
    workers: int
    cpus: float
    gpus: float = 0.0
    memory: float = 0.0
    beside: int = CPUS_BESIDE

    def room(self, cluster: Cluster) -> int:
        """How many of the workers the cluster's nodes hold, were they empty."""
        needed = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        if not any(needed.values()):
            return self.workers
        held = 0
        for node in cluster.nodes:
            # Fractions of a GPU add up with rounding.
            held += int(min(node.resources.get(n, 0.0) / a + 1e-9 for n, a in needed.items() if a))
        return held

    def worker(self) -> str:
        """What one worker takes, in words."""
        parts = [f"{self.cpus:g} CPU"] if self.cpus else []
        parts += [f"{self.gpus:g} GPU"] if self.gpus else []
        parts += [f"{self.memory / _GIB:g} GiB"] if self.memory else []
        return " + ".join(parts) or "nothing"


def demands(config: HtsConfig, command: str) -> list[Demand]:
    """Return what a command needs at the least; none for what runs in the driver alone."""
    train = config.train
    found = {
        "label": _actors("label.pool", config.label.pool),
        "predict": _students("predict.pool", config.predict.pool),
        "score": _students("score.pool", config.score.pool),
        "train": _students("train.features.pool", train.features.pool)
        if train.trainable == "head"
        else _trainers(train),
    }
    return [found[stage] for stage in _stages(command) if stage in found]


def _stages(command: str) -> tuple[str, ...]:
    """Return the stages that a command runs."""
    return ("label", "train", "predict") if command in {"pipeline", "demo"} else (command,)


def _actors(section: str, pool: PoolConfig) -> Demand:
    memory = (pool.memory_gib or 0.0) * _GIB
    return Demand(f"{section}.min_size", pool.min_size, pool.actor_cpus, pool.num_gpus, memory)


def _students(section: str, pool: PoolConfig) -> Demand:
    demand = _actors(section, pool)
    if pool.num_gpus:
        return demand
    # Without GPUs these are tasks, which come and go; only the filter holds its CPU.
    return Demand(f"{section}.num_cpus", 1, pool.num_cpus, 0.0, demand.memory, beside=1)


def _trainers(train: TrainConfig) -> Demand:
    if not train.num_workers:  # the driver trains
        return Demand("train.num_workers", 0, 0.0, beside=1)
    gpus = 1.0 if train.use_gpu else 0.0
    return Demand("train.num_workers", train.num_workers, train.cpus_per_worker, gpus, beside=1)


def check_room(cluster: Cluster, needed: Iterable[Demand]) -> list[str]:
    """Raise ConfigError, with figures, for what a cluster can never serve.

    On a cluster that adds nodes on demand, what is missing is returned as notes instead.
    """
    notes = []
    for demand in needed:
        lack = _lack(cluster, demand)
        if lack is None:
            continue
        if not cluster.autoscaling:
            raise ConfigError(
                f"{lack.message}: it would wait for ever",
                field=lack.field,
                value=lack.value,
                remedy=f"{lack.remedy}; if nodes come by themselves, set ray.autoscaling=true",
            )
        notes.append(f"{lack.field}={lack.value}: {lack.message}; waiting for more nodes")
    return notes


class _Lack(NamedTuple):
    field: str
    value: object
    message: str
    remedy: str


def _lack(cluster: Cluster, demand: Demand) -> _Lack | None:
    """Return what is missing and what to do about it, None when the demand can be met."""
    room, count = demand.room(cluster), demand.workers
    if room < count:
        workers = _count(count, "worker")
        message = f"{workers} of {demand.worker()} wanted, and {cluster} can hold {room}"
        section = demand.setting.rpartition(".")[0]
        if demand.gpus and not cluster.total("GPU") and section == "train":
            remedy = "add nodes with GPUs, or set it to false"
            return _Lack("train.use_gpu", True, message, remedy)
        if demand.gpus and not cluster.total("GPU"):
            remedy = "add nodes with GPUs, or set it to 0"
            return _Lack(f"{section}.num_gpus", demand.gpus, message, remedy)
        remedy = "ask for less in one worker than the largest node has, or add larger nodes"
        if room:
            remedy = f"set {demand.setting} to {room} or less, or add nodes"
        return _Lack(demand.setting, count, message, remedy)
    taken, cpus = count * demand.cpus, cluster.total("CPU")
    wanted = taken + demand.beside
    if wanted <= cpus:
        return None
    message = (
        f"the workers take {taken:g} CPUs, and reading, decoding and resuming {demand.beside}"
        f" more, {wanted:g} in all; there are {cpus:g} ({cluster})"
    )
    remedy = f"start Ray with more (logical) CPUs, `ray start --num-cpus={wanted:g}`"
    remedy += f", or set {demand.setting} to less" if count > 1 else ""
    return _Lack(demand.setting, count, message, remedy)


def is_shared(path: str, prefixes: Sequence[str]) -> bool:
    """Return whether every node sees a path: a remote one, or one below a shared folder."""
    if storage.is_remote(path):
        return True
    place = Path(storage.resolve(path)[1])
    return any(place.is_relative_to(storage.resolve(prefix)[1]) for prefix in prefixes)


def check_paths(cluster: Cluster, shared: Sequence[str], paths: Iterable[tuple[str, str]]) -> None:
    """Raise ConfigError for the first of (field, path) that only one machine of several has."""
    if not cluster.several_hosts:
        return
    for field, path in paths:
        if not is_shared(path, shared):
            raise ConfigError(
                f"is a local path, and workers run on other machines too ({_machines(cluster)})",
                field=field,
                value=path,
                remedy=_shared_remedy(path),
            )


def check_uris(
    cluster: Cluster, shared: Sequence[str], column: pa.ChunkedArray, source: str
) -> None:
    """Raise ConfigError for images at paths that only one machine of several has.

    `source` names the table that the URIs are from.
    """
    uris = pc.unique(column).drop_null()
    # Only folders differ in whether they are shared; images are many.
    folders = {uri.rpartition("/")[0]: uri for uri in uris.to_pylist()}
    bad = [uri for folder, uri in folders.items() if not is_shared(folder or uri, shared)]
    if bad:
        raise ConfigError(
            f"the images of {source} are at local paths, and workers run on other machines too"
            f" ({_machines(cluster)})",
            field="uri",
            value=bad[0],
            remedy=_shared_remedy(bad[0])
            + "; `hts prepare` with the new root writes a manifest of it",
        )


def _machines(cluster: Cluster) -> str:
    hosts = len({node.host for node in cluster.nodes})
    return f"the cluster has {hosts}" + (", and adds more" if cluster.autoscaling else "")


def _shared_remedy(path: str) -> str:
    place = Path(storage.resolve(path)[1])
    # The mount is more likely what somebody means than a folder deep below it.
    prefix = place.parents[-2] if len(place.parents) > 1 else place
    return (
        "use storage that all nodes reach (s3://, gs://), or, if every node sees this path (NFS, a"
        f" folder of the image), say so: ray.shared_paths=[{prefix}]"
    )


def worker_paths(config: HtsConfig, command: str) -> Iterator[tuple[str, str]]:
    """Yield (field, path) of what the settings let workers of a command open."""
    yield "run_dir", config.run_dir
    stages = _stages(command)
    if "label" in stages:
        yield from _model_path("label.teacher.model", config.label.teacher.model)
        yield from _model_path("label.regions.detector", config.label.regions.detector)


def driver_paths(config: HtsConfig, command: str) -> Iterator[tuple[str, str]]:
    """Yield (field, path) of what the settings let the driver of a command open."""
    stages = _stages(command)
    if config.classes.source != "hico":
        yield "classes.source", config.classes.source
    if "label" in stages and config.label.regions.boxes:
        yield "label.regions.boxes", config.label.regions.boxes
    if "train" in stages:
        if config.student.model.startswith("local-dir:"):
            yield "student.model", config.student.model.removeprefix("local-dir:")
        yield from _model_path("student.pretrained", config.student.pretrained)


def _model_path(field: str, name: str | None) -> Iterator[tuple[str, str]]:
    """Yield a model's name when it means a folder and not a hub id or something built in."""
    if name and (name.startswith(("/", "~", "./", "../")) or Path(name).exists()):
        yield field, name


def check_joined(
    config: HtsConfig,
    command: str,
    paths: Iterable[tuple[str, str]] = (),
    *,
    manifest: Manifest | None = None,
    labels: pa.Table | None = None,
) -> list[str]:
    """Check the cluster that this process has joined for a command; returns notes for the user.

    `paths` are (field, path) that come from elsewhere than the settings; the images of `manifest`
    and of `labels` (a table with `uri`) are looked at too. Raises ConfigError for what would fail
    late or wait for ever.
    """
    cluster = joined_cluster(config.ray)
    shared = config.ray.shared_paths
    check_paths(cluster, shared, [*worker_paths(config, command), *paths])
    if manifest is not None and cluster.several_hosts:
        check_paths(cluster, shared, [("manifest", manifest.path)])
        check_uris(cluster, shared, manifest.table["uri"], manifest.path)
    if labels is not None and cluster.several_hosts:
        check_uris(cluster, shared, labels["uri"], "the labels")
    return check_room(cluster, demands(config, command))
