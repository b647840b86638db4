"""The stages as a notebook calls them; tests/test_notebook.py runs all of them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from labeled_run import save_run

from hts_ray import stages
from hts_ray.errors import ConfigError, DataError
from hts_ray.store import storage
from hts_ray.store.run import StageFolder


def test_settings_start_from_a_preset_and_are_checked():
    """Catches settings that are taken unchecked, or that a preset wins over."""
    config = stages.settings("demo", run_dir="runs/x", train={"epochs": 3})
    assert (config.run_dir, config.train.epochs) == ("runs/x", 3)
    assert config.label.teacher.model == "builtin:world_captioner"  # of the preset
    assert stages.changed(config, train={"batch_size": 7}).train.epochs == 3
    with pytest.raises(ConfigError, match="did you mean epochs"):
        stages.settings(train={"epoch": 3})


def test_a_stage_takes_the_latest_input_or_the_one_given(tmp_path):
    """Catches a stage that ignores what it is given, or that needs Ray to look things up."""
    config = save_run(tmp_path)
    labels = stages.filter_labels(config)
    assert labels.read(["image_id"]).num_rows == 6
    strict = stages.changed(config, filter={"positive_threshold": 0.95, "min_support": 3})
    with pytest.raises(DataError, match="no pseudo-label is left"):
        stages.filter_labels(strict)
    assert stages.class_names(config) == ["ride bicycle", "sit on bicycle", "wash car"]
    path = stages.report(config, max_images=0)
    assert path == storage.join(config.run_dir, "report.html")
    assert storage.exists(path)


def test_a_sweep_s_best_settings_are_taken(tmp_path):
    """Catches settings that a sweep found and that are lost on the way to the training."""
    config = save_run(tmp_path)
    sweep = StageFolder(config.run_dir, "sweep", "abc")
    storage.write_bytes(sweep.file("best.yaml"), b"filter: {min_support: 2}\ntrain: {epochs: 9}\n")
    best = stages.with_best(config, sweep)
    assert (best.filter.min_support, best.train.epochs) == (2, 9)
    assert best.filter.positive_threshold == config.filter.positive_threshold


def test_ray_is_kept_until_the_process_ends(monkeypatch):
    """Catches a cluster that is started for nothing, or left running behind the process."""
    told = []

    @contextmanager
    def cluster(config, command):
        told.append("up")
        yield
        told.append("down")

    ends = []
    monkeypatch.setattr(stages, "command_cluster", cluster)
    monkeypatch.setattr(stages.atexit, "register", ends.append)
    stages.start(stages.settings())
    assert told == ["up"]
    ends[0]()
    assert told == ["up", "down"]
