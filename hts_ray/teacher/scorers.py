"""One batch of decoded images through a teacher, with every failure kept to its own image.

How crops are scored is one of three `ClassScorer`s: by prompts, captions, or questions.
`RegionScorer` does the rest. Neither knows Ray or files.

Shape legend: R regions, P prompts, C classes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hts_ray.classes import ClassTable
from hts_ray.classes.prompts import object_phrases
from hts_ray.config import CaptionConfig, RegionsConfig, TeacherConfig
from hts_ray.errors import ConfigError
from hts_ray.images.boxes import GivenBoxes
from hts_ray.images.crops import CropBatch
from hts_ray.images.decode import DecodedImage
from hts_ray.images.regions import Box, Detection, Region, propose_regions
from hts_ray.store.aliases import FloatArray, Pixels
from hts_ray.teacher.captioner import (
    AskedCaptioner,
    Caption,
    Captioner,
    ClassPrompts,
    Reduction,
    SearchingCaptioner,
    TopSearch,
    reduce_templates,
    score_classes,
)
from hts_ray.teacher.detector import Detector

logger = logging.getLogger(__name__)

TEACHER_ERROR = "teacher_error"
OUT_OF_MEMORY = "out_of_memory"
NOT_FINITE = "not_finite"

# From captions to one {class id: probability} each; see `hts_ray.captions.matching`.
CaptionMatcher = Callable[[Sequence[str]], list[dict[int, float]]]
# Class scores (R, C) float32 of R crops and the captions of each: -inf means that the class was
# left out, NaN that the model failed.
ClassScorer = Callable[[Sequence[Pixels], Sequence[Sequence[Caption]]], FloatArray]


@dataclass(frozen=True)
class PromptLikelihoods:
    """mode=prompts: log-likelihoods of every class, or, exactly, of those that a search keeps."""

    captioner: Captioner
    prompts: ClassPrompts
    teacher: TeacherConfig
    search: TopSearch | None = None

    def __call__(
        self, crops: Sequence[Pixels], captions: Sequence[Sequence[Caption]]
    ) -> FloatArray:
        """See `ClassScorer`."""
        if self.search is not None and isinstance(self.captioner, SearchingCaptioner):
            return self.captioner.score_top(crops, self.prompts, self.search)
        scores_RC = score_classes(
            self.captioner,
            crops,
            self.prompts,
            length_normalize=self.teacher.length_normalize,
            reduction=self.teacher.template_reduction,
        )
        if self.search is not None:
            return self.search.keep(scores_RC)
        scores_RC[np.isneginf(scores_RC)] = np.nan
        return scores_RC


@dataclass(frozen=True)
class CaptionVotes:
    """mode=captions: log-probabilities that a region's captions state each class.

    Sampled captions count alike, since likely ones come up often; the results of a beam search
    are `weighted` by their probabilities. -inf where no caption names the class. `positions` are
    those of class ids among the C classes.
    """

    matcher: CaptionMatcher
    positions: Mapping[int, int]
    weighted: bool

    def __call__(
        self, crops: Sequence[Pixels], captions: Sequence[Sequence[Caption]]
    ) -> FloatArray:
        """See `ClassScorer`."""
        probabilities_RC = np.zeros((len(captions), len(self.positions)))
        texts = [caption.text for of_region in captions for caption in of_region]
        matches = iter(self.matcher(texts))
        for row, of_region in enumerate(captions):
            scores = np.array([c.log_probability if self.weighted else 0.0 for c in of_region])
            weights = np.exp(scores - (scores.max() if len(scores) else 0.0))
            for weight in (weights / weights.sum()).tolist():
                for class_id, probability in next(matches).items():
                    probabilities_RC[row, self.positions[class_id]] += weight * probability
        with np.errstate(divide="ignore"):
            return np.log(np.minimum(probabilities_RC, 1.0)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ObjectsFirst:
    """Objects that are asked for before their classes.

    `phrases` are those of O objects; `of_class_C` is each class's object, -1 for a class without
    one, which is always asked about. Others are where the object's log odds reach `bound`.
    """

    phrases: tuple[str, ...]
    of_class_C: npt.NDArray[np.int64]
    bound: float

    @classmethod
    def of(cls, table: ClassTable, bound: float) -> ObjectsFirst:
        """Ask for the objects of a class table."""
        phrases = [object_phrases(entry.object)[0] if entry.object else None for entry in table]
        names = list(dict.fromkeys(filter(None, phrases)))
        places = [names.index(phrase) if phrase else -1 for phrase in phrases]
        return cls(tuple(names), np.array(places), bound)

    def wanted(self, captioner: AskedCaptioner, crops: Sequence[Pixels]) -> FloatArray:
        """Return 0 where a class (R, C) is to be asked about, -inf where not, NaN on failure."""
        if not self.phrases:
            return np.zeros((len(crops), len(self.of_class_C)), np.float32)
        odds_RO = captioner.ask(crops, self.phrases).log_odds
        wanted_RO = np.where(odds_RO >= self.bound, 0, -np.inf)
        wanted_RO[np.isnan(odds_RO)] = np.nan
        wanted_RC = wanted_RO[:, self.of_class_C]
        wanted_RC[:, self.of_class_C < 0] = 0
        return wanted_RC.astype(np.float32)


@dataclass(frozen=True)
class QuestionOdds:
    """mode=questions: log P(yes) - log P(no) of every class, asked for by its phrases.

    With `objects` -inf for the classes whose object is not there.
    """

    captioner: AskedCaptioner
    phrases: ClassPrompts
    reduction: Reduction
    objects: ObjectsFirst | None = None

    @classmethod
    def of(
        cls,
        captioner: Captioner,
        phrases: ClassPrompts,
        teacher: TeacherConfig,
        objects: ObjectsFirst | None = None,
    ) -> QuestionOdds:
        """Ask a teacher that was loaded for it."""
        assert isinstance(captioner, AskedCaptioner)
        return cls(captioner, phrases, teacher.template_reduction, objects)

    def __call__(
        self, crops: Sequence[Pixels], captions: Sequence[Sequence[Caption]]
    ) -> FloatArray:
        """See `ClassScorer`."""
        if self.objects is None:
            return self._of(crops, self.phrases)
        scores_RC = self.objects.wanted(self.captioner, crops)
        by_class = self.phrases.by_class(self.phrases.texts)
        for asked_C in np.unique(scores_RC == 0, axis=0):
            if asked_C.any():  # regions with the same objects are asked together
                rows = np.flatnonzero(((scores_RC == 0) == asked_C).all(axis=1))
                columns = np.flatnonzero(asked_C)
                phrases = ClassPrompts.of([by_class[c] for c in columns], max(self.phrases.counts))
                scores_RC[np.ix_(rows, columns)] = self._of([crops[int(r)] for r in rows], phrases)
        return scores_RC

    def _of(self, crops: Sequence[Pixels], phrases: ClassPrompts) -> FloatArray:
        odds_RP = self.captioner.ask(crops, phrases.texts).log_odds.astype(np.float64)
        return reduce_templates(odds_RP, phrases.counts, self.reduction).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ImageTask:
    """An image to score: its pixels, and what its given boxes are looked up by."""

    image: DecodedImage
    image_id: str = ""
    uri: str = ""


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """What the teacher says of one image.

    `scores` (R, C) float32 are what the mode makes of the regions, -inf for classes that were left
    out; `captions` one list a region, empty unless captions were asked for; `problems` names the
    boxes that could not be used and why.
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


@dataclass
class RegionScorer:
    """Scores all regions of several images at a time.

    `caption` is how captions are written, None for no captions. `chunk` is how many regions the
    device gets at a time; it is halved for good when memory runs out. `limit` caps the regions
    of an image on top of `regions.max_regions`.
    """

    captioner: Captioner
    class_scores: ClassScorer
    regions: RegionsConfig
    chunk: int = 64
    caption: CaptionConfig | None = None
    detector: Detector | None = None
    given: GivenBoxes | None = None
    limit: int | None = None

    def __call__(self, tasks: Sequence[ImageTask]) -> list[ScoredImage | ImageFailure]:
        """Return one result an image, in order.

        An exception of the teacher is pinned to the image that causes it by halving the
        batch; a teacher that takes images side by side gets each by itself. Errors that say nothing
        about an image are raised: wrong settings, and those of `breaks_device`.
        """
        if not tasks:
            return []
        if len(tasks) > 1 and getattr(self.captioner, "side_by_side", False):
            with ThreadPoolExecutor(len(tasks)) as threads:
                return [one for (one,) in threads.map(lambda task: self([task]), tasks)]
        try:
            return self._score(tasks)
        except Exception as error:
            if breaks_device(error) or isinstance(error, ConfigError):
                raise
            if len(tasks) == 1:
                kind = OUT_OF_MEMORY if _is_out_of_memory(error) else TEACHER_ERROR
                return [ImageFailure(kind, f"{type(error).__name__}: {error}"[:500])]
        middle = len(tasks) // 2
        return [*self(tasks[:middle]), *self(tasks[middle:])]

    def _score(self, tasks: Sequence[ImageTask]) -> list[ScoredImage | ImageFailure]:
        found: list[list[Detection]] = [[] for _ in tasks]
        if self.detector is not None:
            found = self.detector.detect([task.image.pixels for task in tasks])
        proposed = [self._propose(task, boxes) for task, boxes in zip(tasks, found, strict=True)]
        crops = CropBatch.of([task.image for task in tasks], [regions for regions, _ in proposed])
        scores, captions = self._score_crops(crops)
        results: list[ScoredImage | ImageFailure] = []
        first = 0
        for regions, problems in proposed:
            part = slice(first, first + len(regions))
            first = part.stop
            broken = int((np.isnan(scores[part]) | np.isposinf(scores[part])).sum())
            if broken:
                results.append(ImageFailure(NOT_FINITE, f"{broken} scores are NaN or infinite"))
            else:
                results.append(ScoredImage(regions, scores[part], captions[part], problems))
        return results

    def _propose(
        self, task: ImageTask, found: Sequence[Detection]
    ) -> tuple[list[Region], list[str]]:
        """Return the regions of an image, and what could not be used of its given boxes."""
        image, size = task.image, (task.image.width, task.image.height)
        height, width = image.pixels.shape[:2]
        # Boxes are found in the pixels, and kept as those of the upright original.
        detections = [one.scaled(image.width / width, image.height / height) for one in found]
        plain: list[Box] = []
        problems: list[str] = []
        if self.given is not None:
            labeled, plain, problems = self.given.of(task.image_id, task.uri, *size)
            detections = [*labeled, *detections]
        regions = propose_regions(
            *size, self.regions, detections=detections, given=plain, limit=self.limit
        )
        return regions, problems

    def _score_crops(self, crops: CropBatch) -> tuple[FloatArray, list[list[str]]]:
        """Score crops in chunks that fit the device: (R, C), and the captions."""
        scores: list[FloatArray] = []
        captions: list[list[str]] = []
        first = 0
        while first < len(crops):
            chunk = crops[first : first + self.chunk]
            try:
                written: list[list[Caption]] = [[] for _ in chunk]
                if self.caption is not None:
                    written = self.captioner.caption(chunk, self.caption)
                chunk_scores = self.class_scores(chunk, written)
            except Exception as error:
                if not _is_out_of_memory(error) or len(chunk) == 1:
                    raise
                self.chunk = max(1, len(chunk) // 2)
                logger.warning("out of memory: scoring %d regions at a time from now", self.chunk)
            else:
                scores.append(chunk_scores)
                captions += _texts(written)
                first += len(chunk)
                continue
            _free_memory()  # only here is the failed forward out of scope
        return np.concatenate(scores), captions

    def captions_of(
        self, task: ImageTask, regions: Sequence[Region], settings: CaptionConfig
    ) -> list[list[str]]:
        """Write captions of an image's regions, whether or not the run asks for them."""
        crops = CropBatch.of([task.image], [regions])
        texts: list[list[str]] = []
        for first in range(0, len(crops), self.chunk):
            chunk = crops[first : first + self.chunk]
            texts += _texts(self.captioner.caption(chunk, settings))
        return texts


def _texts(written: Sequence[Sequence[Caption]]) -> list[list[str]]:
    return [[caption.text for caption in of_region] for of_region in written]


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; by the error's name, as torch may not be loaded."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def breaks_device(error: BaseException) -> bool:
    """Return whether an error leaves this process's CUDA context, or its engine, unusable."""
    if _is_out_of_memory(error):
        return False
    broken = {"AcceleratorError", "EngineDeadError"}  # of torch, of vLLM
    return type(error).__name__ in broken or "CUDA error" in str(error)


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
