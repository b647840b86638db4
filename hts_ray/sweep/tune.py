"""The trials of a sweep on Ray Tune.

A trial fits classifiers on stored features, which takes about a second, while starting a process
for it would take several. So a few actors are kept and given one trial after the other, the data
lies in the object store once, and a trial is a function that reports after each of its seeds.
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
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from hts_ray.config import SweepConfig
from hts_ray.errors import UserError
from hts_ray.store import storage
from hts_ray.sweep.log import OWN, TRIALS_FOLDER, Metrics, Status, Trial, TrialLog
from hts_ray.sweep.proposals import Proposer, make_proposer
from hts_ray.sweep.space import Space

# Called as run_once(settings=..., seed=..., **parameters); more of the objective is better.
RunOnce = Callable[..., Metrics]

_METRIC, _TIME = "objective", "repeat"
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


def run_trials(
    config: SweepConfig,
    space: Space,
    run_once: RunOnce,
    objective: str,
    *,
    folder: str,
    parameters: Mapping[str, Any] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> dict[int, Trial]:
    """Run the trials of a sweep that have not ended yet, and return all of them by number.

    `run_once(settings=..., seed=..., **parameters)` returns metrics, `objective` among them; it
    runs in Ray's workers, and `parameters` go to the object store once. `folder` keeps the log.
    ASHA (Li et al. 2020) stops trials whose mean over the seeds so far is not among the best
    1/`sweep.reduction` of those that came as far; the run's own settings are never stopped. A
    UserError of `run_once` makes a trial infeasible. Raises UserError when trials were left undone,
    and what the log raises when it cannot be written.
    """
    log = TrialLog(storage.join(folder, TRIALS_FOLDER))
    known = log.read()
    wanted = [number for number in range(config.trials) if number not in known]
    if not wanted:
        return known
    recorder = _Recorder(log, make_proposer(config, space, [*known.values()]), config, on_trial)
    slots = trial_slots(config)
    trainable = tune.with_parameters(
        _run_trial,
        run_once=run_once,
        objective=objective,
        repeats=config.repeats,
        seed=config.seed,
        **(parameters or {}),
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": slots.cpus}),
        tune_config=tune.TuneConfig(
            search_alg=_PlannedSearch(wanted, recorder.proposer),
            scheduler=_scheduler(config, known),
            num_samples=len(wanted),
            max_concurrent_trials=slots.concurrency,
            reuse_actors=True,
            trial_dirname_creator=_folder_of,
        ),
        run_config=tune.RunConfig(
            # A name of its own: an experiment of the same name would be overwritten in part.
            name=f"{time.time_ns():x}",
            storage_path=storage.join(folder, "tune"),
            callbacks=[recorder],
            stop=_Failure(recorder),
            failure_config=tune.FailureConfig(max_failures=_LIVES),
            verbose=0,
        ),
    )
    with _environment():
        tuner.fit()
    if recorder.failure is not None:
        raise recorder.failure
    storage.remove_tree(storage.join(folder, "tune"))
    return _complete(log, config)


def _complete(log: TrialLog, config: SweepConfig) -> dict[int, Trial]:
    found = log.read()
    missing = config.trials - len(found)
    if missing:
        raise UserError(
            f"{missing} of {config.trials} trials were not run; the same command goes on"
        )
    return found


def _run_trial(
    config: dict[str, Any],
    *,
    run_once: RunOnce,
    objective: str,
    repeats: int,
    seed: int,
    **parameters: Any,
) -> None:
    """Run a trial's seeds and report the means so far after each; runs in a Tune actor."""
    settings = json.loads(config["settings"])
    started = time.monotonic()
    found: list[Metrics] = []
    for repeat in range(repeats):
        status, message = "", ""
        try:
            found.append(run_once(settings=settings, seed=seed + repeat, **parameters))
            if not math.isfinite(found[-1][objective]):
                status, message = "infeasible", f"{objective} is not a number"
        except UserError as error:
            status, message = "infeasible", str(error)
        except Exception as error:  # not raised: Tune would start the process anew, for seconds
            status, message = "failed", f"{type(error).__name__}: {error}"
        means = _means(found)
        tune.report(
            {
                _METRIC: math.nan if status else means[objective],
                _TIME: repeat + 1,
                "metrics": json.dumps(means),
                "seconds": time.monotonic() - started,
                "status": status,
                "message": message,
            }
        )
        if status:
            return


def _means(found: Sequence[Metrics]) -> Metrics:
    """Return the mean of every metric; those that are not numbers are left out."""
    names = found[0] if found else {}
    means = {name: sum(metrics[name] for metrics in found) / len(found) for name in names}
    return {name: value for name, value in means.items() if math.isfinite(value)}


class _PlannedSearch(Searcher):  # type: ignore[misc]
    """Suggests the wanted trials in turn. Tune's copies of it are empty: the log is its state."""

    def __init__(self, wanted: Sequence[int], proposer: Proposer) -> None:
        super().__init__(metric=_METRIC, mode="max")
        self._wanted, self._proposer = deque(wanted), proposer

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return a trial's number, and its settings as text, in which Tune reads no dots."""
        if not self._wanted:
            return str(Searcher.FINISHED)
        number = self._wanted.popleft()
        return {"number": number, "settings": json.dumps(self._proposer.propose(number))}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Do nothing: the recorder tells the proposer."""

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the log is the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Scheduler(ASHAScheduler):  # type: ignore[misc]
    """ASHA that lets the run's own settings go on and leaves infeasible trials out of its rungs."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Any) -> str:
        """Return STOP or CONTINUE."""
        action: str = super().on_trial_result(tune_controller, trial, _comparable(result))
        spared = trial.config["number"] == OWN and result[_TIME] < self._max_t
        return self.CONTINUE if spared else action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        """Note a trial's last result."""
        super().on_trial_complete(tune_controller, trial, _comparable(result))


def _comparable(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without its objective where that is not a number; ASHA then skips it."""
    skip = math.isnan(result.get(_METRIC, math.nan))
    return {name: value for name, value in result.items() if not (skip and name == _METRIC)}


def _scheduler(config: SweepConfig, known: Mapping[int, Trial]) -> _Scheduler:
    """Return the scheduler, told of the trials that ended in an earlier run."""
    scheduler = _Scheduler(
        time_attr=_TIME,
        metric=_METRIC,
        mode="max",
        max_t=config.repeats,
        grace_period=1,
        reduction_factor=config.reduction,
    )
    for trial in known.values():
        earlier = SimpleNamespace(
            trial_id=f"earlier-{trial.number}", config={"number": trial.number}
        )
        scheduler.on_trial_add(None, earlier)
        for repeat, value in enumerate(trial.reports, start=1):
            scheduler.on_trial_result(None, earlier, {_TIME: repeat, _METRIC: value})
    return scheduler


class _Recorder(tune.Callback):  # type: ignore[misc]
    """Puts every trial that ends into the log, and tells the proposer and whoever watches.

    `failure` is why the log could not be written. It is not raised here: Tune would take it for the
    trial's, run the trial again, and have it end as a failed one.
    """

    def __init__(
        self,
        log: TrialLog,
        proposer: Proposer,
        config: SweepConfig,
        on_trial: Callable[[Trial], None] | None,
    ) -> None:
        self.proposer = proposer
        self.failure: OSError | UserError | None = None
        self._log, self._repeats, self._on_trial = log, config.repeats, on_trial
        self._results: dict[str, list[dict[str, Any]]] = {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Forget what a trial reported before its process died."""
        self._results[trial.trial_id] = []

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Remember a report."""
        self._results[trial.trial_id].append(dict(result))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Keep a trial that ran to its end or was stopped."""
        results = self._results.pop(trial.trial_id)
        ran: Status = "complete" if len(results) == self._repeats else "stopped"
        self._keep(trial, results, results[-1]["status"] or ran, results[-1]["message"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Keep a trial whose process died each time."""
        results = self._results.pop(trial.trial_id, [])
        lines = str(trial.get_error()).strip().splitlines() or ["its process died"]
        self._keep(trial, results, "failed", lines[-1])

    def _keep(self, trial: Any, results: list[dict[str, Any]], status: Status, text: str) -> None:
        if self.failure is not None:  # everything is being stopped
            return
        last: dict[str, Any] = results[-1] if results else {"metrics": "{}", "seconds": 0.0}
        ended = Trial(
            number=trial.config["number"],
            settings=json.loads(trial.config["settings"]),
            status=status,
            metrics=json.loads(last["metrics"]),
            reports=tuple(r[_METRIC] for r in results if math.isfinite(r[_METRIC])),
            seconds=round(last["seconds"], 4),
            message=text,
        )
        try:
            self._log.write(ended)
        except (OSError, UserError) as error:
            self.failure = error
            return
        self.proposer.tell(ended)
        if self._on_trial is not None:
            self._on_trial(ended)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Failure(tune.Stopper):  # type: ignore[misc]
    """Ends all trials when one could not be kept."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __call__(self, trial_id: str, result: Any) -> bool:
        """Stop no trial for itself."""
        return False

    def stop_all(self) -> bool:
        """Tell whether it is over."""
        return self._recorder.failure is not None

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _folder_of(trial: Any) -> str:
    return f"{trial.config['number']:06d}-{trial.trial_id}"


@contextmanager
def _environment() -> Iterator[None]:
    """Set what Tune reads from the environment, and its log level, while the block runs."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(_ENVIRONMENT)
    # What ends a sweep is told by the command, in a line; Tune would print a traceback before that.
    logger.setLevel(logging.ERROR if os.environ.get("HTS_DEBUG") else logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
