"""The HICO protocol against a slow transcription of its MATLAB steps, and by its properties."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hts_ray.metrics import (
    RECALL_THRESHOLDS,
    evaluate,
    hico_average_precision,
    mean_average_precision,
    wilson_interval,
)

LIMITED = settings(max_examples=80, deadline=None)
SETTINGS = ["default", "known_object"]

# What MATLAB prints for 0:0.1:1 with format long: only 0.3 differs from the decimal number.
MATLAB_THRESHOLDS = [0.0, 0.1, 0.2, 0.30000000000000004, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def reference_ap(scores, labels, setting):
    """One class, image by image, in the steps of the HICO authors' evaluation."""
    kept = [i for i, label in enumerate(labels) if label != 0]
    value = {i: float(scores[i]) for i in kept}
    if setting == "known_object":
        value.update({i: -1e10 for i in kept if labels[i] == -2})
    ranking = sorted(kept, key=lambda i: -value[i])  # stable
    positives = sum(labels[i] == 1 for i in kept)
    if positives == 0:
        return math.nan
    found, points = 0, []
    for place, i in enumerate(ranking, start=1):
        found += labels[i] == 1
        points.append((found / positives, found / place))
    ap = 0.0
    for threshold in MATLAB_THRESHOLDS:
        ap += max((p for r, p in points if r >= threshold), default=0.0) / 11
    return min(ap, 1.0)  # eleven p / 11 may end one rounding above 1


def reference(scores, annotations, setting):
    columns = range(annotations.shape[1])
    return np.array([reference_ap(scores[:, c], annotations[:, c], setting) for c in columns])


@st.composite
def labelled(draw, ties=True):
    images, classes = draw(st.integers(1, 30)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    if ties:
        scores = rng.integers(-3, 4, size=(images, classes))
    else:
        scores = np.stack([rng.permutation(images) - images // 2 for _ in range(classes)], axis=1)
    annotations = rng.choice([1, -1, 0, -2], size=(images, classes), p=[0.4, 0.2, 0.1, 0.3])
    return scores.astype(dtype), annotations.astype(np.int8)


def test_thresholds_are_matlabs():
    """Catches numpy's i * 0.1, which puts 0.6 and 0.7 above recalls of 6 and 7 of 10."""
    assert RECALL_THRESHOLDS.tolist() == MATLAB_THRESHOLDS


@pytest.mark.parametrize("setting", SETTINGS)
@LIMITED
@given(data=labelled())
def test_equals_the_reference_to_the_last_bit(data, setting):
    """Catches wrong ties, ambiguous images kept, unknowns misplaced, or another sum."""
    got, wanted = hico_average_precision(*data, setting), reference(*data, setting)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_the_reference_on_many_images(dtype):
    """Catches faults beyond one block of classes, with infinities and ties among the scores."""
    rng = np.random.default_rng(3)
    annotations = rng.choice([1, -1, 0, -2], size=(600, 37), p=[0.02, 0.1, 0.03, 0.85])
    scores = rng.standard_normal(annotations.shape).astype(dtype)
    scores[::7] = np.round(scores[::7])
    scores[5], scores[6] = np.inf, -1e9
    for setting in SETTINGS:
        np.testing.assert_array_equal(
            hico_average_precision(scores, annotations, setting),
            reference(scores, annotations, setting),
        )


def test_recall_of_exactly_three_in_ten():
    """Catches a 3-of-10 recall counted as reaching MATLAB's 0.3, which lies one rounding above."""
    # Hits at places 1 to 3, then 7 more behind 10 misses: precision 1 holds to a recall of 3/10.
    labels = np.array([1] * 3 + [-1] * 10 + [1] * 7)
    scores = -np.arange(20.0)[:, None]
    later = 10 / 20
    for column in (labels, np.where(labels == -1, -2, labels)):
        ap = hico_average_precision(scores, column[:, None])
        np.testing.assert_allclose(ap, (3 * 1 + 8 * later) / 11, rtol=1e-15)
    # Six of ten does reach 0.6: seven thresholds at precision 1, and four behind.
    labels = np.array([1] * 6 + [-1] * 10 + [1] * 4)
    ap = hico_average_precision(scores, labels[:, None])
    np.testing.assert_allclose(ap, (7 * 1 + 4 * later) / 11, rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_ties_keep_the_order_of_the_images(dtype):
    """Catches an unstable sort, reversed ties, and -0.0 ranked below 0.0."""
    scores = np.array([[-0.0], [0.0], [-0.0], [0.0]], dtype=dtype)
    first = hico_average_precision(scores, np.array([[1], [-1], [-1], [-1]]))
    last = hico_average_precision(scores, np.array([[-1], [-1], [-1], [1]]))
    np.testing.assert_allclose([first[0], last[0]], [1, 1 / 4])


@LIMITED
@given(data=labelled())
def test_monotone_transforms_change_nothing(data):
    """Catches a use of the scores' size, for instance a threshold or -1e10 for unknowns."""
    scores, annotations = data
    wide = scores.astype(np.float64)
    for setting in SETTINGS:
        wanted = hico_average_precision(scores, annotations, setting)
        for other in (wide**3 + 2 * wide, 1e200 * wide, wide.astype(np.int32)):
            np.testing.assert_array_equal(
                hico_average_precision(other, annotations, setting), wanted
            )


@LIMITED
@given(data=labelled(ties=False), seed=st.integers(0, 1000))
def test_order_of_images_and_classes_changes_nothing(data, seed):
    """Catches sorted scores paired with unsorted labels, and classes mixed up within a block."""
    scores, annotations = data
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(scores.shape[0]), rng.permutation(scores.shape[1])
    np.testing.assert_array_equal(
        hico_average_precision(scores[rows][:, columns], annotations[rows][:, columns]),
        hico_average_precision(scores, annotations)[columns],
    )


@LIMITED
@given(data=labelled())
def test_bounds(data):
    """Catches AP outside [0, 1], NaN in the wrong classes, unknowns that hurt in known object."""
    ap, known = (hico_average_precision(*data, setting) for setting in SETTINGS)
    has_positive = (data[1] == 1).any(axis=0)
    assert np.array_equal(np.isnan(ap), ~has_positive)
    assert np.array_equal(np.isnan(known), ~has_positive)
    assert (ap[has_positive] > 0).all()
    assert (known[has_positive] <= 1).all()
    # Unknowns are never positives: moving them back can only raise every precision.
    assert (known[has_positive] >= ap[has_positive]).all()


@LIMITED
@given(data=labelled())
def test_perfect_ranking_is_one(data):
    """Catches an ascending sort and an interpolation that misses the end points."""
    _, annotations = data
    ap = hico_average_precision((annotations == 1).astype(np.float32), annotations)
    np.testing.assert_allclose(ap[~np.isnan(ap)], 1.0, rtol=1e-12)


def test_evaluate_agrees_with_its_parts_and_makes_json():
    """Catches settings swapped in the shared sort, a misapplied mask, and NaN in the JSON."""
    rng = np.random.default_rng(0)
    annotations = rng.choice([1, -1, 0, -2], size=(50, 20), p=[0.1, 0.2, 0.1, 0.6])
    annotations[:, 4][annotations[:, 4] == 1] = -1
    scores = rng.random(annotations.shape)
    counts = np.arange(20)
    result = evaluate(scores, annotations, {n: counts <= n for n in (0, 1, 5)} | {10: counts == 4})
    ap, known = (hico_average_precision(scores, annotations, setting) for setting in SETTINGS)
    np.testing.assert_array_equal(result.ap, ap)
    np.testing.assert_array_equal(result.ap_known_object, known)
    assert result.mean_ap == pytest.approx(np.nanmean(ap))
    assert result.mean_ap_known_object == pytest.approx(np.nanmean(known))
    assert result.mean_ap < result.mean_ap_known_object
    np.testing.assert_allclose(result.interpolated_precision.mean(axis=1), ap, rtol=1e-12)
    assert not (np.diff(result.interpolated_precision) > 0).any()
    assert (result.num_classes, result.num_images) == (np.isfinite(ap).sum(), 50)
    assert result.few_shot[5] == mean_average_precision(ap[counts <= 5])
    assert result.few_shot_known_object[5] == mean_average_precision(known[counts <= 5])
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["few@10"] is None
    assert plain["ap"][4] is None
    assert plain["interpolated_precision"][4] is None
    assert np.mean(plain["interpolated_precision"][5]) == pytest.approx(ap[5], abs=1e-4)
    assert plain["mAP"] == result.mean_ap
    assert plain["few@1_known_object"] == result.few_shot_known_object[1]


def test_means():
    """Catches NaN classes counted as 0, and a warning where no class has an AP."""
    assert mean_average_precision([0.2, np.nan, 0.6, 1.0]) == pytest.approx(0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(mean_average_precision([np.nan]))
        assert math.isnan(mean_average_precision([]))


def test_no_images_and_no_classes():
    """Catches a crash in min() or argsort on an empty evaluation."""
    assert np.isnan(hico_average_precision(np.zeros((0, 3)), np.zeros((0, 3)))).all()
    assert hico_average_precision(np.zeros((3, 0)), np.zeros((3, 0), dtype=int)).shape == (0,)


@pytest.mark.parametrize(
    ("scores", "annotations", "said"),
    [
        ([[0.1, math.nan]], [[1, 1]], r"scores\[0, 1\] is NaN"),
        ([[0.1, 0.2]], [[1]], "both have to be"),
        ([0.1, 0.2], [1, 1], "both have to be"),
        ([[0.1, 0.2]], [[1, 2]], "annotations hold 2"),
        ([[0.1, 0.2]], [[1, -3]], "annotations hold -3"),
        ([[0.1, 0.2]], [[1, 257]], "annotations hold 257"),
        ([[0.1, 0.2]], [[1, 0.5]], "annotations hold 0.5"),
        ([[0.1, 0.2]], [[1, math.nan]], "annotations hold nan"),
        ([[0.1, 0.2]], [[True, False]], "bool"),
    ],
)
def test_wrong_input_is_refused(scores, annotations, said):
    """Catches NaN sorted silently, a 0/1 mask read as ambiguous, and codes cut to int8."""
    with pytest.raises(ValueError, match=said):
        hico_average_precision(scores, annotations)


def test_other_arguments_are_refused():
    """Catches a misspelt setting, an integer few-shot list taken as a mask."""
    scores, annotations = np.zeros((2, 2)), np.ones((2, 2))
    with pytest.raises(ValueError, match="default, known_object"):
        hico_average_precision(scores, annotations, "known")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"few_shot\[1\]"):
        evaluate(scores, annotations, {1: [0, 1]})


@settings(deadline=None)  # a crowded machine stops now and then
@given(st.integers(1, 500), st.data())
def test_wilson_intervals_hold_their_share(total, data):
    """Catches an interval that leaves [0, 1] or does not hold the share itself."""
    hits = data.draw(st.integers(0, total))
    low, high = wilson_interval(hits, total)
    assert 0 <= low <= hits / total + 1e-12
    assert hits / total - 1e-12 <= high <= 1
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)  # not empty
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
