"""The evaluate stage: predictions and annotations in, HICO metrics out.

Shapes: N annotated images, M images of a table, B rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray import metrics
from hts_ray.classes import ClassTable
from hts_ray.engine.run import Run
from hts_ray.errors import DataError
from hts_ray.images.hico import read_anno_table
from hts_ray.images.manifest import Manifest, open_manifest
from hts_ray.store import storage
from hts_ray.store.run import settings_hash
from hts_ray.store.tables import (
    ANNOTATION_COLUMNS,
    read_batches,
    read_table,
    require_unique_ids,
    table_schema,
)

FEW_SHOT_LEVELS = (1, 5, 10)
_ROWS = 4096  # rows that are taken at a time
_HELD_BYTES = 1 << 29  # of scores and labels


def evaluate_predictions(
    run: Run, predictions: str, annotations: str | Manifest, split: str = "test", name: str = ""
) -> dict[str, Any]:
    """Return the HICO metrics of a predictions table, and publish them in the run directory.

    `annotations` is a manifest or the path of one or of an `anno.mat`.
    """
    truth = read_annotations(annotations, run.class_table, split)
    result = evaluate_stored(predictions, truth).to_dict()
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
    """What is known of N images: rows of a manifest, all annotated.

    `train_positives_C` counts the positives of the training split, or is None when the
    annotations have none.
    """

    table: pa.Table
    class_table: ClassTable
    train_positives_C: np.ndarray | None

    @property
    def image_ids(self) -> pa.Array:
        """The ids (N,) of the images."""
        return self.table["image_id"].combine_chunks()

    def labels(self, classes: slice = slice(None)) -> np.ndarray:
        """Return labels (N, C) in {1, -1, 0, -2}: positive, negative, ambiguous, unknown."""
        return label_matrix(self.table, self.class_table, classes)


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
    counts_C = sum(
        (label_matrix(train.slice(start, _ROWS), class_table) == metrics.POSITIVE).sum(axis=0)
        for start in range(0, len(train), _ROWS)
    )
    return Annotations(chosen, class_table, counts_C if len(train) else None)


def label_matrix(
    manifest: pa.Table, class_table: ClassTable, classes: slice = slice(None)
) -> np.ndarray:
    """Return the annotations of N manifest rows as (N, C) int8 in {1, -1, 0, -2}.

    `classes` narrows the C columns.
    """
    return label_codes(manifest, class_table.ids[classes])


def label_codes(rows: pa.Table, ids_C: np.ndarray) -> np.ndarray:
    """Return the annotations of N rows of classes (C,) as `label_matrix`, others left out."""
    labels_NC = np.full((len(rows), len(ids_C)), metrics.UNKNOWN, dtype=np.int8)
    values = (metrics.POSITIVE, metrics.NEGATIVE, metrics.AMBIGUOUS)
    position = np.full(2**16, -1, dtype=np.int32)
    position[ids_C.astype(np.uint16)] = np.arange(len(ids_C))
    for column, value in zip(ANNOTATION_COLUMNS, values, strict=True):
        lists = rows[column].combine_chunks()
        places = position[lists.flatten().to_numpy().astype(np.uint16)]
        row_E = pc.list_parent_indices(lists).to_numpy()
        labels_NC[row_E[places >= 0], places[places >= 0]] = value
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
    image_ids: Sequence[str], scores_NC: np.ndarray, annotations: Annotations
) -> metrics.Evaluation:
    """Match scores to annotations by image id and apply the HICO protocol.

    Annotated images without scores (quarantined ones) score below all others, so that leaving
    images out cannot raise the result. Raises DataError when no image matches.
    """
    place_M = _places(pa.array(image_ids, pa.string()), annotations)
    return _evaluated(lambda classes: [(place_M, scores_NC[:, classes])], annotations)


def evaluate_stored(path: str, annotations: Annotations) -> metrics.Evaluation:
    """Evaluate a predictions table as `evaluate_scores` does, some classes after the other.

    The table is read once for as many classes as fit into 512 MiB. Raises as `read_predictions`.
    """
    columns_C = _score_columns(path, annotations.class_table)
    ids = read_table(path, ["image_id"])
    require_unique_ids(ids, path)
    place_M = _places(ids["image_id"].combine_chunks(), annotations)

    def scored(classes: slice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        for batch in read_batches(path, ["scores"], _ROWS):
            stored, rows = batch.column("scores"), slice(start, start + len(batch))
            known = stored.is_valid().to_numpy(zero_copy_only=False)
            yield place_M[rows][known], _matrix(stored.drop_null())[:, columns_C[classes]]
            start = rows.stop

    return _evaluated(scored, annotations)


def _places(image_ids: pa.Array, annotations: Annotations) -> np.ndarray:
    """Return the place of images among the annotated ones, -1 for others."""
    places = pc.index_in(image_ids, value_set=annotations.image_ids)
    return np.asarray(places.fill_null(-1).to_numpy(zero_copy_only=False))


def _evaluated(
    scored: Callable[[slice], Iterable[tuple[np.ndarray, np.ndarray]]], annotations: Annotations
) -> metrics.Evaluation:
    """Evaluate what `scored` gives of some classes: places among the annotated, and scores."""
    images, classes = len(annotations.table), len(annotations.class_table)
    size = max(1, _HELD_BYTES // (5 * images))  # 4 bytes a score, 1 a label
    parts = (slice(start, min(start + size, classes)) for start in range(0, classes, size))

    def matched(part: slice) -> np.ndarray:
        scores_NC = np.full((images, part.stop - part.start), -np.inf, np.float32)
        seen = 0
        for place_B, scores_BC in scored(part):
            known = place_B >= 0
            # Wider scores stay as wide, or close ones would become ties.
            scores_NC = scores_NC.astype(np.result_type(scores_NC, scores_BC), copy=False)
            scores_NC[place_B[known]] = scores_BC[known]
            seen += int(known.sum())
        if not seen:
            first = annotations.image_ids[0].as_py()
            raise DataError(
                f"no predicted image is among the {images} annotated ones, for example {first!r}:"
                " check --annotations and --split"
            )
        return scores_NC

    masks = few_shot_masks(annotations.train_positives_C, annotations.class_table)
    return metrics.evaluate_parts(((matched(p), annotations.labels(p)) for p in parts), masks)


def read_predictions(path: str, class_table: ClassTable) -> tuple[list[str], np.ndarray]:
    """Return the ids and scores (N, C) of the scored rows of a predictions table.

    Columns are brought into the order of `class_table` by the class ids stored beside the
    table. Raises DataError when a class has no score.
    """
    columns_C = _score_columns(path, class_table)
    table = read_table(path, columns=["image_id", "scores"])
    require_unique_ids(table, path)
    table = table.filter(table["scores"].is_valid())
    if not len(table):
        raise DataError(f"{path} holds no scored image")
    return table["image_id"].to_pylist(), _matrix(table["scores"].combine_chunks())[:, columns_C]


def _matrix(scores: pa.Array) -> np.ndarray:
    """Return the scores (N, C) of a column without nulls."""
    values = scores.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values.reshape(-1, scores.type.list_size))


def _score_columns(path: str, class_table: ClassTable) -> np.ndarray:
    """Return where each class's score lies among the stored ones; DataError for one without."""
    sidecar = storage.join(path, "table.json")
    if not storage.exists(sidecar):
        width = table_schema(path).field("scores").type.list_size
        if width != len(class_table):
            raise DataError(f"{path} has {width} scores an image for {len(class_table)} classes")
        return np.arange(width)
    stored = {int(i): place for place, i in enumerate(storage.read_json(sidecar)["class_ids"])}
    missing = [int(i) for i in class_table.ids if int(i) not in stored]
    if missing:
        raise DataError(f"{path} has no score for class id {missing[0]}: use the run's own classes")
    return np.array([stored[int(i)] for i in class_table.ids])
