"""What a cluster must have before a stage starts on it: paths that its nodes see, and room.

A missing folder fails late, on a worker of another node, and Ray waits in silence for resources
that never come. Both are reported here in figures: by the client before a job is submitted, and by
the driver before a stage starts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from hts_ray.config import OPEN_CLIP, HtsConfig, NodesConfig, PoolConfig, RayConfig
from hts_ray.engine.clip import LOCAL
from hts_ray.engine.compat import autoscaler_status
from hts_ray.errors import ConfigError
from hts_ray.images.manifest import Manifest
from hts_ray.store import storage
from hts_ray.store.tables import stream

# Tasks that must find a CPU while all actors of a pool hold theirs: reading, decoding, and the
# filter of a resumed run. Without them Ray waits for ever.
CPUS_BESIDE = 3
# A label that KubeRay, the cluster launcher and autoscalers set.
_NODE_GROUP = "ray.io/node-group"
_NODE_ID = "ray.io/node-id"
_ANY = NodesConfig()
_URIS = 1 << 16
_ANONYMOUS_NODE = "node_"  # Ray's prefix for nodes that were started by hand
_GIB = 1 << 30


@dataclass(frozen=True)
class Node:
    """A live node: its address and what it has in all (`CPU`, `GPU`, `memory` in bytes, ...)."""

    host: str
    resources: Mapping[str, float]
    node_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def accelerator(self) -> str:
        """The type of its GPUs, as Ray names it: A100; "" where Ray does not know it."""
        named = (name.partition("accelerator_type:")[2] for name in self.resources)
        return next(filter(None, named), "")


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
        known = (
            Node(
                row["host"],
                dict(row["resources"]),
                row.get("node_id", ""),
                dict(row.get("labels") or {}),
            )
            for row in rows
        )
        return cls(tuple(known), found)


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

    names = {"host": "NodeManagerAddress", "resources": "Resources", "labels": "Labels"}
    names["node_id"] = "NodeID"
    alive = [node for node in ray.nodes() if node["Alive"]]
    rows = [{key: node.get(name, {}) for key, name in names.items()} for node in alive]
    return Cluster.of_nodes(rows, config, autoscaler_status())


@dataclass(frozen=True)
class Demand:
    """What must run at the same time for a stage to go on: equal workers, and tasks beside them.

    `setting` is the field to lower, and `placing` the one that says which `nodes` may hold the
    workers; `memory` is in bytes.
    """

    setting: str
    workers: int
    cpus: float
    gpus: float = 0.0
    memory: float = 0.0
    beside: int = CPUS_BESIDE
    nodes: NodesConfig = _ANY
    placing: str = ""

    def room(self, cluster: Cluster) -> int:
        """How many of the workers the cluster's nodes hold, were they empty."""
        needed = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        if not any(needed.values()):
            return self.workers
        held = 0
        for node in self.candidates(cluster):
            # Fractions of a GPU add up with rounding.
            held += int(min(node.resources.get(n, 0.0) / a + 1e-9 for n, a in needed.items() if a))
        return held

    def candidates(self, cluster: Cluster) -> list[Node]:
        """Return the nodes that the workers may run on."""
        return [node for node in cluster.nodes if self.nodes.take(node.labels, node.accelerator)]

    def worker(self) -> str:
        """What one worker takes, in words."""
        parts = {"CPU": self.cpus, "GPU": self.gpus, "GiB": self.memory / _GIB}
        return " + ".join(f"{a:g} {name}" for name, a in parts.items() if a) or "nothing"


def demands(config: HtsConfig, command: str) -> list[Demand]:
    """Return what a command needs at the least; none for what runs in the driver alone."""
    train = config.train
    cpus, gpus = train.worker_cpus, float(train.gpu)
    workers = Demand("train.num_workers", train.num_workers, cpus, gpus, beside=1)
    trainers = [replace(workers, nodes=train.nodes, placing="train.nodes")]
    if train.trainable == "head":
        trainers = _pool("train.features.pool", train.features.pool)
    found = {
        "prepare": [_decoding("prepare", config.prepare.nodes, "nodes")],
        "label": _pool("label.pool", config.label.pool, actors=True),
        "filter": [_decoding("filter", config.filter.nodes, "nodes")],
        "predict": _pool("predict.pool", config.predict.pool),
        "score": _pool("score.pool", config.score.pool),
        "train": trainers,
    }
    return [demand for stage in stages_of(command) for demand in found.get(stage, ())]


def stages_of(command: str) -> tuple[str, ...]:
    """Return the stages that a command runs."""
    whole = ("label", "filter", "train", "predict")
    return whole if command in {"pipeline", "demo"} else (command,)


def _pool(section: str, pool: PoolConfig, *, actors: bool = False) -> list[Demand]:
    """Return the least that a pool needs; without GPUs students are tasks, which come and go."""
    memory = (pool.memory_gib or 0.0) * _GIB
    if actors or pool.gpus:
        setting = f"{section}.min_size"
        demand = Demand(setting, pool.min_size, pool.actor_cpus, pool.gpus, memory)
    else:
        # Only the filter of a resumed run holds its CPU beside the tasks.
        demand = Demand(f"{section}.num_cpus", 1, pool.num_cpus, 0.0, memory, beside=1)
    demand = replace(demand, nodes=pool.nodes, placing=f"{section}.nodes")
    return [demand, _decoding(section, pool.decode_nodes)]


def _decoding(section: str, nodes: NodesConfig, name: str = "decode_nodes") -> Demand:
    """Return what decoding needs: where it is told to go, a CPU."""
    placing = f"{section}.{name}"
    return Demand(placing, 1, 0.0 if nodes.any else 1.0, beside=0, nodes=nodes, placing=placing)


def check_room(cluster: Cluster, needed: Iterable[Demand]) -> list[str]:
    """Raise ConfigError, with figures, for what a cluster can never serve.

    On a cluster that adds nodes on demand, what is missing is returned as notes instead.
    """
    notes = []
    for demand in needed:
        lack = _lack(cluster, demand)
        if lack is None:
            continue
        field, value, message, remedy = lack
        if not cluster.autoscaling:
            raise ConfigError(
                f"{message}: it would wait for ever",
                field=field,
                value=value,
                remedy=f"{remedy}; if nodes come by themselves, set ray.autoscaling=true",
            )
        notes.append(f"{field}={value}: {message}; waiting for more nodes")
    return notes


def _lack(cluster: Cluster, demand: Demand) -> tuple[str, object, str, str] | None:
    """Return (field, value, message, remedy) of what is missing, None when nothing is."""
    room, count, setting = demand.room(cluster), demand.workers, demand.setting
    if not (demand.nodes.any or demand.candidates(cluster)):
        return _misplaced(cluster, demand)
    if room < count:
        wanted = f"{_count(count, 'worker')} of {demand.worker()} wanted"
        where = "" if demand.nodes.any else f" where {demand.placing} lets them"
        message = f"{wanted}, and {cluster} can hold {room}{where}"
        if demand.gpus and not cluster.total("GPU"):
            trains = setting == "train.num_workers"
            field = "train.use_gpu" if trains else f"{setting.rpartition('.')[0]}.num_gpus"
            value, off = (True, "false") if trains else (demand.gpus, "0")
            return field, value, message, f"add nodes with GPUs, or set it to {off}"
        remedy = "ask for less in one worker than the largest node has, or add larger nodes"
        if room:
            remedy = f"set {setting} to {room} or less, or add nodes"
        return setting, count, message, remedy
    taken, cpus = count * demand.cpus, cluster.total("CPU")
    total = taken + demand.beside
    if total <= cpus:
        return None
    message = (
        f"the workers take {taken:g} CPUs, and reading, decoding and resuming {demand.beside}"
        f" more, {total:g} in all; there are {cpus:g} ({cluster})"
    )
    remedy = f"start Ray with more (logical) CPUs, `ray start --num-cpus={total:g}`"
    return setting, count, message, remedy + (f", or set {setting} to less" if count > 1 else "")


def _misplaced(cluster: Cluster, demand: Demand) -> tuple[str, object, str, str]:
    """Return what is missing where no node of a cluster is one that is asked for."""
    wanted = demand.nodes
    if any(wanted.take(node.labels, wanted.accelerator_type or "") for node in cluster.nodes):
        found = sorted({node.accelerator for node in cluster.nodes} - {""})
        message = f"no node has such GPUs; there are {', '.join(found) or 'none of a known type'}"
        field, value = f"{demand.placing}.accelerator_type", wanted.accelerator_type
        return field, value, message, "name a type that is there, or leave it out"
    known = Counter(
        f"{key}={value}"
        for node in cluster.nodes
        for key, value in node.labels.items()
        if key != _NODE_ID
    )
    there = ", ".join(f"{label} ({_count(n, 'node')})" for label, n in known.most_common(12))
    remedy = "name labels that are there, or start nodes with them (`ray start --labels KEY=VALUE`)"
    message = f"no node has these labels; there are {there or 'none'}"
    return f"{demand.placing}.labels", dict(wanted.labels), message, remedy


def is_shared(path: str, prefixes: Sequence[str]) -> bool:
    """Return whether every node sees a path: a remote one, or one below a shared folder."""
    if storage.is_remote(path):
        return True
    place = Path(storage.resolve(path)[1])
    return any(place.is_relative_to(storage.resolve(prefix)[1]) for prefix in prefixes)


def check_paths(cluster: Cluster, shared: Sequence[str], paths: Iterable[tuple[str, str]]) -> None:
    """Raise ConfigError for the first of (field, path) that only one machine of several has."""
    for name, path in paths if cluster.several_hosts else ():
        if not is_shared(path, shared):
            raise _not_shared(cluster, name, path, "is a local path")


def check_uris(
    cluster: Cluster, shared: Sequence[str], column: pa.ChunkedArray, source: str
) -> None:
    """Raise ConfigError for images at paths that only one machine of several has.

    `source` names the table that the URIs are from.
    """
    # Only folders differ in whether they are shared; images are many: some at a time.
    folders: dict[str, str] = {}
    for start in range(0, len(column), _URIS):
        uris = column.slice(start, _URIS).drop_null().to_pylist()
        folders |= {uri.rpartition("/")[0]: uri for uri in uris}
    for folder, uri in folders.items():
        if not is_shared(folder or uri, shared):
            more = "; `hts prepare` with the new root writes a manifest of it"
            what = f"the images of {source} are at local paths"
            raise _not_shared(cluster, "uri", uri, what, more)


def _not_shared(
    cluster: Cluster, field: str, path: str, what: str, more_remedy: str = ""
) -> ConfigError:
    hosts = len({node.host for node in cluster.nodes})
    machines = f"the cluster has {hosts}" + (", and adds more" if cluster.autoscaling else "")
    place = Path(storage.resolve(path)[1])
    # The mount is more likely what somebody means than a folder deep below it.
    prefix = place.parents[-2] if len(place.parents) > 1 else place
    return ConfigError(
        f"{what}, and workers run on other machines too ({machines})",
        field=field,
        value=path,
        remedy="use storage that all nodes reach (s3://, gs://), or, if every node sees this path"
        f" (NFS, a folder of the image), say so: ray.shared_paths=[{prefix}]{more_remedy}",
    )


def worker_paths(config: HtsConfig, command: str) -> Iterator[tuple[str, str]]:
    """Yield (field, path) of what the settings let workers of a command open."""
    yield "run_dir", config.run_dir
    stages = stages_of(command)
    if "label" in stages:
        teacher = config.labeling.teacher.model.removeprefix(OPEN_CLIP).removeprefix(LOCAL)
        yield from _model_path("label.teacher.model", teacher)
        yield from _model_path("label.regions.detector", config.label.regions.detector)


def driver_paths(config: HtsConfig, command: str) -> Iterator[tuple[str, str]]:
    """Yield (field, path) of what the settings let the driver of a command open."""
    stages = stages_of(command)
    if config.classes.source != "hico":
        yield "classes.source", config.classes.source
    if "label" in stages and config.label.regions.boxes:
        yield "label.regions.boxes", config.label.regions.boxes
    if "train" in stages:
        if config.student.model.startswith(LOCAL):
            yield "student.model", config.student.model.removeprefix(LOCAL)
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
    labels: pads.Dataset | None = None,
) -> list[str]:
    """Check the cluster that this process has joined for a command; returns notes for the user.

    `paths` are (field, path) that come from elsewhere than the settings; the images of `manifest`
    and of `labels` (rows with `uri`) are looked at too. Raises ConfigError for what would fail
    late or wait for ever.
    """
    cluster = joined_cluster(config.ray)
    shared = config.ray.shared_paths
    check_paths(cluster, shared, [*worker_paths(config, command), *paths])
    if manifest is not None and cluster.several_hosts:
        check_paths(cluster, shared, [("manifest", manifest.path)])
        check_uris(cluster, shared, manifest.images["uri"], manifest.path)
    if labels is not None and cluster.several_hosts:
        for piece in stream(labels, ["uri"]):
            check_uris(cluster, shared, piece["uri"], "the labels")
    return check_room(cluster, demands(config, command))
