"""Tests of one batch through a teacher: regions, searches, captions, and who pays for a failure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from hts_ray.config import RegionsConfig, TeacherConfig
from hts_ray.data.images import DecodedImage
from hts_ray.teacher.captioner import ClassPrompts, DummyCaptioner, PromptScores
from hts_ray.teacher.scoring import ImageFailure, ImageTask, RegionScorer, ScoredImage


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


class FragileCaptioner(DummyCaptioner):
    """Fails on images by their first pixel: 1 raises, 2 gives NaN; memory for `fits` regions."""

    def __init__(self, fits: int = 1000) -> None:
        super().__init__()
        self.fits = fits
        self.sizes: list[int] = []

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> PromptScores:
        """Fail where the images say so."""
        self.sizes.append(len(images))
        if len(images) > self.fits:
            raise OutOfMemoryError("CUDA out of memory")
        marks = [int(image.max()) for image in images]
        if 1 in marks:
            raise RuntimeError("odd image")
        if 3 in marks:
            raise RuntimeError("CUDA error: device-side assert triggered")
        scores = super().score(images, prompts)
        scores.log_likelihoods[[mark == 2 for mark in marks]] = np.nan
        return scores


def scorer(captioner: DummyCaptioner) -> RegionScorer:
    prompts = ClassPrompts.of([["a b"], ["c", "d"]], 2)
    regions = RegionsConfig(grid_scales=(), grid_steps=())
    return RegionScorer(captioner, prompts, TeacherConfig(max_batch_regions=8), regions)


def marked(*marks: int) -> list[ImageTask]:
    images = [DecodedImage(np.full((20, 20, 3), mark, np.uint8), 20, 20) for mark in marks]
    return [ImageTask(image) for image in images]


def test_failures_are_pinned_to_their_image() -> None:
    """Catches one odd image taking its batch along, or NaN entering the table."""
    results = scorer(FragileCaptioner())(marked(9, 1, 9, 9, 2, 9, 1))
    kinds = [r.kind if isinstance(r, ImageFailure) else "ok" for r in results]
    assert kinds == ["ok", "teacher_error", "ok", "ok", "not_finite", "ok", "teacher_error"]
    assert isinstance(results[0], ScoredImage)
    assert results[0].scores.shape == (1, 2)


def test_out_of_memory_halves_the_chunk() -> None:
    """Catches images given up although fewer at a time would fit."""
    captioner = FragileCaptioner(fits=3)
    results = scorer(captioner)(marked(*range(10, 20)))
    assert all(isinstance(result, ScoredImage) for result in results)
    assert captioner.sizes == [8, 4, 2, 2, 2, 2, 2]
    alone = scorer(FragileCaptioner(fits=0))(marked(9))
    assert isinstance(alone[0], ImageFailure)
    assert alone[0].kind == "out_of_memory"


def test_broken_device_stops_the_run() -> None:
    """Catches a dead GPU quarantining every image that comes after it."""
    with pytest.raises(RuntimeError, match="device-side assert"):
        scorer(FragileCaptioner())(marked(9, 3))
