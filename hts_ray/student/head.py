"""Fitting the student's classifier alone, on features that were computed once.

With the tower frozen an image's features never change, so an epoch is a matrix product: what
takes hours of forward passes takes seconds here, and a sweep can afford a fit for every trial. No
Ray, no images, no tower: arrays in, a classifier out.

Shapes: N images, B images of a batch, D features, C classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from hts_ray.config import TrainConfig
from hts_ray.errors import DataError
from hts_ray.losses import SignedLoss, make_loss
from hts_ray.student.loop import average_decay, learning_rate_factor

FloatArray = npt.NDArray[np.float32]

OnEpoch = Callable[["HeadFit"], Mapping[str, Any] | None]

_EPSILON = 1e-12  # of torch's normalize, so that a row of zeros stays one
_NAMED_IMAGES = 8
_MULTIPLICATIONS_FOR_THREADS = 1 << 24  # of a step's forward pass


@dataclass(frozen=True, eq=False)
class HeadFit:
    """A fitted classifier (C, D) float32, not normalised, and one record an epoch.

    Records have the keys of the full training's history: epoch, loss (mean over images), lr,
    images, images_per_second, seconds. `logit_scale` is the given one unless it was learnt.
    """

    classifier_CD: FloatArray
    history: list[dict[str, Any]]
    logit_scale: float


def fit_head(
    features_ND: ArrayLike,
    targets_NC: ArrayLike,
    classifier_CD: ArrayLike,
    *,
    logit_scale: float,
    config: TrainConfig,
    seed: int,
    label_weights_NC: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    flipped_ND: ArrayLike | None = None,
    image_ids: Sequence[str] | None = None,
    on_epoch: OnEpoch | None = None,
) -> HeadFit:
    """Fit a cosine classifier to fixed features, as full training with a frozen tower would.

    Loss, optimizer, schedule, batch size, epochs, moving average, the learnt logit scale, repeats
    of rare classes (`min_positives_per_class`) and class weights (`class_balance`, unless
    `class_weights` (C,) are given) are those of `config`; the order of the images follows from
    `seed`. Of the augmentations only the flip is possible: with `augment.flip` and `flipped_ND`
    every image shows one of its two sides at random in every epoch.

    `features_ND` and `flipped_ND` need not be normalised; `targets_NC` holds 1, 0 (ignored) and
    -1; `label_weights_NC` are numbers of at least 0. The fit starts from `classifier_CD`. The same
    arguments give the same bytes on the same number of threads; torch's global random state is
    neither read nor changed. `on_epoch` gets the fit so far after every epoch; what it returns is
    added to the epoch's record, and what it raises ends the fit.

    Raises DataError when there is no image or the loss stops being finite, naming the images by
    `image_ids`, or by row without them; ValueError for shapes or values that do not fit.
    """
    data = _Data.of(features_ND, targets_NC, classifier_CD, label_weights_NC, flipped_ND, config)
    order = _repeated(data.targets_NC, config.min_positives_per_class)
    loss = _make_loss(config, data.targets_NC[order], class_weights)
    head = _Head(_float_array("classifier_CD", classifier_CD), logit_scale, config)
    fit = _Fit(data, head, config, loss, image_ids)
    history: list[dict[str, Any]] = []
    for epoch in range(config.epochs):
        with torch.enable_grad(), _suitable_threads(config.batch_size * head.classifier.numel()):
            history.append(_run_epoch(fit, order, seed, epoch))
        if on_epoch is not None:
            history[-1].update(on_epoch(head.result(history)) or {})
    return head.result(history)


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


@dataclass(frozen=True)
class _Data:
    """What a fit reads, checked: unit features, targets and weights of N images."""

    features_ND: Tensor
    flipped_ND: Tensor | None
    targets_NC: Tensor
    weights_NC: Tensor | None

    @classmethod
    def of(
        cls,
        features_ND: ArrayLike,
        targets_NC: ArrayLike,
        classifier_CD: ArrayLike,
        label_weights_NC: ArrayLike | None,
        flipped_ND: ArrayLike | None,
        config: TrainConfig,
    ) -> _Data:
        features = _float_array("features_ND", features_ND)
        # A copy: what comes from Arrow is read-only, which torch warns of.
        targets = np.array(targets_NC)
        classes = len(_float_array("classifier_CD", classifier_CD))
        if targets.shape != (len(features), classes):
            raise ValueError(
                f"targets_NC {targets.shape}: {len(features)} images and {classes} classes need"
                f" ({len(features)}, {classes})"
            )
        if not len(features):
            raise DataError("no image to fit the classifier on: see the quarantine")
        weights = None
        if label_weights_NC is not None:
            weights = torch.from_numpy(np.array(label_weights_NC, dtype=np.float32))
        flipped = None
        if flipped_ND is not None and config.augment.flip:
            flipped_array = _float_array("flipped_ND", flipped_ND)
            if flipped_array.shape != features.shape:
                raise ValueError(
                    f"flipped_ND {flipped_array.shape} and features_ND {features.shape}:"
                    " both need the same shape"
                )
            flipped = torch.from_numpy(_unit(flipped_array))
        return cls(torch.from_numpy(_unit(features)), flipped, torch.from_numpy(targets), weights)


class _Head:
    """The parameters of a fit, their optimizer, and their moving average where one is kept."""

    def __init__(self, classifier_CD: FloatArray, logit_scale: float, config: TrainConfig) -> None:
        optim = config.optim
        self.classifier = torch.tensor(classifier_CD).requires_grad_()
        # As the student has it: the logarithm of a factor that starts at 1.
        self.log_gain = torch.zeros(()).requires_grad_(config.learn_logit_scale)
        self.base_lr = optim.lr if optim.head_lr is None else optim.head_lr
        self.parameters = [self.classifier, *([self.log_gain] if config.learn_logit_scale else [])]
        decays = [optim.weight_decay, 0.0]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [value], "lr": self.base_lr, "weight_decay": decay}
                for value, decay in zip(self.parameters, decays, strict=False)
            ]
        )
        self._logit_scale = float(logit_scale)
        self._ema_decay = config.ema_decay
        self._average = [value.detach().clone() for value in self.parameters]
        self._steps = 0
        self._grad_clip = optim.grad_clip

    def __call__(self, features_BD: Tensor) -> Tensor:
        """Return logits (B, C) of unit features."""
        cosine_BC = features_BD @ F.normalize(self.classifier, dim=-1).T
        return self._logit_scale * self.log_gain.exp() * cosine_BC

    def step(self, loss: Tensor, lr_factor: float) -> float:
        """Take one optimizer step; returns its learning rate."""
        lr = self.base_lr * lr_factor
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self._grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self._grad_clip)
        self.optimizer.step()
        if self._ema_decay is not None:
            decay = average_decay(self._steps, self._ema_decay)
            with torch.no_grad():
                for average, value in zip(self._average, self.parameters, strict=True):
                    average.lerp_(value, 1 - decay)
        self._steps += 1
        return lr

    def result(self, history: list[dict[str, Any]]) -> HeadFit:
        """Return what was fitted: the moving average, where one is kept."""
        values = self.parameters if self._ema_decay is None else self._average
        gain = values[1].exp().item() if len(values) > 1 else 1.0
        classifier_CD = values[0].detach().numpy().copy()
        return HeadFit(classifier_CD, list(history), self._logit_scale * gain)


@dataclass(frozen=True)
class _Fit:
    """What the epochs of a fit share."""

    data: _Data
    head: _Head
    config: TrainConfig
    loss: SignedLoss
    image_ids: Sequence[str] | None


def _run_epoch(fit: _Fit, order: npt.NDArray[np.int64], seed: int, epoch: int) -> dict[str, Any]:
    """Pass over the images once; everything random in it follows from the seed and the epoch."""
    started = time.monotonic()
    random = np.random.default_rng([seed, epoch])
    rows = torch.from_numpy(random.permutation(order))
    flips = torch.from_numpy(random.random(len(rows)) < 0.5)
    size, epochs = fit.config.batch_size, fit.config.epochs
    steps = -(-len(rows) // size)
    total, lr = 0.0, 0.0
    for step in range(steps):
        chosen = slice(step * size, (step + 1) * size)
        loss = _loss_of(fit, rows[chosen], flips[chosen], epoch)
        done = epoch * steps + step
        factor = learning_rate_factor(done, epochs * steps, fit.config.optim, steps)
        lr = fit.head.step(loss / len(rows[chosen]), factor)
        total += loss.item()
    seconds = time.monotonic() - started
    return {
        "epoch": epoch,
        "loss": total / len(rows),
        "lr": lr,
        "images": len(rows),
        "images_per_second": len(rows) / max(seconds, 1e-9),
        "seconds": seconds,
    }


def _loss_of(fit: _Fit, rows_B: Tensor, flips_B: Tensor, epoch: int) -> Tensor:
    """Return the loss summed over a batch."""
    data = fit.data
    features_BD = data.features_ND[rows_B]
    if data.flipped_ND is not None:
        features_BD[flips_B] = data.flipped_ND[rows_B[flips_B]]
    weights_BC = None if data.weights_NC is None else data.weights_NC[rows_B]
    loss_B = fit.loss(fit.head(features_BD), data.targets_NC[rows_B], weights_BC)
    total: Tensor = loss_B.sum()
    if not math.isfinite(total.item()):
        bad_B = ~torch.isfinite(loss_B)
        # Losses may be finite each and overflow together.
        _refuse(fit, rows_B[bad_B] if bad_B.any() else rows_B, epoch)
    return total


def _refuse(fit: _Fit, rows: Tensor, epoch: int) -> None:
    found = sorted(set(rows.tolist()))[:_NAMED_IMAGES]
    names = [f"row {row}" if fit.image_ids is None else fit.image_ids[row] for row in found]
    raise DataError(
        f"the loss is not finite in epoch {epoch}; images {', '.join(names)}: lower"
        " train.optim.head_lr or train.optim.lr, raise train.loss_temperature or set"
        " train.optim.grad_clip"
    )


def _make_loss(
    config: TrainConfig, targets_NC: Tensor, class_weights: ArrayLike | None
) -> SignedLoss:
    from hts_ray.student.train import class_weights as balanced

    if class_weights is None:
        found = np.nonzero(targets_NC.numpy() == 1)[1]
        # Which image has which class does not matter here: one list holds them all.
        positive = pa.ListArray.from_arrays([0, len(found)], pa.array(found))
        class_weights = balanced(positive, targets_NC.shape[1], config.class_balance)
    return make_loss(
        config.loss,
        config.loss_temperature,
        reduction="none",
        parameters=config.loss_parameters,
        class_weights=None
        if class_weights is None
        else torch.tensor(np.asarray(class_weights, dtype=np.float32)),
    )


def _repeated(targets_NC: Tensor, least: int) -> npt.NDArray[np.int64]:
    """Return the rows of an epoch, those of rare classes repeated."""
    from hts_ray.student.train import repeat_indices

    if not least:
        return np.arange(len(targets_NC))
    return repeat_indices(targets_NC.numpy(), least)


def _float_array(name: str, values: ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float32)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}: give 2 dimensions")
    return array


def _unit(array_ND: FloatArray) -> FloatArray:
    """Return rows of length 1; rows of zeros and of NaN stay what they are."""
    lengths_N1 = np.sqrt(np.einsum("nd,nd->n", array_ND, array_ND))[:, None]
    return np.asarray(array_ND / np.maximum(lengths_N1, _EPSILON), dtype=np.float32)
