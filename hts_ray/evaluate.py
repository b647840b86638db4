"""The evaluate stage: predictions and annotations in, HICO metrics out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hts_ray import metrics
from hts_ray.classes import ClassTable
from hts_ray.engine.run import Run
from hts_ray.errors import DataError
from hts_ray.images.hico import read_anno_table
from hts_ray.images.manifest import Manifest, open_manifest
from hts_ray.store import storage
from hts_ray.store.run import settings_hash
from hts_ray.store.tables import ANNOTATION_COLUMNS, read_table, require_unique_ids

FEW_SHOT_LEVELS = (1, 5, 10)


def evaluate_predictions(
    run: Run, predictions: str, annotations: str | Manifest, split: str = "test", name: str = ""
) -> dict[str, Any]:
    """Return the HICO metrics of a predictions table, and publish them in the run directory.

    `annotations` is a manifest or the path of one or of an `anno.mat`.
    """
    ids, scores_NC = read_predictions(predictions, run.class_table)
    truth = read_annotations(annotations, run.class_table, split)
    result = evaluate_scores(ids, scores_NC, truth, run.class_table).to_dict()
    source = annotations if isinstance(annotations, str) else annotations.path
    publish_metrics(run, result, predictions, source, split, name)
    return result


def publish_metrics(
    run: Run, result: dict[str, Any], scores: str, annotations: str, split: str, name: str = ""
) -> None:
    """Store metrics in the run directory, with what they were measured on."""
    result.update(class_ids=run.class_table.ids.tolist(), predictions=scores)
    if name:
        result["name"] = name
    stage = run.stage("evaluation", settings_hash(scores, annotations, split))
    storage.write_json(stage.file("metrics.json"), result)
    rows = result["num_images"]
    stage.publish({"rows_in": rows, "rows_out": rows, "quarantined": 0})


@dataclass(frozen=True)
class Annotations:
    """Labels (N, C) in {1, -1, 0, -2}: positive, negative, ambiguous, unknown.

    `train_positives_C` counts the positives of the training split, or is None when the
    annotations have none.
    """

    image_ids: list[str]
    labels_NC: np.ndarray
    train_positives_C: np.ndarray | None


def read_annotations(
    source: str | Manifest, class_table: ClassTable, split: str = "test"
) -> Annotations:
    """Read annotations from a manifest or its path, or from a HICO `anno.mat`.

    Raises DataError when the split has no annotated image.
    """
    if isinstance(source, str):
        is_mat = source.endswith(".mat")
        source = Manifest(source, read_anno_table(source)) if is_mat else open_manifest(source)
    chosen, train = source.annotated(split), source.annotated("train")
    if not len(chosen):
        raise DataError(f"{source.path} has no annotated image in split {split!r}")
    counts = (label_matrix(train, class_table) == metrics.POSITIVE).sum(axis=0)
    return Annotations(
        chosen["image_id"].to_pylist(),
        label_matrix(chosen, class_table),
        counts if len(train) else None,
    )


def label_matrix(manifest: pa.Table, class_table: ClassTable) -> np.ndarray:
    """Return the annotations of N manifest rows as (N, C) int8 in {1, -1, 0, -2}.

    Class ids that are not in the table are left out.
    """
    labels_NC = np.full((len(manifest), len(class_table)), metrics.UNKNOWN, dtype=np.int8)
    values = (metrics.POSITIVE, metrics.NEGATIVE, metrics.AMBIGUOUS)
    position = np.full(2**15, -1, dtype=np.int32)
    position[class_table.ids.astype(np.int64)] = np.arange(len(class_table))
    for column, value in zip(ANNOTATION_COLUMNS, values, strict=True):
        for row, ids in enumerate(manifest[column].to_pylist()):
            places = position[np.asarray(ids or [], dtype=np.int64)]
            labels_NC[row, places[places >= 0]] = value
    return labels_NC


def few_shot_masks(
    train_positives_C: np.ndarray | None, class_table: ClassTable
) -> Mapping[int, np.ndarray]:
    """Return the bool masks (C,) of Few@1, 5 and 10.

    Counted on the training annotations where there are some, else as the class table has them.
    """
    if train_positives_C is None:
        return class_table.few_shot
    return {n: train_positives_C <= n for n in FEW_SHOT_LEVELS}


def evaluate_scores(
    image_ids: Sequence[str],
    scores_NC: np.ndarray,
    annotations: Annotations,
    class_table: ClassTable,
) -> metrics.Evaluation:
    """Match scores to annotations by image id and apply the HICO protocol.

    Annotated images without scores (quarantined ones) score below all others, so that leaving
    images out cannot raise the result. Raises DataError when no image matches.
    """
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    rows = np.array([row_of.get(image_id, -1) for image_id in annotations.image_ids])
    if not (rows >= 0).any():
        raise DataError(
            "no predicted image is among the annotated ones: first predicted id"
            f" {next(iter(image_ids), None)!r}, first annotated {annotations.image_ids[0]!r}"
        )
    floor = float(scores_NC.min()) - 1.0
    matched_NC = np.where((rows >= 0)[:, None], scores_NC[np.maximum(rows, 0)], floor)
    masks = few_shot_masks(annotations.train_positives_C, class_table)
    return metrics.evaluate(matched_NC, annotations.labels_NC, masks)


def read_predictions(path: str, class_table: ClassTable) -> tuple[list[str], np.ndarray]:
    """Return the ids and scores (N, C) of the scored rows of a predictions table.

    Columns are brought into the order of `class_table` by the class ids stored beside the
    table. Raises DataError when a class has no score.
    """
    table = read_table(path, columns=["image_id", "scores"])
    require_unique_ids(table, path)
    table = table.filter(table["scores"].is_valid())
    if not len(table):
        raise DataError(f"{path} holds no scored image")
    scores = table["scores"].combine_chunks()
    width = scores.type.list_size
    scores_NC = scores.flatten().to_numpy(zero_copy_only=False).reshape(len(table), width)
    sidecar = storage.join(path, "table.json")
    if not storage.exists(sidecar):
        if width != len(class_table):
            raise DataError(f"{path} has {width} scores an image for {len(class_table)} classes")
        return table["image_id"].to_pylist(), scores_NC
    stored = {int(i): place for place, i in enumerate(storage.read_json(sidecar)["class_ids"])}
    missing = [int(i) for i in class_table.ids if int(i) not in stored]
    if missing:
        raise DataError(f"{path} has no score for class id {missing[0]}: use the run's own classes")
    order = [stored[int(i)] for i in class_table.ids]
    return table["image_id"].to_pylist(), scores_NC[:, order]
