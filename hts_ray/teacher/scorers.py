"""One batch of decoded images through a teacher, with every failure kept to its own image.

Knows neither Ray nor files. Shape legend: R regions, P prompts, C classes, O objects.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hts_ray.config import RegionsConfig, TeacherConfig
from hts_ray.images.crops import CropBatch
from hts_ray.images.decode import DecodedImage
from hts_ray.images.regions import Box, Detection, Region, propose_regions
from hts_ray.teacher.captioner import (
    Caption,
    Captioner,
    ClassPrompts,
    FloatArray,
    Pixels,
    SearchingCaptioner,
    score_classes,
)
from hts_ray.teacher.scoring.selection import (
    ObjectGate,
    agreement,
    alive_classes,
    keep_top,
)

if TYPE_CHECKING:
    from hts_ray.teacher.detector import Detector

logger = logging.getLogger(__name__)

TEACHER_ERROR = "teacher_error"
OUT_OF_MEMORY = "out_of_memory"
NOT_FINITE = "not_finite"

# Of how many of the best classes it is told which a search has kept.
AGREEMENT_TOP = 10


@dataclass(frozen=True, eq=False)
class ImageTask:
    """An image to score: its pixels, and what its given boxes are looked up by."""

    image: DecodedImage
    image_id: str = ""
    uri: str = ""


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """What the teacher says of one image.

    `scores` (R, C) float32 log-likelihoods, -inf for classes that were left out; `captions` one
    list a region, empty unless captions were asked for; `problems` tells of boxes that could not
    be used.
    """

    regions: list[Region]
    scores: FloatArray
    captions: list[list[str]]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ImageFailure:
    """Why an image has no scores: TEACHER_ERROR, OUT_OF_MEMORY or NOT_FINITE, and the details."""

    kind: str
    message: str


class GivenBoxesLike(Protocol):
    """Boxes that came with the images; see `hts_ray.images.boxes`."""

    def of(
        self, image_id: str, uri: str, width: int, height: int
    ) -> tuple[list[Detection], list[Box], list[str]]:
        """Return labeled boxes, plain boxes, and what could not be used."""


class CaptionMatcher(Protocol):
    """Finds classes in captions; see `hts_ray.captions.matching`."""

    def __call__(self, captions: Sequence[str]) -> list[dict[int, float]]:
        """Return one {class position: probability} a caption."""


@dataclass
class RegionScorer:
    """Scores all regions of several images at a time.

    `offsets_C` is added to the scores where search=top_k ranks classes, `limit` caps the regions
    of an image on top of `regions.max_regions`.
    """

    captioner: Captioner
    prompts: ClassPrompts
    teacher: TeacherConfig
    regions: RegionsConfig
    detector: Detector | None = None
    given: GivenBoxesLike | None = None
    matcher: CaptionMatcher | None = None
    gate: ObjectGate | None = None
    offsets_C: FloatArray | None = None
    limit: int | None = None
    chunk: int = field(init=False)

    def __post_init__(self) -> None:
        self.chunk = self.teacher.max_batch_regions
        if self.teacher.mode == "captions" and self.matcher is None:
            raise ValueError("mode=captions needs a matcher")
        if self.teacher.search == "objects" and self.gate is None:
            raise ValueError("search=objects needs a gate")

    def __call__(self, tasks: Sequence[ImageTask]) -> list[ScoredImage | ImageFailure]:
        """Return one result an image, in order.

        An exception of the teacher is pinned to the image that causes it by halving the
        batch. Errors that leave the device unusable are raised: they say nothing about
        an image (see `breaks_device`).
        """
        if not tasks:
            return []
        try:
            return self._score(tasks)
        except Exception as error:
            if breaks_device(error):
                raise
            if len(tasks) == 1:
                kind = OUT_OF_MEMORY if _is_out_of_memory(error) else TEACHER_ERROR
                return [ImageFailure(kind, f"{type(error).__name__}: {error}"[:500])]
        middle = len(tasks) // 2
        return [*self(tasks[:middle]), *self(tasks[middle:])]

    def propose(self, tasks: Sequence[ImageTask]) -> tuple[list[list[Region]], list[list[str]]]:
        """Return the regions of every image, and what could not be used of its given boxes."""
        found: list[list[Detection]] = [[] for _ in tasks]
        if self.detector is not None:
            detections = self.detector.detect([task.image.pixels for task in tasks])
            found = [
                [_in_original(detection, task.image) for detection in boxes]
                for task, boxes in zip(tasks, detections, strict=True)
            ]
        regions, problems = [], []
        for task, detected in zip(tasks, found, strict=True):
            image = task.image
            labeled: list[Detection] = []
            plain: list[Box] = []
            strange: list[str] = []
            if self.given is not None:
                labeled, plain, strange = self.given.of(
                    task.image_id, task.uri, image.width, image.height
                )
            regions.append(
                propose_regions(
                    image.width,
                    image.height,
                    self.regions,
                    detections=[*labeled, *detected],
                    given=plain,
                    limit=self.limit,
                )
            )
            problems.append(strange)
        return regions, problems

    def _score(self, tasks: Sequence[ImageTask]) -> list[ScoredImage | ImageFailure]:
        regions, problems = self.propose(tasks)
        crops = CropBatch.of([task.image for task in tasks], regions)
        scores, captions = self._score_crops(crops)
        results: list[ScoredImage | ImageFailure] = []
        first = 0
        for of_image, strange in zip(regions, problems, strict=True):
            part = slice(first, first + len(of_image))
            first = part.stop
            broken = int((np.isnan(scores[part]) | np.isposinf(scores[part])).sum())
            if self.teacher.mode == "prompts" and self.teacher.search == "all":
                broken = int((~np.isfinite(scores[part])).sum())
            if broken:
                results.append(ImageFailure(NOT_FINITE, f"{broken} scores are NaN or infinite"))
            else:
                results.append(ScoredImage(of_image, scores[part], captions[part], strange))
        return results

    def _score_crops(self, crops: CropBatch) -> tuple[FloatArray, list[list[str]]]:
        """Score crops in chunks that fit the device: (R, C), and the captions."""
        scores: list[FloatArray] = []
        captions: list[list[str]] = []
        first = 0
        while first < len(crops):
            chunk = crops[first : first + self.chunk]
            try:
                written = self._captions(chunk)
                chunk_scores = self.class_scores(chunk, written)
            except Exception as error:
                if not _is_out_of_memory(error) or len(chunk) == 1:
                    raise
                self.chunk = max(1, len(chunk) // 2)
                logger.warning("out of memory: scoring %d regions at a time from now", self.chunk)
            else:
                scores.append(chunk_scores)
                captions += [[caption.text for caption in of_crop] for of_crop in written]
                first += len(chunk)
                continue
            _free_memory()  # only here is the failed forward out of scope
        return np.concatenate(scores), captions

    def _captions(self, crops: Sequence[Pixels]) -> list[list[Caption]]:
        if not (self.teacher.captions or self.teacher.mode == "captions"):
            return [[] for _ in crops]
        return self.captioner.caption(crops, self.teacher.caption)

    def captions_of(self, task: ImageTask, regions: Sequence[Region]) -> list[list[str]]:
        """Write captions of an image's regions, whether or not the settings ask for them."""
        crops = CropBatch.of([task.image], [regions])
        texts: list[list[str]] = []
        for first in range(0, len(crops), self.chunk):
            chunk = crops[first : first + self.chunk]
            for of_crop in self.captioner.caption(chunk, self.teacher.caption):
                texts.append([caption.text for caption in of_crop])
        return texts

    def class_scores(
        self, crops: Sequence[Pixels], captions: Sequence[Sequence[Caption]] = ()
    ) -> FloatArray:
        """Return class scores (R, C) float32 of crops by the mode and search of the settings."""
        teacher = self.teacher
        if teacher.mode == "captions":
            assert self.matcher is not None
            beams = teacher.caption.decoding == "beam"
            return caption_scores(captions, self.matcher, len(self.prompts), weighted=beams)
        if teacher.search == "all":
            return self.exact_scores(crops)
        if teacher.search == "objects":
            assert self.gate is not None
            return self._score_objects_first(crops, self.gate)
        if isinstance(self.captioner, SearchingCaptioner):
            return self.captioner.score_top(
                crops,
                self.prompts,
                top_k=teacher.top_k,
                reduction=teacher.template_reduction,
                offsets_C=self.offsets_C,
            )
        return keep_top(self.exact_scores(crops), teacher.top_k, self.offsets_C)

    def exact_scores(self, crops: Sequence[Pixels]) -> FloatArray:
        """Return log-likelihoods (R, C) of every class, whatever the search."""
        return score_classes(
            self.captioner,
            crops,
            self.prompts,
            length_normalize=self.teacher.length_normalize,
            reduction=self.teacher.template_reduction,
        )

    def _score_objects_first(self, crops: Sequence[Pixels], gate: ObjectGate) -> FloatArray:
        if isinstance(self.captioner, SearchingCaptioner):
            return self.captioner.score_objects_first(
                crops,
                self.prompts,
                gate.prompts,
                gate.object_of_class,
                gate.keep,
                reduction=self.teacher.template_reduction,
            )
        scores_RO = self.captioner.score(crops, gate.prompts).log_likelihoods
        alive_RC = alive_classes(scores_RO, gate.object_of_class, gate.keep)
        scores_RC = keep_top(self.exact_scores(crops), None, None, alive_RC)
        scores_RC[np.isnan(scores_RO).any(axis=1)] = np.nan
        return scores_RC

    def agreement(self, tasks: Sequence[ImageTask], most: int = 32) -> dict[str, float]:
        """Measure the search against exact scores on the first regions of some images.

        Returns `regions` and the figures of `selection.agreement`.
        """
        regions, _ = self.propose(tasks)
        crops = CropBatch.of([task.image for task in tasks], regions)[:most]
        found = agreement(self.exact_scores(crops), self.class_scores(crops), AGREEMENT_TOP)
        return {"regions": float(len(crops)), **found}


def caption_scores(
    captions: Sequence[Sequence[Caption]],
    matcher: CaptionMatcher,
    num_classes: int,
    *,
    weighted: bool = False,
) -> FloatArray:
    """Return log-probabilities (R, C) that a region's captions state each class.

    Sampled captions count alike, since likely ones come up often; the results of a beam search
    are `weighted` by their probabilities. -inf where no caption names the class.
    """
    probabilities_RC = np.zeros((len(captions), num_classes))
    matches = iter(matcher([caption.text for of_region in captions for caption in of_region]))
    for row, of_region in enumerate(captions):
        scores = np.array([c.log_probability if weighted else 0.0 for c in of_region])
        weights = np.exp(scores - (scores.max() if len(scores) else 0.0))
        for weight in (weights / weights.sum()).tolist():
            for position, probability in next(matches).items():
                probabilities_RC[row, position] += weight * probability
    with np.errstate(divide="ignore"):
        return np.log(np.minimum(probabilities_RC, 1.0)).astype(np.float32)


def by_position(
    match: Callable[[Sequence[str]], list[dict[int, float]]], positions: Mapping[int, int]
) -> CaptionMatcher:
    """Return a matcher that names classes by position from one that names them by id."""

    def matcher(captions: Sequence[str]) -> list[dict[int, float]]:
        return [
            {positions[class_id]: p for class_id, p in found.items() if class_id in positions}
            for found in match(captions)
        ]

    return matcher


def _in_original(detection: Detection, image: DecodedImage) -> Detection:
    """Scale a box from an image's pixels to those of the upright original."""
    height, width = image.pixels.shape[:2]
    return detection.scaled(image.width / width, image.height / height)


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell by name, since torch may not even be loaded."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def breaks_device(error: BaseException) -> bool:
    """Tell errors after which a CUDA process answers nothing any more."""
    if _is_out_of_memory(error):
        return False
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
