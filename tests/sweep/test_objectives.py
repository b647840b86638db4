"""Label-free objectives: their formulas by brute force, and that the obvious cheats do not pay."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hts_ray.errors import ConfigError, DataError
from hts_ray.sweep.objectives import (
    DEFAULT_OBJECTIVE,
    OBJECTIVES,
    VALIDATION,
    Outcome,
    choose_objective,
    expected_average_precision,
    expected_f1,
    isotonic_map,
    make_reference,
    overlap,
    rank_agreement,
)

LIMITED = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def average_precision(ranked):
    """Without interpolation, image by image; 0 without a positive, times the positives."""
    found, total = 0, 0.0
    for place, positive in enumerate(ranked, start=1):
        found += positive
        total += positive * found / place
    return total


@given(SEEDS, st.integers(1, 7))
@LIMITED
def test_expected_ap_is_the_ratio_of_enumerated_expectations(seed, images):
    """Catches a wrong formula: every labelling is enumerated with its probability."""
    rng = np.random.default_rng(seed)
    p, scores = rng.random(images), rng.random(images)
    ranked = p[np.argsort(-scores)]
    numerator = sum(
        np.prod(np.where(labels, ranked, 1 - ranked)) * average_precision(labels)
        for labels in itertools.product((False, True), repeat=images)
    )
    found = expected_average_precision(scores[:, None], p[:, None])
    np.testing.assert_allclose(found, [numerator / p.sum()], rtol=1e-9)


@given(SEEDS)
@LIMITED
def test_expected_ap_depends_on_the_order_alone(seed):
    """Catches scores that enter as numbers, which would reward a student's confidence."""
    rng = np.random.default_rng(seed)
    scores, p = rng.normal(size=(40, 3)), rng.random((40, 3))
    found = expected_average_precision(scores, p)
    np.testing.assert_allclose(expected_average_precision(np.exp(3 * scores), p), found)
    assert ((found >= 0) & (found <= 1)).all()
    best = expected_average_precision(p, p)
    assert (best >= found - 1e-12).all()


def test_expected_ap_knows_what_it_cannot_measure():
    """Catches classes that nobody expects counted as 0, and wrong input taken silently."""
    scores = np.zeros((3, 2))
    found = expected_average_precision(scores, np.array([[0, 1.0], [0, 0], [0, 0]]))
    assert np.isnan(found[0])
    assert found[1] == 1  # equal scores keep the images' order
    with pytest.raises(ValueError, match="both have to be"):
        expected_average_precision(scores, scores[:2])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        expected_average_precision(scores, scores - 0.1)


@given(SEEDS)
@LIMITED
def test_isotonic_map_rises_and_keeps_the_mean(seed):
    """Catches a map that reorders probabilities, or ties counted as several points."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 6, 50) / 5
    y = (rng.random(50) < x).astype(float)
    fitted = isotonic_map(x, y, np.linspace(0, 1, 30))
    assert (np.diff(fitted) >= -1e-7).all()
    np.testing.assert_allclose(isotonic_map(x, y, x).mean(), y.mean(), atol=1e-6)


@given(SEEDS)
@LIMITED
def test_overlap_and_f1_stay_within_bounds_and_punish_both_extremes(seed):
    """Catches a denominator that a filter can shrink by naming almost nothing."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((60, 4)) < 0.3).astype(np.float32)
    truth[0] = 1
    expected = truth.sum(axis=0)
    right = np.where(truth == 1, 1, -1).astype(np.int8)
    one = np.full_like(right, -1)
    one[0] = 1
    everything = np.ones_like(right)
    np.testing.assert_allclose(expected_f1(right, truth), 1)
    np.testing.assert_allclose(overlap(right, right, expected), 1)
    for labels in (one, everything, np.zeros_like(right)):
        if (labels == right).all():
            continue
        assert (expected_f1(labels, truth) <= 1).all()
        np.testing.assert_allclose(
            overlap(labels, right, expected), overlap(right, labels, expected)
        )
    np.testing.assert_allclose(overlap(one, one, expected), 1 / expected, rtol=1e-6)
    np.testing.assert_allclose(overlap(everything, everything, expected), expected / 60, rtol=1e-6)
    assert (expected_f1(np.zeros_like(right), truth) == 0).all()


@given(SEEDS)
@LIMITED
def test_rank_agreement_is_spearman(seed):
    """Catches ranks taken over the classes, and NaN from a constant class."""
    from scipy.stats import spearmanr

    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(25, 3)), rng.integers(0, 5, (25, 3)).astype(float)
    expected = np.mean([spearmanr(first[:, c], second[:, c]).statistic for c in range(3)])
    assert rank_agreement(first, second) == pytest.approx(expected)
    assert rank_agreement(first, np.zeros_like(first)) == 0
    assert rank_agreement(first, first**3) == pytest.approx(1)


def of_logits(name, logits_NC):
    """Return an objective of the students' logits on images that they did not see."""
    fold_N = np.zeros(len(logits_NC), np.int8)
    students = np.stack([np.zeros_like(logits_NC), logits_NC])
    return OBJECTIVES[name].compute(Outcome(None, fold_N, None, logits_2NC=students))


def test_published_criteria_order_what_they_were_made_to_order():
    """Catches a sign: clusters beat noise, and decided, varied outputs beat both extremes."""
    rng = np.random.default_rng(0)
    owner = np.arange(60) % 3
    clusters = 8 * np.eye(3)[owner] + rng.normal(0, 0.1, (60, 3))
    name = "information_maximization"
    assert of_logits(name, clusters) == pytest.approx(np.log(3), abs=0.05)
    assert of_logits(name, np.zeros((60, 3))) == pytest.approx(0)
    assert of_logits(name, np.tile([9.0, 0, 0], (60, 1))) == pytest.approx(0, abs=1e-9)
    scattered, name = rng.normal(0, 4, (60, 12)), "soft_neighborhood_density"
    assert of_logits(name, clusters) > of_logits(name, scattered)
    # 20 images a cluster, 19 equal neighbours each
    assert of_logits(name, clusters) == pytest.approx(np.log(19), abs=0.2)


# A small world in which the truth is known: the teacher's two halves of regions see it with
# independent errors, and a student is truth plus noise.


def world(seed=0, images=400, classes=12, confidence=-4.0):
    rng = np.random.default_rng(seed)
    truth = rng.random((images, classes)) < rng.uniform(0.03, 0.2, classes)
    noise = rng.normal(0, 1.2, (2, images, classes))
    views = 1 / (1 + np.exp(-(6 * truth + confidence + noise)))
    start = truth + rng.normal(0, 2.5, truth.shape)
    reference = make_reference(views.mean(axis=0), views, start)
    return rng, truth, reference


def outcome(rng, truth, reference, quality=1.0, targets=None):
    """Students whose logits are the zero-shot ones plus `quality` times the truth."""
    start = reference.start_NC
    students = np.stack(
        [start + quality * (4 * truth + rng.normal(0, 1, truth.shape)) for _ in range(2)]
    )
    if targets is None:
        targets = np.where(reference.consensus_NC > 0.5, 1, -1).astype(np.int8)
    fold = (np.arange(len(truth)) % 2).astype(np.int8)
    views = np.where(reference.views_2NC > 0.5, 1, -1).astype(np.int8)
    views = np.where(targets == 0, np.int8(0), views)
    return Outcome(reference, fold, targets, views, students, students, students[0])


TRUSTED = [
    "blended_ap", "unseen_ap", "seen_ap", "expected_ap", "calibrated_ap", "unused_region_ap",
]  # fmt: skip


@pytest.mark.parametrize("name", TRUSTED)
def test_better_students_score_higher(name):
    """Catches an objective that does not see what it is for."""
    rng, truth, reference = world()
    values = [OBJECTIVES[name].compute(outcome(rng, truth, reference, q)) for q in (0.0, 0.3, 1.0)]
    assert values == sorted(values)
    assert values[2] > values[0] + 0.02


@pytest.mark.parametrize("name", ["view_agreement", "label_f1"])
@pytest.mark.parametrize("keep", ["one", "nothing", "everything"])
def test_extreme_filters_do_not_win(name, keep):
    """Catches a filter that wins by keeping almost nothing, or by keeping everything."""
    rng, truth, reference = world()
    good = outcome(rng, truth, reference)
    targets = np.full(truth.shape, {"one": -1, "nothing": 0, "everything": 1}[keep], np.int8)
    if keep == "one":
        targets[reference.consensus_NC.argmax(axis=0), np.arange(truth.shape[1])] = 1
    views = np.stack([targets, targets])
    extreme = Outcome(reference, good.fold_N, targets, views, good.logits_2NC, good.view_logits_2NC)
    assert OBJECTIVES[name].compute(extreme) < OBJECTIVES[name].compute(good) - 0.1


def test_students_that_learned_nothing_agree_about_nothing():
    """Catches agreement that is highest for two copies of the zero-shot student."""
    rng, truth, reference = world()
    compute = OBJECTIVES["half_agreement"].compute
    assert compute(outcome(rng, truth, reference, 0.0)) == pytest.approx(0)
    assert compute(outcome(rng, truth, reference, 1.0)) > 0.005


def test_calibration_moves_probabilities_towards_the_truth():
    """Catches a calibration that makes the word of a teacher that is too confident worse."""
    _, truth, reference = world(confidence=-1.5)
    before = np.mean((reference.consensus_NC - truth) ** 2)
    for name in ("calibrated_NC", "agreed_NC"):
        found = getattr(reference, name)
        assert found.min() >= 0
        assert found.max() <= 1
        assert np.mean((found - truth) ** 2) < before
    # calibration keeps the teacher's order
    order = np.argsort(reference.consensus_NC.ravel())
    assert (np.diff(reference.calibrated_NC.ravel()[order]) >= -1e-6).all()


def test_an_image_is_not_scored_by_the_student_that_saw_it():
    """Catches folds the wrong way round, by students that are right only on their own fold."""
    rng, truth, reference = world()
    base = outcome(rng, truth, reference)
    own = base.fold_N[None, :, None] == np.arange(2)[:, None, None]
    perfect = np.where(truth, 1.0, 0.0)
    memorised = np.where(own, perfect, -perfect)
    general = np.where(own, -perfect, perfect)

    def score(students):
        return OBJECTIVES["calibrated_ap"].compute(
            Outcome(reference, base.fold_N, base.targets_NC, None, students)
        )

    assert score(general) > 0.5 + score(memorised)


def test_unused_regions_are_the_other_half():
    """Catches view students compared with the half of the regions that they were taught by."""
    rng, truth, reference = world()
    base = outcome(rng, truth, reference)

    def score(students):
        return OBJECTIVES["unused_region_ap"].compute(
            Outcome(reference, base.fold_N, base.targets_NC, None, None, students)
        )

    views = reference.views_2NC
    assert score(views[::-1]) > score(views) + 0.02


def test_names_and_missing_evidence_are_told():
    """Catches a mistyped objective that passes, and a teacher that says nothing."""
    assert choose_objective(None, labeled=False) == DEFAULT_OBJECTIVE
    assert choose_objective(None, labeled=True) == VALIDATION
    assert choose_objective("label_f1", labeled=True) == "label_f1"
    with pytest.raises(ConfigError, match="calibrated_ap"):
        choose_objective("calibrated", labeled=False)
    with pytest.raises(ConfigError, match=r"sweep\.validation=PATH"):
        choose_objective(VALIDATION, labeled=False)
    nothing = np.full((4, 3), 0.01, np.float32)
    with pytest.raises(DataError, match="less than one positive"):
        make_reference(nothing, np.stack([nothing, nothing]), nothing)


def test_one_stray_region_convinces_nobody():
    """Catches a reference that a single region makes, and images with one region that lose it."""
    consensus = np.array([[0.6, 0.9], [0.5, 0.8]], np.float32)
    views = np.array([[[0.98, 0.9], [0.5, 0.8]], [[0.01, 0.9], [np.nan, np.nan]]], np.float32)
    agreed = make_reference(consensus, views, np.zeros((2, 2))).agreed_NC
    np.testing.assert_allclose(agreed, [[0.099, 0.9], [0.5, 0.8]], atol=1e-3)


def test_the_blend_is_the_mean_of_both_sides():
    """Catches a blend that forgets a side, or that fails where only halves were trained on."""
    rng, truth, reference = world()
    both = outcome(rng, truth, reference)
    values = {
        name: OBJECTIVES[name].compute(both) for name in ("blended_ap", "unseen_ap", "seen_ap")
    }
    assert values["unseen_ap"] != values["seen_ap"]
    assert values["blended_ap"] == pytest.approx((values["unseen_ap"] + values["seen_ap"]) / 2)
    halves = replace(both, whole_NC=None)
    assert OBJECTIVES["blended_ap"].compute(halves) == values["unseen_ap"]
