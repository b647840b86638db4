"""Tests of which classes a search keeps, and of what is told about it."""

from __future__ import annotations

import numpy as np
import pytest

from hts_ray.teacher.scoring.selection import (
    agreement,
    alive_classes,
    keep_top,
    object_gate,
    object_phrase,
)


def test_agreement_counts_what_was_lost() -> None:
    """Catches shares taken over the wrong axis, or of the wrong scores."""
    exact = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=np.float32))
    approximate = exact + np.float32(0.25)
    approximate[0, 0] = approximate[1, 0] = -np.inf
    measured = agreement(exact, approximate, k=2)
    assert measured == pytest.approx(
        {
            "top_1": 0.5,
            "top_k": 0.75,
            "kept": 4 / 6,
            "score_difference": 0.25,
            "lost_mass": 0.3,
            "worst_lost_mass": 0.5,
            "probability_difference": 0.5 * (0.5 + (2 / 3 - 0.6) + 1 / 30),
        },
        abs=1e-6,
    )


def test_objects_are_said_as_in_the_prompts() -> None:
    """Catches "a person", which every image shows, and "a mouse", which is an animal."""
    names = ("bicycle", "person", "mouse", "hot dog", "hot_dog", "scissors", "red wagon")
    assert [object_phrase(name) for name in names] == [
        "a bicycle",
        "another person",
        "a computer mouse",
        "a hot dog",
        "a hot dog",
        "scissors",
        "a red wagon",
    ]


def test_gate_names_each_class_s_object() -> None:
    """Catches classes that hang on another object than their own."""
    gate = object_gate(["dog", None, "hot_dog", "dog"], keep=1)
    assert gate.prompts == ("a dog", "a hot dog")
    assert gate.object_of_class.tolist() == [0, -1, 1, 0]
    scores_RO = np.array([[-1.0, -5.0], [-7.0, -2.0]])
    alive = alive_classes(scores_RO, gate.object_of_class, 1)
    assert alive.tolist() == [[True, True, False, True], [False, True, True, False]]


def test_nan_is_not_a_class_that_was_left_out() -> None:
    """Catches a broken model whose NaN sorts last and is stored as probability 0."""
    scores = np.array([[-1.0, np.nan, -3.0], [-1.0, -2.0, -3.0]], np.float32)
    kept = keep_top(scores, 1)
    assert np.isnan(kept[0]).all()
    assert kept[1].tolist() == [-1.0, -np.inf, -np.inf]
