"""Mixing the student's opinion into the teacher's: the mean that is named, region by region."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hts_ray.config import SelfTrainingConfig
from hts_ray.errors import DataError
from hts_ray.self_training import SecondOpinion, mix_probabilities, student_probabilities

PROBABILITIES = arrays(np.float32, (3, 4), elements=st.floats(0, 1, width=32))
MIXTURES = ("geometric", "arithmetic")


@settings(max_examples=200, deadline=None)
@given(PROBABILITIES, PROBABILITIES, st.floats(0, 1))
def test_a_mixture_is_a_mean(teacher, student, weight):
    """Catches weights on the wrong side, and means that leave the range of what they average."""
    geometric, arithmetic = (
        mix_probabilities(teacher, student, weight, mixture) for mixture in MIXTURES
    )
    low, high = np.minimum(teacher, student), np.maximum(teacher, student)
    for mixed in (geometric, arithmetic):
        assert mixed.dtype == np.float32
        assert (mixed >= low - 1e-6).all()
        assert (mixed <= high + 1e-6).all()
    assert (geometric <= arithmetic + 1e-6).all()
    np.testing.assert_allclose(
        arithmetic, (1 - weight) * teacher + weight * student, rtol=1e-5, atol=1e-6
    )
    for mixture in MIXTURES:
        assert np.array_equal(mix_probabilities(teacher, student, 0, mixture), teacher)
        assert np.array_equal(mix_probabilities(teacher, student, 1, mixture), student)


def test_a_geometric_mixture_needs_both():
    """Catches a product without exponents, and a zero that is lifted."""
    mixed = mix_probabilities([[0.0, 1.0, 0.81]], [[1.0, 0.0, 0.01]], 0.5, "geometric")
    np.testing.assert_allclose(mixed, [[0.0, 0.0, 0.09]], rtol=1e-5)


def test_wrong_mixtures_are_refused():
    """Catches broadcasting of one region over all, and weights in percent."""
    ones = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="unequal shapes"):
        mix_probabilities(ones, ones[:1], 0.5, "geometric")
    with pytest.raises(ValueError, match="weight = 50"):
        mix_probabilities(ones, ones, 50, "geometric")
    with pytest.raises(ValueError, match="mixture = 'mean'"):
        mix_probabilities(ones, ones, 0.5, "mean")
    with pytest.raises(ValueError, match="temperature = 0"):
        student_probabilities(ones, 0)


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(0.1, 10))
def test_logits_become_probabilities(logit, temperature):
    """Catches overflow at large logits, and a border that is not at 0."""
    found, mirrored = student_probabilities([[logit, -logit]], temperature)[0]
    assert 0 <= found <= 1
    assert found + mirrored == pytest.approx(1, abs=1e-6)
    assert (found >= 0.5) == (logit >= 0) or abs(logit) < 1e-5
    bounded = np.clip(logit / temperature, -80, 80)
    assert found == pytest.approx(1 / (1 + np.exp(-bounded)), rel=1e-4, abs=1e-7)


class Stored:
    """Student scores in memory."""

    def __init__(self, class_ids, logits):
        self.class_ids = class_ids
        self.logits = logits

    def get(self, image_id):
        """Return an image's logits."""
        return self.logits.get(image_id)


def test_an_opinion_meets_its_own_regions_and_classes():
    """Catches columns by position instead of class id, and rows of regions that were left out."""
    logits = np.array([[9.0, -9, 0], [0, 0, 0], [-9, 9, 0]], np.float32)
    config = SelfTrainingConfig(student_weight=1.0)
    opinion = SecondOpinion(Stored([7, 3, 5], {"a": logits}), np.array([3, 7], np.int16), config)
    teacher = np.full((2, 2), 0.25, np.float32)
    mixed = opinion("a", np.array([True, False, True]), teacher)
    np.testing.assert_allclose(mixed, [[0, 1], [1, 0]], atol=2e-4)
    assert opinion("unknown", np.array([True, True]), teacher) is teacher
    softer = config.model_copy(update={"student_weight": 0.5, "mixture": "arithmetic"})
    half = SecondOpinion(Stored([7, 3], {"a": logits[:, :2]}), np.array([3, 7], np.int16), softer)
    np.testing.assert_allclose(
        half("a", np.array([True, False, True]), teacher),
        [[0.125, 0.625], [0.625, 0.125]],
        atol=2e-4,
    )
    with pytest.raises(DataError, match="the student has no class 9"):
        SecondOpinion(Stored([7, 3], {}), np.array([3, 9], np.int16), config)
