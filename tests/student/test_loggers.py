"""Loggers: what reaches a tracker, and that none of them ends a training."""

from __future__ import annotations

import logging
import sys
import types

import accelerate.tracking  # noqa: F401 - it looks for W&B, before there is a false one
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hts_ray.errors import ConfigError
from hts_ray.student.loggers import CurveLog, check_loggers


@pytest.fixture
def wandb(monkeypatch):
    """A module in the place of W&B's client that keeps what it is told."""
    told = []
    run = types.SimpleNamespace(
        log=lambda values, step, **_: told.append((step, values)),
        finish=lambda: told.append("finished"),
    )
    config = types.SimpleNamespace(update=lambda values, **_: told.append(values))
    module = types.ModuleType("wandb")
    module.init = lambda **arguments: told.append(arguments) or run
    module.config = config
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_missing_library_is_told_before_any_work(monkeypatch):
    """Catches a run that trains for hours without the curves that were asked for."""
    check_loggers(["tensorboard"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train.loggers = 'mlflow'.*pip install mlflow"):
        check_loggers(["mlflow"])


def test_trackers_get_settings_values_and_their_end(wandb, tmp_path):
    """Catches settings that are nested beyond recognition, lost steps, and an open run."""
    settings = {"epochs": 3, "optim": {"lr": 0.1, "head_lr": None}}
    log = CurveLog(["wandb"], folder=str(tmp_path), settings=settings)
    log.log({"train/loss": 0.5}, 7)
    log.close()
    assert {"epochs": 3, "optim.lr": 0.1, "optim.head_lr": "None"} in wandb
    assert wandb[-2:] == [(7, {"train/loss": 0.5}), "finished"]


def test_a_tracker_that_fails_is_left_out(wandb, tmp_path, caplog, monkeypatch):
    """Catches a training that ends because a logging server is down."""
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: 1 / 0)
    with caplog.at_level(logging.WARNING):
        log = CurveLog(["wandb", "tensorboard"], folder=str(tmp_path), settings={})
    assert "wandb is left out" in caplog.text
    log.log({"train/loss": 0.5}, 0)
    log.close()
    assert list(tmp_path.rglob("events.*"))


def test_steps_after_a_crash_stand_once(tmp_path):
    """Catches curves that run back and forth over the steps that were taken twice."""
    for first, steps in ((0, range(6)), (4, range(4, 8))):
        log = CurveLog(
            ["tensorboard"],
            folder=str(tmp_path),
            settings={},
            first_step=first,
        )
        for step in steps:
            log.log({"train/loss": float(10 * first + step)}, step)
        log.close()
    folder = next(tmp_path.rglob("events.*")).parent
    scalars = EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    assert [(s.step, s.value) for s in scalars] == [
        *((step, float(step)) for step in range(4)),
        *((step, float(40 + step)) for step in range(4, 8)),
    ]


def test_curves_reach_remote_storage(tmp_path, monkeypatch):
    """Catches curves that stay on a worker's disk when the run lives in a bucket."""
    monkeypatch.setattr("hts_ray.store.storage.is_remote", lambda path: True)
    log = CurveLog(["tensorboard"], folder=str(tmp_path / "far"), settings={})
    log.log({"train/loss": 1.0}, 0)
    log.close()
    folder = next((tmp_path / "far").rglob("events.*")).parent
    assert EventAccumulator(str(folder)).Reload().Scalars("train/loss")[0].value == 1.0
