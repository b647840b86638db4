"""The sweep stage: region scores in, tried settings and the best of them out.

Trials fit classifiers on cached features (`hts_ray.sweep.tune`); the best few are trained in
full by the normal stages (`hts_ray.sweep.finalists`) and must then beat the run's own settings,
or these are kept. Everything lies in one folder, named by settings and inputs, that a sweep which
was cut off goes on in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.labels.stage import plan_filter
from hts_ray.store import storage
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.run import StageFolder, content_hash, given_stage, require_stage, settings_hash
from hts_ray.store.tables import read_table, trials_schema, write_table
from hts_ray.student.model import source_fingerprint
from hts_ray.student.train import plan_train
from hts_ray.sweep.finalists import FOLDER, Finalist, labeled_among, run_finalists
from hts_ray.sweep.log import OWN, TRIALS_FOLDER, Trial, best_first, promising_first
from hts_ray.sweep.objectives import DEFAULT_OBJECTIVE, OBJECTIVES
from hts_ray.sweep.proposals import make_proposer
from hts_ray.sweep.space import Settings, Space, build_space, nested
from hts_ray.sweep.trial import VALIDATION

if TYPE_CHECKING:
    from hts_ray.sweep.trial import SweepData

TABLE = "sweep"
TRIALS_FILE = "trials.parquet"
FINALISTS_FILE = "finalists.json"
BEST_FILE = "best.yaml"
START = "start"  # the folder of the zero-shot student
_IMAGE_COLUMNS = ["image_id", "uri", "split"]
# Standard errors that a gain on labeled images has to exceed: a one-sided test at 5 %.
_SURE = 1.645


@dataclass(frozen=True)
class Plan:
    """A sweep that was checked and not run yet.

    `images` has image_id, uri and split of the images that trials train on, `validation` the
    annotated rows of the labeled images, or is None.
    """

    run: Run
    region_scores: StageFolder
    space: Space
    objective: str
    images: pa.Table
    validation: pa.Table | None
    stage: StageFolder


def plan_sweep(run: Run, region_scores: StageFolder) -> Plan:
    """Check everything that a sweep needs, without Ray, and name its folder.

    Raises ConfigError for wrong settings, values, objectives or labels; DataError when there is
    no image, or no labeled one.
    """
    config = run.config
    if config.train.labels != "pseudo":
        raise ConfigError(
            field="train.labels",
            value=config.train.labels,
            remedy="a sweep tries settings of pseudo-labels: set train.labels=pseudo",
        )
    space = build_space(config, region_scores.path)
    if config.sweep.search == "optuna":
        make_proposer(config.sweep, space)  # refuses early where it is not installed
    validation = None
    if config.sweep.validation is not None:
        validation = labeled_images(run, config.sweep.validation)
    objective = _objective(config.sweep.objective, validation is not None)
    images = scored_images(region_scores, config.train.split)
    if validation is not None:
        labeled_among(images["image_id"].to_numpy(), validation, config.sweep)
    own = {"space", "validation", "objective"}
    key = settings_hash(
        {name: v for name, v in config.sweep.answer_settings().items() if name not in own},
        space.fingerprint(),
        objective,
        None if validation is None else content_hash(validation),
        plan_filter(run, region_scores).folder.key,  # scores, classes, corrections, settings
        config.train.answer_settings(),
        config.student.answer_settings(),
        source_fingerprint(run.config.student),
        config.seed,
    )
    stage = run.stage(TABLE, key)
    return Plan(run, region_scores, space, objective, images, validation, stage)


def _objective(name: str | None, labeled: bool) -> str:
    if name is None:
        return VALIDATION if labeled else DEFAULT_OBJECTIVE
    known = [*OBJECTIVES, *([VALIDATION] if labeled else [])]
    if name == VALIDATION and not labeled:
        raise ConfigError(
            field="sweep.objective", value=name, remedy="it needs sweep.validation=PATH"
        )
    if name not in known:
        raise ConfigError(
            field="sweep.objective", value=name, remedy=f"choose one of {', '.join(known)}"
        )
    return name


def scored_images(region_scores: StageFolder, split: str) -> pa.Table:
    """Return image_id, uri and split of the images of a split that the teacher scored, by id.

    DataError when there is none.
    """
    table = read_table(region_scores.path, [*_IMAGE_COLUMNS, "status"])
    chosen = table.filter(pc.and_(pc.equal(table["status"], "ok"), pc.equal(table["split"], split)))
    if not len(chosen):
        raise DataError(f"no scored image of split {split!r}: check train.split and label.splits")
    return chosen.select(_IMAGE_COLUMNS).sort_by("image_id").combine_chunks()


def labeled_images(run: Run, path: str) -> pa.Table:
    """Return the annotated rows of a manifest, by id; an `anno.mat` takes paths from the run's.

    `path` may be a folder that holds `manifest.parquet`, as `hts import-labels` writes one.
    DataError when there is no such row.
    """
    if path.endswith(".mat"):
        from hts_ray.images.hico import read_anno_table

        annotated = read_anno_table(path)
        known = run.manifest().table.select(["image_id", "uri"])
        joined = annotated.drop_columns(["uri"]).join(known, "image_id", join_type="inner")
        table = joined.select(annotated.column_names).cast(annotated.schema)
    else:
        table = run.manifest(path).table
    table = table.filter(table["positive_ids"].is_valid())
    if not len(table):
        raise DataError(f"sweep.validation={path}: no annotated image that the run knows")
    return table.sort_by("image_id").combine_chunks()


def run_sweep(
    plan: Plan,
    *,
    on_trial: Callable[[Trial], None] | None = None,
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
    data = load_data(plan, tell, on_features)
    trials = _run_trials(plan, data, on_trial)
    _require_results(trials)
    seconds_trials = time.monotonic() - started
    chosen = [trial for trial in promising_first(trials) if trial.number != OWN]
    chosen = chosen[: config.finalists]
    finalists = run_finalists(plan, data, [trials[OWN], *chosen], tell) if config.finalists else []
    winner, verdict = _winner(plan, trials, finalists)
    write_table(stage.file(TRIALS_FILE), trials_table(plan.space, list(trials.values())))
    storage.write_json(stage.file(FINALISTS_FILE), [finalist.to_dict() for finalist in finalists])
    storage.write_bytes(stage.file(BEST_FILE), _best_yaml(winner.settings, verdict).encode())
    stage.publish(
        {
            "rows_in": len(trials),
            "rows_out": sum(trial.status == "complete" for trial in trials.values()),
            "quarantined": 0,
            "seconds": time.monotonic() - started,
            "seconds_trials": seconds_trials,
            "statuses": _statuses(trials),
            "objective": plan.objective,
            "best_trial": winner.number,
            "kept_own": winner.number == OWN,
            "verdict": verdict,
            "region_scores": plan.region_scores.path,
            "space": plan.space.fingerprint(),
        }
    )
    # What only an unfinished sweep needs: trials.parquet has the trials, and the finalists'
    # students saw a part of the images each.
    for name in (TRIALS_FOLDER, START, FOLDER):
        storage.remove_tree(stage.file(name))
    return stage


def load_data(
    plan: Plan,
    tell: Callable[[str], None] = lambda text: None,
    progress: ImagesDone | None = None,
) -> SweepData:
    """Compute the image features that are missing, and read everything that trials need."""
    from hts_ray.student.features import ensure_features
    from hts_ray.sweep.trial import load_sweep_data

    config = plan.run.config
    student = start_student(plan, plan.stage.file(START))
    features = ensure_features(
        config.train.features,
        run_dir=plan.run.run_dir,
        student_path=student,
        images=all_images(plan),
        flipped=needs_flipped(plan),
        progress=progress,
    )
    tell(f"features of {features.stats['rows_out']} images -> {features.path}")
    return load_sweep_data(
        config,
        plan.run.class_table,
        plan.region_scores.path,
        features.path,
        config.sweep.seed,
        plan.validation,
    )


def needs_flipped(plan: Plan) -> bool:
    """Tell whether some trial trains on mirrored images."""
    own = plan.run.config.train.augment.flip
    return own or any(p.name == "train.augment.flip" for p in plan.space.parameters)


def start_student(plan: Plan, folder: str) -> str:
    """Store the zero-shot student in a folder of its own, and return its path."""
    values = {"run_dir": folder, "train": {"labels": "none"}}
    run = plan.run.changed(values)
    return plan_train(run, None).run().path


def all_images(plan: Plan) -> pa.Table:
    """Return image_id, uri and split of all images that a sweep looks at, each once."""
    if plan.validation is None:
        return plan.images
    more = plan.validation.select(_IMAGE_COLUMNS)
    new = more.filter(pc.invert(pc.is_in(more["image_id"], plan.images["image_id"])))
    return pa.concat_tables([plan.images, new.cast(plan.images.schema)]).combine_chunks()


def _run_trials(
    plan: Plan, data: SweepData, on_trial: Callable[[Trial], None] | None
) -> dict[int, Trial]:
    from hts_ray.sweep.tune import run_trials

    return run_trials(
        plan.run.config.sweep,
        plan.space,
        one_trial,
        plan.objective,
        folder=plan.stage.path,
        parameters={"data": data, "names": objectives_of(plan.objective)},
        on_trial=on_trial,
    )


def objectives_of(chosen: str) -> list[str]:
    """Return what a trial measures: what is compared, and what takes no students of half regions.

    Those are the dearest, for no other objective has a use for them.
    """
    return [
        name
        for name, objective in OBJECTIVES.items()
        if name == chosen or not objective.needs_view_students
    ]


def one_trial(
    data: SweepData, settings: Mapping[str, Any], seed: int, names: Sequence[str]
) -> dict[str, float]:
    """Run a trial with one seed; DataError when its filter leaves no positive."""
    import torch

    from hts_ray.sweep.trial import run_trial

    torch.set_num_threads(1)  # as many trials run at a time as there are CPUs
    result = run_trial(data, settings, seed, names)
    if result["positives_per_image"] == 0:
        raise DataError("the filter leaves no pseudo-label")
    return result


def _require_results(trials: Mapping[int, Trial]) -> None:
    if trials[OWN].status == "complete":
        return
    reasons = {trial.message for trial in trials.values() if trial.message}
    raise DataError(
        f"the run's own settings led to nothing that could be compared: {trials[OWN].message};"
        f" {sum(bool(trial.message) for trial in trials.values())} of {len(trials)} trials failed"
        f" ({'; '.join(sorted(reasons)[:3])})"
    )


def _winner(
    plan: Plan, trials: Mapping[int, Trial], finalists: Sequence[Finalist]
) -> tuple[Trial, str]:
    """Return the best trial, the run's own unless another beats it, and that in a sentence.

    A few labeled images tell settings apart by chance too, so with them the gain has to be clear of
    its standard error.
    """
    errors: dict[int, float] = {}
    if finalists:
        values = {f.number: f.value for f in finalists if f.value is not None}
        errors = {f.number: f.gain_error for f in finalists if f.gain_error is not None}
        what = f"{finalists[0].objective} of students trained in full"
    else:
        complete = best_first(trials)
        values = {t.number: t.objective for t in complete if t.objective is not None}
        what = f"{plan.objective} of the trials"
    own = values.pop(OWN)
    better = {n: v for n, v in values.items() if v - own > _SURE * errors.get(n, 0.0)}
    if better:
        best = max(better, key=lambda number: better[number])
        against = f"{what} {better[best]:.4f} against {own:.4f}"
        return trials[best], f"trial {best} beats the run's own settings: {against}"
    rival = ""
    if values:
        best = max(values, key=lambda number: values[number])
        chance = ", no more than chance gives" if values[best] > own else ""
        rival = f"; the best other had {values[best]:.4f}{chance}"
    return trials[OWN], f"the run's own settings are kept: {what} {own:.4f}{rival}"


def _statuses(trials: Mapping[int, Trial]) -> dict[str, int]:
    names = [trial.status for trial in trials.values()]
    return {name: names.count(name) for name in sorted(set(names))}


def _best_yaml(settings: Settings, verdict: str) -> str:
    return f"# {verdict}\n{yaml.safe_dump(nested(settings), sort_keys=False)}"


def trials_table(space: Space, trials: Sequence[Trial]) -> pa.Table:
    """Return one row a trial: number, status, objective, its course, settings and metrics."""
    names = sorted({name for trial in trials for name in trial.metrics} - {"seconds"})
    settings = [p.name for p in space.parameters]
    columns = {name: _typed([trial.settings[name] for trial in trials]) for name in settings}
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
    name = storage.absolute(path).rstrip("/").rpartition("/")[2]
    if name.startswith(f"{TABLE}-"):
        return given_stage(path, TABLE)
    return require_stage(storage.absolute(path), TABLE, "sweep")


def best_overrides(sweep: StageFolder) -> list[str]:
    """Return a sweep's best settings as `section.name=value`, as on a command line."""
    values = yaml.safe_load(storage.read_bytes(sweep.file(BEST_FILE)))
    return [f"{name}={json.dumps(value)}" for name, value in _flat(values)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found
