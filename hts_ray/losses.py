"""Losses over partly labelled classes: LSE-Sign, the paper's, and its rivals.

Shapes: N images, C classes. Targets are 1 (positive), 0 (ignored) and -1 (negative). Below, s is
a logit, y its target, T the temperature, w a weight and m = y s / T the margin.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

Reduction = Literal["mean", "sum", "none"]


class SignedLoss(nn.Module, ABC):
    """What all losses share: checks, temperature, weights, float32 arithmetic and the reduction.

    `class_weights` (C,) and, in the call, `label_weights` (N, C) are finite numbers of at least
    0; an entry's weight w is their product. 1 changes nothing and 0 is the same as an ignored
    target; no gradient flows into them. The reduction never divides by weights: `mean` is over
    the N rows, so that weights may differ between workers, whose sums of rows can then be added
    and divided by the rows of the global batch. Raises ValueError for wrong settings or inputs;
    with `checks_values` False only for wrong shapes and types: to look at values waits for a GPU.
    """

    class_weights: Tensor | None
    checks_values = True

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        *,
        class_weights: Tensor | None = None,
    ) -> None:
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
        if class_weights is not None:
            class_weights = torch.as_tensor(class_weights, dtype=torch.float32).detach().clone()
            if class_weights.ndim != 1:
                raise ValueError(
                    f"class_weights has shape {tuple(class_weights.shape)}: give (classes,)"
                )
            _check_weights("class_weights", class_weights)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(
        self, logits: Tensor, targets: Tensor, label_weights: Tensor | None = None
    ) -> Tensor:
        """Loss of (N, C) `logits` against (N, C) `targets`; see the class for the formula."""
        check_targets(logits, targets, values=self.checks_values)
        # bf16 keeps 8 bits of mantissa: a sum of 600 exponentials has to be taken in float32.
        # float64 stays what it is, so that gradients can be checked numerically.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        signs_NC = targets.to(wide.dtype)
        weights_NC = self._weights(wide, label_weights)
        if weights_NC is not None:
            signs_NC = signs_NC.masked_fill(weights_NC == 0, 0)
        loss_N = self._rows(signs_NC * wide / self.temperature, signs_NC, weights_NC)
        if self.reduction == "none":
            return loss_N
        # An empty batch (a worker's last shard) is worth 0, not the NaN of 0 / 0.
        return loss_N.sum() if self.reduction == "sum" else loss_N.sum() / max(len(loss_N), 1)

    def _weights(self, logits: Tensor, label_weights: Tensor | None) -> Tensor | None:
        """Return the product of all weights, broadcast to (N, C), or None where there are none."""
        weights = None
        if self.class_weights is not None:
            if len(self.class_weights) != logits.shape[1]:
                raise ValueError(
                    f"class_weights has {len(self.class_weights)} entries and logits"
                    f" {logits.shape[1]} classes: give one weight per class"
                )
            weights = self.class_weights.to(logits.dtype).expand_as(logits)
        if label_weights is not None:
            if label_weights.shape != logits.shape:
                raise ValueError(
                    f"logits {tuple(logits.shape)} and label_weights"
                    f" {tuple(label_weights.shape)}: both have to be (images, classes)"
                )
            label_weights = label_weights.detach().to(logits.dtype)
            if self.checks_values:
                _check_weights("label_weights", label_weights)
            weights = label_weights if weights is None else weights * label_weights
        return weights

    @abstractmethod
    def _rows(self, margins_NC: Tensor, signs_NC: Tensor, weights_NC: Tensor | None) -> Tensor:
        """Loss (N,) of each image, from m, y (0 also where the weight is 0) and w.

        The margins of entries with y = 0 may be NaN and must have no influence.
        """

    def extra_repr(self) -> str:
        """Show the settings in `print(loss)`."""
        weighted = "" if self.class_weights is None else ", class_weights=..."
        return f"temperature={self.temperature}, reduction={self.reduction!r}{weighted}"


class LSESignLoss(SignedLoss):
    """LSE-Sign: log(1 + sum over kept classes of w exp(-y s / T)) for each image.

    The gradient of one image is a softmax over its classes (and the constant 1), so it goes to
    the classes that are most wrong and is bounded by 1 / T however many classes there are; binary
    cross-entropy spreads it over all the easy negatives instead.

    `logits` (N, C) float of any precision, finite, is left unchanged; `targets` (N, C) of
    any signed type holds 1, 0 or -1. Ignored classes drop out of the sum, so an image with
    every class ignored contributes 0. `mean` divides by the N images, those at 0 included, which
    keeps the step size independent of how many images the filter emptied; `sum` adds them;
    `none` gives (N,). The result is float32 (float64 for float64 logits). Raises ValueError for
    another target, unequal shapes, temperature <= 0 or an unknown reduction.

    A weight w counts an entry w times in the sum: its share of the softmax is
    w exp(-m) / (1 + sum of w exp(-m)), the same as subtracting T log(w) from y s, so that 2 is
    the class written twice. The bound 1 / T holds for any weights. Weights thus decide between
    classes that are about equally wrong, and how soon an entry counts as right; they do not
    scale the gradient of one class that is far more wrong than all others, which stays 1 / T.

    Source: DEFR, arXiv 2112.06392, as used by HTS (ICIP 2023); the temperature,
    the ignored classes and the weights are ours, the authors' code has none of them and negates
    logits in place.
    """

    def _rows(self, margins_NC: Tensor, signs_NC: Tensor, weights_NC: Tensor | None) -> Tensor:
        exponents_NC = -margins_NC
        if weights_NC is not None:
            exponents_NC = exponents_NC + weights_NC.log()
        exponents_NC = exponents_NC.masked_fill(signs_NC == 0, -math.inf)
        # The constant 1 is exp(0): as one more term, logsumexp keeps the whole sum in range, and
        # being finite it gives a row of -inf a value (0) and a gradient (0) instead of NaN.
        one_N1 = exponents_NC.new_zeros(len(exponents_NC), 1)
        return torch.logsumexp(torch.cat((one_N1, exponents_NC), dim=1), dim=1)


class _TermwiseLoss(SignedLoss):
    """A loss with one term an entry: the sum of the kept entries' w * term, divided by C.

    The division is by C, all classes, not by the kept ones or by the weights: an entry then
    weighs the same in every image, and an ignored one only loses its own term. Being a mean over
    classes, it is some C times smaller than a sum, so a learning rate tuned for LSE-Sign has to
    be tuned anew. Unlike LSE-Sign's, a weight scales its entry's gradient.
    """

    def _rows(self, margins_NC: Tensor, signs_NC: Tensor, weights_NC: Tensor | None) -> Tensor:
        ignored_NC = signs_NC == 0
        # Masked before the terms, for a gradient that is finite, and after them, for a value of
        # 0. Multiplying by 0 instead would let an ignored logit that overflowed become NaN.
        terms_NC = self._terms(margins_NC.masked_fill(ignored_NC, 0), signs_NC)
        if weights_NC is not None:
            terms_NC = terms_NC * weights_NC
        return terms_NC.masked_fill(ignored_NC, 0).sum(dim=1) / max(terms_NC.shape[1], 1)

    @abstractmethod
    def _terms(self, margins_NC: Tensor, signs_NC: Tensor) -> Tensor:
        """Loss (N, C) of each entry, from m and y; finite with a finite gradient where m is."""


class BCELoss(_TermwiseLoss):
    """Binary cross-entropy with ignored classes: mean over classes of log(1 + exp(-y s / T)).

    Same inputs, reductions and errors as `LSESignLoss`; `_TermwiseLoss` tells what the mean is.
    Without ignored classes `mean` equals torch's `binary_cross_entropy_with_logits`.

    `positive_weight` multiplies the terms of positives: a number, or a (C,) tensor, above 0;
    ValueError otherwise.
    """

    positive_weight: Tensor | None

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        positive_weight: float | Tensor | None = None,
        *,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__(temperature, reduction, class_weights=class_weights)
        weight = None
        if positive_weight is not None:
            weight = torch.as_tensor(positive_weight, dtype=torch.float32).detach()
            if weight.ndim > 1 or not bool(((weight > 0) & weight.isfinite()).all()):
                raise ValueError(
                    f"positive_weight = {positive_weight!r}: give one finite number above 0,"
                    " or a (C,) tensor of them"
                )
        self.register_buffer("positive_weight", weight, persistent=False)

    def _terms(self, margins_NC: Tensor, signs_NC: Tensor) -> Tensor:
        # logsigmoid rather than softplus, which turns linear above 20 and is inexact there.
        terms_NC = -F.logsigmoid(margins_NC)
        if self.positive_weight is None:
            return terms_NC
        weight = self.positive_weight.to(terms_NC.dtype)
        if weight.ndim == 1 and len(weight) != terms_NC.shape[1]:
            raise ValueError(
                f"positive_weight has {len(weight)} entries and logits {terms_NC.shape[1]}"
                " classes: give one weight per class, or one number"
            )
        return torch.where(signs_NC > 0, terms_NC * weight, terms_NC)


class FocalLoss(_TermwiseLoss):
    """Focal loss: mean over classes of a (1 - q)^gamma * -log q, q = sigmoid(m) the right answer's.

    Entries that are right already fade as `gamma` >= 0 grows; at 0, and with `alpha` None, it is
    `BCELoss`. `alpha` in (0, 1) is a for positives and 1 - a for negatives; None is 1 for both.
    Same inputs, reductions and errors as `LSESignLoss`; ValueError for other gamma or alpha.

    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, whose defaults are ours;
    it divides by the number of positives, which a mean over images cannot.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        gamma: float = 2.0,
        alpha: float | None = 0.25,
        *,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__(temperature, reduction, class_weights=class_weights)
        self.gamma = _exponent("gamma", gamma)
        if alpha is not None and not 0 < alpha < 1:
            raise ValueError(f"alpha = {alpha!r}: give a number between 0 and 1, or None")
        self.alpha = alpha

    def extra_repr(self) -> str:
        """Show the settings in `print(loss)`."""
        return f"{super().extra_repr()}, gamma={self.gamma}, alpha={self.alpha}"

    def _terms(self, margins_NC: Tensor, signs_NC: Tensor) -> Tensor:
        # In logarithms: a power of 1 - q, which can round to 0, has an infinite gradient for
        # gamma < 1.
        terms_NC = -F.logsigmoid(margins_NC) * torch.exp(self.gamma * F.logsigmoid(-margins_NC))
        if self.alpha is None:
            return terms_NC
        return torch.where(signs_NC > 0, self.alpha * terms_NC, (1 - self.alpha) * terms_NC)


class AsymmetricLoss(_TermwiseLoss):
    """ASL: focal loss whose negatives fade faster, and vanish where p = sigmoid(s / T) <= clip.

    A positive's term is (1 - p)^gamma_pos * -log p. A negative's is r^gamma_neg * -log(1 - r)
    with r = max(p - clip, 0). With clip > 0 a negative's gradient also falls towards 0 as p
    approaches 1: such a label is taken for a mistake, and is not learned. With all three
    at 0 it is `BCELoss`. Same inputs, reductions and errors as `LSESignLoss`; ValueError for
    a gamma below 0 or a clip outside [0, 1).

    Source: Ridnik et al., Asymmetric Loss For Multi-Label Classification, ICCV 2021, whose
    settings are the defaults. It sums over images and classes, and its code can stop the gradient
    through the powers; here it flows, as in the paper's analysis.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        gamma_neg: float = 4.0,
        gamma_pos: float = 0.0,
        clip: float = 0.05,
        *,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__(temperature, reduction, class_weights=class_weights)
        self.gamma_neg = _exponent("gamma_neg", gamma_neg)
        self.gamma_pos = _exponent("gamma_pos", gamma_pos)
        if not 0 <= clip < 1:
            raise ValueError(f"clip = {clip!r}: give a probability, at least 0 and below 1")
        self.clip = float(clip)

    def extra_repr(self) -> str:
        """Show the settings in `print(loss)`."""
        gammas = f"gamma_neg={self.gamma_neg}, gamma_pos={self.gamma_pos}"
        return f"{super().extra_repr()}, {gammas}, clip={self.clip}"

    def _terms(self, margins_NC: Tensor, signs_NC: Tensor) -> Tensor:
        # A negative's margin is -s / T: both cases are p = sigmoid(-m) of being wrong.
        wrong_NC, right_NC = F.logsigmoid(-margins_NC), F.logsigmoid(margins_NC)
        positive_NC = -right_NC * torch.exp(self.gamma_pos * wrong_NC)
        if not self.clip:
            negative_NC = -right_NC * torch.exp(self.gamma_neg * wrong_NC)
            return torch.where(signs_NC > 0, positive_NC, negative_NC)
        # sigmoid would lose the gradient p (1 - p) to rounding where p is close to 1.
        probability_NC = wrong_NC.exp()
        counts_NC = probability_NC > self.clip
        # A power of 0 has an infinite gradient for gamma_neg < 1, so what is clipped becomes 1.
        shifted_NC = torch.where(counts_NC, probability_NC - self.clip, 1.0)
        # log(1 - p + clip) from log(1 - p), which does not round to log(0) at a large logit. It
        # passes 0 by a rounding error near p = clip.
        clip = math.log(self.clip)
        kept_NC = torch.logaddexp(right_NC, right_NC.new_full((), clip)).clamp(max=0)
        negative_NC = torch.where(counts_NC, -kept_NC * shifted_NC**self.gamma_neg, 0.0)
        return torch.where(signs_NC > 0, positive_NC, negative_NC)


LOSSES: dict[str, Callable[..., SignedLoss]] = {
    "lse_sign": LSESignLoss,
    "bce": BCELoss,
    "weighted_bce": partial(BCELoss, positive_weight=10.0),
    "focal": FocalLoss,
    "asl": AsymmetricLoss,
}


def make_loss(
    name: str,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    *,
    parameters: Mapping[str, float | None] | None = None,
    class_weights: Tensor | None = None,
) -> SignedLoss:
    """Make the loss `name`, a key of `LOSSES`; `parameters` are settings that only it has.

    Raises ValueError, with the names, for another name, and for a wrong setting; TypeError for a
    parameter that the loss does not have.
    """
    if name not in LOSSES:
        raise ValueError(f"loss = {name!r}: give one of {', '.join(LOSSES)}")
    return LOSSES[name](temperature, reduction, class_weights=class_weights, **(parameters or {}))


def check_targets(logits: Tensor, targets: Tensor, *, values: bool = True) -> None:
    """Raise ValueError unless both are (N, C), logits float and targets in {1, 0, -1}.

    On a GPU looking at `values` waits for the targets once a step; a mislabelled batch costs more.
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
    if not values:
        return
    wrong_NC = targets != targets.sign()  # NaN differs from its sign too
    if bool(wrong_NC.any()):
        raise ValueError(
            f"targets hold {targets[wrong_NC][0].item()!r}:"
            " give 1 for positive, 0 for ignored and -1 for negative"
        )


def _check_weights(name: str, weights: Tensor) -> None:
    wrong = ~((weights >= 0) & weights.isfinite())
    if bool(wrong.any()):
        raise ValueError(
            f"{name} hold {weights[wrong][0].item()!r}: give finite numbers of at least 0"
        )


def _exponent(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} = {value!r}: give a finite number of at least 0")
    return float(value)
