"""`train.trainable=head`: a fit on cached features instead of the training loop.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch
import torch

from hts_ray.engine.image_pass import OK
from hts_ray.metrics import hico_average_precision, mean_average_precision
from hts_ray.store import storage
from hts_ray.store.tables import read_table, write_table
from hts_ray.student.checkpoints import WEIGHTS
from hts_ray.student.features import Features, ensure_features, read_feature_table
from hts_ray.student.head import HeadData, HeadFit, fit_head, head_logits
from hts_ray.student.loggers import CurveLog
from hts_ray.student.progress import encoding_progress
from hts_ray.student.targets import Task, dense_targets, dense_weights, validation_due


def fit_on_features(task: Task) -> dict[str, Any]:
    """Fit the classifier of the task's student; returns history, rows and weights (bytes).

    Features that the run has of these images already are used again. Raises DataError when no
    image can be read or the loss stops being finite.
    """
    config, classes = task.config, len(task.run.class_table)
    found = _features(task, "train", task.data.table, config.split, flipped=config.augment.flip)
    state = safetensors.torch.load(storage.read_bytes(storage.join(task.initial, WEIGHTS)))
    first = _first_rows(task.data.table)
    table = task.data.table.take(pa.array([first[image_id] for image_id in found.image_ids]))
    positive, ignored = table["positive"], table["ignored"]
    soft = "weight" in table.column_names
    data = HeadData(
        found.features_ND,
        dense_targets(positive, ignored, classes),
        label_weights_NC=dense_weights(positive, table["weight"], classes) if soft else None,
        flipped_ND=found.flipped_ND,
        image_ids=found.image_ids,
    )
    validate = _validator(task)
    settings = config.model_dump(mode="json")
    log = CurveLog(config.loggers, folder=task.stage.file("curves"), settings=settings)

    def on_epoch(fit: HeadFit) -> Mapping[str, Any]:
        record = {**fit.history[-1], "validation_mAP": validate(fit)}
        log.log_epoch(record, len(fit.history) * -(-record["images"] // config.batch_size))
        if task.progress is not None:
            task.progress(record)
        return record

    with closing(log):
        fit = fit_head(
            data,
            state["classifier"].numpy(),
            logit_scale=float(state["logit_scale"]),
            config=config,
            seed=task.run.config.seed,
            on_epoch=on_epoch,
        )
    state["classifier"] = torch.from_numpy(fit.classifier_CD)
    state["logit_scale"] = torch.tensor(fit.logit_scale)
    weights = safetensors.torch.save(state)
    return {"history": fit.history, "rows": fit.history[-1]["images"], "weights": weights}


def _validator(task: Task) -> Callable[[HeadFit], float | None]:
    """Return what measures a fit on the validation images, in the epochs where that is due."""
    validation, config = task.validation, task.config
    if validation is None:
        return lambda fit: None
    split = config.validation_split or "validation"
    found = _features(task, "validation", validation.table, split, flipped=False)
    first = _first_rows(validation.table)
    annotations_NC = validation.annotations_NC[[first[image_id] for image_id in found.image_ids]]

    def validate(fit: HeadFit) -> float | None:
        if not validation_due(config, len(fit.history) - 1):
            return None
        logits_NC = head_logits(found.features_ND, fit.classifier_CD, fit.logit_scale)
        return mean_average_precision(hico_average_precision(logits_NC, annotations_NC))

    return validate


def _features(task: Task, images: str, table: pa.Table, split: str, *, flipped: bool) -> Features:
    """Return the features of a table's images, each once; the bad ones go to the task's folder."""
    rows = table.take(pa.array(sorted(_first_rows(table).values()))).select(["image_id", "uri"])
    rows = rows.append_column("split", pa.array([split] * len(rows), pa.string()))
    stage = ensure_features(
        task.config.features,
        run_dir=task.stage.run_dir,
        student_path=task.initial,
        images=rows,
        flipped=flipped,
        progress=encoding_progress(task.progress),
    )
    wanted = rows["image_id"].combine_chunks()
    stored = read_table(stage.path, ["image_id", "uri", "status", "error_kind", "error"])
    bad = stored.filter(
        pc.and_(pc.not_equal(stored["status"], OK), pc.is_in(stored["image_id"], wanted))
    )
    if len(bad):
        path = storage.join(task.bad_folder(images), "features.parquet")
        write_table(path, bad.drop_columns(["status"]))
    found = read_feature_table(stage.path)
    return found.take(sorted(set(found.image_ids).intersection(wanted.to_pylist())))


def _first_rows(table: pa.Table) -> dict[str, int]:
    """Return the first row of every image id: a table of a training repeats rare images."""
    ids = table["image_id"].to_pylist()
    return {image_id: row for row, image_id in reversed(list(enumerate(ids)))}
