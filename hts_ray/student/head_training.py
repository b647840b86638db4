"""`train.trainable=head`: the full training's place taken by cached features and a fit.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch
import torch
from accelerate import Accelerator

from hts_ray.config import TrainConfig
from hts_ray.engine.image_pass import OK
from hts_ray.metrics import hico_average_precision
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import read_table, write_table
from hts_ray.student.checkpoints import WEIGHTS
from hts_ray.student.features import Features, ensure_features, read_feature_table
from hts_ray.student.head import HeadFit, fit_head, head_logits
from hts_ray.student.loggers import CurveLog
from hts_ray.student.loop import dense_targets, dense_weights
from hts_ray.student.progress import Progress

if TYPE_CHECKING:
    from hts_ray.student.train import TrainingSet, ValidationSet

_CURVES = ("loss", "images_per_second", "validation_mAP")


def fit_on_features(
    *,
    config: TrainConfig,
    num_classes: int,
    initial: str,
    data: TrainingSet,
    validation: ValidationSet | None,
    run_dir: str,
    bad_folders: tuple[str, str],
    curves: str,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Fit the classifier of the student at `initial`; returns history, rows and weights (bytes).

    Features that the run has of these images already are used again. Images that cannot be read
    are written to `bad_folders`, of the training and of the validation; the epochs' curves go to
    `config.loggers`, with `curves` as their folder. Raises DataError when no image can be read or
    the loss stops being finite.
    """
    features = partial(_features, config, initial, run_dir, _encoding(progress))
    found = features(data.table, config.split, bad_folders[0], flipped=config.augment.flip)
    state = safetensors.torch.load(storage.read_bytes(storage.join(initial, WEIGHTS)))
    first = _first_rows(data.table)
    table = data.table.take(pa.array([first[image_id] for image_id in found.image_ids]))
    positive, ignored = table["positive"].combine_chunks(), table["ignored"].combine_chunks()
    weights_NC = None
    if "weight" in table.column_names:
        weights_NC = dense_weights(positive, table["weight"].combine_chunks(), num_classes)
    validate = _validator(config, validation, features, bad_folders[1])
    log = CurveLog(
        Accelerator(cpu=True),
        config.loggers,
        folder=curves,
        settings=config.model_dump(mode="json"),
    )

    def on_epoch(fit: HeadFit) -> Mapping[str, Any]:
        values = validate(fit)
        record = {**fit.history[-1], **values}
        steps = -(-record["images"] // config.batch_size)
        shown = {f"epoch/{name}": record[name] for name in _CURVES if record.get(name) is not None}
        log.log(shown, len(fit.history) * steps)
        if progress is not None:
            progress(record)
        return values

    with closing(log):
        fit = fit_head(
            found.features_ND,
            dense_targets(positive, ignored, num_classes),
            state["classifier"].numpy(),
            logit_scale=float(state["logit_scale"]),
            config=config,
            seed=seed,
            label_weights_NC=weights_NC,
            flipped_ND=found.flipped_ND,
            image_ids=found.image_ids,
            on_epoch=on_epoch,
        )
    state["classifier"] = torch.from_numpy(fit.classifier_CD)
    state["logit_scale"] = torch.tensor(fit.logit_scale)
    weights = safetensors.torch.save(state)
    return {"history": fit.history, "rows": fit.history[-1]["images"], "weights": weights}


def _validator(
    config: TrainConfig,
    validation: ValidationSet | None,
    features: Callable[..., Features],
    bad_folder: str,
) -> Callable[[HeadFit], dict[str, Any]]:
    """Return what measures a fit on the validation images, in the epochs where that is due."""
    if validation is None:
        return lambda fit: {}
    split = config.validation_split or "validation"
    found = features(validation.table, split, bad_folder, flipped=False)
    first = _first_rows(validation.table)
    annotations_NC = validation.annotations_NC[[first[image_id] for image_id in found.image_ids]]

    def validate(fit: HeadFit) -> dict[str, Any]:
        done = len(fit.history)
        if done % config.validate_every and done != config.epochs:
            return {"validation_mAP": None}
        logits_NC = head_logits(found.features_ND, fit.classifier_CD, fit.logit_scale)
        average_precision_C = hico_average_precision(logits_NC, annotations_NC)
        unknown = np.isnan(average_precision_C).all()
        return {"validation_mAP": float("nan" if unknown else np.nanmean(average_precision_C))}

    return validate


def _encoding(progress: Progress | None) -> Callable[[int, int, int], None] | None:
    """Return what tells `progress` how many images are encoded."""
    if progress is None:
        return None
    return lambda done, of, bad: progress({"encoded": done, "of": of, "quarantined": bad})


def _features(
    config: TrainConfig,
    initial: str,
    run_dir: str,
    progress: Callable[[int, int, int], None] | None,
    table: pa.Table,
    split: str,
    bad_folder: str,
    *,
    flipped: bool,
) -> Features:
    """Return the features of a table's images, each once; the bad ones go to `bad_folder`."""
    images = table.take(pa.array(sorted(_first_rows(table).values())))
    images = images.select(["image_id", "uri"])
    images = images.append_column("split", pa.array([split] * len(images), pa.string()))
    stage = ensure_features(
        config.features,
        run_dir=run_dir,
        student_path=initial,
        images=images,
        flipped=flipped,
        progress=progress,
    )
    wanted = images["image_id"].combine_chunks()
    _tell_bad(stage, wanted, bad_folder)
    found = read_feature_table(stage.path)
    return found.take(sorted(set(found.image_ids).intersection(wanted.to_pylist())))


def _tell_bad(stage: StageFolder, wanted: pa.Array, bad_folder: str) -> None:
    rows = read_table(stage.path, ["image_id", "uri", "status", "error_kind", "error"])
    bad = rows.filter(pc.and_(pc.not_equal(rows["status"], OK), pc.is_in(rows["image_id"], wanted)))
    if len(bad):
        write_table(storage.join(bad_folder, "features.parquet"), bad.drop_columns(["status"]))


def _first_rows(table: pa.Table) -> dict[str, int]:
    """Return the first row of every image id: a table of a training repeats rare images."""
    ids = table["image_id"].to_pylist()
    return {image_id: row for row, image_id in reversed(list(enumerate(ids)))}
