"""Tests of log P(prompt): of which images, and kept for which passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from assignments import CLASSES, plan, rows

from hts_ray.errors import DataError
from hts_ray.teacher.captioner import Answers, DummyCaptioner, PromptScores
from hts_ray.teacher.prior import (
    empty_pictures,
    log_mean_exp,
    null_log_odds,
    plain_images,
    prior_scores,
)


class CountingCaptioner(DummyCaptioner):
    """Counts the images it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> PromptScores:
        """Count and score."""
        self.images += len(images)
        return super().score(images, prompts)


class AlwaysYes(DummyCaptioner):
    """Agrees with everything."""

    def ask(self, images: Sequence[np.ndarray], phrases: Sequence[str]) -> Answers:
        """Agree."""
        answers = super().ask(images, phrases)
        answers.log_odds[:] = 9
        return answers


def test_prior_of_plain_images(tmp_path: Path) -> None:
    """Catches a prior that averages log-probabilities instead of probabilities."""
    assignment = plan(
        tmp_path, rows(tmp_path, 1), null_images=4, max_batch_regions=3, background="none"
    )
    prior = prior_scores(DummyCaptioner(), assignment)
    scores = DummyCaptioner().score(plain_images(4), CLASSES.primary_prompts).log_likelihoods
    np.testing.assert_allclose(prior, np.log(np.exp(scores.astype(np.float64)).mean(0)), rtol=1e-6)


def test_prior_of_a_sample_is_kept_for_the_run(tmp_path: Path) -> None:
    """Catches a second pass that pays for the prior again, and a prior of other settings."""
    table = rows(tmp_path, 12, bad=3)
    captioner = CountingCaptioner()
    assignment = plan(tmp_path, table, prior="sample", prior_sample=8)
    first = prior_scores(captioner, assignment)
    assert first is not None
    scored = captioner.images
    assert 5 <= scored <= 8  # the unreadable ones of the sample are left out
    other_regions = {"grid_scales": [], "grid_steps": []}
    again = plan(tmp_path, table, other_regions, prior="sample", prior_sample=8)
    np.testing.assert_array_equal(prior_scores(captioner, again), first)
    assert captioner.images == scored
    asking = {"prior": "sample", "prior_sample": 8, "mode": "questions"}
    odds = prior_scores(captioner, plan(tmp_path, table, **asking))
    assert odds is not None
    assert odds.shape == (4,)
    assert np.abs(odds).max() < 8  # no log-likelihoods of the same images
    worded = prior_scores(AlwaysYes(), plan(tmp_path, table, **asking, question="Is it {}?"))
    assert worded is not None
    assert (worded == 9).all()  # another question is another answer
    for changed in ({"prior_sample": 7}, {"append_eos": True}, {"template_reduction": "max"}):
        settings = {"prior": "sample", "prior_sample": 8, **changed}
        prior_scores(captioner, plan(tmp_path, table, **settings))
        assert captioner.images > scored
        scored = captioner.images
    assert prior_scores(captioner, plan(tmp_path, table, prior="none")) is None
    unreadable = plan(tmp_path, rows(tmp_path, 0, bad=2), prior="sample")
    with pytest.raises(DataError, match="prior=plain"):
        prior_scores(captioner, unreadable)


def test_prior_is_a_mean_of_probabilities() -> None:
    """Catches a prior that averages log-probabilities, or that skips an image."""
    scores = DummyCaptioner().score(plain_images(4), CLASSES.primary_prompts).log_likelihoods
    expected = np.log(np.exp(scores.astype(np.float64)).mean(0))
    np.testing.assert_allclose(log_mean_exp(scores), expected, rtol=1e-6)
    assert len({image.tobytes() for image in plain_images(5)}) == 5
    with pytest.raises(ValueError, match="at least one"):
        log_mean_exp(scores[:0])


def test_what_classes_reach_where_nothing_shows(tmp_path: Path) -> None:
    """Catches classes compared with themselves, and a mean in place of the highest."""
    assignment = plan(tmp_path, rows(tmp_path, 1), background="general")
    texts = [*CLASSES.primary_prompts, *assignment.background]
    pictures = empty_pictures()
    assert len({picture.tobytes() for picture in pictures}) == len(pictures) == 12
    scores_MS = DummyCaptioner().score(pictures, texts).log_likelihoods.astype(np.float64)
    beside_M1 = np.log(np.exp(scores_MS[:, 4:]).sum(axis=1, keepdims=True))
    expected = (scores_MS[:, :4] - beside_M1).max(axis=0)
    np.testing.assert_allclose(null_log_odds(DummyCaptioner(), assignment), expected, rtol=1e-4)
    alone = plan(tmp_path, rows(tmp_path, 1), background="none")
    assert null_log_odds(DummyCaptioner(), alone) is None
