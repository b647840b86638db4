"""From labels to what a training reads: images in their order, decoded, targets and weights.

Ray's tasks import this module, so it does without torch.

Shapes: N images, C classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.classes import ClassTable
from hts_ray.config import ImagesConfig, TrainConfig
from hts_ray.engine.decoding import decode_batch
from hts_ray.engine.image_pass import write_quarantine
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.evaluate import label_matrix
from hts_ray.store import storage
from hts_ray.store.aliases import TrainingTold
from hts_ray.store.run import StageFolder, require_stage
from hts_ray.store.tables import QUARANTINE_SCHEMA, read_table, write_table

if TYPE_CHECKING:
    import ray.data

WORK = "ray_train"  # the folder of what only an unfinished training needs
_DECODE_ROWS = 32
_LOOP_COLUMNS = ("row", "positive", "ignored", "weight", "pixels")
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class TrainingSet:
    """The rows to train on, and what was left out of them.

    `table` has row, image_id, uri, and `positive` and `ignored` as positions in the class
    table, in training order, repeats included; with soft labels also `weight`, one per positive.
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


@dataclass(frozen=True)
class Task:
    """One training, whichever way it is run.

    `initial` is the folder of the zero-shot student that it starts from, and `progress` gets the
    records of `student.progress`.
    """

    run: Run
    data: TrainingSet
    validation: ValidationSet | None
    stage: StageFolder
    initial: str
    progress: TrainingTold | None

    @property
    def config(self) -> TrainConfig:
        """The settings of the training."""
        return self.run.config.train

    def work_file(self, *names: str) -> str:
        """Return a path in the folder that only an unfinished training needs.

        `bad-train` and `bad-validation` there list images that cannot be read.
        """
        return self.stage.file(WORK, *names)


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


def center_rows(run: Run, manifest: str | None = None) -> pa.Table | None:
    """Return the images of `train.split` whose mean logits are kept; None where none are asked for.

    A seeded sample of them, as image_id, uri and split.
    """
    train = run.config.train
    if not train.center_images:
        return None
    return run.manifest(manifest).rows((train.split,), train.center_images, run.config.seed)


def validation_due(config: TrainConfig, epoch: int) -> bool:
    """Return whether the validation images are scored after an epoch; after the last they are."""
    return epoch + 1 == config.epochs or (epoch + 1) % config.validate_every == 0


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


def decoded_images(table: pa.Table, size: int, bad_folder: str) -> tuple[ray.data.Dataset, int]:
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


def gather_quarantine(task: Task) -> int:
    """Write the bad images of all workers to the stage's quarantine.

    Returns how many of them were to be trained on.
    """
    found: dict[str, dict[str, Any]] = {}
    counts = []
    for images in ("train", "validation"):
        folder = task.work_file(f"bad-{images}")
        rows = read_table(folder).to_pylist() if storage.list_names(folder) else []
        found.update({row["image_id"]: row for row in rows})
        counts.append(len({row["image_id"] for row in rows}))
    columns = ("image_id", "uri", "error_kind", "error")
    schema = pa.schema([QUARANTINE_SCHEMA.field(name) for name in columns])
    table = pa.Table.from_pylist([found[key] for key in sorted(found)], schema)
    write_quarantine(task.stage, table, "train")
    return counts[0]


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


def class_weights(counts_C: npt.NDArray[np.int64], power: float) -> list[float] | None:
    """Return the classes' weights (C,) in the loss, or None when all weigh the same (power 0).

    `counts_C` are the classes' positives, repeats counted. A weight is proportional to the count
    to the power -`power`, and the mean of all weights is 1: at power 1 the positives of every
    class weigh the same together. A class without positives gets the smallest weight, because
    its negatives have nothing to balance.
    """
    if not power:
        return None
    present_C = counts_C > 0
    weights_C = np.maximum(counts_C, 1).astype(np.float64) ** -power
    weights_C[~present_C] = weights_C[present_C].min()
    return [float(weight) for weight in weights_C / weights_C.mean()]


def dense_targets(
    positive: pa.Array | pa.ChunkedArray, ignored: pa.Array | pa.ChunkedArray, num_classes: int
) -> npt.NDArray[np.int8]:
    """Return targets (N, C) int8 of position lists: 1 positive, 0 ignored, -1 the others.

    A class that is in both lists is positive.
    """
    targets_NC = np.full((len(positive), num_classes), -1, dtype=np.int8)
    for lists, value in ((ignored, 0), (positive, 1)):
        targets_NC[_rows(lists), _flat(lists)] = value
    return targets_NC


def dense_weights(
    positive: pa.Array | pa.ChunkedArray, weight: pa.Array | pa.ChunkedArray, num_classes: int
) -> npt.NDArray[np.float32]:
    """Return label weights (N, C) float32: those given with the positives, 1 elsewhere."""
    weights_NC = np.ones((len(positive), num_classes), dtype=np.float32)
    weights_NC[_rows(positive), _flat(positive)] = _flat(weight)
    return weights_NC


def positive_counts(positive: pa.Array | pa.ChunkedArray, num_classes: int) -> npt.NDArray[Any]:
    """Return how many of the lists of positions hold each class, (C,)."""
    return np.bincount(_flat(positive), minlength=num_classes)


def _positions(
    column: pa.ChunkedArray, class_table: ClassTable
) -> tuple[pa.ListArray, npt.NDArray[np.bool_]]:
    """Turn lists of class ids into lists of positions; returns which ids were known too."""
    lists = column.combine_chunks()
    ids = pc.list_flatten(lists).cast(pa.int64())
    places = pc.index_in(ids, pa.array(class_table.ids, pa.int64()))
    known = np.asarray(places.is_valid())
    lengths = np.bincount(_rows(lists)[known], minlength=len(lists))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), places.drop_null()), known


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
    weights = _flat(labels["probability"].combine_chunks()).astype(np.float32)
    if len(weights) != len(known):
        raise DataError(
            f"{len(known)} positive labels have {len(weights)} probabilities: filter again"
        )
    return pa.ListArray.from_arrays(positive.offsets, pa.array(weights[known]))


def _rows(lists: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return the row of every element of the lists."""
    return np.asarray(pc.list_parent_indices(lists).to_numpy(zero_copy_only=False), np.int64)


def _flat(lists: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return all elements of the lists."""
    return np.asarray(pc.list_flatten(lists).to_numpy(zero_copy_only=False))
