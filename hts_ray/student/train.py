"""Fine-tuning the student: Ray Data feeds it, Ray Train runs and restarts it.

The driver writes the zero-shot student, turns labels into a dataset of decoded images and starts
the workers; each worker runs `train_loop`. Every epoch is seeded by its number alone, so a run
that goes on from a checkpoint after a crash equals one that was never interrupted, and on CPUs
two runs with the same labels and seed give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.classes import ClassTable
from hts_ray.config import ImagesConfig, StudentConfig, TrainConfig
from hts_ray.engine.image_pass import (
    data_context,
    decode_batch,
    user_error,
    users_mistakes_unwrapped,
    write_quarantine,
)
from hts_ray.engine.run import Run, Stage
from hts_ray.engine.telemetry import Meter
from hts_ray.errors import ConfigError, DataError, UserError
from hts_ray.evaluate import label_matrix
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, content_hash, require_stage, settings_hash
from hts_ray.store.tables import QUARANTINE_SCHEMA, read_table, write_table
from hts_ray.student.loggers import check_loggers
from hts_ray.student.loop import dense_targets, train_loop
from hts_ray.student.progress import Progress, training_progress
from hts_ray.student.resume import (
    KEPT_CHECKPOINTS,
    MODEL,
    STATE,
    find_unlisted,
    read_files,
    read_local,
)

if TYPE_CHECKING:
    import ray.data

    from hts_ray.student.model import Student


_DECODE_ROWS = 32
_LOOP_COLUMNS = ("row", "positive", "ignored", "weight", "pixels")
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class TrainingSet:
    """What the labels come to: the rows to train on and what was left out.

    `table` has row, image_id, uri, and `positive` and `ignored` as positions in the class
    table, in training order, repeats included; with soft labels also `weight`, one a positive.
    """

    table: pa.Table
    images: int
    classes_with_positives: int
    dropped_ids: int


@dataclass(frozen=True)
class ValidationSet:
    """Images (row, image_id, uri) and their annotations (N, C) in {1, -1, 0, -2}."""

    table: pa.Table
    annotations_NC: npt.NDArray[np.int8]

    @classmethod
    def of(cls, manifest: pa.Table, class_table: ClassTable) -> ValidationSet:
        """Take annotated rows of a manifest."""
        table = manifest.select(["image_id", "uri"])
        table = table.append_column("row", pa.array(np.arange(len(table))))
        return cls(table.combine_chunks(), label_matrix(manifest, class_table))


def training_labels(
    run: Run, source: StageFolder | None = None, manifest: str | None = None
) -> pa.Table | None:
    """Return what the student learns from: image_id, uri, positive_ids, ignored_ids.

    With `train.soft_labels` the positives' probability comes with them. `train.labels` decides:

    - `pseudo`: the labels in `source`, or the run's latest; no manifest is opened;
    - `annotations`: those of the manifest, unknown counting as negative as HICO's protocol has it;
    - `none`: None.

    Raises DataError when there is nothing of the kind.
    """
    train = run.config.train
    if train.labels == "none":
        return None
    columns = ["image_id", "uri", "positive_ids", "ignored_ids"]
    if train.labels == "pseudo":
        columns += ["probability"] if train.soft_labels else []
        folder = source or require_stage(run.run_dir, "pseudo_labels", "filter")
        table = folder.read([*columns, "split"])
        return table.filter(pc.equal(table["split"], train.split)).select(columns)
    chosen = run.manifest(manifest).annotated(train.split)
    if not len(chosen):
        raise DataError(f"train.labels=annotations: no annotated image in split {train.split!r}")
    names = ["ignored_ids" if n == "ambiguous_ids" else n for n in chosen.column_names]
    return chosen.rename_columns(names).select(columns)


def validation_rows(run: Run, manifest: str | None = None) -> pa.Table | None:
    """Return the annotated rows of `train.validation_split`, or None when it is not set.

    DataError when the split has none.
    """
    split = run.config.train.validation_split
    if split is None:
        return None
    chosen = run.manifest(manifest).annotated(split)
    if not len(chosen):
        raise DataError(f"train.validation_split={split}: no image of the manifest is annotated")
    return chosen


def plan_train(run: Run, labels: pa.Table | None, validation: pa.Table | None = None) -> Stage:
    """Plan a training on labels; None stores the zero-shot student.

    `validation`, annotated rows of a manifest, is measured while the training runs.
    """
    from hts_ray.student.model import source_fingerprint

    config = run.config
    key = settings_hash(
        config.train.answer_settings(),
        config.student.answer_settings(),
        source_fingerprint(config.student),
        config.seed,
        run.class_table.fingerprint(),
        None if labels is None else content_hash(labels),
    )
    folder = run.stage("student", key)

    def work(progress: Progress | None) -> object:
        return train_student(
            config=config.train,
            student_config=config.student,
            class_table=run.class_table,
            labels=labels,
            stage=folder,
            seed=config.seed,
            validation=validation,
            progress=progress,
        )

    return Stage(folder, {"student": config.student.model, "labels": config.train.labels}, work)


def train_student(
    *,
    config: TrainConfig,
    student_config: StudentConfig,
    class_table: ClassTable,
    labels: pa.Table | None,
    stage: StageFolder,
    seed: int,
    validation: pa.Table | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune a student on labels and publish it in `stage`; returns the stage's stats.

    `labels` has image_id, uri, positive_ids and ignored_ids (class ids), and probability (one a
    positive) for soft labels; every other class is negative. None publishes the zero-shot
    student. `validation`, annotated rows of a manifest, are scored while the training runs. A
    run that was cut off goes on from its last checkpoint; a finished stage is returned as it is.
    `progress` gets the records that `student.progress` lists, from another thread. Raises
    DataError when no label or image can be used or the loss stops being finite, ConfigError for
    settings that do not fit together, UserError when the workers kept failing.
    """
    if stage.finished:
        return stage.stats
    started = time.monotonic()
    _check_config(config, student_config)
    data = None if labels is None else training_set(labels, class_table, config, seed)
    initial = _write_initial(student_config, class_table, config, stage)
    if data is None:
        outcome: dict[str, Any] = {"history": [], "rows": 0}
        counts = {"rows_in": 0, "rows_out": 0, "quarantined": 0}
    else:
        fit = _fit_head if config.trainable == "head" else _fit
        task = _Task(
            config=config,
            student_config=student_config,
            num_classes=len(class_table),
            initial=initial,
            data=data,
            validation=None if validation is None else ValidationSet.of(validation, class_table),
            stage=stage,
            seed=seed,
            progress=progress,
        )
        outcome = fit(task)
        bad = _gather_quarantine(stage)
        Meter.of(stage, "train").count(quarantined=bad)
        counts = {
            "rows_in": data.images,
            "rows_out": data.images - bad,
            "quarantined": bad,
            "rows_trained": outcome["rows"],
            "classes_with_positives": data.classes_with_positives,
            "dropped_class_ids": data.dropped_ids,
        }
    _publish(config, initial, stage, seed, outcome)
    history = outcome["history"]
    seconds = time.monotonic() - started
    stage.publish(
        {
            **counts,
            "epochs": len(history),
            "final_loss": history[-1]["loss"] if history else None,
            "validation_mAP": history[-1].get("validation_mAP") if history else None,
            "seconds": seconds,
            "rows_per_second": history[-1]["images_per_second"] if history else 0.0,
        }
    )
    storage.remove_tree(_work(stage))  # optimizer states are as large as the model, twice
    return stage.stats


def estimate(
    config: TrainConfig,
    student_config: StudentConfig,
    class_table: ClassTable,
    labels: pa.Table | None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a few training steps on noise in this process and extrapolate; writes nothing.

    Returns images, images_per_epoch (repeats included), epochs, steps, device,
    seconds_per_step, seconds (without start-up and decoding) and gpu_hours; only images for
    the zero-shot student. Raises what training would raise for the same settings and labels.
    """
    if labels is None:
        return {"images": 0, "note": "the zero-shot student is stored without training"}
    _check_config(config, student_config)
    data = training_set(labels, class_table, config, seed)
    workers = max(1, config.num_workers)
    share = max(1, config.batch_size // workers)
    steps = config.epochs * max(1, -(-(len(data.table) // workers) // share))
    passes, gpus = steps, float(workers * config.use_gpu)
    if config.trainable == "head":  # an image and its mirror image pass through the tower once
        pool = config.features.pool
        passes = -(-data.images * (1 + config.augment.flip) // (share * pool.max_size))
        gpus = pool.num_gpus * pool.max_size
    device, per_step = _time_steps(config, student_config, class_table, share, gpus > 0)
    seconds = passes * per_step
    return {
        "images": data.images,
        "images_per_epoch": len(data.table),
        "classes_with_positives": data.classes_with_positives,
        "epochs": config.epochs,
        "steps": steps,
        "device": device,
        "seconds_per_step": round(per_step, 4),
        "seconds": seconds,
        "gpu_hours": seconds * gpus / 3600,
    }


def _time_steps(
    config: TrainConfig,
    student_config: StudentConfig,
    class_table: ClassTable,
    batch: int,
    use_gpu: bool,
) -> tuple[str, float]:
    """Return the device and the seconds of the second of two steps on a worker's batch."""
    import torch

    from hts_ray.losses import make_loss
    from hts_ray.student.model import build_student, parameter_groups, set_trainable

    device = "cuda" if use_gpu and torch.cuda.is_available() else "cpu"
    student = build_student(student_config, class_table).to(device)
    set_trainable(student, config.trainable, config.trainable_blocks)
    student.train()
    optimizer = torch.optim.AdamW(parameter_groups(student, config.optim))
    loss = make_loss(config.loss, config.loss_temperature, parameters=config.loss_parameters)
    loss.to(device)
    size = student.image_size
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.full((batch, len(class_table)), -1, dtype=torch.int8, device=device)
    targets[:, 0] = 1
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        loss(student(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    return device, seconds


def training_set(
    labels: pa.Table, class_table: ClassTable, config: TrainConfig, seed: int
) -> TrainingSet:
    """Map class ids to positions, repeat images for rare classes and fix the order by `seed`.

    Raises DataError when no image has a positive label, and ConfigError when soft labels are
    asked of labels without probabilities.
    """
    labels = labels.filter(labels["image_id"].is_valid())
    positive, known = _positions(labels["positive_ids"], class_table)
    ignored, known_ignored = _positions(labels["ignored_ids"], class_table)
    unknown_positive, unknown_ignored = int((~known).sum()), int((~known_ignored).sum())
    found = pc.list_flatten(positive)
    if not len(found):
        dropped = f" ({unknown_positive} are of other classes)" if unknown_positive else ""
        raise DataError(
            f"no image of {len(labels)} has a positive label{dropped}: lower"
            " filter.positive_threshold or filter.min_support, or check classes.source"
        )
    order = np.arange(len(labels))
    if config.min_positives_per_class:
        targets_NC = dense_targets(positive, ignored, len(class_table))
        order = repeat_indices(targets_NC, config.min_positives_per_class)
    order = np.random.default_rng(seed).permutation(order)
    columns = {
        "image_id": labels["image_id"],
        "uri": labels["uri"],
        "positive": positive,
        "ignored": ignored,
    }
    if config.soft_labels:
        columns["weight"] = _positive_weights(labels, positive, known)
    table = pa.table(columns).take(pa.array(order))
    table = table.append_column("row", pa.array(np.arange(len(order))))
    return TrainingSet(
        table.combine_chunks(),
        images=len(labels),
        classes_with_positives=len(pc.unique(found)),
        dropped_ids=unknown_positive + unknown_ignored,
    )


def repeat_indices(targets_NC: npt.NDArray[np.int8], least: int) -> npt.NDArray[np.int64]:
    """Return image indices in which every class with a positive has at least `least` of them.

    `targets_NC` (N, C) is 1 where positive. Each image occurs at least once, in ascending order;
    the images of a rare class are repeated in turn, rarest class first, and each repeat counts
    for all of its classes. Source: DEFR's training, with least = 40.
    """
    positive_NC = targets_NC == 1
    copies_N = np.ones(len(targets_NC), dtype=np.int64)
    counts_C = positive_NC.sum(axis=0).astype(np.int64)
    for c in np.argsort(counts_C, kind="stable"):
        owners = np.flatnonzero(positive_NC[:, c])
        lacking = least - int(counts_C[c])
        if len(owners) == 0 or lacking <= 0:
            continue
        extra = np.full(len(owners), lacking // len(owners), dtype=np.int64)
        extra[: lacking % len(owners)] += 1
        copies_N[owners] += extra
        counts_C += extra @ positive_NC[owners]
    return np.repeat(np.arange(len(targets_NC)), copies_N)


def class_weights(
    positive: pa.Array | pa.ChunkedArray, num_classes: int, power: float
) -> list[float] | None:
    """Return the classes' weights (C,) in the loss, or None for the same weight in all.

    `positive` holds the images' lists of class positions. A class's weight is proportional to
    its number of positives, repeats counted, to the power -`power`, and all weights' mean is 1: at
    power 1 every class's positives weigh the same together. A class without positives gets the
    smallest weight, since it has only negatives and there is nothing to make up for.
    """
    if not power:
        return None
    found = pc.list_flatten(positive).to_numpy(zero_copy_only=False)
    counts_C = np.bincount(found, minlength=num_classes)
    present_C = counts_C > 0
    weights_C = np.maximum(counts_C, 1).astype(np.float64) ** -power
    weights_C[~present_C] = weights_C[present_C].min()
    return [float(weight) for weight in weights_C / weights_C.mean()]


def _check_config(config: TrainConfig, student: StudentConfig) -> None:
    check_loggers(config.loggers)
    workers = max(1, config.num_workers)
    if config.batch_size % workers:
        raise ConfigError(
            "every worker needs an equal share",
            field="train.batch_size",
            value=config.batch_size,
            remedy=f"use a multiple of train.num_workers = {workers}",
        )
    if student.precision == "fp16" and not config.use_gpu:
        raise ConfigError(
            field="student.precision",
            value="fp16",
            remedy="a CPU trains in no or bf16, or set train.use_gpu=true",
        )


def _positions(
    column: pa.ChunkedArray, class_table: ClassTable
) -> tuple[pa.ListArray, npt.NDArray[np.bool_]]:
    """Turn lists of class ids into lists of positions; returns which ids were known too."""
    lists = _one_array(column)
    ids = pc.list_flatten(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    parents = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    lookup = np.full(1 << 16, -1, dtype=np.int32)
    lookup[class_table.ids.astype(np.int64)] = np.arange(len(class_table))
    places = lookup[ids & 0xFFFF]
    known = places >= 0
    lengths = np.bincount(parents[known], minlength=len(lists))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(places[known])), known


def _positive_weights(
    labels: pa.Table, positive: pa.ListArray, known: npt.NDArray[np.bool_]
) -> pa.ListArray:
    """Return the probabilities of the known positives, as lists beside `positive`."""
    if "probability" not in labels.column_names:
        raise ConfigError(
            "these labels have no probabilities",
            field="train.soft_labels",
            value=True,
            remedy="they come with train.labels=pseudo only",
        )
    flat = pc.list_flatten(_one_array(labels["probability"]))
    weights = flat.to_numpy(zero_copy_only=False).astype(np.float32)
    if len(weights) != len(known):
        raise DataError(
            f"{len(known)} positive labels have {len(weights)} probabilities: filter again"
        )
    return pa.ListArray.from_arrays(positive.offsets, pa.array(weights[known]))


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        return pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], column.type)
    return lists


def _work(stage: StageFolder) -> str:
    """Return the folder of checkpoints and other things that only an unfinished run needs."""
    return stage.file("ray_train")


def _run_name(stage: StageFolder) -> str:
    """Return how Ray Train calls a run, and its folder."""
    return f"train-{stage.key}"


def _write_initial(
    student_config: StudentConfig, class_table: ClassTable, config: TrainConfig, stage: StageFolder
) -> str:
    """Write the zero-shot student for the workers to start from; returns its folder."""
    from hts_ray.student.checkpoints import DESCRIPTION, save_student
    from hts_ray.student.model import build_student

    folder = storage.join(_work(stage), "initial")
    if not storage.exists(storage.join(folder, DESCRIPTION)):
        student = build_student(student_config, class_table)
        _check_tower(student, config)
        save_student(student, folder)
    return folder


def _check_tower(student: Student, config: TrainConfig) -> None:
    """Raise ConfigError for settings that the tower cannot serve, before any worker starts."""
    from hts_ray.student.model import checkpoint_activations, parameter_groups, set_trainable

    set_trainable(student, config.trainable, config.trainable_blocks)
    parameter_groups(student, config.optim)
    if config.gradient_checkpointing:
        checkpoint_activations(student)


@dataclass(frozen=True)
class _Task:
    """One training, whichever way it is run; `initial` is the zero-shot student's folder."""

    config: TrainConfig
    student_config: StudentConfig
    num_classes: int
    initial: str
    data: TrainingSet
    validation: ValidationSet | None
    stage: StageFolder
    seed: int
    progress: Progress | None


def _fit(task: _Task) -> dict[str, Any]:
    """Run the training; returns the history, the rows trained on and the weights' bytes."""
    from hts_ray.student.augment import stored_size
    from hts_ray.student.checkpoints import description_of

    config, stage, data, validation = task.config, task.stage, task.data, task.validation
    image_size = int(description_of(task.initial)["image_size"])
    size = stored_size(image_size, config.augment)
    with data_context(keep_order=True):
        dataset, rows = _image_dataset(data.table, size, _bad(stage))
        datasets = {"train": dataset}
        if validation is not None:
            datasets["validation"], _ = _image_dataset(
                validation.table, image_size, _bad(stage, "validation")
            )
    workers = max(1, config.num_workers)
    if rows < workers:
        _gather_quarantine(stage)
        raise DataError(
            f"{rows} of {data.images} images can be read, {workers} workers need one each:"
            f" the reasons are in {stage.file('quarantine')}"
        )
    job: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "precision": task.student_config.precision,
        "initial": task.initial,
        "seed": task.seed,
        "rows": rows,
        "class_weights": class_weights(
            data.table["positive"], task.num_classes, config.class_balance
        ),
        "stored_size": size,
        "validation": None if validation is None else validation.annotations_NC,
        "history": stage.file("history.json"),
        "steps": storage.join(_work(stage), "steps.json"),
        "meter": asdict(Meter.of(stage, "train")),
        "curves": stage.file("curves"),
        "local": storage.join(_work(stage), "local") if config.num_workers == 0 else None,
        "unlisted": find_unlisted(storage.join(_work(stage), _run_name(stage))),
    }
    telling = training_progress(job["history"], job["steps"], task.progress)
    with telling, users_mistakes_unwrapped():
        weights, error = _run_trainer(config, job, datasets, stage)
    if error is not None:
        names = data.table["image_id"].take(pa.array(error["rows"], pa.int64())).to_pylist()
        raise DataError(
            f"{error['message']}; images {', '.join(names)}: lower train.optim.lr, raise"
            " train.loss_temperature or set train.optim.grad_clip"
        )
    return {"history": weights["history"], "rows": rows, "weights": weights["model"]}


def _fit_head(task: _Task) -> dict[str, Any]:
    """Do what `_fit` does, on features that are computed once: the tower does not learn."""
    from hts_ray.student.head_training import fit_on_features

    # The features' precision is that of the student at `initial`.
    return fit_on_features(
        config=task.config,
        num_classes=task.num_classes,
        initial=task.initial,
        data=task.data,
        validation=task.validation,
        run_dir=task.stage.run_dir,
        bad_folders=(_bad(task.stage), _bad(task.stage, "validation")),
        curves=task.stage.file("curves"),
        seed=task.seed,
        progress=task.progress,
    )


def _bad(stage: StageFolder, images: str = "train") -> str:
    """Return the folder where decoding leaves the rows of images that cannot be read."""
    return storage.join(_work(stage), f"bad-{images}")


def _image_dataset(table: pa.Table, size: int, bad_folder: str) -> tuple[ray.data.Dataset, int]:
    """Return decoded images with their labels as a dataset, and its number of rows.

    It is computed once when it fits into a third of the object store, which a shuffle and its
    neighbours have to live in as well; otherwise again every epoch.
    """
    import ray
    import ray.data

    image_bytes = size * size * 3
    block = max(1, min(_BLOCK_BYTES // image_bytes, -(-len(table) // 8)))
    slices = [table.slice(start, block) for start in range(0, len(table), block)]
    dataset = ray.data.from_arrow(slices).map_batches(
        partial(_decode_rows, size=size, bad_folder=bad_folder),
        batch_format="pyarrow",
        batch_size=_DECODE_ROWS,
    )
    store = ray.cluster_resources().get("object_store_memory", 0.0)
    if len(table) * image_bytes > store / 3:
        return dataset, len(table)
    dataset = dataset.materialize()
    return dataset, int(dataset.count())


def _decode_rows(table: pa.Table, *, size: int, bad_folder: str) -> pa.Table:
    """Decode a batch; bad rows leave it and are written to a file named by their ids."""
    decoded = decode_batch(table, ImagesConfig.model_validate({}), square=size)
    good = decoded["error_kind"].is_null()
    bad = decoded.filter(pc.invert(good))
    if len(bad):
        name = hashlib.sha256("\n".join(bad["image_id"].to_pylist()).encode()).hexdigest()[:24]
        columns = ["image_id", "uri", "error_kind", "error"]
        write_table(storage.join(bad_folder, f"{name}.parquet"), bad.select(columns))
    kept = [name for name in decoded.column_names if name in _LOOP_COLUMNS]
    return decoded.filter(good).select(kept)


def _gather_quarantine(stage: StageFolder) -> int:
    """Write the bad images of all workers to the stage's quarantine.

    Returns how many of them were to be trained on.
    """
    found: dict[str, dict[str, Any]] = {}
    counts = []
    for folder in (_bad(stage), _bad(stage, "validation")):
        rows = read_table(folder).to_pylist() if storage.list_names(folder) else []
        found.update({row["image_id"]: row for row in rows})
        counts.append(len({row["image_id"] for row in rows}))
    schema = pa.schema(
        [QUARANTINE_SCHEMA.field(n) for n in ("image_id", "uri", "error_kind", "error")]
    )
    table = pa.Table.from_pylist([found[key] for key in sorted(found)], schema)
    write_quarantine(stage, table, "train")
    return counts[0]


def _run_trainer(
    config: TrainConfig,
    job: dict[str, Any],
    datasets: dict[str, ray.data.Dataset],
    stage: StageFolder,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Run Ray Train; returns the last checkpoint's history and weights, and the loop's error."""
    from ray.data import ExecutionOptions
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": config.cpus_per_worker, **({"GPU": 1.0} if config.use_gpu else {})}
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker=resources if config.num_workers else None,
        ),
        run_config=RunConfig(
            # The same name after a crash is what makes Ray Train go on from its checkpoint.
            name=_run_name(stage),
            storage_path=storage.absolute(_work(stage)),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
        datasets=datasets,
        dataset_config=DataConfig(
            datasets_to_split=["train"], execution_options=ExecutionOptions(preserve_order=True)
        ),
    )
    result = _fit_or_explain(trainer, config)
    error = (result.return_value or {}).get("error")
    if error is not None:
        return {}, error
    if config.num_workers == 0:
        files = read_local(job["local"])
    else:
        with result.checkpoint.as_directory() as folder:
            files = read_files(Path(folder))
    if files is None:
        raise UserError("training ended without a checkpoint: remove its folder and run it again")
    return {"history": json.loads(files[STATE])["history"], "model": files[MODEL]}, None


def _fit_or_explain(trainer: Any, config: TrainConfig) -> Any:
    from ray.exceptions import RayActorError
    from ray.train import ControllerError, WorkerGroupError

    try:
        return trainer.fit()
    except RayActorError as error:
        raise UserError(
            f"the process that runs the training died: {_in_a_line(error)}; the same command goes"
            " on from the last checkpoint"
        ) from error
    except WorkerGroupError as error:
        failures = error.worker_failures
        for failure in failures.values():
            mistake = user_error(failure)
            if mistake is not None:
                raise mistake from error
        rank, failure = min(failures.items())
        raise UserError(
            f"training failed {config.max_failures + 1} times, lastly in worker {rank}:"
            f" {_in_a_line(failure)}; the same command goes on from the last checkpoint"
        ) from error
    except ControllerError as error:
        told = _in_a_line(error.controller_failure)
        raise UserError(f"training could not be run: {told}") from error


def _in_a_line(failure: BaseException) -> str:
    """Return what a failure says, without the traceback that Ray puts into its text."""
    text = str(failure).strip()
    if "Traceback (most recent call last)" in text or '  File "' in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())


def _publish(
    config: TrainConfig, initial: str, stage: StageFolder, seed: int, outcome: Mapping[str, Any]
) -> None:
    """Write the trained student and its history into the stage's folder."""
    import safetensors.torch

    from hts_ray.student.checkpoints import load_student, save_student
    from hts_ray.student.model import with_learnt_scale

    student = load_student(initial)
    if "weights" in outcome:
        trained = safetensors.torch.load(outcome["weights"])
        student.load_state_dict(with_learnt_scale(trained))
    info = {"train": config.answer_settings(), "seed": seed, "epochs": len(outcome["history"])}
    save_student(student, stage.path, info)
    storage.write_json(stage.file("history.json"), outcome["history"])
