"""Label-free objectives: their formulas by brute force, and that the obvious cheats do not pay."""

from __future__ import annotations

import itertools

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
    make_reference,
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


# A small world in which the truth is known: the teacher's two halves of regions see it with
# independent errors, and a student is truth plus noise.


def world(seed=0, images=400, classes=12):
    rng = np.random.default_rng(seed)
    truth = rng.random((images, classes)) < rng.uniform(0.03, 0.2, classes)
    noise = rng.normal(0, 1.2, (2, images, classes))
    views = 1 / (1 + np.exp(-(6 * truth - 4.0 + noise)))
    start = truth + rng.normal(0, 2.5, truth.shape)
    return rng, truth, start, make_reference(views.mean(axis=0), views)


def outcome(world, quality=1.0):
    """Students whose logits are the zero-shot ones plus `quality` times the truth."""
    rng, truth, start, reference = world
    students = np.stack(
        [start + quality * (4 * truth + rng.normal(0, 1, truth.shape)) for _ in range(2)]
    )
    fold = (np.arange(len(truth)) % 2).astype(np.int8)
    return Outcome(reference, fold, students, students[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_better_students_score_higher(name):
    """Catches an objective that does not see what it is for."""
    made = world()
    values = [OBJECTIVES[name](outcome(made, quality)) for quality in (0.0, 0.3, 1.0)]
    assert values == sorted(values)
    assert values[2] > values[0] + 0.02


def test_the_reference_is_nearer_the_truth_than_either_half():
    """Catches a pool that makes the word of a teacher that is too confident worse."""
    rng = np.random.default_rng(0)
    truth = rng.random((400, 12)) < 0.1
    views = 1 / (1 + np.exp(-(6 * truth - 1.5 + rng.normal(0, 1.2, (2, *truth.shape)))))
    found = make_reference(views.mean(axis=0), views)
    assert found.min() >= 0
    assert found.max() <= 1
    assert np.mean((found - truth) ** 2) < np.mean((views.mean(axis=0) - truth) ** 2)


def test_an_image_is_not_scored_by_the_student_that_saw_it():
    """Catches folds the wrong way round, by students that are right only on their own fold."""
    made = world()
    base = outcome(made)
    own = base.fold_N[None, :, None] == np.arange(2)[:, None, None]
    perfect = np.where(made[1], 1.0, 0.0)
    memorised = np.where(own, perfect, -perfect)
    general = np.where(own, -perfect, perfect)

    def score(students):
        return OBJECTIVES["unseen_ap"](Outcome(base.reference_NC, base.fold_N, students))

    assert score(general) > 0.5 + score(memorised)


def test_names_and_missing_evidence_are_told():
    """Catches a mistyped objective that passes, and a teacher that says nothing."""
    assert choose_objective(None, labeled=False) == DEFAULT_OBJECTIVE
    assert choose_objective(None, labeled=True) == VALIDATION
    assert choose_objective("seen_ap", labeled=True) == "seen_ap"
    with pytest.raises(ConfigError, match="blended_ap, unseen_ap, seen_ap"):
        choose_objective("blended", labeled=False)
    with pytest.raises(ConfigError, match=r"sweep\.validation=PATH"):
        choose_objective(VALIDATION, labeled=False)
    nothing = np.full((4, 3), 0.01, np.float32)
    with pytest.raises(DataError, match="less than one positive"):
        make_reference(nothing, np.stack([nothing, nothing]))


def test_one_stray_region_convinces_nobody():
    """Catches a reference that a single region makes, and images with one region that lose it."""
    consensus = np.array([[0.6, 0.9], [0.5, 0.8]], np.float32)
    views = np.array([[[0.98, 0.9], [0.5, 0.8]], [[0.01, 0.9], [np.nan, np.nan]]], np.float32)
    agreed = make_reference(consensus, views)
    np.testing.assert_allclose(agreed, [[0.099, 0.9], [0.5, 0.8]], atol=1e-3)


def test_the_blend_is_the_mean_of_both_sides():
    """Catches a blend that forgets a side."""
    both = outcome(world())
    values = {name: compute(both) for name, compute in OBJECTIVES.items()}
    assert values["unseen_ap"] != values["seen_ap"]
    assert values["blended_ap"] == pytest.approx((values["unseen_ap"] + values["seen_ap"]) / 2)
