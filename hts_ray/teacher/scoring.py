"""One batch of decoded images through a teacher, with every failure kept to its own image.

Knows neither Ray nor files. Shape legend: R regions of an image, C classes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hts_ray.config import RegionsConfig, TeacherConfig
from hts_ray.data.images import DecodedImage
from hts_ray.teacher.captioner import Captioner, ClassPrompts, FloatArray, Pixels, score_classes
from hts_ray.teacher.regions import Region, propose_regions

logger = logging.getLogger(__name__)

TEACHER_ERROR = "teacher_error"
OUT_OF_MEMORY = "out_of_memory"
NOT_FINITE = "not_finite"


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """What the teacher says of one image.

    `scores` (R, C) float32 log-likelihoods, all finite; `captions` one list a region,
    empty unless captions were asked for.
    """

    regions: list[Region]
    scores: FloatArray
    captions: list[list[str]]


@dataclass(frozen=True)
class ImageFailure:
    """Why an image has no scores: TEACHER_ERROR, OUT_OF_MEMORY or NOT_FINITE, and the details."""

    kind: str
    message: str


@dataclass
class RegionScorer:
    """Scores all regions of several images at a time."""

    captioner: Captioner
    prompts: ClassPrompts
    teacher: TeacherConfig
    regions: RegionsConfig
    chunk: int = field(init=False)

    def __post_init__(self) -> None:
        self.chunk = self.teacher.max_batch_regions

    def __call__(self, images: Sequence[DecodedImage]) -> list[ScoredImage | ImageFailure]:
        """Return one result an image, in order.

        An exception of the teacher is pinned to the image that causes it by halving the
        batch. Errors that leave the device unusable are raised: they say nothing about
        an image.
        """
        if not images:
            return []
        try:
            return self._score(images)
        except Exception as error:
            if _is_fatal(error):
                raise
            if len(images) == 1:
                kind = OUT_OF_MEMORY if _is_out_of_memory(error) else TEACHER_ERROR
                return [ImageFailure(kind, f"{type(error).__name__}: {error}"[:500])]
        middle = len(images) // 2
        return [*self(images[:middle]), *self(images[middle:])]

    def _score(self, images: Sequence[DecodedImage]) -> list[ScoredImage | ImageFailure]:
        regions = [propose_regions(i.width, i.height, self.regions) for i in images]
        crops = [
            crop_region(image, region)
            for image, of_image in zip(images, regions, strict=True)
            for region in of_image
        ]
        scores, captions = self._score_crops(crops)
        results: list[ScoredImage | ImageFailure] = []
        first = 0
        for of_image in regions:
            part = slice(first, first + len(of_image))
            first = part.stop
            if np.isfinite(scores[part]).all():
                results.append(ScoredImage(of_image, scores[part], captions[part]))
            else:
                broken = int((~np.isfinite(scores[part])).sum())
                results.append(ImageFailure(NOT_FINITE, f"{broken} scores are NaN or infinite"))
        return results

    def _score_crops(self, crops: Sequence[Pixels]) -> tuple[FloatArray, list[list[str]]]:
        """Score crops in chunks that fit the device: (R, C), and the captions."""
        scores: list[FloatArray] = []
        captions: list[list[str]] = []
        first = 0
        while first < len(crops):
            chunk = crops[first : first + self.chunk]
            try:
                chunk_scores = score_classes(
                    self.captioner,
                    chunk,
                    self.prompts,
                    length_normalize=self.teacher.length_normalize,
                )
                chunk_captions = self._captions(chunk)
            except Exception as error:
                if not _is_out_of_memory(error) or len(chunk) == 1:
                    raise
                self.chunk = max(1, len(chunk) // 2)
                logger.warning("out of memory: scoring %d regions at a time from now", self.chunk)
            else:
                scores.append(chunk_scores)
                captions += chunk_captions
                first += len(chunk)
                continue
            _free_memory()  # only here is the failed forward out of scope
        return np.concatenate(scores), captions

    def _captions(self, crops: Sequence[Pixels]) -> list[list[str]]:
        if not self.teacher.captions:
            return [[] for _ in crops]
        captions = self.captioner.caption(crops, self.teacher.caption.max_tokens)
        return [[caption.text] for caption in captions]


def crop_region(image: DecodedImage, region: Region) -> Pixels:
    """Return a region's pixels, a view; boxes count in pixels of the original image.

    Where the image was downscaled while decoding, the box shrinks with it, to no less
    than one pixel a side.
    """
    height, width = image.pixels.shape[:2]
    left, top, right, bottom = region.box
    x0, x1 = _span(left, right, width / image.width, width)
    y0, y1 = _span(top, bottom, height / image.height, height)
    return image.pixels[y0:y1, x0:x1]


def _span(start: float, stop: float, scale: float, limit: int) -> tuple[int, int]:
    first = min(round(start * scale), limit - 1)
    return first, min(limit, first + max(1, round((stop - start) * scale)))


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell by name, since torch may not even be loaded."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _is_fatal(error: BaseException) -> bool:
    """Tell errors after which a CUDA process answers nothing any more."""
    if _is_out_of_memory(error):
        return False
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
