"""The trials of a sweep, run as Ray tasks: one task measures one seed of one trial.

A trial fits classifiers on stored features, which takes about a second. Ray keeps the processes of
its tasks, and the data lies in the object store once. This process holds the state of every trial:
it decides what is tried, which trials are stopped early, and what is kept.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayError

from hts_ray.config import SweepConfig
from hts_ray.errors import UserError
from hts_ray.store import storage
from hts_ray.sweep.log import OWN, TRIALS_FOLDER, Metrics, Status, Trial, TrialLog
from hts_ray.sweep.proposals import make_proposer
from hts_ray.sweep.space import Settings, Space

# Called as run_once(settings=..., seed=..., **parameters); more of the objective is better.
RunOnce = Callable[..., Metrics]
OnTrial = Callable[[Trial], None]

_LIVES = 2  # times that a seed is begun again when its process or node died


class Slots(NamedTuple):
    """How many trials run at a time, and the logical CPUs that each asks Ray for."""

    concurrency: int
    cpus: float


def trial_slots(config: SweepConfig) -> Slots:
    """Return how many trials the cluster runs at a time.

    One a CPU; on a single machine its real CPUs count, since a local cluster may have more
    logical ones. Asked for more trials than CPUs, each takes less than one, so that all find room.
    """
    logical = float(ray.cluster_resources().get("CPU", 1.0))
    single = sum(bool(node["Alive"]) for node in ray.nodes()) == 1
    real = min(logical, float(os.cpu_count() or 1)) if single else logical
    concurrency = config.concurrency or max(1, min(config.trials, int(real)))
    return Slots(concurrency, min(1.0, logical / concurrency))


class _Seed(NamedTuple):
    """What a trial led to with one seed; `status` is None where that can be compared."""

    metrics: Metrics
    status: Status | None = None
    message: str = ""
    seconds: float = 0.0


def run_trials(
    config: SweepConfig,
    space: Space,
    run_once: RunOnce,
    objective: str,
    *,
    folder: str,
    parameters: Mapping[str, Any] | None = None,
    on_trial: OnTrial = lambda trial: None,
) -> dict[int, Trial]:
    """Run the trials of a sweep that have not ended yet, and return all of them by number.

    `run_once(settings=..., seed=..., **parameters)` returns metrics, `objective` among them; it
    runs in Ray's workers, and `parameters` go to the object store once. `folder` keeps the log.
    A UserError of `run_once` makes a trial infeasible. Raises what the log raises when it cannot
    be written.
    """
    log = TrialLog(storage.join(folder, TRIALS_FOLDER))
    known = log.read()
    wanted = [number for number in reversed(range(config.trials)) if number not in known]
    if not wanted:
        return known
    proposer = make_proposer(config, space, [*known.values()])
    halving = Halving(config.repeats, config.reduction, known)
    slots = trial_slots(config)
    measure = ray.remote(_measure).options(num_cpus=slots.cpus, max_retries=_LIVES)
    shared = {name: ray.put(value) for name, value in (parameters or {}).items()}
    running: dict[ray.ObjectRef, tuple[int, Settings, list[_Seed]]] = {}

    def start(number: int, settings: Settings, seeds: list[_Seed]) -> None:
        given = {"settings": settings, "seed": config.seed + len(seeds), **shared}
        running[measure.remote(run_once, objective, **given)] = number, settings, seeds

    try:
        while wanted or running:
            while wanted and len(running) < slots.concurrency:
                number = wanted.pop()
                start(number, proposer.propose(number), [])
            [done], _ = ray.wait([*running])
            number, settings, seeds = running.pop(done)
            seeds.append(_result(done))
            trial = _trial(number, settings, seeds, objective, config.repeats)
            if trial.status == "stopped" and halving.goes_on(number, trial.reports):
                start(number, settings, seeds)
                continue
            log.write(trial)
            proposer.tell(trial)
            on_trial(trial)
    finally:
        for seed in running:  # none is left unless an error or Ctrl+C ends the sweep
            ray.cancel(seed)
    return log.read()


def _measure(run_once: RunOnce, objective: str, /, **given: Any) -> _Seed:
    """Run a trial with one seed; runs in a worker of Ray's."""
    started = time.monotonic()
    metrics: Metrics = {}
    status: Status | None = None
    message = ""
    try:
        metrics = run_once(**given)
        if not math.isfinite(metrics[objective]):
            status, message = "infeasible", f"{objective} is not a number"
    except UserError as error:
        status, message = "infeasible", str(error)
    except Exception as error:  # not raised: it ends this trial and not the sweep
        status, message = "failed", f"{type(error).__name__}: {error}"
    return _Seed(metrics, status, message, time.monotonic() - started)


def _result(done: ray.ObjectRef) -> _Seed:
    """Return what a task returned, or why its process died each time."""
    try:
        seed: _Seed = ray.get(done)
    except RayError as error:
        lines = str(error).strip().splitlines() or ["its process died"]
        return _Seed({}, "failed", lines[0])
    return seed


def _trial(
    number: int, settings: Settings, seeds: Sequence[_Seed], objective: str, repeats: int
) -> Trial:
    """Return a trial after its last seed so far: "stopped" unless another one follows."""
    found = [seed.metrics for seed in seeds if seed.metrics]
    means = {name: sum(each[name] for each in found) / len(found) for name in (found or [{}])[0]}
    values = [seed.metrics[objective] for seed in seeds if seed.status is None]
    return Trial(
        number=number,
        settings=settings,
        status=seeds[-1].status or ("complete" if len(seeds) == repeats else "stopped"),
        metrics={name: value for name, value in means.items() if math.isfinite(value)},
        reports=tuple(sum(values[:n]) / n for n in range(1, len(values) + 1)),
        seconds=round(sum(seed.seconds for seed in seeds), 4),
        message=seeds[-1].message,
    )


class Halving:
    """Asynchronous successive halving (ASHA, Li et al. 2020): which trials go on to more seeds.

    Trials are compared when they come to 1, r, r**2, ... seeds, r being `reduction`, with all that
    came there before. One whose mean is not among the best 1/r ends. The run's own settings always
    go on. `known` are trials of an earlier run.
    """

    def __init__(self, repeats: int, reduction: float, known: Mapping[int, Trial]) -> None:
        self._repeats, self._reduction = repeats, reduction
        self._rungs: dict[int, dict[int, float]] = {}  # power of r: trial's number: mean
        for trial in known.values():
            for seeds in range(1, len(trial.reports) + 1):
                self.goes_on(trial.number, trial.reports[:seeds])

    def goes_on(self, number: int, reports: Sequence[float]) -> bool:
        """Take note of a trial's means after each of its seeds; returns whether it goes on."""
        seeds, mean = len(reports), reports[-1]
        if seeds >= self._repeats:
            return False
        power = 0
        while self._reduction ** (power + 1) <= seeds:
            power += 1
        rung = self._rungs.setdefault(power, {})
        if number in rung:
            return True
        quantile = 100 * (1 - 1 / self._reduction)
        among_best = not rung or mean >= np.percentile(list(rung.values()), quantile)
        rung[number] = mean
        return bool(among_best) or number == OWN
