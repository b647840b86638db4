"""What a sweep may vary: names, values, and draws that fit together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hts_ray.config import HtsConfig, load_config, override
from hts_ray.errors import ConfigError
from hts_ray.store.run import require_stage
from hts_ray.sweep.space import Parameter, Space, build_space, field_of, nested, subsets


def space_of(ranges, *overrides):
    config = load_config(overrides=[*overrides, f"sweep.space={ranges}"])
    return build_space(config, "not-read-when-a-space-is-given")


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ("{filter.topk: {choices: [1]}}", ["filter.topk", "did you mean filter.top_k?"]),
        ("{train.head_lr: {low: 1, high: 2}}", ["did you mean train.optim.head_lr?"]),
        ("{filter.top_k: {choices: [1, 0]}}", ["filter.top_k = 0", "greater than or equal to 1"]),
        ("{filter.top_k: {low: 1.5, high: 3}}", ["filter.top_k = 1.5", "valid integer"]),
        ("{filter.aggregation: {choices: [max, most]}}", ["aggregation = 'most'", "noisy_or"]),
        ("{filter.aggregation: {low: 1, high: 2}}", ["not a number", "choices"]),
        ("{filter.positive_threshold: {low: 0.5, high: 1.5}}", ["positive_threshold = 1.5"]),
        ("{filter.top_k: {low: 3, high: 1}}", ["low below high"]),
        ("{filter.top_k: {low: 0, high: 3, log: true}}", ["low above 0"]),
        ("{filter.top_k: {low: 1}}", ["low and high"]),
        ("{train.num_workers: {choices: [1]}}", ["how a stage runs"]),
        ("{train.features.pool.max_size: {choices: [1]}}", ["how a stage runs"]),
        ("{label.limit: {choices: [1]}}", ["only filter.*, train.*, student.*"]),
        ("{train.trainable: {choices: [all]}}", ["stored features"]),
        ("{}", ["name a setting"]),
        (
            "{filter: {positive_threshold: {choices: [0.1]}, negative_threshold: {choices: [1]}}}",
            ["no settings drawn", "must not be above"],
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(ranges, words):
    """Would catch a misspelt or impossible setting that is found by the hundredth trial."""
    with pytest.raises(ConfigError) as caught:
        space_of(ranges)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def test_the_trunk_s_rate_is_refused_where_trials_cannot_feel_it():
    """Would catch a sweep of noise: the rate moves what trials keep frozen."""
    rate = "{train.optim.lr: {low: 1e-5, high: 1e-3, log: true}}"
    assert space_of(rate).parameters[0].log
    with pytest.raises(ConfigError, match="stored features"):
        space_of(rate, "train.optim.head_lr=0.1")


def test_sections_may_be_nested_and_come_back_from_yaml():
    """Would catch a space that --print-config cannot print, or reads as other settings."""
    text = "sweep.space.filter.top_k.choices=[1, 3]"
    config = load_config(overrides=[text, "sweep.space={train: {epochs: {low: 1, high: 4}}}"])
    names = [p.name for p in build_space(config, "").parameters]
    assert sorted(names) == ["filter.top_k", "train.epochs"]
    again = HtsConfig.model_validate(nested({"sweep.space": config.model_dump()["sweep"]["space"]}))
    assert again.sweep.space == config.sweep.space


@given(st.integers(0, 2**32 - 1), st.integers(1, 10**6))
def test_draws_fit_together_and_follow_from_seed_and_number(seed, trial):
    """Would catch thresholds in the wrong order, values out of range, and draws that drift."""
    space = Space(
        load_config(),
        (
            Parameter("filter.positive_threshold", 0.05, 0.9),
            Parameter("filter.negative_threshold", 0.01, 0.8, log=True),
            Parameter("filter.top_k", 1, 5, integer=True),
            Parameter("filter.null_score", choices=(None, -3.0)),
        ),
    )
    settings = space.draw(seed, trial)
    assert settings == space.draw(seed, trial)
    assert settings != space.draw(seed, trial + 1)
    found = override(space.base, nested(settings)).filter
    assert 0.01 <= found.negative_threshold <= found.positive_threshold <= 0.9
    assert found.top_k in range(1, 6)
    assert isinstance(settings["filter.top_k"], int)
    assert settings["filter.null_score"] in {None, -3.0}


def test_every_other_trial_keeps_some_of_the_runs_settings():
    """Catches a search that changes all at once, and one that tries what the user left out."""
    names = ("negative_threshold", "quantile_floor", "temperature", "positive_threshold")
    ranges = ((0.0, 0.3), (0.0, 0.9), (0.5, 2.0), (0.6, 0.9))
    parameters = [
        Parameter(f"filter.{name}", *ends) for name, ends in zip(names, ranges, strict=True)
    ]
    space = Space(load_config(), tuple(parameters))
    own, outside = space.own(), "filter.positive_threshold"
    assert own[outside] < 0.6
    kept = [
        sum(space.draw(0, trial)[name] == value for name, value in own.items())
        for trial in range(1, 41)
    ]
    assert all(space.draw(0, trial)[outside] >= 0.6 for trial in range(1, 41))
    assert set(kept[0::2]) == {0}  # trials 1, 3, ...
    assert 1.5 < sum(kept[1::2]) / 20 < 2.7  # of three that may be kept


@given(st.floats(1e-6, 1e3), st.floats(1.01, 1e4), st.booleans(), st.integers(0, 2**32))
def test_numbers_stay_in_their_range(low, factor, log, seed):
    """Would catch a rounding that leaves the range, where the setting may not be valid."""
    parameter = Parameter("x", low, low * factor, log)
    rng = np.random.default_rng(seed)
    assert all(low <= parameter.draw(rng) <= low * factor for _ in range(20))


def test_a_logarithmic_range_is_drawn_evenly_in_its_logarithm():
    """Would catch rates of which nine in ten lie in the top decade."""
    rng = np.random.default_rng(0)
    values = [Parameter("x", 1e-4, 1.0, log=True).draw(rng) for _ in range(4000)]
    assert 0.45 < np.mean(np.asarray(values) < 1e-2) < 0.55


def test_default_space_follows_what_the_teacher_stored(swept_run):
    """Would catch kinds, margins, priors or levels that these scores do not have."""
    scores = require_stage(swept_run.run_dir, "region_scores", "label")
    space = build_space(swept_run.config, scores.path)
    found = {p.name: p for p in space.parameters}
    kinds = found["filter.region_kinds"].choices
    assert kinds[0] is None
    shown = sorted("+".join(sorted(kind)) for kind in kinds[1:])
    assert shown == ["grid", "grid+person", "grid+whole", "person", "person+whole", "whole"]
    assert "filter.margins" not in found  # one margin is no choice
    assert "filter.prior_alpha" not in found  # no prior is stored
    assert found["filter.top_k"].high == 4
    levels = [value for value in found["filter.null_score"].choices if value is not None]
    assert -1.0 in levels  # the run's own
    assert all(-8 < level < 2 for level in levels)
    assert space.own()["filter.top_k"] == swept_run.config.filter.top_k
    for trial in range(1, 30):
        assert space.problem(space.draw(0, trial)) is None


def test_every_default_parameter_is_a_setting():
    """Would catch a default whose setting was renamed."""
    for name in ("filter.quantile_floor", "train.loss_temperature", "train.optim.head_lr"):
        assert field_of(name) is not None
    with pytest.raises(ConfigError, match="unknown setting"):
        field_of("filter")


def test_subsets_are_not_repeated():
    """Would catch choices that are the same and so twice as likely."""
    assert subsets(["a", "b"]) == (None, ["b"], ["a"])
    assert subsets(["a", "b", "c"]) == (
        None, ["b", "c"], ["a", "c"], ["a", "b"], ["a"], ["b"], ["c"]
    )  # fmt: skip


def test_full_trainings_may_vary_what_a_fit_on_features_cannot_feel():
    """Would catch a search over trainings that only takes settings of the classifier."""
    ranges = "{train.optim.lr: {low: 1e-5, high: 1e-3}, student.image_size: {choices: [64, 80]}}"
    with pytest.raises(ConfigError, match="stored features"):
        space_of(ranges)
    full = space_of(ranges, "sweep.train=full")
    assert [p.name for p in full.parameters] == ["train.optim.lr", "student.image_size"]
    with pytest.raises(ConfigError, match=r"train\.num_workers.*how a stage runs"):
        space_of("{train.num_workers: {choices: [2]}}", "sweep.train=full")
