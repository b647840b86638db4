"""The sweep stage: region scores in, tried settings and the best of them out.

Trials fit classifiers on cached features (`hts_ray.sweep.trial`) or train in full
(`hts_ray.sweep.trainings`). The best few are compared as students that were trained in full
(`hts_ray.sweep.finalists`) and must then beat the run's own settings, or these are kept. Everything
lies in one folder, named by settings and inputs; a sweep that was cut off goes on from there.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml

from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.run import StageFolder, given_stage, require_stage
from hts_ray.store.tables import trials_schema, write_table
from hts_ray.student.features import plan_features
from hts_ray.student.train import plan_train
from hts_ray.sweep.data import Judging, SweepData, load_judging, load_sweep_data
from hts_ray.sweep.finalists import FOLDER, Finalist, full_training, run_finalists
from hts_ray.sweep.log import OWN, TRIALS_FOLDER, Trial, best_first, promising_first
from hts_ray.sweep.plan import TABLE, Plan
from hts_ray.sweep.space import Space, nested
from hts_ray.sweep.trainings import curve_work
from hts_ray.sweep.trial import run_trial
from hts_ray.sweep.tune import OnTrial, run_trials, search

TRIALS_FILE = "trials.parquet"
FINALISTS_FILE = "finalists.json"
BEST_FILE = "best.yaml"
START = "start"  # the folder of the zero-shot student
# Standard errors that a gain has to exceed: a one-sided test at 5 %.
SURE = 1.645


def run_sweep(
    plan: Plan,
    *,
    on_trial: OnTrial | None = None,
    on_features: ImagesDone | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> StageFolder:
    """Run what is left of a sweep and publish it; a finished one is returned as it is.

    `on_trial` is called with every trial that ends, `on_features` with (done, total, quarantined)
    images while their features are computed, `tell` with a line now and then. Raises DataError
    when no trial came to a result, or the run's own settings did not.
    """
    stage, config = plan.stage, plan.run.config.sweep
    if stage.finished:
        return stage
    started = time.monotonic()
    data, trials = _searched(plan, on_trial, on_features, tell)
    require_results(trials)
    seconds_trials = time.monotonic() - started
    finalists: list[Finalist] = []
    if config.finalists:
        best = [trial for trial in promising_first(trials) if trial.number != OWN]
        finalists = run_finalists(plan, data, [trials[OWN], *best[: config.finalists]], tell)
    winner, verdict = choose_winner(plan.objective, trials, finalists)
    best_yaml = f"# {verdict}\n{yaml.safe_dump(nested(winner.settings), sort_keys=False)}"
    write_table(stage.file(TRIALS_FILE), trials_table(plan.space, list(trials.values())))
    storage.write_json(stage.file(FINALISTS_FILE), [asdict(finalist) for finalist in finalists])
    storage.write_bytes(stage.file(BEST_FILE), best_yaml.encode())
    statuses = Counter(trial.status for trial in trials.values())
    stage.publish(
        {
            "rows_in": len(trials),
            "rows_out": statuses["complete"],
            "quarantined": 0,
            "seconds": time.monotonic() - started,
            "seconds_trials": seconds_trials,
            "statuses": dict(sorted(statuses.items())),
            "objective": plan.objective,
            "images": plan.sample,
            "best_trial": winner.number,
            "kept_own": winner.number == OWN,
            "verdict": verdict,
            "region_scores": plan.region_scores.path,
            "space": plan.space.fingerprint(),
        }
    )
    # trials.parquet has the trials, and the finalists' students saw a part of the images each.
    for name in (TRIALS_FOLDER, START, FOLDER):
        storage.remove_tree(stage.file(name))
    return stage


def _searched(
    plan: Plan,
    on_trial: OnTrial | None,
    on_features: ImagesDone | None,
    tell: Callable[[str], None],
) -> tuple[Judging, dict[int, Trial]]:
    """Run the trials that are left; returns what finalists are compared by, and all trials."""
    config, space, folder = plan.run.config, plan.space, plan.stage.path
    if config.sweep.train == "full":
        scores, classes = plan.region_scores.path, plan.run.class_table
        judging = load_judging(config, classes, scores, plan.validation)
        training = full_training(plan, judging)
        work = partial(curve_work, training)
        return judging, search(config.sweep, space, work, folder=folder, on_trial=on_trial)
    data = load_data(plan, tell, on_features)
    parameters = {"data": data}
    return data, run_trials(
        config.sweep,
        space,
        one_trial,
        plan.objective,
        folder=folder,
        parameters=parameters,
        on_trial=on_trial,
    )


def load_data(
    plan: Plan, tell: Callable[[str], None] = lambda text: None, progress: ImagesDone | None = None
) -> SweepData:
    """Compute the image features that are missing, and read everything that trials need."""
    config = plan.run.config
    features = plan_features(
        config.train.features,
        plan.run.run_dir,
        start_student(plan, plan.stage.file(START)),
        plan.all_images(),
        flipped=plan.flipped,
    ).run(progress)
    tell(f"features of {features.stats['rows_out']} images -> {features.path}")
    scores, classes = plan.region_scores.path, plan.run.class_table
    return load_sweep_data(config, classes, scores, features.path, plan.validation)


def start_student(plan: Plan, folder: str) -> str:
    """Store the zero-shot student in a folder of its own, and return its path."""
    run = plan.run.changed({"run_dir": folder, "train": {"labels": "none"}})
    return plan_train(run, None).run().path


def one_trial(data: SweepData, settings: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Run a trial with one seed, on one CPU: as many trials run at a time as there are CPUs."""
    torch.set_num_threads(1)
    return run_trial(data, settings, seed)


def require_results(trials: Mapping[int, Trial]) -> None:
    """Raise DataError when the run's own settings led to nothing, with the reasons."""
    if trials[OWN].status == "complete":
        return
    reasons = [trial.message for trial in trials.values() if trial.message]
    raise DataError(
        f"the run's own settings led to nothing that could be compared: {trials[OWN].message};"
        f" {len(reasons)} of {len(trials)} trials failed ({'; '.join(sorted(set(reasons))[:3])})"
    )


def choose_winner(
    objective: str, trials: Mapping[int, Trial], finalists: Sequence[Finalist]
) -> tuple[Trial, str]:
    """Return the best trial, the run's own unless another beats it, and that in a sentence.

    Settings differ by chance too, so a gain has to be clear of its standard error: that of the
    difference over classes for finalists, over seeds where trials alone decide.
    """
    if finalists:
        values = {f.number: f.value for f in finalists if f.value is not None}
        errors = {f.number: f.gain_error for f in finalists if f.gain_error is not None}
        what = f"{finalists[0].objective} of students trained in full"
    else:
        complete = {t.number: t for t in best_first(trials) if t.objective is not None}
        values = {n: t.objective for n, t in complete.items() if t.objective is not None}
        errors = {n: seeds_error(t, complete[OWN]) for n, t in complete.items()}
        what = f"{objective} of the trials"
    own = values.pop(OWN)
    gains = {n: value - own for n, value in values.items()}
    better = [n for n, gain in gains.items() if gain > SURE * errors.get(n, float("inf"))]
    if better:
        best = max(better, key=lambda number: gains[number])
        against = f"{what} {values[best]:.4f} against {own:.4f}, {_gain(gains, errors, best)}"
        return trials[best], f"trial {best} beats the run's own settings: {against}"
    rival = ""
    if gains:
        best = max(gains, key=lambda number: gains[number])
        rival = f"; the best other had {values[best]:.4f}"
        if gains[best] > 0:
            rival += f", {_gain(gains, errors, best)}, which chance gives too"
    return trials[OWN], f"the run's own settings are kept: {what} {own:.4f}{rival}"


def seeds_error(trial: Trial, other: Trial) -> float:
    """Return the standard error of the difference of two trials' objectives over their seeds.

    Infinite for fewer than two seeds in common.
    """
    count = min(len(trial.reports), len(other.reports))
    if count < 2:
        return float("inf")
    # A report is the mean so far: the seeds' own values are the steps of their sums.
    sums = np.arange(1, count + 1) * (np.subtract(trial.reports[:count], other.reports[:count]))
    return float(np.diff(sums, prepend=0.0).std(ddof=1) / np.sqrt(count))


def _gain(gains: Mapping[int, float], errors: Mapping[int, float], number: int) -> str:
    return f"a gain of {gains[number]:.4f} with a standard error of {errors[number]:.4f}"


def trials_table(space: Space, trials: Sequence[Trial]) -> pa.Table:
    """Return one row a trial: number, status, objective, its course, settings and metrics."""
    names = sorted({name for trial in trials for name in trial.metrics} - {"seconds"})
    columns = {
        p.name: _typed([trial.settings[p.name] for trial in trials]) for p in space.parameters
    }
    schema = trials_schema({name: column.type for name, column in columns.items()}, names)
    rows: dict[str, Any] = {
        "trial": [trial.number for trial in trials],
        "status": [trial.status for trial in trials],
        "objective": [trial.objective for trial in trials],
        "reports": [list(trial.reports) for trial in trials],
        "seconds": [trial.seconds for trial in trials],
        "message": [trial.message for trial in trials],
        **columns,
        **{name: [trial.metrics.get(name) for trial in trials] for name in names},
    }
    return pa.table([pa.array(rows[f.name], f.type) for f in schema], schema=schema)


def _typed(values: list[Any]) -> pa.Array:
    """Return values as a column of their type, or as JSON where they have no common one."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else json.dumps(value) for value in values])


def find_sweep(path: str) -> StageFolder:
    """Return the finished sweep at a path, or the latest of the run directory there.

    DataError when there is none.
    """
    path = storage.absolute(path)
    if path.rstrip("/").rpartition("/")[2].startswith(f"{TABLE}-"):
        return given_stage(path, TABLE)
    return require_stage(path, TABLE, "sweep")


def best_overrides(sweep: StageFolder) -> list[str]:
    """Return a sweep's best settings as `section={...}`, as on a command line."""
    values = yaml.safe_load(storage.read_bytes(sweep.file(BEST_FILE)))
    return [f"{section}={json.dumps(inner)}" for section, inner in values.items()]
