"""Filtering: probabilities, aggregation, and a selection that accounts for every candidate."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hts_ray.config import FilterConfig
from hts_ray.labels.select import (
    REASONS,
    aggregate,
    class_thresholds,
    find_entries,
    odds_probabilities,
    region_probabilities,
    select,
    support,
)

LIMITED = settings(max_examples=60, deadline=None)


@st.composite
def log_likelihoods(draw):
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 8)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.uniform(-200, 0, shape)
    scores[rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -np.inf
    return scores.astype(draw(st.sampled_from([np.float16, np.float32, np.float64])))


@st.composite
def image_probabilities(draw):
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 8)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Distinct values, so that no tie has to be broken by the order of the classes.
    values = rng.permutation(np.linspace(0, 1, shape[0] * shape[1]))
    return values.reshape(shape).astype(np.float32), rng.integers(0, 4, shape)


@st.composite
def filters(draw):
    low, high = sorted([draw(st.floats(0, 1)), draw(st.floats(0, 1))])
    return FilterConfig(
        positive_threshold=high,
        negative_threshold=low,
        per_class_quantile=draw(st.none() | st.floats(0.01, 0.99)),
        quantile_floor=draw(st.floats(0, 1)),
        min_support=draw(st.integers(1, 3)),
        max_positives_per_image=draw(st.integers(1, 4) | st.just(100)),
    )


def banded(**given):
    """Return settings with a band from 0.1 to 0.5 and neither quantile nor cap, but for some."""
    plain = {"positive_threshold": 0.5, "negative_threshold": 0.1, "per_class_quantile": None}
    return FilterConfig(**(plain | {"max_positives_per_image": 100} | given))


def thresholds_of(p_NC, setting):
    found = find_entries(p_NC, np.zeros(p_NC.shape, int), setting)
    return class_thresholds(found, p_NC.shape[1], setting)


def reference_select(probabilities, regions, thresholds, setting):
    """One image and one class at a time, in the words of `select`'s documentation."""
    targets = np.empty(probabilities.shape, dtype=int)
    counts = []
    negative = np.float32(setting.negative_threshold)
    for n, row in enumerate(probabilities):
        count, left = dict.fromkeys(REASONS, 0), []
        for c, probability in enumerate(row):
            targets[n, c] = -1 if probability < negative else 0
            if targets[n, c] == -1:
                continue
            if probability < thresholds[c]:
                count["ignored_band"] += 1
            elif regions[n, c] < setting.min_support:
                count["below_support"] += 1
            else:
                left.append(c)
        left.sort(key=lambda c: (-row[c], -regions[n, c], c))
        kept = left[: setting.max_positives_per_image]
        targets[n, kept] = 1
        count["over_cap"] = len(left) - len(kept)
        counts.append(count)
    return targets, counts


@LIMITED
@given(
    scores=log_likelihoods(), temperature=st.floats(0.01, 10), null=st.none() | st.floats(-50, 0)
)
def test_probabilities_are_finite_and_in_range(scores, temperature, null):
    """Catches NaN from -inf - -inf, overflow at a low temperature, and a sum above 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = region_probabilities(
            scores, np.full(scores.shape[1], -30.0), 0.5, temperature, null_score=null
        )
    assert got.dtype == (np.float64 if scores.dtype == np.float64 else np.float32)
    assert np.isfinite(got).all()
    assert ((got >= 0) & (got <= 1)).all()
    assert (got[np.isneginf(scores)] == 0).all()
    total = got.sum(axis=1)
    empty = np.isneginf(scores).all(axis=1)
    assert (total[empty] == 0).all()
    assert (total <= 1 + 1e-5).all()
    if null is None:
        np.testing.assert_allclose(total[~empty], 1, rtol=1e-5)


def test_score_is_visual_gpt_score():
    """Catches a prior with the wrong sign, not scaled by alpha, or applied after T."""
    scores, prior = np.array([[-5.0, -4.0]]), np.array([-6.0, -2.0])
    logits = (scores - 0.5 * prior) / 2
    wanted = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(region_probabilities(scores, prior, 0.5, 2.0), wanted, rtol=1e-12)
    both = np.exp(scores / 2)
    np.testing.assert_allclose(
        region_probabilities(scores, prior, 0.0, 2.0, null_score=-3.0),
        both / (both.sum() + np.exp(-3.0 / 2)),
        rtol=1e-12,
    )


def test_full_prior_correction_removes_a_phrase_preference():
    """Catches an alpha of 1 that leaves some of the prior in the score."""
    prior = np.array([-2.0, -9.0])
    got = region_probabilities(prior[None], prior, alpha=1.0)
    np.testing.assert_allclose(got, [[0.5, 0.5]])


def test_numpy_scalars_do_not_widen_the_result():
    """Catches a float64 setting from a sweep that doubles the memory or moves a threshold."""
    scores = np.full((2, 3), -5, dtype=np.float16)
    got = region_probabilities(scores, np.zeros(3), np.float64(0.5), np.float64(0.7))
    assert got.dtype == np.float32
    one = np.array([[0.3]], dtype=np.float32)
    assert support(one, np.float64(0.3)) == support(one, 0.3) == 1


@LIMITED
@given(scores=log_likelihoods(), top_k=st.integers(1, 7))
def test_aggregates_are_ordered(scores, top_k):
    """Catches a partition of the wrong end, and noisy-or inverted."""
    probabilities = region_probabilities(scores)
    low, middle, high, top = (
        aggregate(probabilities, method, top_k)
        for method in ("mean", "top_k_mean", "max", "noisy_or")
    )
    slack = 1e-6
    assert (top + slack >= high).all()
    assert (high + slack >= middle).all()
    assert (middle + slack >= low).all()
    assert (low >= 0).all()
    assert (top <= 1).all()


def test_aggregate_values():
    """Catches each formula against numbers worked out by hand."""
    probabilities = np.array([[0.5, 0.0, 1.0], [0.2, 0.0, 0.4], [0.8, 0.0, 0.1]])
    np.testing.assert_allclose(aggregate(probabilities, "max"), [0.8, 0, 1])
    np.testing.assert_allclose(aggregate(probabilities, "mean"), [0.5, 0, 0.5])
    np.testing.assert_allclose(aggregate(probabilities, "top_k_mean", 2), [0.65, 0, 0.7])
    np.testing.assert_allclose(aggregate(probabilities, "top_k_mean", 9), [0.5, 0, 0.5])
    np.testing.assert_allclose(aggregate(probabilities, "noisy_or"), [0.92, 0, 1])
    assert support(probabilities, 0.5).tolist() == [2, 0, 1]


@LIMITED
@given(data=image_probabilities(), setting=filters())
def test_selection_equals_the_reference(data, setting):
    """Catches reasons tested in another order, a broken cap, or targets with swapped codes."""
    thresholds = thresholds_of(data[0], setting)
    got = select(*data, setting)
    targets, counts = reference_select(*data, thresholds, setting)
    np.testing.assert_array_equal(got.targets_NC, targets)
    assert got.targets_NC.dtype == np.int8
    for name in REASONS:
        assert got.reason_counts_N[name].tolist() == [row[name] for row in counts]


@LIMITED
@given(data=image_probabilities(), setting=filters())
def test_every_candidate_is_accounted_for(data, setting):
    """Catches a candidate that vanishes, is counted twice, or is turned into a negative."""
    got = select(*data, setting)
    candidates = data[0] >= np.float32(setting.negative_threshold)
    dropped = sum(got.reason_counts_N[name] for name in REASONS)
    positives = (got.targets_NC == 1).sum(axis=1)
    np.testing.assert_array_equal(candidates.sum(axis=1), positives + dropped)
    np.testing.assert_array_equal((got.targets_NC == 0).sum(axis=1), dropped)
    np.testing.assert_array_equal(got.targets_NC == -1, ~candidates)
    assert (positives <= setting.max_positives_per_image).all()
    totals = got.reason_totals()
    assert sum(totals.values()) == dropped.sum()
    summary = got.summary()
    assert summary["positives"] == positives.sum()
    assert summary["images_without_positive"] == (positives == 0).sum()
    assert all(np.isfinite(value) for value in summary.values())


@LIMITED
@given(data=image_probabilities(), setting=filters(), higher=st.floats(0, 1))
def test_a_higher_threshold_never_adds_positives(data, setting, higher):
    """Catches a cap applied before the threshold, which lets a later class move up."""
    assume(higher >= setting.positive_threshold)
    setting = setting.model_copy(update={"per_class_quantile": None})
    stricter = setting.model_copy(update={"positive_threshold": higher})
    before = select(*data, setting).targets_NC == 1
    after = select(*data, stricter).targets_NC == 1
    assert not (after & ~before).any()


@LIMITED
@given(data=image_probabilities(), setting=filters(), seed=st.integers(0, 1000))
def test_order_of_images_and_classes_changes_nothing(data, setting, seed):
    """Catches a result that depends on neighbours, on the block of a class or on row starts."""
    rng = np.random.default_rng(seed)
    rows, columns = (rng.permutation(size) for size in data[0].shape)
    plain = select(*data, setting)
    moved = select(*(array[rows][:, columns] for array in data), setting)
    np.testing.assert_array_equal(moved.targets_NC, plain.targets_NC[rows][:, columns])
    np.testing.assert_array_equal(moved.reason_counts_N, plain.reason_counts_N[rows])
    thresholds = thresholds_of(data[0], setting)
    moved_thresholds = thresholds_of(data[0][rows][:, columns], setting)
    np.testing.assert_array_equal(moved_thresholds, thresholds[columns])


@LIMITED
@given(data=image_probabilities(), setting=filters())
def test_class_thresholds_stay_in_the_band(data, setting):
    """Catches a quantile that raises a threshold, or a floor below the negatives."""
    thresholds = thresholds_of(data[0], setting)
    assert (thresholds <= np.float32(setting.positive_threshold)).all()
    assert (thresholds >= np.float32(setting.negative_threshold)).all()


def test_quantile_feeds_the_tail_but_not_absent_classes():
    """Catches a starved rare class, a forced absent one, and a frequent one made stricter."""
    rare, absent, frequent = np.zeros(100), np.full(100, 0.05), np.full(100, 0.9)
    rare[:3] = 0.4, 0.35, 0.3
    absent[:3] = 0.15, 0.14, 0.13
    probabilities = np.stack([rare, absent, frequent], axis=1)
    support_NC = np.ones(probabilities.shape, dtype=int)
    plain = select(probabilities, support_NC, banded())
    assert (plain.targets_NC == 1).sum(axis=0).tolist() == [0, 0, 100]
    own = banded(quantile_floor=0.2, per_class_quantile=0.98)
    got = select(probabilities, support_NC, own)
    assert (got.targets_NC == 1).sum(axis=0).tolist() == [2, 0, 100]
    np.testing.assert_allclose(thresholds_of(probabilities, own), [0.35, 0.2, 0.5])


def test_quantile_counts_images_exactly():
    """Catches (1 - 0.9) * 10 = 0.9999999999999998 cut to 0, and half an image forced to 1."""
    for images, share, claimed in (
        (49, 0.98, 0),
        (50, 0.98, 1),
        (149, 0.98, 2),
        (9, 0.9, 0),
        (10, 0.9, 1),
    ):
        probabilities = np.linspace(0.2, 0.4, images)[:, None]
        own = banded(per_class_quantile=share, quantile_floor=0.1)
        got = select(probabilities, np.ones((images, 1), dtype=int), own)
        assert (got.targets_NC == 1).sum() == claimed


def test_ties_at_the_cap_prefer_support():
    """Catches saturated probabilities kept in class order although regions disagree on them."""
    own = banded(max_positives_per_image=2)
    got = select(np.ones((1, 4)), np.array([[1, 3, 2, 3]]), own)
    assert got.targets_NC.tolist() == [[0, 1, 0, 1]]
    assert got.reason_totals() == {"ignored_band": 0, "below_support": 0, "over_cap": 2}


def test_no_images():
    """Catches a crash on a shard that quarantine emptied."""
    own = banded(per_class_quantile=0.9, max_positives_per_image=2)
    got = select(np.zeros((0, 3)), np.zeros((0, 3), dtype=int), own)
    assert got.targets_NC.shape == (0, 3)
    assert got.summary()["classes_without_positive"] == 3


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_wrong_log_likelihoods_are_refused(wrong):
    """Catches NaN from a failed forward pass that ends as a silent negative."""
    scores = np.array([[-1.0, wrong]])
    with pytest.raises(ValueError, match="log_likelihoods_RC"):
        region_probabilities(scores)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.1, 1.1])
def test_wrong_probabilities_are_refused(wrong):
    """Catches log-likelihoods or NaN handed over as probabilities."""
    values = np.array([[0.5, wrong]])
    with pytest.raises(ValueError, match="probabilities_RC"):
        aggregate(values)
    with pytest.raises(ValueError, match="probabilities_RC"):
        support(values, 0.5)
    with pytest.raises(ValueError, match="image_probabilities_NC"):
        select(values, np.ones((1, 2), dtype=int), banded())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prior_C": [0.0], "alpha": 1.0}, "prior_C has the shape"),
        ({"prior_C": [0.0, -np.inf], "alpha": 1.0}, "one finite number for each of 2"),
        ({"alpha": 1.0}, "prior_C has the shape"),
        ({"temperature": 1e-38, "prior_C": [-9.0, -9.0], "alpha": 1.0}, "overflow"),
    ],
)
def test_wrong_settings_of_the_probabilities_are_refused(arguments, said):
    """Catches broadcasting priors and settings that would be ignored without a word."""
    with pytest.raises(ValueError, match=said):
        region_probabilities(np.array([[-1.0, -2.0]], dtype=np.float32), **arguments)


@pytest.mark.parametrize("given", [np.ones((1, 3), dtype=int), np.ones((1, 2))])
def test_wrong_support_is_refused(given):
    """Catches a support matrix of other images, or of probabilities."""
    with pytest.raises(ValueError, match="support_NC"):
        select(np.zeros((1, 2)), given, banded())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("positive_threshold", 1.5),
        ("negative_threshold", 0.6),
        ("quantile_floor", -0.1),
        ("per_class_quantile", 1.0),
        ("max_positives_per_image", 0),
        ("min_support", 0),
        ("support_threshold", 1.1),
        ("aggregation", "median"),
        ("top_k", 0),
        ("prior_alpha", -1.0),
        ("temperature", 0.0),
        ("null_score", np.inf),
    ],
)
def test_wrong_settings_are_refused(name, value):
    """Catches a threshold order or a misspelt method that would empty the labels silently."""
    with pytest.raises(ValueError, match=name):
        banded(**{name: value})


def test_an_aggregate_of_nothing_is_refused():
    """Catches an image without regions that ends as one without classes."""
    with pytest.raises(ValueError, match="no regions"):
        aggregate(np.zeros((0, 3)))


def test_odds_lose_a_bias_to_yes_and_nothing_else():
    """Would catch a model that says yes to a grey picture believed, or an honest no made a maybe.

    Nothing to see gets at most 5 %; a class that got less keeps its odds.
    """
    odds_RC = np.float32([[4.0, 4.0, 4.0], [7.0, -9.0, -2.0]])
    nothing_C = np.float32([4.0, -9.0, -2.0])
    found = odds_probabilities(odds_RC, nothing_C)
    assert found.dtype == np.float32
    np.testing.assert_allclose([found[0, 0], found[1, 2]], 0.05, rtol=1e-5)
    assert found[1, 0] == pytest.approx(0.514, abs=1e-3)
    np.testing.assert_allclose(found[:, 1], odds_probabilities(odds_RC)[:, 1])
    assert odds_probabilities([[-np.inf, -1e4, 1e4]]).tolist() == [[0.0, 0.0, 1.0]]
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="log odds are finite"):
            odds_probabilities([[0.0, wrong]])
