"""The optimizer steps of a training: of the whole student, or of its classifier alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hts_ray.config import OptimConfig, TrainConfig
from hts_ray.losses import Reduction, SignedLoss, make_loss
from hts_ray.student.model import CosineClassifier, parameter_groups


@dataclass
class Optimizer:
    """AdamW with the settings' schedule, gradient clipping and moving average of the weights.

    `inner` is torch's optimizer, or Accelerate's around it, and `clip` cuts the gradients of some
    parameters to a norm and returns what it was. `average` is a copy of the model that follows it,
    by `averaged` steps. Nothing waits for a GPU.
    """

    model: CosineClassifier
    inner: Any
    config: TrainConfig
    average: CosineClassifier | None = None
    averaged: int = 0
    clip: Callable[..., Any] = clip_grad_norm_

    @classmethod
    def of(cls, model: CosineClassifier, config: TrainConfig) -> Optimizer:
        """Make the optimizer of what learns in a model, and a copy for the average if one is kept.

        Raises what `parameter_groups` raises.
        """
        average = None if config.ema_decay is None else copy.deepcopy(model)
        groups = parameter_groups(model, config.optim)
        return cls(model, torch.optim.AdamW(groups, fused=True), config, average)

    def __post_init__(self) -> None:
        """Keep the groups' rates, of which a step's rates are shares."""
        self._base_lrs: list[float] = [group["lr"] for group in self.inner.param_groups]

    @property
    def published(self) -> Any:
        """The model that would be published now: the moving average, where one is kept."""
        return self.model if self.average is None else self.average

    def set_rates(self, step: int, steps_per_epoch: int) -> float:
        """Set every group's rate for a step, counted over all epochs.

        Returns the trunk's, or the head's where it learns alone.
        """
        total = self.config.epochs * steps_per_epoch
        factor = learning_rate_factor(step, total, self.config.optim, steps_per_epoch)
        for group, base in zip(self.inner.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * factor
        return self._base_lrs[0] * factor

    def step(self) -> Any:
        """Take a step by the gradients that are there; returns their norm where it is clipped."""
        norm = None
        if self.config.optim.grad_clip is not None:
            norm = self.clip(self.model.parameters(), self.config.optim.grad_clip)
        self.inner.step()
        self.inner.zero_grad()
        self._follow()
        return norm

    def _follow(self) -> None:
        """Move the average towards the model.

        After n steps the decay is at most (1 + n) / (10 + n), or a short run's average would be
        its start. Source: TensorFlow's ExponentialMovingAverage with num_updates.
        """
        if self.average is None or self.config.ema_decay is None:
            return
        n = self.averaged
        decay = min(self.config.ema_decay, (1 + n) / (10 + n)) if n else 0.0
        ema: Any = get_ema_multi_avg_fn
        ema(decay)(list(self.average.parameters()), list(self.model.parameters()), n)
        self.averaged += 1


def learning_rate_factor(
    step: int, total: int, optim: OptimConfig, steps_per_epoch: int = 1
) -> float:
    """Return the share of the learning rate at `step` of `total`, in 0..1.

    Warm-up is linear over `warmup_steps`. `cosine` falls to 0 once; `warm_restarts` does so in
    every `restart_epochs` epochs again (SGDR, T_mult 1; DEFR restarts after 5 epochs).
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "warm_restarts":
        period = optim.restart_epochs * steps_per_epoch
        restart = step // period * period
        start = max(restart, optim.warmup_steps)  # the warm-up is the first period's beginning
        done = (step - start) / (restart + period - start)
    else:
        done = min(1.0, (step - optim.warmup_steps) / max(1, total - optim.warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * done))


def settings_loss(
    config: TrainConfig, class_weights: list[float] | None, reduction: Reduction
) -> SignedLoss:
    """Return the loss of the settings, with the classes' weights (C,) where there are any."""
    return make_loss(
        config.loss,
        config.loss_temperature,
        reduction=reduction,
        parameters=config.loss_parameters,
        class_weights=None if class_weights is None else torch.tensor(class_weights),
    )
