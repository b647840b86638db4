"""The stages in order: each reads what the one before published and publishes in turn.

Every function takes the whole configuration, finds its input in the run directory (or takes
it by path), names its output folder by a hash of the settings and inputs that make it, and
returns that folder at once when it is finished already. Ray is expected to be up where a stage
needs it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.classes import ClassTable, load_class_table
from hts_ray.config import HtsConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.labels.corrections import overrides_key
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, content_hash, find_stage, require_stage, settings_hash
from hts_ray.store.tables import (
    ANNOTATION_COLUMNS,
    MANIFEST_SCHEMA,
    check_table,
    read_table,
    require_unique_ids,
    write_table,
)

Progress = Callable[[int, int, int], None]
TrainProgress = Callable[[Mapping[str, Any]], None]


class Watch(Protocol):
    """Gives the callbacks that show how long stages go; `hts_ray.engine.console.Steps` is one."""

    def images(self, title: str) -> Progress:
        """Return a callback (done, total, quarantined) for a stage over images."""

    def epochs(self, title: str, epochs: int) -> TrainProgress:
        """Return a callback for the records of a training's epochs."""


@dataclass(frozen=True)
class Run:
    """A run directory with its settings and classes."""

    config: HtsConfig
    class_table: ClassTable

    @property
    def run_dir(self) -> str:
        """Absolute path or URI of the run directory."""
        return storage.absolute(self.config.run_dir)

    def stage(self, table: str, key: str) -> StageFolder:
        """Return the folder of a stage."""
        return StageFolder(self.run_dir, table, key)


def open_run(config: HtsConfig) -> Run:
    """Load the classes of a configuration; remote class files are fetched first."""
    classes = config.classes
    source = classes.source
    if storage.is_remote(source):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "classes.csv"
            local.write_bytes(storage.read_bytes(source))
            return Run(config, load_class_table(str(local), classes.ids))
    return Run(config, load_class_table(source, classes.ids))


def prepare(run: Run, source: str, root: str, progress: Progress | None = None) -> StageFolder:
    """Write the manifest of a HICO download (`hico`) or a plain folder (`folder`).

    The output folder is named by the manifest's content. Raises DataError when no image is usable.
    """
    config = run.config.prepare
    if source == "hico":
        from hts_ray.images.hico import read_hico

        prepared = read_hico(root, splits=config.splits, workers=config.workers, progress=progress)
    elif source == "folder":
        from hts_ray.images.folder import read_folder

        prepared = read_folder(
            root,
            config.split,
            follow_symlinks=config.follow_symlinks,
            workers=config.workers,
            progress=progress,
        )
    else:
        raise ConfigError(field="source", value=source, remedy="choose hico or folder")
    stage = run.stage("manifest", content_hash(prepared.manifest))
    if not stage.finished:
        write_table(stage.file("manifest.parquet"), prepared.manifest)
        write_table(stage.file("quarantine", "part-0.parquet"), prepared.quarantine)
    if not len(prepared.manifest):
        raise DataError(f"no usable image under {root}: {_counts(prepared.counts)}")
    # Published on every call: the latest manifest is the one that later stages take.
    stage.publish(
        {
            **prepared.counts,
            "rows_in": len(prepared.manifest) + len(prepared.quarantine),
            "rows_out": len(prepared.manifest),
            "quarantined": len(prepared.quarantine),
            "root": storage.absolute(root),
        }
    )
    return stage


def manifest_path(run: Run, given: str | None = None) -> str:
    """Return the Parquet file of a given manifest, or of the run's latest."""
    if given is None:
        return require_stage(run.run_dir, "manifest", "prepare").file("manifest.parquet")
    path = storage.absolute(given)
    return path if path.endswith(".parquet") else storage.join(path, "manifest.parquet")


def read_manifest(path: str) -> pa.Table:
    """Read and check a manifest; DataError naming what is wrong with it."""
    table = check_table(read_table(path), MANIFEST_SCHEMA, path)
    require_unique_ids(table, path)
    return table


def label_stage(run: Run, manifest: str) -> StageFolder:
    """Return the folder that the label stage writes to, without running anything.

    Annotations are left out of its key: the teacher must not see them.
    """
    from hts_ray.teacher.actor import region_sources
    from hts_ray.teacher.models.loading import model_fingerprint

    images = read_manifest(manifest).drop_columns(list(ANNOTATION_COLUMNS))
    label = run.config.label
    key = settings_hash(
        label.answer_settings(),
        run.class_table.fingerprint(),
        content_hash(images),
        model_fingerprint(label.teacher),
        region_sources(label.regions),
    )
    return run.stage("region_scores", key)


def label(run: Run, manifest: str, progress: Progress | None = None) -> StageFolder:
    """Score every class prompt on every region of the manifest's images."""
    from hts_ray.teacher.stage import label_images

    stage = label_stage(run, manifest)
    label_images(
        run.config.label,
        manifest_path=manifest,
        class_table=run.class_table,
        stage=stage,
        progress=progress,
    )
    return stage


def region_scores_stage(run: Run, given: str | None = None) -> StageFolder:
    """Return a given region_scores folder, or the run's latest."""
    if given is None:
        return require_stage(run.run_dir, "region_scores", "label")
    return given_stage(given, "region_scores")


def filter_stage(
    run: Run, region_scores: StageFolder, opinions: StageFolder | None = None
) -> StageFolder:
    """Return the folder that the filter stage writes to; `opinions` is a student_scores folder."""
    parts = [
        run.config.filter.answer_settings(),
        run.config.train.split,
        region_scores.key,
        run.class_table.fingerprint(),
    ]
    if opinions is not None:
        mixing = run.config.self_training.answer_settings()
        del mixing["rounds"]  # a further round does not change what the earlier ones answer
        parts += [mixing, opinions.key]
    if run.config.filter.overrides is not None:
        parts += ["overrides", overrides_key(run.config.filter.overrides)]
    return run.stage("pseudo_labels", settings_hash(*parts))


def filter_labels(
    run: Run, region_scores: StageFolder, opinions: StageFolder | None = None
) -> StageFolder:
    """Turn regional scores into pseudo-labels, with a student's `opinions` where they are given."""
    from hts_ray.labels.stage import filter_regions

    stage = filter_stage(run, region_scores, opinions)
    class_ids = stored_class_ids(region_scores)
    opinion = None
    if opinions is not None:
        from hts_ray.self_training import SecondOpinion
        from hts_ray.student.region_scoring import StudentScores

        scores = StudentScores(opinions.path)
        opinion = SecondOpinion(scores, class_ids, run.config.self_training)
    filter_regions(
        run.config.filter,
        region_scores_path=region_scores.path,
        class_ids=class_ids,
        split=run.config.train.split,
        stage=stage,
        opinion=opinion,
    )
    return stage


def stored_class_ids(stage: StageFolder) -> np.ndarray:
    """Return the class ids (C,) of a stage's score columns, in their order."""
    ids = storage.read_json(stage.file("table.json"))["class_ids"]
    return np.asarray(ids, dtype=np.int16)


def training_labels(run: Run, source: StageFolder | None, manifest: str | None) -> pa.Table | None:
    """Return what the student learns from: image_id, uri, positive_ids, ignored_ids.

    With `train.soft_labels` the positives' probability comes with them.
    `train.labels` decides: pseudo-labels come from the filter stage alone and no manifest is
    opened; annotations from the manifest, unknown counting as negative as HICO's protocol has
    it; none gives None.
    """
    train = run.config.train
    if train.labels == "none":
        return None
    columns = ["image_id", "uri", "positive_ids", "ignored_ids"]
    if train.labels == "pseudo":
        columns += ["probability"] if train.soft_labels else []
        folder = source or require_stage(run.run_dir, "pseudo_labels", "filter")
        table = read_table(folder.path, columns=[*columns, "split"])
        return table.filter(pc.equal(table["split"], train.split)).select(columns)
    table = read_manifest(manifest or manifest_path(run))
    chosen = table.filter(
        pc.and_(pc.equal(table["split"], train.split), table["positive_ids"].is_valid())
    )
    if not len(chosen):
        raise DataError(f"train.labels=annotations: no annotated image in split {train.split!r}")
    return chosen.rename_columns(
        ["ignored_ids" if name == "ambiguous_ids" else name for name in chosen.column_names]
    ).select(columns)


def train_stage(run: Run, labels: pa.Table | None) -> StageFolder:
    """Return the folder that training on these labels writes to."""
    key = settings_hash(
        run.config.train.answer_settings(),
        run.config.student.answer_settings(),
        student_source_fingerprint(run),
        run.config.seed,
        run.class_table.fingerprint(),
        None if labels is None else content_hash(labels),
    )
    return run.stage("student", key)


def student_source_fingerprint(run: Run) -> str:
    """Return a hash of the files that a locally stored starting point consists of."""
    from hts_ray.student.model import source_fingerprint

    return source_fingerprint(run.config.student)


def validation_rows(run: Run, manifest: str | None) -> pa.Table | None:
    """Return the annotated rows of `train.validation_split`, or None when it is not set.

    DataError when the split has none.
    """
    split = run.config.train.validation_split
    if split is None:
        return None
    table = read_manifest(manifest or manifest_path(run))
    chosen = table.filter(
        pc.and_(pc.equal(table["split"], split), table["positive_ids"].is_valid())
    )
    if not len(chosen):
        raise DataError(f"train.validation_split={split}: no image of the manifest is annotated")
    return chosen


def train(
    run: Run,
    labels: pa.Table | None,
    progress: TrainProgress | None = None,
    validation: pa.Table | None = None,
) -> StageFolder:
    """Fine-tune the student on `labels`; None stores the zero-shot student.

    `validation`, annotated rows of a manifest, is measured while the training runs.
    """
    from hts_ray.student.train import train_student

    stage = train_stage(run, labels)
    train_student(
        config=run.config.train,
        student_config=run.config.student,
        class_table=run.class_table,
        labels=labels,
        stage=stage,
        seed=run.config.seed,
        validation=validation,
        progress=progress,
    )
    return stage


def student_path(run: Run, given: str | None = None) -> str:
    """Return a given student folder, or the run's latest."""
    if given is not None:
        return storage.absolute(given)
    return require_stage(run.run_dir, "student", "train").path


def student_scores(
    run: Run, region_scores: StageFolder, student: StageFolder, progress: Progress | None = None
) -> StageFolder:
    """Score the training split's regions with a student; returns the student_scores folder."""
    from hts_ray.student.checkpoints import student_fingerprint
    from hts_ray.student.region_scoring import score_regions

    images, split = run.config.label.images, run.config.train.split
    key = settings_hash(
        region_scores.key, student_fingerprint(student.path), images.answer_settings(), split
    )
    stage = run.stage("student_scores", key)
    score_regions(
        run.config.self_training,
        images=images,
        student_path=student.path,
        region_scores_path=region_scores.path,
        split=split,
        stage=stage,
        progress=progress,
    )
    return stage


def self_train(
    run: Run,
    region_scores: StageFolder,
    student: StageFolder,
    *,
    validation: pa.Table | None = None,
    on_stage: Callable[[str, StageFolder], None] | None = None,
    watch: Watch | None = None,
) -> tuple[StageFolder, StageFolder]:
    """Let `student` help to filter, and train anew: `self_training.rounds` times.

    Every round's student starts from the zero-shot one. Returns the last pseudo-labels and
    student. Raises ConfigError unless the student learns from pseudo-labels, in one round or more.
    """
    check_self_training(run.config)
    tell = on_stage or (lambda name, stage: None)
    for _ in range(run.config.self_training.rounds):
        opinions = student_scores(run, region_scores, student, _images(watch, "student scores"))
        tell("student scores", opinions)
        labels = filter_labels(run, region_scores, opinions)
        tell("filter", labels)
        student = train(run, training_labels(run, labels, None), _epochs(watch, run), validation)
        tell("train", student)
    return labels, student


def check_self_training(config: HtsConfig) -> None:
    """Raise ConfigError for settings under which `self_train` has nothing to do."""
    rounds, labels = config.self_training.rounds, config.train.labels
    if rounds == 0:
        raise ConfigError(field="self_training.rounds", value=rounds, remedy="give 1 or more")
    if labels != "pseudo":
        raise ConfigError(
            "a student can help with pseudo-labels only",
            field="self_training.rounds",
            value=rounds,
            remedy=f"set 0, or train.labels=pseudo instead of {labels}",
        )


def predict_stage(run: Run, student: str, manifest: str) -> StageFolder:
    """Return the folder that predicting with this student on this manifest writes to."""
    images = read_manifest(manifest).drop_columns(list(ANNOTATION_COLUMNS))
    weights = storage.join(student, "student.json")
    if not storage.exists(weights):
        raise DataError(f"no student at {student}: `hts train` writes one")
    key = settings_hash(
        run.config.predict.answer_settings(),
        student.rsplit("/", 1)[-1],
        storage.read_json(weights),
        content_hash(images),
    )
    return run.stage("predictions", key)


def predict(run: Run, student: str, manifest: str, progress: Progress | None = None) -> StageFolder:
    """Score images with a student."""
    from hts_ray.student.predict import predict_images

    stage = predict_stage(run, student, manifest)
    predict_images(
        config=run.config.predict,
        student_path=student,
        manifest_path=manifest,
        stage=stage,
        progress=progress,
    )
    return stage


def evaluate(
    run: Run, predictions: str, annotations: str, split: str = "test", name: str = ""
) -> dict[str, Any]:
    """Return the HICO metrics of a predictions table, and publish them in the run directory."""
    from hts_ray.evaluate import evaluate_scores, read_annotations, read_predictions

    ids, scores_NC = read_predictions(predictions, run.class_table)
    truth = read_annotations(annotations, run.class_table, split)
    result = evaluate_scores(ids, scores_NC, truth, run.class_table).to_dict()
    publish_metrics(run, result, predictions, annotations, split, name)
    return result


def publish_metrics(
    run: Run, result: dict[str, Any], scores: str, annotations: str, split: str, name: str
) -> None:
    """Store metrics in the run directory, with what they were measured on."""
    result.update(class_ids=run.class_table.ids.tolist(), predictions=scores)
    if name:
        result["name"] = name
    stage = run.stage("evaluation", settings_hash(scores, annotations, split))
    storage.write_json(stage.file("metrics.json"), result)
    rows = result["num_images"]
    stage.publish({"rows_in": rows, "rows_out": rows, "quarantined": 0})


def run_all(
    run: Run,
    manifest: str,
    *,
    on_stage: Callable[[str, StageFolder], None] | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Run label, filter, train, predict and, where there are annotations, evaluate.

    With `self_training.rounds` the student helps to filter and is trained anew in between.
    Returns the metrics, or an empty dict without annotations.
    """
    if run.config.self_training.rounds:
        check_self_training(run.config)
    tell = on_stage or (lambda name, stage: None)
    scores = label(run, manifest, _images(watch, "label"))
    tell("label", scores)
    source = filter_labels(run, scores)
    tell("filter", source)
    validation = validation_rows(run, manifest)
    student = train(run, training_labels(run, source, manifest), _epochs(watch, run), validation)
    tell("train", student)
    if run.config.self_training.rounds:
        _, student = self_train(
            run,
            scores,
            student,
            validation=validation,
            on_stage=tell,
            watch=watch,
        )
    predictions = predict(run, student.path, manifest, _images(watch, "predict"))
    tell("predict", predictions)
    split = run.config.predict.split or "test"
    if not is_annotated(manifest, split):
        return {}
    return evaluate(run, predictions.path, manifest, split)


def is_annotated(manifest: str, split: str) -> bool:
    """Tell whether any image of a split has annotations."""
    table = read_manifest(manifest)
    known = pc.and_(pc.equal(table["split"], split), table["positive_ids"].is_valid())
    return bool(pc.any(known).as_py())


def _images(watch: Watch | None, title: str) -> Progress | None:
    return None if watch is None else watch.images(title)


def _epochs(watch: Watch | None, run: Run) -> TrainProgress | None:
    return None if watch is None else watch.epochs("train", run.config.train.epochs)


def stage_overview(run_dir: str) -> list[tuple[str, StageFolder | None]]:
    """Return the latest finished folder of every stage, in order."""
    tables = ("manifest", "region_scores", "pseudo_labels", "student", "predictions", "evaluation")
    return [(table, find_stage(run_dir, table)) for table in tables]


def given_stage(path: str, table: str) -> StageFolder:
    """Return the finished stage folder at `path`; DataError when it is another table's."""
    folder, _, name = storage.absolute(path).rstrip("/").rpartition("/")
    if not name.startswith(f"{table}-"):
        raise DataError(f"{path} is not a {table} folder: its name must start with {table}-")
    stage = StageFolder(folder, table, name.removeprefix(f"{table}-"))
    if not stage.finished:
        raise DataError(f"{path} is not finished: run the stage again, it resumes")
    return stage


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in counts.items())
