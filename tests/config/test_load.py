"""Presets, files and overrides: their order, and errors that name the remedy."""

from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hts_ray.config import (
    HtsConfig,
    TrainConfig,
    load_config,
    override,
    preset_names,
)
from hts_ray.errors import ConfigError


@pytest.mark.parametrize("name", ["demo", "hico-vitb16", "hico-vitb32", "own-images"])
def test_every_preset_parses(name):
    """Would catch a preset with a renamed or wrong setting."""
    assert name in preset_names()
    assert load_config(preset=name) != HtsConfig()


def test_layers_apply_in_order(tmp_path):
    """Would catch a preset that wins over the file, or a file over the overrides."""
    path = tmp_path / "c.yaml"
    path.write_text("train: {epochs: 7, batch_size: 9}\n")
    config = load_config(
        preset="hico-vitb32",
        file=str(path),
        overrides=["train.batch_size=11", "train.optim.lr=1e-4"],
    )
    assert config.train.epochs == 7
    assert config.train.batch_size == 11
    assert config.train.optim.lr == 1e-4
    assert config.student.image_size == 672


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label.regoins.whole=true", ["label.regoins", "did you mean regions?"]),
        ("filter.topk=3", ["filter.topk", "did you mean top_k?"]),
        ("train.head_lr=1", ["train.head_lr", "did you mean train.optim.head_lr?"]),
        ("train.epochs=0", ["train.epochs = 0", "greater than or equal to 1"]),
        ("train.loss=mse", ["train.loss = 'mse'", "lse_sign"]),
        ("filter.negative_threshold=0.9", ["filter", "must not be above positive_threshold"]),
        ("label.pool.max_size=nine", ["label.pool.max_size = 'nine'", "integer"]),
        ("train.optim.lr=nan", ["train.optim.lr", "finite"]),
        ("label.teacher.question=Is it?", ["label.teacher", "'Is it?' must hold {} once"]),
        ("label.teacher.object_bound=0", ["object_bound=0.0 needs mode=questions"]),
        ("nonsense", ["override = 'nonsense'", "section.name=value"]),
        ("a..b=1", ["override", "section.name=value"]),
        ("label.regions.grid_scales=[0.5]", ["label.regions", "one entry a scale"]),
    ],
)
def test_mistakes_name_field_value_and_remedy(text, words):
    """Would catch an error that leaves the user guessing which setting is meant."""
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[text])
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def test_unknown_preset_and_missing_file_are_told(tmp_path):
    """Would catch a traceback for a mistyped preset or path."""
    with pytest.raises(ConfigError, match="did you mean demo"):
        load_config(preset="demoo")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(file=str(tmp_path / "none.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1, 2")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(file=str(bad))
    bad.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(file=str(bad))
    bad.write_text("- just\n- a list\n")
    with pytest.raises(ConfigError, match="must hold `section:` keys"):
        load_config(file=str(bad))


@pytest.mark.parametrize(
    "text",
    ["&a {run_dir: *a}", "train: &a {optim: *a}", "sweep: {space: &a {filter: *a}}"],
)
def test_a_section_that_holds_itself_is_told(tmp_path, text):
    """Would catch a RecursionError's traceback for a YAML anchor that leads back to itself."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"holds itself.*anchor"):
        load_config(file=str(path))


def test_printed_config_reads_back_equal(tmp_path):
    """Would catch a value that does not survive --print-config > file, --config file."""
    for name in preset_names():
        config = load_config(preset=name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(config.to_yaml())
        assert load_config(file=str(path)) == config


def test_a_run_of_another_version_goes_on(tmp_path, caplog):
    """Would catch a setting that is taken away and closes every run that remembers it."""
    path = tmp_path / "config.yaml"
    path.write_text(HtsConfig(seed=3).to_yaml().replace("\nfilter:", "\nfilter:\n  calibrate: no"))
    assert load_config(run_file=str(path)) == HtsConfig(seed=3)
    assert "there is no such setting now: filter.calibrate" in caplog.text
    with pytest.raises(ConfigError, match=r"filter\.calibrate: unknown setting"):
        load_config(file=str(path))


def test_override_keeps_the_rest_and_checks_again():
    """Would catch a variant that silently resets or skips validation."""
    config = load_config(preset="own-images")
    changed = override(config, {"train": {"loss": "bce"}})
    assert changed.train.loss == "bce"
    assert changed.train.epochs == config.train.epochs
    with pytest.raises(ConfigError):
        override(config, {"train": {"loss": "none"}})


@given(st.text(max_size=30))
def test_no_override_text_escapes_as_another_error(text):
    """Would catch a traceback from odd command-line text."""
    try:
        load_config(overrides=[f"train.loss={text}"])
    except ConfigError:
        return
    assert yaml.safe_load(text) in get_args(TrainConfig.model_fields["loss"].annotation)
