"""Losses over partly labelled classes: LSE-Sign, the paper's, and binary cross-entropy.

Shapes: N images, C classes. Targets are 1 (positive), 0 (ignored) and -1 (negative).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

Reduction = Literal["mean", "sum", "none"]


class _SignedLoss(nn.Module, ABC):
    """What both losses share: checks, temperature, float32 arithmetic and the reduction."""

    def __init__(self, temperature: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(
                f"temperature = {temperature!r}: give a finite number above 0 (1.0 changes nothing)"
            )
        if reduction not in get_args(Reduction):
            raise ValueError(
                f"reduction = {reduction!r}: give one of {', '.join(get_args(Reduction))}"
            )
        self.temperature = float(temperature)
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of (N, C) `logits` against (N, C) `targets`; see the class for the formula."""
        check_targets(logits, targets)
        # bf16 keeps 8 bits of mantissa: a sum of 600 exponentials has to be taken in float32.
        # float64 stays what it is, so that gradients can be checked numerically.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        signs_NC = targets.to(wide.dtype)
        loss_N = self._rows(signs_NC * wide / self.temperature, signs_NC)
        if self.reduction == "none":
            return loss_N
        # An empty batch (a worker's last shard) is worth 0, not the NaN of 0 / 0.
        return loss_N.sum() if self.reduction == "sum" else loss_N.sum() / max(len(loss_N), 1)

    @abstractmethod
    def _rows(self, margins_NC: Tensor, signs_NC: Tensor) -> Tensor:
        """Loss (N,) of each image, from y * s / T and y."""

    def extra_repr(self) -> str:
        """Show the settings in `print(loss)`."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


class LSESignLoss(_SignedLoss):
    """LSE-Sign: log(1 + sum over kept classes of exp(-y s / T)) for each image.

    The gradient of one image is a softmax over its classes (and the constant 1), so it goes to
    the classes that are most wrong and is bounded by 1 / T however many classes there are; binary
    cross-entropy spreads it over all the easy negatives instead.

    `logits` (N, C) float of any precision, finite, is left unchanged; `targets` (N, C) of
    any signed type holds 1, 0 or -1. Ignored classes drop out of the sum, so an image with
    every class ignored contributes 0. `mean` divides by the N images, those at 0 included, which
    keeps the step size independent of how many images the filter emptied; `sum` adds them;
    `none` gives (N,). The result is float32 (float64 for float64 logits). Raises ValueError for
    another target, unequal shapes, temperature <= 0 or an unknown reduction.

    Source: DEFR, arXiv 2112.06392, as used by HTS (ICIP 2023); the temperature and
    the ignored classes are ours, the authors' code has neither and negates logits in place.
    """

    def _rows(self, margins_NC: Tensor, signs_NC: Tensor) -> Tensor:
        exponents_NC = (-margins_NC).masked_fill(signs_NC == 0, -math.inf)
        # The constant 1 is exp(0): as one more term, logsumexp keeps the whole sum in range, and
        # being finite it gives a row of -inf a value (0) and a gradient (0) instead of NaN.
        one_N1 = exponents_NC.new_zeros(len(exponents_NC), 1)
        return torch.logsumexp(torch.cat((one_N1, exponents_NC), dim=1), dim=1)


class BCELoss(_SignedLoss):
    """Binary cross-entropy with ignored classes: mean over classes of log(1 + exp(-y s / T)).

    Same inputs, reductions and errors as `LSESignLoss`. An image's loss is the sum over its
    kept classes divided by C, all classes, not by the kept ones: a kept entry then weighs the
    same in every image and an ignored one only loses its own term. Without ignored classes
    `mean` equals torch's `binary_cross_entropy_with_logits`. Being a mean over classes, it is
    some C times smaller than a sum, so a learning rate tuned for LSE-Sign has to be tuned anew.

    `positive_weight` multiplies the terms of positives: a number, or a (C,) tensor, above 0;
    ValueError otherwise.
    """

    positive_weight: Tensor | None

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        positive_weight: float | Tensor | None = None,
    ) -> None:
        super().__init__(temperature, reduction)
        weight = None
        if positive_weight is not None:
            weight = torch.as_tensor(positive_weight, dtype=torch.float32).detach()
            if weight.ndim > 1 or not bool(((weight > 0) & weight.isfinite()).all()):
                raise ValueError(
                    f"positive_weight = {positive_weight!r}: give one finite number above 0,"
                    " or a (C,) tensor of them"
                )
        self.register_buffer("positive_weight", weight, persistent=False)

    def _rows(self, margins_NC: Tensor, signs_NC: Tensor) -> Tensor:
        # An infinite margin costs 0 and has gradient 0. Multiplying the terms by 0 instead would
        # let an ignored logit that overflowed turn the loss into NaN.
        margins_NC = margins_NC.masked_fill(signs_NC == 0, math.inf)
        # logsigmoid rather than softplus, which turns linear above 20 and is inexact there.
        terms_NC = -F.logsigmoid(margins_NC)
        if self.positive_weight is not None:
            weight = self.positive_weight.to(terms_NC.dtype)
            if weight.ndim == 1 and len(weight) != terms_NC.shape[1]:
                raise ValueError(
                    f"positive_weight has {len(weight)} entries and logits {terms_NC.shape[1]}"
                    " classes: give one weight per class, or one number"
                )
            terms_NC = torch.where(signs_NC > 0, terms_NC * weight, terms_NC)
        return terms_NC.sum(dim=1) / max(terms_NC.shape[1], 1)


LOSSES: dict[str, Callable[..., _SignedLoss]] = {"lse_sign": LSESignLoss, "bce": BCELoss}


def make_loss(
    name: str, temperature: float = 1.0, reduction: Reduction = "mean"
) -> LSESignLoss | BCELoss:
    """Make the loss `name` ("lse_sign" or "bce"); ValueError, with the names, for another."""
    if name not in LOSSES:
        raise ValueError(f"loss = {name!r}: give one of {', '.join(LOSSES)}")
    loss = LOSSES[name](temperature=temperature, reduction=reduction)
    assert isinstance(loss, LSESignLoss | BCELoss)
    return loss


def check_targets(logits: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless both are (N, C), logits float and targets in {1, 0, -1}.

    On a GPU this waits for the targets once a step; a mislabelled batch costs more.
    """
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}:"
            " both have to be (images, classes)"
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype}: convert them to a float type")
    if targets.dtype == torch.bool:
        raise ValueError(
            "targets are torch.bool, whose False would mean ignored: give 1 for positive,"
            " -1 for negative and 0 for ignored"
        )
    wrong_NC = targets != targets.sign()  # NaN differs from its sign too
    if bool(wrong_NC.any()):
        raise ValueError(
            f"targets hold {targets[wrong_NC][0].item()!r}:"
            " give 1 for positive, 0 for ignored and -1 for negative"
        )
