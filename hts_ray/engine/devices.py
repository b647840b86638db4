"""Which devices a stage takes where its settings say `auto`: what the cluster's nodes offer.

A GPU counts where Ray counts it and torch on its node can use it. The driver's own devices count
only as those of a node. Precision is the one choice that changes an answer, so a run keeps it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

from hts_ray.config import HtsConfig, override
from hts_ray.engine.compat import local_gpus, startable_gpus
from hts_ray.engine.console import busy
from hts_ray.engine.room import Node, joined_cluster, stages_of
from hts_ray.engine.telemetry import on_ray
from hts_ray.errors import ConfigError

# Types, as Ray names them, of GPUs older than NVIDIA's capability 8.0: torch emulates bfloat16.
_NO_BFLOAT16 = frozenset({"K80", "P4", "P100", "V100", "T4"})
_PROBE_SECONDS = 90.0
_NODE_SECONDS = 1200.0  # for an autoscaler to start a node
_GIB = 1 << 30
# Beside the weights a GPU holds its CUDA context and the activations of a group of regions.
_WEIGHTS_SHARE, _WEIGHTS_BESIDE_GIB = 0.85, 1.0
_DTYPE = "label.teacher.dtype"
_USE_GPU = "train.use_gpu"
# What a stage's settings say of GPUs, the one first that its figures are of.
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "label": ("label.pool.num_gpus",),
    "train": (_USE_GPU, "train.features.pool.num_gpus"),
    "predict": ("predict.pool.num_gpus",),
    "score": ("score.pool.num_gpus",),
    "sweep": (_USE_GPU, "train.features.pool.num_gpus", "predict.pool.num_gpus"),
}
# Run on a node in a process of its own: a look at a GPU takes memory on it.
_PROBE = """
import json, torch
def seen(number):
    about = torch.cuda.get_device_properties(number)
    with torch.cuda.device(number):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return [about.name, about.total_memory, fast]
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
build = torch.version.cuda or torch.version.hip
print(json.dumps({"build": build, "gpus": [seen(number) for number in range(count)]}))
"""

Seen = Mapping[str, Any]


def torch_sees() -> Seen | None:
    """Return what torch sees on this machine; None when it does not say.

    `build` is the CUDA or ROCm that it is built for, `gpus` (name, bytes, bfloat16) of each GPU.
    """
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", _PROBE], capture_output=True, timeout=_PROBE_SECONDS, check=True
        )
        found: Seen = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return found


@dataclass(frozen=True)
class Gpus:
    """The GPUs of `nodes` equal nodes, `each` on one, of memory `gib` (None: not known).

    `trouble` says why torch cannot use them.
    """

    name: str
    each: float
    nodes: int = 1
    bfloat16: bool = False
    gib: float | None = None
    trouble: str = ""

    @classmethod
    def of(cls, kind: str, each: float, nodes: int, seen: Seen | None) -> Gpus:
        """Judge what torch saw on one of the nodes; without that, their accelerator type."""
        if seen is None:
            return cls(kind or "GPU", each, nodes, bool(kind) and kind not in _NO_BFLOAT16)
        if not seen["gpus"]:
            build = seen["build"]
            trouble = "torch is a CPU build" if build is None else f"torch for {build} sees none"
            return cls(kind or "GPU", each, nodes, trouble=trouble)
        name, memory, _ = min(seen["gpus"], key=lambda gpu: gpu[1])
        fast = all(gpu[2] for gpu in seen["gpus"])
        return cls(name.removeprefix("NVIDIA "), each, nodes, fast, memory / _GIB)

    def needed(self, gib: float | None) -> int:
        """Return how many of these GPUs hold weights of `gib` together."""
        if gib is None or self.gib is None:
            return 1
        return max(1, math.ceil(gib / max(_WEIGHTS_SHARE * self.gib - _WEIGHTS_BESIDE_GIB, 0.1)))

    def workers(self, gpus: float) -> int:
        """Return how many workers with so many GPUs the nodes hold."""
        return int(self.each / gpus + 1e-9) * self.nodes

    def __str__(self) -> str:
        return f"{self.each * self.nodes:g} x {self.name}"


@dataclass(frozen=True)
class Offer:
    """What a cluster has for stages: its GPUs by kind, and whether it adds nodes on demand."""

    gpus: tuple[Gpus, ...] = ()
    autoscaling: bool = False

    @property
    def usable(self) -> tuple[Gpus, ...]:
        """The GPUs that torch can use."""
        return tuple(gpus for gpus in self.gpus if not gpus.trouble)

    @property
    def total(self) -> float:
        """How many of them there are."""
        return sum(gpus.each * gpus.nodes for gpus in self.usable)

    def lack(self) -> str:
        """Say why there is none."""
        if self.gpus:
            return f"{self.gpus[0]} idle: {self.gpus[0].trouble}"
        return "no node with a GPU is up" if self.autoscaling else "no GPU"

    def __str__(self) -> str:
        return ", ".join(map(str, self.usable))


def cluster_offer(config: HtsConfig, command: str) -> Offer:
    """Return what the joined cluster offers, or the one that would be started on this machine.

    Torch is asked on a node of each kind, unless no setting is `auto`. Where nodes come on demand
    and none with a GPU is up, one is asked for if the settings want GPUs and leave the precision
    open.
    """
    look = bool(_left_open(config, command))
    if not on_ray():
        each = local_gpus() if config.ray.num_gpus is None else float(config.ray.num_gpus)
        return Offer((Gpus.of("", each, 1, _here() if look else None),) if each else ())
    cluster = joined_cluster(config.ray)
    kinds: dict[tuple[str, float], list[Node]] = {}
    for node in cluster.nodes:
        if each := node.resources.get("GPU", 0.0):
            kinds.setdefault((node.accelerator, each), []).append(node)
    found = [
        Gpus.of(kind, each, len(nodes), _on(nodes[0].node_id) if look else None)
        for (kind, each), nodes in kinds.items()
    ]
    if not found and cluster.autoscaling:
        found = [Gpus.of(kind, each, nodes, None) for kind, each, nodes in startable_gpus()]
        labels = "label" in stages_of(command) and not _elsewhere(config)
        if labels and _value(config, _DTYPE) == "auto":
            wanted = min(1.0, config.label.pool.gpus or len(found))
            if wanted:
                with busy("waiting for a node with a GPU, to see which precision it has"):
                    seen = _ask(torch_sees, _NODE_SECONDS, num_gpus=wanted)
                found = [Gpus.of("", 1.0, 1, seen)]
    return Offer(tuple(found), cluster.autoscaling)


@cache
def _here() -> Seen | None:
    return torch_sees()


@cache
def _on(node_id: str) -> Seen | None:
    """Ask torch on a node, once a process."""
    found: Seen | None = _ask(torch_sees, _PROBE_SECONDS, node_id)
    return found


def _ask(
    function: Callable[[], Any], seconds: float, node_id: str = "", *, num_gpus: float = 0.0
) -> Any:
    """Return what a function returns on a node; None when no answer comes in so many seconds."""
    import ray
    from ray.exceptions import RayError

    pending = on_node(node_id, function, num_gpus=num_gpus).remote()
    try:
        return ray.get(pending, timeout=seconds)
    except RayError:  # also GetTimeoutError
        ray.cancel(pending, force=True)
        return None


def on_node(node_id: str, function: Callable[..., Any], *, num_gpus: float = 0.0) -> Any:
    """Return a remote function that runs on one node, or any, and takes no CPU from anything."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node_id, soft=False) if node_id else "DEFAULT"
    remote = ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(function)
    return remote.options(scheduling_strategy=place)


def _left_open(config: HtsConfig, command: str) -> set[str]:
    """Return the settings of a command's stages that are `auto`."""
    stages = stages_of(command)
    names = [name for stage in stages for name in _SETTINGS.get(stage, ())]
    names += [_DTYPE] if "label" in stages else []
    return {name for name in names if _value(config, name) == "auto"}


def _value(config: HtsConfig, name: str) -> Any:
    return reduce(getattr, name.split("."), config)


@dataclass(frozen=True)
class Choice:
    """What `auto` stands for in a command: settings without it, what is recorded, and lines.

    `record` has by stage num_gpus (of a worker), gpus (in words) and, of label, dtype.
    """

    config: HtsConfig
    record: Mapping[str, Mapping[str, Any]]
    lines: tuple[str, ...]


def choose_devices(
    config: HtsConfig,
    command: str,
    offer: Offer,
    *,
    earlier: Mapping[str, Any] | None = None,
    weights_gib: Callable[[str], float | None] = lambda dtype: None,
) -> Choice:
    """Choose the devices and the precision of every stage that a command runs.

    `earlier` is what was recorded when the run's teacher passes began. `weights_gib` returns the
    size of the teacher's weights in a precision, None where it is not known. Raises ConfigError
    for a teacher that the GPUs cannot hold.
    """
    earlier, asked = earlier or {}, config
    record: dict[str, dict[str, Any]] = {}
    for stage in stages_of(command):
        for name in _SETTINGS.get(stage, ()):
            gpus, gib = _value(config, name), None
            chosen = record.setdefault(stage, {})
            if stage == "label":
                chosen["dtype"] = _dtype(config, offer, earlier)
                config = _changed(config, _DTYPE, chosen["dtype"])
                gib = weights_gib(chosen["dtype"])
            if gpus == "auto" and name == _USE_GPU:
                gpus = offer.total >= max(1, config.train.num_workers)
            elif gpus == "auto" and stage == "label" and _elsewhere(config):
                gpus = 0.0
            elif gpus == "auto":
                gpus = _gpus_of_actor(offer, gib, earlier)
            config = _changed(config, name, gpus)
            if stage == "sweep" and config.train.cpus_per_worker == "auto":
                # Its trainings run at the same time, and all the cores are theirs together.
                config = _changed(config, "train.cpus_per_worker", 1.0)
            chosen.setdefault("num_gpus", float(gpus))
    for chosen in record.values():
        chosen["gpus"] = [str(gpus) for gpus in offer.usable if chosen["num_gpus"]]
    said = [line for stage in record for line in _lines(stage, asked, record[stage], offer)]
    return Choice(config, record, tuple(said))


def _changed(config: HtsConfig, name: str, value: Any) -> HtsConfig:
    nested: Any = value
    for part in reversed(name.split(".")):
        nested = {part: nested}
    return override(config, nested)


def _elsewhere(config: HtsConfig) -> bool:
    """Return whether the teacher's actors need no device: its model is behind an endpoint."""
    return config.label.teacher.engine == "openai" and config.label.regions.detector is None


def _dtype(config: HtsConfig, offer: Offer, earlier: Mapping[str, Any]) -> str:
    teacher, pool = config.label.teacher, config.label.pool
    if teacher.engine == "openai" and teacher.dtype == "auto":
        return "float32"  # of no meaning there: it must not make another pass
    if teacher.dtype != "auto":
        return teacher.dtype
    return str(earlier.get("dtype") or _best_dtype(offer, pool.num_gpus))


def _best_dtype(offer: Offer, num_gpus: float | str) -> str:
    if num_gpus == 0 or (num_gpus == "auto" and not offer.usable):
        return "float32"
    fast = bool(offer.usable) and all(gpus.bfloat16 for gpus in offer.usable)
    return "bfloat16" if fast else "float16"


def _gpus_of_actor(offer: Offer, gib: float | None, earlier: Mapping[str, Any]) -> float:
    """Return how many GPUs `auto` gives an actor whose weights take `gib`."""
    if not offer.usable:
        # What was up when the run began comes up again.
        return float(earlier.get("num_gpus") or 0.0) if offer.autoscaling else 0.0
    needed = max((g.needed(gib) for g in offer.usable if g.needed(gib) <= g.each), default=0)
    # Ray would place actors on these nodes too.
    small = next((g for g in offer.usable if g.needed(gib) > g.each >= needed), None)
    if small is not None:
        raise ConfigError(
            f"the teacher's weights take {gib:.1f} GiB, too much for {small.each:g} x {small.name}"
            f" of {small.gib:.0f} GiB",
            field="label.pool.num_gpus",
            value="auto",
            remedy="use nodes with more memory on their GPUs or a smaller teacher, or say yourself"
            " how many GPUs of a node an actor gets",
        )
    return float(needed)


def _lines(stage: str, asked: HtsConfig, chosen: Mapping[str, Any], offer: Offer) -> Iterator[str]:
    """Say what a stage runs on, where the settings leave that open, and which GPUs it leaves idle.

    `asked` are the settings before the choice.
    """
    if stage == "label" and _elsewhere(asked):
        return
    name, gpus, dtype = _SETTINGS[stage][0], float(chosen["num_gpus"]), chosen.get("dtype", "")
    trains, value = name == _USE_GPU, _value(asked, name)
    most = "train.num_workers" if trains else f"{name.rpartition('.')[0]}.max_size"
    workers = max(1, _value(asked, most))
    where = f"CPUs ({offer.lack()})" if value == "auto" else "CPUs"
    if gpus:
        where = f"{gpus:g} GPU{'s' * (gpus > 1)} for each {'worker' if trains else 'actor'}"
        where += f" ({offer})" if offer.usable else ""
    elif value == "auto" and offer.usable:
        where = f"CPUs ({offer}: too few for {most}={workers})"
    open_dtype = bool(dtype) and _value(asked, _DTYPE) == "auto"
    if value == "auto" or open_dtype:
        yield f"{stage}: {where}{', ' if dtype else ''}{dtype}"
    if open_dtype and dtype != (best := _best_dtype(offer, gpus)):
        yield f"note: {dtype} as this run began; {_DTYPE}={best} would label anew"
    idle = offer.total - gpus * workers
    # A sweep has several trainings at a time.
    if idle >= max(1.0, gpus) and (gpus or value != "auto") and not (gpus and stage == "sweep"):
        all_of_them = sum(kind.workers(gpus) for kind in offer.usable) if gpus else 0
        remedy = f"{most}={all_of_them} takes all" if gpus else f"{name} is {value:g}"
        yield f"note: {idle:g} of {offer.total:g} GPUs idle: {remedy}"
