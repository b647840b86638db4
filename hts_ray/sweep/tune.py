"""The trials of a sweep, run by Ray Tune.

A trial is a function that reports after each of its seeds, or epochs. Tune only runs them: what is
tried, which trials are stopped early and what is kept is decided here. A fit of classifiers on
stored features takes about a second, while starting a process for it would take several. So a few
actors are kept for such trials and given one after the other, and the data lies in the object store
once. Trials that train in full are in `hts_ray.sweep.trainings`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from hts_ray.config import SweepConfig
from hts_ray.errors import UserError
from hts_ray.store import storage
from hts_ray.sweep.log import OWN, TRIALS_FOLDER, Metrics, Trial, TrialLog
from hts_ray.sweep.proposals import make_proposer
from hts_ray.sweep.space import Space

# Called as run_once(settings=..., seed=..., **parameters); more of the objective is better.
RunOnce = Callable[..., Metrics]
OnTrial = Callable[[Trial], None]

_LIVES = 2  # times that a trial is begun again when its process or node died
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # three files a trial that nobody reads
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl+C ends the command as it does everywhere else
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the log has them
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a table at any verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class Slots:
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


@dataclass(frozen=True)
class Work:
    """What Tune runs of a trial: `trainable`, a function that reports with `report_fields`.

    `resources` are what each holds besides what it starts itself, `at_a_time` how many run.
    `reports` is how many a whole trial makes; infinite where it ends by itself. With `reuse` one
    process runs one trial after the other; a trial that is stopped dies with its process otherwise.
    """

    trainable: Any
    resources: Mapping[str, float]
    at_a_time: int
    reports: float = math.inf
    reuse: bool = False


def run_trials(
    config: SweepConfig,
    space: Space,
    run_once: RunOnce,
    objective: str,
    *,
    folder: str,
    parameters: Mapping[str, Any] | None = None,
    on_trial: OnTrial | None = None,
) -> dict[int, Trial]:
    """Search with trials that are means over seeds; see `search`.

    `run_once(settings=..., seed=..., **parameters)` returns metrics, `objective` among them; it
    runs in Ray's workers, and `parameters` go to the object store once. A UserError of `run_once`
    makes a trial infeasible.
    """

    def work() -> Work:
        trainable = tune.with_parameters(
            _run_trial,
            run_once=run_once,
            objective=objective,
            repeats=config.repeats,
            seed=config.seed,
            **(parameters or {}),
        )
        slots = trial_slots(config)
        cpus = {"cpu": slots.cpus}
        return Work(trainable, cpus, slots.concurrency, config.repeats, reuse=True)

    return search(config, space, work, folder=folder, on_trial=on_trial)


def search(
    config: SweepConfig,
    space: Space,
    work: Callable[[], Work],
    *,
    folder: str,
    on_trial: OnTrial | None = None,
) -> dict[int, Trial]:
    """Run the trials of a sweep that have not ended yet, and return all of them by number.

    `work` is asked for only when there are some; `folder` keeps the log. Raises UserError when
    trials were left undone, and what the log raises when it cannot be written.
    """
    log = TrialLog(storage.join(folder, TRIALS_FOLDER))
    known = log.read()
    wanted = [number for number in range(config.trials) if number not in known]
    if not wanted:
        return known
    ledger, todo = _Ledger(config, space, log, known, wanted), work()
    scheduler = _Stopping(Halving(todo.reports, config.reduction, known))
    tuner = _tuner(todo, ledger, scheduler, storage.join(folder, "tune"))
    ledger.on_trial = on_trial  # only now: the Tuner has pickled what it was given
    with _environment():
        tuner.fit()
    if ledger.failure is not None:
        raise ledger.failure
    storage.remove_tree(storage.join(folder, "tune"))
    found = log.read()
    missing = config.trials - len(found)
    if missing:
        raise UserError(
            f"{missing} of {config.trials} trials were not run; the same command goes on"
        )
    return found


def run_jobs(work: Work, jobs: Sequence[Any], folder: str) -> list[str]:
    """Run `work` once for each job, a JSON value; returns what went wrong in each, "" for nothing.

    The function gets `{"job": text}`. Tune's own files lie in `folder` meanwhile.
    """
    ledger = _Jobs(jobs)
    tuner = _tuner(work, ledger, FIFOScheduler(), folder)
    ledger.told = {}
    with _environment():
        tuner.fit()
    storage.remove_tree(folder)
    return [ledger.told.get(number, "it was not run") for number in range(len(jobs))]


class _Asked(Protocol):
    """Who hands out what Tune runs, and hears how it ended."""

    @property
    def wanted(self) -> int: ...

    def ask(self) -> dict[str, Any] | None: ...

    def tell(self, asked: Mapping[str, Any], fields: Mapping[str, Any]) -> None: ...


class _Jobs:
    """Hands out jobs by number and keeps their messages."""

    def __init__(self, jobs: Sequence[Any]) -> None:
        self.wanted = len(jobs)
        self.told: dict[int, str] = {}
        self._left = deque(enumerate(jobs))

    def ask(self) -> dict[str, Any] | None:
        """Return the next job."""
        if not self._left:
            return None
        number, job = self._left.popleft()
        return {"number": number, "job": json.dumps(job)}

    def tell(self, asked: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        """Keep what went wrong."""
        self.told[asked["number"]] = fields["message"]


def _tuner(work: Work, ledger: _Asked, scheduler: FIFOScheduler, folder: str) -> tune.Tuner:
    """Return what runs the ledger's trials, with its files in `folder`."""
    return tune.Tuner(
        tune.with_resources(work.trainable, dict(work.resources)),
        tune_config=tune.TuneConfig(
            search_alg=_Asking(ledger),
            scheduler=scheduler,
            num_samples=ledger.wanted,
            max_concurrent_trials=work.at_a_time,
            reuse_actors=work.reuse,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            # A name of its own: an experiment of the same name would be overwritten in part.
            name=f"{time.time_ns():x}",
            storage_path=folder,
            callbacks=[_Telling(ledger)],
            failure_config=tune.FailureConfig(max_failures=_LIVES),
            verbose=0,
        ),
    )


def report_fields(
    status: str, metrics: Metrics, reports: Sequence[float], started: float, message: str = ""
) -> None:
    """Report a trial's fields so far, as text, because Tune reads dots in names as nesting."""
    fields = {
        "status": status,
        "metrics": metrics,
        "reports": list(reports),
        "seconds": round(time.monotonic() - started, 4),
        "message": message,
    }
    tune.report({"fields": json.dumps(fields)})


def _run_trial(
    config: dict[str, Any],
    *,
    run_once: RunOnce,
    objective: str,
    repeats: int,
    seed: int,
    **parameters: Any,
) -> None:
    """Run a trial's seeds and report its results so far after each; runs in a Tune actor."""
    settings = json.loads(config["settings"])
    started = time.monotonic()
    found: list[Metrics] = []
    reports: list[float] = []
    status = message = ""
    for repeat in range(repeats):
        try:
            found.append(run_once(settings=settings, seed=seed + repeat, **parameters))
            if not math.isfinite(found[-1][objective]):
                status, message = "infeasible", f"{objective} is not a number"
        except UserError as error:
            status, message = "infeasible", str(error)
        except Exception as error:  # not raised: Tune would start the process anew, for seconds
            status, message = "failed", f"{type(error).__name__}: {error}"
        means = _means(found)
        if not status:
            reports.append(means[objective])
        so_far = status or ("complete" if repeat + 1 == repeats else "stopped")
        report_fields(so_far, means, reports, started, message)
        if status:
            return


def _means(found: Sequence[Metrics]) -> Metrics:
    """Return the mean of every metric; those that are not numbers are left out."""
    names = found[0] if found else {}
    means = {name: sum(metrics[name] for metrics in found) / len(found) for name in names}
    return {name: value for name, value in means.items() if math.isfinite(value)}


class Halving:
    """Asynchronous successive halving (ASHA, Li et al. 2020): which trials go on.

    Trials are compared when they come to 1, r, r**2, ... reports (seeds, or epochs), r being
    `reduction`, with all that came there before. One whose value is not among the best 1/r ends.
    The run's own settings always go on. `known` are trials of an earlier run.
    """

    def __init__(self, repeats: float, reduction: float, known: Mapping[int, Trial]) -> None:
        self._repeats, self._reduction = repeats, reduction
        self._rungs: dict[int, dict[int, float]] = {}  # power of r: trial's number: mean
        for trial in known.values():
            for seeds, mean in enumerate(trial.reports, start=1):
                self.goes_on(trial.number, seeds, mean)

    def goes_on(self, number: int, seeds: int, mean: float) -> bool:
        """Take note of a trial's value after so many reports; returns whether it goes on."""
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


class _Ledger:
    """Hands out the trials that are wanted, one by one, and logs those that ended.

    `failure` is why the log could not be written. It is not raised at once: Tune would take it for
    the trial's, run the trial again, and have it end as a failed one.
    """

    def __init__(
        self,
        config: SweepConfig,
        space: Space,
        log: TrialLog,
        known: Mapping[int, Trial],
        wanted: Sequence[int],
    ) -> None:
        self.failure: OSError | UserError | None = None
        self.on_trial: OnTrial | None = None
        self._log, self._wanted = log, deque(wanted)
        self._proposer = make_proposer(config, space, [*known.values()])

    @property
    def wanted(self) -> int:
        """How many trials are still to be asked for."""
        return len(self._wanted)

    def ask(self) -> dict[str, Any] | None:
        """Return the number and the settings, as text, of the next trial; None after the last."""
        if not self._wanted or self.failure is not None:
            return None
        number = self._wanted.popleft()
        return {"number": number, "settings": json.dumps(self._proposer.propose(number))}

    def tell(self, asked: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        """Keep a trial that ended, and tell the proposer and whoever watches."""
        if self.failure is not None:
            return
        reports = tuple(fields.get("reports", ()))
        settings = json.loads(asked["settings"])
        trial = Trial(asked["number"], settings, **{**fields, "reports": reports})
        try:
            self._log.write(trial)
        except (OSError, UserError) as error:
            self.failure = error
            return
        self._proposer.tell(trial)
        if self.on_trial is not None:
            self.on_trial(trial)


class _Asking(Searcher):  # type: ignore[misc]
    def __init__(self, ledger: _Asked) -> None:
        super().__init__()
        self._ledger = ledger

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return what the next trial is given."""
        return self._ledger.ask() or str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Do nothing: `_Telling` is given more about the trial."""


class _Stopping(FIFOScheduler):  # type: ignore[misc]
    def __init__(self, halving: Halving) -> None:
        super().__init__()
        self._halving = halving

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Return STOP or CONTINUE; a trial without a result ends by itself."""
        fields = json.loads(result["fields"])
        if fields["status"] in ("infeasible", "failed"):
            return str(self.CONTINUE)
        reports = fields["reports"]
        on = self._halving.goes_on(trial.config["number"], len(reports), reports[-1])
        return str(self.CONTINUE if on else self.STOP)


class _Telling(tune.Callback):  # type: ignore[misc]
    def __init__(self, ledger: _Asked) -> None:
        self._ledger = ledger

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Log a trial that ran to its end or was stopped."""
        self._ledger.tell(trial.config, json.loads(trial.last_result["fields"]))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Log a trial whose process died each time."""
        lines = str(trial.get_error()).strip().splitlines() or ["its process died"]
        self._ledger.tell(trial.config, {"status": "failed", "message": lines[-1]})


@contextmanager
def _environment() -> Iterator[None]:
    """Set what Tune reads from the environment, and its log level, while the block runs."""
    before = {name: os.environ.pop(name, None) for name in _ENVIRONMENT}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(_ENVIRONMENT)
    # The command says in a line what ends a sweep; Tune would print a traceback before that.
    logger.setLevel(logging.ERROR if os.environ.get("HTS_DEBUG") else logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
