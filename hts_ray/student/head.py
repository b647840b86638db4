"""Fitting the student's classifier alone, on features that were computed once.

With the tower frozen an image's features never change, so an epoch is a matrix product: what
takes hours of forward passes takes seconds here, and a sweep can afford a fit for every trial.
`fit_head` takes arrays and returns a classifier; `fit_on_features` is `train.trainable=head`,
which computes the features of a training's images first.

Shapes: N images, B images of a batch, D features, C classes.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hts_ray.config import TrainConfig
from hts_ray.engine.image_pass import OK
from hts_ray.errors import DataError
from hts_ray.metrics import hico_average_precision, mean_average_precision
from hts_ray.store import storage
from hts_ray.store.aliases import FloatArray
from hts_ray.store.tables import open_table, stream, write_table
from hts_ray.student import targets
from hts_ray.student.checkpoints import WEIGHTS
from hts_ray.student.features import FLIPPED, TABLE, feature_matrix, plan_features
from hts_ray.student.loggers import CurveLog
from hts_ray.student.model import CosineClassifier
from hts_ray.student.optimizer import Optimizer, settings_loss
from hts_ray.student.progress import epoch_record
from hts_ray.student.targets import Task

OnEpoch = Callable[["HeadFit"], Mapping[str, Any] | None]

_EPSILON = 1e-12  # of torch's normalize, so that a row of zeros stays one
_NAMED_IMAGES = 8
_MULTIPLICATIONS_FOR_THREADS = 1 << 24  # of a step's forward pass


@dataclass(frozen=True, eq=False)
class HeadFit:
    """A fitted classifier (C, D) float32, not normalised, and one record an epoch.

    Records are those of the full training's history. `logit_scale` is the given one unless it
    was learnt.
    """

    classifier_CD: FloatArray
    history: list[dict[str, Any]]
    logit_scale: float


class RowFile:
    """A matrix (N, K) in a temporary file of this machine, of which rows are read as asked for.

    Rows are given as positions in an int64 tensor, as those of a tensor are. The file is gone when
    the object is.
    """

    def __init__(self, shape: tuple[int, int], kind: npt.DTypeLike) -> None:
        self.shape, self._kind = shape, np.dtype(kind)
        self._row_bytes = shape[1] * self._kind.itemsize
        self._file = tempfile.TemporaryFile(prefix="hts-rows-")  # noqa: SIM115 - lives on
        self._file.truncate(shape[0] * self._row_bytes)

    def __getitem__(self, rows_B: Tensor) -> Tensor:
        values_BK = np.empty((len(rows_B), self.shape[1]), self._kind)
        for value_K, row in zip(values_BK, rows_B.tolist(), strict=True):
            os.preadv(self._file.fileno(), [value_K], row * self._row_bytes)
        return torch.from_numpy(values_BK)

    def __setitem__(self, rows_B: Tensor, values_BK: Tensor) -> None:
        for row, value_K in zip(rows_B.tolist(), values_BK.numpy(), strict=True):
            os.pwrite(self._file.fileno(), value_K.tobytes(), row * self._row_bytes)


Matrix = Tensor | RowFile


class HeadData:
    """What a fit reads, checked; its arrays are copied.

    `features_ND` and `flipped_ND`, those of the mirrored images, need not be normalised.
    `targets_NC` holds 1, 0 (ignored) and -1; `label_weights_NC` are numbers of at least 0. Images
    are named by `image_ids` in errors, by row without them. Raises DataError when there is no
    image, ValueError for shapes that do not fit.
    """

    def __init__(
        self,
        features_ND: ArrayLike,
        targets_NC: ArrayLike,
        *,
        label_weights_NC: ArrayLike | None = None,
        flipped_ND: ArrayLike | None = None,
        image_ids: Sequence[str] | None = None,
    ) -> None:
        features = _float_array("features_ND", features_ND)
        # Copies: what comes from Arrow is read-only, which torch warns of.
        targets_array = np.array(targets_NC)
        if targets_array.ndim != 2 or len(targets_array) != len(features):
            found = targets_array.shape
            raise ValueError(f"targets_NC {found}: {len(features)} images need as many rows")
        if not len(features):
            raise DataError("no image to fit the classifier on: see the quarantine")
        self.features_ND: Matrix = torch.from_numpy(_unit(features))
        self.targets_NC: Matrix = torch.from_numpy(targets_array)
        # Image and class of every positive.
        self.positives: tuple[Any, ...] = np.nonzero(targets_array == 1)
        self.weights_NC: Matrix | None = None
        self.flipped_ND: Matrix | None = None
        if label_weights_NC is not None:
            self.weights_NC = torch.from_numpy(np.array(label_weights_NC, dtype=np.float32))
        if flipped_ND is not None:
            flipped = _float_array("flipped_ND", flipped_ND)
            if flipped.shape != features.shape:
                raise ValueError(
                    f"flipped_ND {flipped.shape} and features_ND {features.shape}:"
                    " both need the same shape"
                )
            self.flipped_ND = torch.from_numpy(_unit(flipped))
        self._image_ids = image_ids

    @classmethod
    def streamed(cls, task: Task, features: str, image_ids: pa.Array) -> HeadData:
        """Read what a training needs of the images `image_ids` from a table of features.

        What takes more than `train.features.memory_gib` lies in files of this machine.
        """
        config, classes, self = task.config, len(task.run.class_table), cls.__new__(cls)
        table, images = open_table(features), len(image_ids)
        names = [TABLE, FLIPPED] if config.augment.flip else [TABLE]
        width = table.schema.field(TABLE).type.list_size
        row_bytes = 4 * width * len(names) + classes * (5 if config.weighs_labels else 1)
        on_disk = images * row_bytes > config.features.memory_gib * 2**30

        def matrix(columns: int, kind: npt.DTypeLike) -> Matrix:
            shape = (images, columns)
            return RowFile(shape, kind) if on_disk else torch.from_numpy(np.empty(shape, kind))

        found = {name: matrix(width, np.float32) for name in names}
        for rows_B, piece in _placed(stream(table, ["image_id", *names]), image_ids):
            for name in names:
                found[name][rows_B] = torch.from_numpy(_unit(feature_matrix(piece[name])))
        self.features_ND, self.flipped_ND = found[TABLE], found.get(FLIPPED)
        self.targets_NC = matrix(classes, np.int8)
        self.weights_NC = matrix(classes, np.float32) if config.weighs_labels else None
        pairs = []
        for rows_B, piece in _placed(task.data.mapped(task.run.class_table, config), image_ids):
            targets_BC = targets.dense_targets(piece["positive"], piece["ignored"], classes)
            self.targets_NC[rows_B] = torch.from_numpy(targets_BC)
            owners_P, classes_P = np.nonzero(targets_BC == 1)
            pairs.append((rows_B.numpy()[owners_P], classes_P))
            if self.weights_NC is not None:
                weights = targets.dense_weights(piece["positive"], piece["weight"], classes)
                self.weights_NC[rows_B] = torch.from_numpy(weights)
        owners_P, classes_P = (np.concatenate(part) for part in zip(*pairs, strict=True))
        order = np.lexsort((classes_P, owners_P))
        self.positives, self._image_ids = (owners_P[order], classes_P[order]), image_ids
        return self

    def names(self, rows: Tensor) -> str:
        """Name the first few images of some rows."""
        found = sorted(set(rows.tolist()))[:_NAMED_IMAGES]
        ids = self._image_ids
        return ", ".join(f"row {row}" if ids is None else str(ids[row]) for row in found)


def _placed(pieces: Iterable[pa.Table], image_ids: pa.Array) -> Iterator[tuple[Tensor, pa.Table]]:
    """Yield the rows of pieces whose images are among `image_ids`, each with its place there."""
    for piece in pieces:
        ids = piece["image_id"].cast(image_ids.type)
        places = pc.index_in(ids, value_set=image_ids).combine_chunks()
        known = piece.filter(places.is_valid())
        if len(known):
            yield torch.from_numpy(places.drop_null().to_numpy().astype(np.int64)), known


def fit_head(
    data: HeadData,
    classifier_CD: ArrayLike,
    *,
    logit_scale: float,
    config: TrainConfig,
    seed: int,
    on_epoch: OnEpoch | None = None,
) -> HeadFit:
    """Fit a cosine classifier to fixed features, as full training with a frozen tower would.

    Loss, optimizer, schedule, batch size, epochs, moving average, the learnt logit scale, repeats
    of rare classes (`min_positives_per_class`) and class weights (`class_balance`) are those of
    `config`; the order of the images follows from `seed`. Of the augmentations only the flip is
    possible: with `augment.flip` and flipped features every image shows one of its two sides at
    random in every epoch.

    The fit starts from `classifier_CD`. The same arguments give the same bytes on the same number
    of threads; torch's global random state is neither read nor changed. `on_epoch` gets the fit so
    far after every epoch; what it returns is added to the epoch's record, and what it raises ends
    the fit. Raises DataError when the loss stops being finite, naming images; ValueError for
    shapes that do not fit.
    """
    start_CD = _float_array("classifier_CD", classifier_CD)
    if start_CD.shape != (data.targets_NC.shape[1], data.features_ND.shape[1]):
        raise ValueError(
            f"classifier_CD {start_CD.shape}: targets_NC {tuple(data.targets_NC.shape)} and"
            f" features_ND {tuple(data.features_ND.shape)} need as many classes and features"
        )
    fit = _Fit(data, start_CD, logit_scale, config)
    history: list[dict[str, Any]] = []
    for epoch in range(config.epochs):
        with torch.enable_grad(), _suitable_threads(config.batch_size * start_CD.size):
            history.append(fit.run_epoch(seed, epoch))
        if on_epoch is not None:
            history[-1].update(on_epoch(fit.result(history)) or {})
    return fit.result(history)


class _Fit:
    """What the epochs of a fit share."""

    def __init__(
        self, data: HeadData, start_CD: FloatArray, logit_scale: float, config: TrainConfig
    ) -> None:
        self._data, self._config, self._logit_scale = data, config, logit_scale
        self._head = CosineClassifier(torch.tensor(start_CD), logit_scale)
        if config.learn_logit_scale:
            self._head.learn_logit_scale()
        self._optimizer = Optimizer.of(self._head, config)
        (owners_P, classes_P), (images, classes) = data.positives, data.targets_NC.shape
        counts_C = np.bincount(classes_P, minlength=classes)
        least = config.min_positives_per_class
        times_N, counts_C = targets.repeats(owners_P, classes_P, images, counts_C, least)
        self._order = np.repeat(np.arange(images), times_N)
        weights = targets.class_weights(counts_C, config.class_balance)
        self._loss = settings_loss(config, weights, "none")

    def result(self, history: list[dict[str, Any]]) -> HeadFit:
        """Return what would be published now."""
        head = self._optimizer.published
        gain = 1.0 if head.log_gain is None else head.log_gain.exp().item()
        classifier_CD = head.classifier.detach().numpy().copy()
        return HeadFit(classifier_CD, list(history), self._logit_scale * gain)

    def run_epoch(self, seed: int, epoch: int) -> dict[str, Any]:
        """Pass over the images once; all that is random in it follows from seed and epoch."""
        started = time.monotonic()
        random = np.random.default_rng([seed, epoch])
        rows = torch.from_numpy(random.permutation(self._order))
        flips = torch.from_numpy(random.random(len(rows)) < 0.5)
        size = self._config.batch_size
        steps = -(-len(rows) // size)
        total, lr = 0.0, 0.0
        for step in range(steps):
            chosen = slice(step * size, (step + 1) * size)
            loss = self._loss_of(rows[chosen], flips[chosen], epoch)
            lr = self._optimizer.set_rates(epoch * steps + step, steps)
            (loss / len(rows[chosen])).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            total += loss.item()
        return epoch_record(epoch, total, lr, len(rows), time.monotonic() - started)

    def _loss_of(self, rows_B: Tensor, flips_B: Tensor, epoch: int) -> Tensor:
        """Return the loss summed over a batch; DataError when it is not finite."""
        data = self._data
        features_BD = data.features_ND[rows_B]
        if data.flipped_ND is not None and self._config.augment.flip:
            features_BD[flips_B] = data.flipped_ND[rows_B[flips_B]]
        weights_BC = None if data.weights_NC is None else data.weights_NC[rows_B]
        loss_B = self._loss(self._head.logits(features_BD), data.targets_NC[rows_B], weights_BC)
        total: Tensor = loss_B.sum()
        if not math.isfinite(total.item()):
            bad_B = ~torch.isfinite(loss_B)
            # Losses may be finite each and overflow together.
            names = data.names(rows_B[bad_B] if bad_B.any() else rows_B)
            raise DataError(
                f"the loss is not finite in epoch {epoch}; images {names}: lower"
                " train.optim.head_lr or train.optim.lr, raise train.loss_temperature or set"
                " train.optim.grad_clip"
            )
        return total


@contextmanager
def _suitable_threads(multiplications: int) -> Iterator[None]:
    """Compute small steps in one thread: threads that wait for each other cost more than they do.

    On busy cores such a fit takes 30 times as long with two threads.
    """
    threads = torch.get_num_threads()
    if multiplications < _MULTIPLICATIONS_FOR_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def head_logits(features_ND: ArrayLike, classifier_CD: ArrayLike, logit_scale: float) -> FloatArray:
    """Return logits (N, C) float32: `logit_scale` times the cosine, as the student's forward does.

    Raises ValueError for shapes that do not fit.
    """
    features = _unit(_float_array("features_ND", features_ND))
    classifier = _unit(_float_array("classifier_CD", classifier_CD))
    if features.shape[1] != classifier.shape[1]:
        raise ValueError(
            f"features_ND {features.shape} and classifier_CD {classifier.shape}:"
            " both need the same number of columns"
        )
    return np.asarray(np.float32(logit_scale) * (features @ classifier.T), dtype=np.float32)


def _float_array(name: str, values: ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float32)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}: give 2 dimensions")
    return array


def _unit(array_ND: FloatArray) -> FloatArray:
    """Return rows of length 1; rows of zeros and of NaN stay what they are."""
    lengths_N1 = np.sqrt(np.einsum("nd,nd->n", array_ND, array_ND))[:, None]
    return np.asarray(array_ND / np.maximum(lengths_N1, _EPSILON), dtype=np.float32)


def fit_on_features(task: Task) -> dict[str, Any]:
    """Fit the classifier of the task's student; returns its history and weights (bytes).

    Features that the run has of these images already are used again. Raises DataError when no
    image can be read or the loss stops being finite.
    """
    config = task.config
    pieces = task.data.mapped(task.run.class_table, config)
    rows = pa.concat_tables(piece.select(["image_id", "uri"]) for piece in pieces)
    features, ids = _encoded(task, "train", rows, config.split, flipped=config.augment.flip)
    data = HeadData.streamed(task, features, ids)
    state = safetensors.torch.load(storage.read_bytes(storage.join(task.initial, WEIGHTS)))
    validate = _validator(task)
    log = CurveLog(config.loggers, task.stage.file("curves"), config.model_dump(mode="json"))

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
    return {"history": fit.history, "weights": weights, "kept": {}}


def _validator(task: Task) -> Callable[[HeadFit], float | None]:
    """Return what measures a fit on the validation images, in the epochs where that is due."""
    validation, config = task.validation, task.config
    if validation is None:
        return lambda fit: None
    split = config.validation_split or "validation"
    path, ids = _encoded(task, "validation", validation.table, split, flipped=False)
    pieces = _placed(stream(open_table(path), ["image_id", TABLE]), ids)
    parts = [(rows_B.numpy(), feature_matrix(piece[TABLE])) for rows_B, piece in pieces]
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    features_ND = np.concatenate([features for _, features in parts])[order]
    known = validation.table["image_id"].cast(ids.type)
    annotations_NC = validation.annotations_NC[pc.index_in(ids, value_set=known).to_numpy()]

    def validate(fit: HeadFit) -> float | None:
        if not targets.validation_due(config, len(fit.history) - 1):
            return None
        logits_NC = head_logits(features_ND, fit.classifier_CD, fit.logit_scale)
        return mean_average_precision(hico_average_precision(logits_NC, annotations_NC))

    return validate


def _encoded(
    task: Task, images: str, rows: pa.Table, split: str, *, flipped: bool
) -> tuple[str, pa.Array]:
    """Have the features of some rows' images in a table; returns its path and the ids, sorted.

    Images that cannot be read are left out, and listed in the task's folder.
    """
    rows = rows.select(["image_id", "uri"])
    rows = rows.append_column("split", pa.array([split] * len(rows), pa.string()))
    settings, run_dir = task.config.features, task.stage.run_dir
    planned = plan_features(settings, run_dir, task.initial, rows, flipped=flipped)

    def told(done: int, of: int, bad: int) -> None:
        if task.progress is not None:
            task.progress({"encoded": done, "of": of, "quarantined": bad})

    stage = planned.run(told if task.progress else None)
    stored = stage.read(["image_id", "uri", "status", "error_kind", "error"])
    # By id: the order in which workers wrote must not be the order of a training.
    stored = stored.filter(pc.is_in(stored["image_id"], value_set=rows["image_id"]))
    good = pc.equal(stored["status"], OK)
    bad = stored.filter(pc.invert(good))
    if len(bad):
        path = task.work_file(f"bad-{images}", "features.parquet")
        write_table(path, bad.drop_columns(["status"]))
    # Text of 2 GiB has no room in an array of strings.
    ids = stored.filter(good)["image_id"].cast(pa.large_string()).combine_chunks()
    if not len(ids):
        raise DataError(f"{stage.path} holds no image with features: see its quarantine")
    return stage.path, ids.take(pc.sort_indices(ids))
