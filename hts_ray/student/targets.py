"""From labels to what a training reads: rows in their order, targets and weights.

Labels are streamed: neither their number nor that of the images shows in the memory of the process
that prepares a training. Ray's tasks import this module, so it does without torch.

Shapes: N images, C classes, P positive labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from hts_ray.classes import ClassTable
from hts_ray.config import TrainConfig
from hts_ray.engine.image_pass import write_quarantine
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.evaluate import label_matrix
from hts_ray.store import storage
from hts_ray.store.aliases import TrainingTold
from hts_ray.store.run import StageFolder, require_stage
from hts_ray.store.tables import QUARANTINE_SCHEMA, open_table, read_table, stream, write_table

WORK = "ray_train"  # the folder of what only an unfinished training needs
_FILE_ROWS, _MOST_FILES = 1 << 16, 256
_SAMPLED = 64  # images that stand for the others in estimates


@dataclass(frozen=True)
class TrainingSet:
    """Labels to train on, and what a pass over them found.

    `labels` has image_id, uri, positive_ids, ignored_ids and, with soft labels, probability.
    `counts_C` are the positives by class, repeats counted. `copies` says how often the images of
    rare classes occur, by their number among the `images`; the others occur once. `sample` are
    some of the URIs.
    """

    labels: pads.Dataset
    images: int
    counts_C: npt.NDArray[np.int64]
    copies: dict[int, int]
    dropped_ids: int
    sample: list[str | None]

    @property
    def rows(self) -> int:
        """The rows of an epoch: the images, repeats included."""
        return self.images + sum(self.copies.values()) - len(self.copies)

    @property
    def classes_with_positives(self) -> int:
        """The number of classes with a positive."""
        return int((self.counts_C > 0).sum())

    def mapped(self, class_table: ClassTable, config: TrainConfig) -> Iterator[pa.Table]:
        """Yield the images as image_id, uri, `positive` and `ignored` (positions of classes).

        With soft labels also `weight`, one per positive.
        """
        return (piece for piece, _ in _mapped(self.labels, class_table, config))


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
        return cls(table, label_matrix(manifest, class_table))

    def write(self, folder: str) -> list[int]:
        """Write the rows as `write_rows` does, in this order; returns the rows of each."""
        starts = range(0, len(self.table), _FILE_ROWS)
        pieces = [self.table.slice(start, _FILE_ROWS) for start in starts]
        for number, piece in enumerate(pieces):
            write_table(row_file(folder, number), piece)
        return [len(piece) for piece in pieces]


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


def label_source(
    run: Run, source: StageFolder | None = None, manifest: str | None = None
) -> pads.Dataset | None:
    """Return where the student's labels are read: image_id, uri, positive_ids, ignored_ids.

    With `train.soft_labels` the positives' probability comes with them. `train.labels` decides:

    - `pseudo`: the labels in `source`, or the run's latest; no manifest is opened;
    - `annotations`: those of the manifest, unknown counting as negative as HICO's protocol has it;
    - `none`: None.

    Raises DataError when there is nothing of the kind.
    """
    train = run.config.train
    if train.labels == "none":
        return None
    if train.labels == "pseudo":
        folder = source or require_stage(run.run_dir, "pseudo_labels", "filter")
        return open_table(folder.path).filter(pads.field("split") == train.split)
    chosen = run.manifest(manifest).annotated(train.split)
    if not len(chosen):
        raise DataError(f"train.labels=annotations: no annotated image in split {train.split!r}")
    names = ["ignored_ids" if n == "ambiguous_ids" else n for n in chosen.column_names]
    return pads.dataset(chosen.rename_columns(names))


def training_labels(
    run: Run, source: StageFolder | None = None, manifest: str | None = None
) -> pa.Table | None:
    """Return the labels that `label_source` finds as a table."""
    found = label_source(run, source, manifest)
    return None if found is None else found.to_table(columns=label_columns(run.config.train))


def label_columns(config: TrainConfig) -> list[str]:
    """Return the columns of labels that a training reads."""
    soft = ["probability"] if config.weighs_labels else []
    return ["image_id", "uri", "positive_ids", "ignored_ids", *soft]


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
    labels: pa.Table | pads.Dataset, class_table: ClassTable, config: TrainConfig
) -> TrainingSet:
    """Look at all labels once, or twice where images of rare classes are repeated.

    Raises DataError when no image has a positive label, and ConfigError when soft labels are
    asked of labels without probabilities.
    """
    source = pads.dataset(labels) if isinstance(labels, pa.Table) else labels
    counts_C = np.zeros(len(class_table), np.int64)
    images, dropped = 0, np.zeros(2, int)  # ids of other classes: positive, ignored
    sample: list[str | None] = []
    for piece, unknown in _mapped(source, class_table, config):
        counts_C += positive_counts(piece["positive"], len(class_table))
        images += len(piece)
        dropped += unknown
        places = np.linspace(0, len(piece) - 1, min(len(piece), _SAMPLED)).astype(int)
        sample += piece["uri"].take(pa.array(places)).to_pylist()
    if not counts_C.any():
        of_others = f" ({dropped[0]} are of other classes)" if dropped[0] else ""
        raise DataError(
            f"no image of {images} has a positive label{of_others}: lower"
            " filter.positive_threshold or filter.min_support, or check classes.source"
        )
    copies: dict[int, int] = {}
    least = config.min_positives_per_class
    if (counts_C[counts_C > 0] < least).any():
        owners_P, classes_P = _rare_positives(source, class_table, config, counts_C < least)
        numbers, owners_P = np.unique(owners_P, return_inverse=True)
        times, counts_C = repeats(owners_P, classes_P, len(numbers), counts_C, least)
        copies = {int(i): int(n) for i, n in zip(numbers, times, strict=True) if n > 1}
    kept = np.linspace(0, len(sample) - 1, min(len(sample), _SAMPLED)).astype(int)
    chosen = [sample[i] for i in kept]
    return TrainingSet(source, images, counts_C, copies, int(dropped.sum()), chosen)


def _mapped(
    labels: pads.Dataset, class_table: ClassTable, config: TrainConfig
) -> Iterator[tuple[pa.Table, tuple[int, int]]]:
    """Yield pieces of the labels with positions, and how many ids of each were of other classes."""
    soft = config.weighs_labels and "probability" in labels.schema.names
    columns = ["image_id", "uri", "positive_ids", "ignored_ids", *(["probability"] * soft)]
    for piece in stream(labels, columns):
        found = piece.filter(piece["image_id"].is_valid())
        positive, known = _positions(found["positive_ids"], class_table)
        ignored, known_ignored = _positions(found["ignored_ids"], class_table)
        table = {
            "image_id": found["image_id"],
            "uri": found["uri"],
            "positive": positive,
            "ignored": ignored,
        }
        if config.weighs_labels:
            table["weight"] = _positive_weights(found, positive, known)
        yield pa.table(table), (int((~known).sum()), int((~known_ignored).sum()))


def _rare_positives(
    labels: pads.Dataset,
    class_table: ClassTable,
    config: TrainConfig,
    rare_C: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return image and class (P,) of all positives of the images that show a rare class."""
    images, classes, start = [], [], 0
    for piece, _ in _mapped(labels, class_table, config):
        rows_P, classes_P = _rows(piece["positive"]), _flat(piece["positive"])
        shows_N = np.zeros(len(piece), bool)
        shows_N[rows_P[rare_C[classes_P]]] = True
        images.append(rows_P[shows_N[rows_P]] + start)
        classes.append(classes_P[shows_N[rows_P]])
        start += len(piece)
    return np.concatenate(images), np.concatenate(classes)


def write_rows(
    data: TrainingSet, class_table: ClassTable, config: TrainConfig, seed: int, folder: str
) -> list[int]:
    """Write a training's rows in an order that follows from `seed`; returns the rows of each file.

    Each Parquet file `part-00000.parquet` and so on has some 65,536 rows drawn from everywhere, at
    the most 256 files. Rows have row (their number), image_id, uri, `positive` and `ignored` as
    positions of classes and, with soft labels, `weight`. Memory is that of one file; the rows
    pass through temporary files of this machine. Rows that an earlier run finished are kept.
    """
    index = storage.join(folder, "_rows.json")
    if storage.exists(index):
        return list(storage.read_json(index))
    files = max(1, min(_MOST_FILES, -(-data.rows // _FILE_ROWS)))
    random = np.random.default_rng(seed)
    counts: list[int] = []
    with tempfile.TemporaryDirectory() as spill:
        _scatter(data, class_table, config, files, random, spill)
        for number in range(files):
            with pa.OSFile(str(Path(spill) / str(number))) as source:
                rows = pa.ipc.open_stream(source).read_all()
            rows = rows.take(pa.array(random.permutation(len(rows))))
            numbers = np.arange(sum(counts), sum(counts) + len(rows))
            write_table(row_file(folder, number), rows.append_column("row", pa.array(numbers)))
            counts.append(len(rows))
    storage.write_json(index, counts)
    return counts


def row_file(folder: str, number: int) -> str:
    """Return the path of one of the files that `write_rows` writes."""
    return storage.join(folder, f"part-{number:05d}.parquet")


def _scatter(
    data: TrainingSet,
    class_table: ClassTable,
    config: TrainConfig,
    files: int,
    random: np.random.Generator,
    folder: str,
) -> None:
    """Write every row, repeats included, to one of so many files at random."""
    copies = np.array(sorted(data.copies.items()), np.int64).reshape(-1, 2)
    start = 0
    with ExitStack() as stack:
        writers: list[pa.RecordBatchStreamWriter] = []
        for piece in data.mapped(class_table, config):
            if not writers:
                sinks = [stack.enter_context(pa.OSFile(f"{folder}/{i}", "w")) for i in range(files)]
                writers = [stack.enter_context(pa.ipc.new_stream(s, piece.schema)) for s in sinks]
            times = np.ones(len(piece), np.int64)
            here = copies[(copies[:, 0] >= start) & (copies[:, 0] < start + len(piece))]
            times[here[:, 0] - start] = here[:, 1]
            rows = np.repeat(np.arange(len(piece)), times)
            goes = random.integers(files, size=len(rows))
            order = np.argsort(goes, kind="stable")
            bounds = np.searchsorted(goes[order], np.arange(files + 1))
            sorted_rows = piece.take(pa.array(rows[order]))
            for writer, low, high in zip(writers, bounds, bounds[1:], strict=False):
                writer.write_table(sorted_rows.slice(low, high - low))
            start += len(times)


def named_rows(folder: str, rows: list[int]) -> list[str]:
    """Return the image ids of some of the rows that `write_rows` wrote, in their order."""
    found = open_table(folder).to_table(
        columns=["row", "image_id"], filter=pads.field("row").isin(rows)
    )
    ids = dict(zip(found["row"].to_pylist(), found["image_id"].to_pylist(), strict=True))
    return [ids[row] for row in rows]


def bad_rows(task: Task) -> int:
    """Return how many rows of a training are known to be bad, repeats included."""
    folder = task.work_file("bad-train")
    if not storage.list_names(folder):
        return 0
    return len(pc.unique(read_table(folder, ["row"])["row"]))


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


def repeats(
    owners_P: npt.NDArray[np.int64],
    classes_P: npt.NDArray[np.int64],
    images: int,
    counts_C: npt.NDArray[np.int64],
    least: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return how often each image occurs (N,), and the positives by class then (C,).

    Positive label p is that of image `owners_P[p]` and class `classes_P[p]`. The images of a
    class with fewer than `least` positives (`counts_C`) are repeated in turn, rarest class first,
    and each repeat counts for all of its classes. Images without a rare class may be left out of
    the labels. Source: DEFR's training, with least = 40.
    """
    times_N, counts_C = np.ones(images, np.int64), counts_C.astype(np.int64)
    for c in np.argsort(counts_C, kind="stable"):
        lacking = least - int(counts_C[c])
        if lacking <= 0:
            continue
        owners = owners_P[classes_P == c]
        if not len(owners):
            continue
        extra_N = np.zeros(images, np.int64)
        extra_N[owners] = lacking // len(owners)
        extra_N[owners[: lacking % len(owners)]] += 1
        times_N += extra_N
        counts_C += np.bincount(classes_P, extra_N[owners_P], len(counts_C)).astype(np.int64)
    return times_N, counts_C


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
            remedy="take labels of `hts filter`",
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
