"""Optimizer steps: the rates of every group over a run."""

from __future__ import annotations

import itertools

import pytest
import torch

from hts_ray.config import OptimConfig, TrainConfig
from hts_ray.student.model import CosineClassifier
from hts_ray.student.optimizer import Optimizer, learning_rate_factor


@pytest.mark.parametrize("schedule", ["constant", "cosine", "warm_restarts"])
def test_learning_rate_warms_up_and_ends(schedule):
    """Catches a first step at rate 0, a rate above 1, and a run that ends at a high rate."""
    optim = OptimConfig(schedule=schedule, warmup_steps=10)
    rates = [learning_rate_factor(step, 150, optim, 10) for step in range(150)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) <= 1.0
    assert rates[10] == pytest.approx(1.0)  # the schedule begins where the warm-up ends
    jumps = [step for step, (a, b) in enumerate(itertools.pairwise(rates), 1) if b > a + 0.5]
    assert jumps == {"constant": [], "cosine": [], "warm_restarts": [50, 100]}[schedule]
    assert (rates[-1] < 0.01) == (schedule != "constant")


def test_a_step_cuts_gradients_and_forgets_them():
    """Catches a clip that is never made, and gradients that add up over steps."""
    config = TrainConfig(optim=OptimConfig(head_lr=0.5, grad_clip=0.1, warmup_steps=4), epochs=1)
    head = CosineClassifier(torch.eye(3), 10.0)
    optimizer = Optimizer.of(head, config)
    assert optimizer.set_rates(1, 8) == pytest.approx(0.25)
    head.logits(torch.full((2, 3), 3**-0.5)).square().sum().backward()
    assert optimizer.step() > 0.1
    assert optimizer.published is head
    assert head.classifier.grad is None
