"""Tests of one batch through a teacher: regions, searches, captions, and who pays for a failure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hts_ray.classes import ClassTable, HoiClass, hico_classes
from hts_ray.config import CaptionConfig, RegionsConfig, TeacherConfig
from hts_ray.images.decode import DecodedImage
from hts_ray.images.regions import Detection
from hts_ray.teacher.captioner import (
    Answers,
    Caption,
    ClassPrompts,
    DummyCaptioner,
    PromptScores,
    TopSearch,
)
from hts_ray.teacher.scorers import (
    CaptionVotes,
    ImageFailure,
    ImageTask,
    ObjectsFirst,
    PromptLikelihoods,
    QuestionOdds,
    RegionScorer,
    ScoredImage,
)


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
    return RegionScorer(
        captioner, PromptLikelihoods(captioner, prompts, TeacherConfig()), regions, 8
    )


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


class LettersCaptioner(DummyCaptioner):
    """Says of an image what its first pixel is told to say."""

    def caption(self, images: Sequence[np.ndarray], settings: CaptionConfig) -> list[list[Caption]]:
        """Return two captions an image, the first twice as likely."""
        marks = [int(image[0, 0, 0]) for image in images]
        return [
            [Caption(f"class {mark}", np.log(0.2)), Caption("class 9", np.log(0.1))]
            for mark in marks
        ]


def find_numbers(captions: Sequence[str]) -> list[dict[int, float]]:
    """Find class n in "class n"; the others say nothing."""
    numbers = [int(caption.split()[1]) for caption in captions]
    return [{number: 0.8} if number < 3 else {} for number in numbers]


@pytest.mark.parametrize(("decoding", "expected"), [("sample", 0.4), ("beam", 0.8 * 2 / 3)])
def test_caption_mode(decoding: str, expected: float) -> None:
    """Catches captions counted for another region, and beams counted as if they were samples."""
    settings = TeacherConfig.model_validate(
        {"mode": "captions", "caption": {"decoding": decoding, "count": 2}}
    )
    regions = RegionsConfig(grid_scales=(), grid_steps=())
    captioner = LettersCaptioner()
    votes = CaptionVotes(find_numbers, {0: 0, 1: 1, 2: 2}, weighted=decoding == "beam")
    result = RegionScorer(captioner, votes, regions, caption=settings.caption)(marked(1, 7, 2))
    assert all(isinstance(scored, ScoredImage) for scored in result)
    probabilities = np.exp(np.concatenate([scored.scores for scored in result]))  # type: ignore[union-attr]
    np.testing.assert_allclose(
        probabilities, [[0, expected, 0], [0, 0, 0], [0, 0, expected]], rtol=1e-6
    )
    assert result[0].captions == [["class 1", "class 9"]]  # type: ignore[union-attr]


def test_search_on_a_teacher_that_knows_none() -> None:
    """Catches a search that means something else on a teacher of one's own."""
    prompts = ClassPrompts.of([[f"prompt {n}", f"other {n}"] for n in range(12)], 2)
    regions = RegionsConfig(grid_scales=(0.5,), grid_steps=(2,), min_side=1)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    images = [ImageTask(DecodedImage(of_image, 20, 20)) for of_image in pixels]
    captioner = DummyCaptioner()
    everything = PromptLikelihoods(captioner, prompts, TeacherConfig())
    exact = RegionScorer(captioner, everything, regions)(images)
    offsets = np.linspace(0, 30, 12, dtype=np.float32)
    search = TopSearch(4, offsets_C=offsets)
    best_four = PromptLikelihoods(captioner, prompts, TeacherConfig(), search)
    top = RegionScorer(captioner, best_four, regions)(images)
    for all_scores, kept in zip(exact, top, strict=True):
        assert isinstance(all_scores, ScoredImage)
        assert isinstance(kept, ScoredImage)
        for row_C, kept_C in zip(all_scores.scores, kept.scores, strict=True):
            best = np.argsort(-(row_C + offsets))[:4]
            assert set(np.flatnonzero(np.isfinite(kept_C))) == set(best)
            np.testing.assert_array_equal(kept_C[best], row_C[best])


def test_questions_are_combined_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches odds of another class's phrase, and a failed answer that passes for a low one."""
    captioner = DummyCaptioner()
    phrases = ClassPrompts.of([["a b"], ["c", "d"]], 2)
    crops = [np.full((8, 8, 3), shade, np.uint8) for shade in (10, 20)]
    odds = captioner.ask(crops, phrases.texts).log_odds
    scores = QuestionOdds(captioner, phrases, "max")(crops, ())
    np.testing.assert_array_equal(scores, np.stack([odds[:, 0], odds[:, 1:].max(1)], 1))
    monkeypatch.setattr(captioner, "ask", lambda *_: Answers(odds * np.nan, np.ones(3, int)))
    assert np.isnan(QuestionOdds(captioner, phrases, "log_mean_exp")(crops, ())).all()


class CountingCaptioner(DummyCaptioner):
    """Counts its answers; fails to see horses in one picture."""

    answers = 0

    def ask(self, images: Sequence[np.ndarray], phrases: Sequence[str]) -> Answers:
        """Count and answer."""
        self.answers += len(images) * len(phrases)
        found = super().ask(images, phrases)
        for row, image in enumerate(images):
            if image.max() == 30 and "a horse" in phrases:
                found.log_odds[row, phrases.index("a horse")] = np.nan
        return found


def test_classes_wait_for_their_object() -> None:
    """Catches classes asked of another object's regions, and a failed object passed for absent."""
    table = hico_classes().subset([18, 139, 19, 140])  # ride and sit on: bicycle, horse
    phrases = ClassPrompts.of(table.prompts, 2)
    objects = ObjectsFirst.of(table, 1.5)
    assert objects.phrases == ("a bicycle", "a horse")
    captioner = CountingCaptioner()
    crops = [np.full((8, 8, 3), shade, np.uint8) for shade in range(0, 120, 10)]
    nouns = captioner.ask(crops, objects.phrases).log_odds
    every = QuestionOdds(captioner, phrases, "mean")(crops, ())
    captioner.answers = 0
    scores = QuestionOdds(captioner, phrases, "mean", objects)(crops, ())
    there = (nouns >= 1.5)[:, [0, 1, 0, 1]]
    assert 0 < there.sum() < there.size
    expected = np.where(there, every, -np.inf)
    expected[3, [1, 3]] = np.nan
    np.testing.assert_array_equal(scores, expected)
    assert captioner.answers == nouns.size + 2 * there.sum()
    thing = ClassTable((HoiClass(0, "red car", None, None, ("a photo of a red car",)),))
    assert (ObjectsFirst.of(thing, 9.0).wanted(captioner, crops) == 0).all()


def test_given_boxes_and_detections_become_regions() -> None:
    """Catches detections left in the coordinates of the shrunk pixels."""

    class Finder:
        def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
            return [
                [Detection((0, 0, 10, 10), "person", 0.9), Detection((8, 8, 18, 18), "dog", 0.8)]
                for _ in images
            ]

    class Given:
        def of(self, image_id: str, uri: str, width: int, height: int) -> Any:
            assert (image_id, uri, width, height) == ("a", "/a.png", 200, 200)
            return [], [(100.0, 100.0, 160.0, 160.0)], ["box 1: no area"]

    image = DecodedImage(np.zeros((20, 20, 3), np.uint8), 200, 200)
    prompts = ClassPrompts.of([["a"], ["b"]], 1)
    regions = RegionsConfig(grid_scales=(), grid_steps=(), margins=(0.0, 0.5))
    captioner, given = DummyCaptioner(), Given()
    scores = PromptLikelihoods(captioner, prompts, TeacherConfig())
    scorer = RegionScorer(captioner, scores, regions, detector=Finder(), given=given)  # type: ignore[arg-type]
    result = scorer([ImageTask(image, "a", "/a.png")])[0]
    assert isinstance(result, ScoredImage)
    shown = {(r.kind, r.margin): r.box for r in result.regions}
    assert shown[("union", 0.0)] == (0, 0, 180, 180)
    assert shown[("person", 0.0)] == (0, 0, 100, 100)
    assert shown[("person", 0.5)] == (0, 0, 150, 150)
    assert shown[("given", 0.0)] == (100, 100, 160, 160)
    assert result.problems == ["box 1: no area"]
    scorer.limit = 2
    limited = scorer([ImageTask(image, "a", "/a.png")])[0]
    assert isinstance(limited, ScoredImage)
    assert [region.kind for region in limited.regions] == ["whole", "union"]
