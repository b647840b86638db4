"""The stages as functions of a configuration, for notebooks and scripts.

Each does what the command of the same name does: it finds its input in the run directory unless it
is given, shows how it goes, and returns the folder it wrote, at once where that is finished
already. `read()` of a folder is its Arrow table, `stats` what was counted.

    from hts_ray import stages

    config = stages.settings("own-images", run_dir="runs/mine", classes={"source": "classes.csv"})
    stages.prepare(config, "folder", "photos")
    stages.label(config)
    stages.filter_labels(config)
    stages.train(config)
    stages.predict(config).read().to_pandas()

Ray is joined or started by every stage that needs it, and once for all of them by `start`.
"""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from typing import Any

import yaml

from hts_ray import pipeline
from hts_ray.config import HtsConfig, load_config, override
from hts_ray.engine.console import image_progress, steps
from hts_ray.engine.session import command_cluster
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, require_stage


def settings(preset: str | None = None, *, file: str | None = None, **values: Any) -> HtsConfig:
    """Return a configuration: a packaged preset, a YAML file, then settings, as nested mappings.

    `settings("demo", run_dir="runs/mine", train={"epochs": 3})`. Raises ConfigError naming the
    field, its value and the remedy.
    """
    return load_config(preset=preset, file=file, extra=values)


def changed(config: HtsConfig, **values: Any) -> HtsConfig:
    """Return a configuration with other settings: `changed(config, filter={"min_support": 2})`."""
    return override(config, values)


def class_names(config: HtsConfig) -> list[str]:
    """Return the names of the classes, in the order of every score."""
    return pipeline.open_run(config).class_table.names


def start(config: HtsConfig) -> None:
    """Join or start Ray for the rest of this process, as `config.ray` says."""
    stack = ExitStack()
    stack.enter_context(command_cluster(config, "pipeline"))
    atexit.register(stack.close)


def prepare(config: HtsConfig, source: str, root: str) -> StageFolder:
    """Write the manifest of a HICO download (`hico`) or a folder of images (`folder`).

    Raises DataError when no image is usable.
    """
    with image_progress("prepare") as progress:
        run = pipeline.open_run(config)
        stage = pipeline.prepare(run, source, root, progress)
    _record(run)
    return stage


def label(config: HtsConfig, manifest: StageFolder | None = None) -> StageFolder:
    """Let the teacher score every class on every region of the images."""
    run, path = _with_manifest(config, manifest)
    _record(run, teacher_model=config.label.teacher.model)
    cluster = command_cluster(config, "label", manifest=path)
    with cluster, image_progress("label") as progress:
        return pipeline.label(run, path, progress)


def filter_labels(config: HtsConfig, region_scores: StageFolder | None = None) -> StageFolder:
    """Turn the teacher's scores into pseudo-labels."""
    run = pipeline.open_run(config)
    stage = pipeline.filter_labels(run, region_scores or pipeline.region_scores_stage(run))
    _record(run)
    return stage


def train(
    config: HtsConfig,
    pseudo_labels: StageFolder | None = None,
    manifest: StageFolder | None = None,
) -> StageFolder:
    """Fine-tune the student on what `train.labels` says: pseudo, annotations or none (zero-shot).

    `manifest` is where annotations and the images of `train.validation_split` come from.
    """
    run = pipeline.open_run(config)
    path = None if manifest is None else pipeline.manifest_path(run, manifest.path)
    labels = pipeline.training_labels(run, pseudo_labels, path)
    validation = pipeline.validation_rows(run, path)
    _record(run, student_model=config.student.model)
    cluster = command_cluster(config, "train", labels=labels)
    with cluster, steps() as shown:
        epochs = shown.epochs("train", config.train.epochs)
        return pipeline.train(run, labels, epochs, validation)


def sweep(config: HtsConfig, region_scores: StageFolder | None = None) -> StageFolder:
    """Try many settings of filter and training; `with_best` takes those that did best."""
    from hts_ray.sweep.progress import features_progress, sweep_progress
    from hts_ray.sweep.stage import plan_sweep, run_sweep

    run = pipeline.open_run(config)
    plan = plan_sweep(run, region_scores or pipeline.region_scores_stage(run))
    _record(run)
    cluster = command_cluster(config, "sweep")
    with cluster, sweep_progress(plan) as on_trial:
        return run_sweep(plan, on_trial=on_trial, on_features=features_progress())


def with_best(config: HtsConfig, sweep: StageFolder) -> HtsConfig:
    """Return the configuration with a sweep's best settings."""
    from hts_ray.sweep.stage import BEST_FILE

    return override(config, yaml.safe_load(storage.read_bytes(sweep.file(BEST_FILE))) or {})


def predict(
    config: HtsConfig,
    student: StageFolder | None = None,
    manifest: StageFolder | None = None,
) -> StageFolder:
    """Score the images of `predict.split` with a student, all classes each."""
    run, path = _with_manifest(config, manifest)
    source = pipeline.student_path(run, None if student is None else student.path)
    cluster = command_cluster(config, "predict", manifest=path, student=source)
    with cluster, image_progress("predict") as progress:
        return pipeline.predict(run, source, path, progress)


def evaluate(
    config: HtsConfig,
    predictions: StageFolder | None = None,
    manifest: StageFolder | None = None,
    split: str = "test",
) -> dict[str, Any]:
    """Return HICO's metrics of predictions on the annotated images of a split.

    `mAP`, `mAP_known_object`, `few@10` and more, in [0, 1]; `ap` by class.
    """
    run, path = _with_manifest(config, manifest)
    scored = predictions or require_stage(run.run_dir, "predictions", "predict")
    return pipeline.evaluate(run, scored.path, path, split)


def report(config: HtsConfig, path: str | None = None, max_images: int = 200) -> str:
    """Write the page that `hts report` writes, and return its path."""
    from hts_ray.report import report_for_run, write_report

    run_dir = storage.absolute(config.run_dir)
    path = path or storage.join(run_dir, "report.html")
    write_report(path, report_for_run(run_dir, max_images))
    return path


def _with_manifest(config: HtsConfig, manifest: StageFolder | None) -> tuple[pipeline.Run, str]:
    run = pipeline.open_run(config)
    return run, pipeline.manifest_path(run, None if manifest is None else manifest.path)


def _record(run: pipeline.Run, **more: Any) -> None:
    from hts_ray.store.provenance import write_provenance

    write_provenance(run.config, run.class_table, **more)
