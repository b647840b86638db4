"""What a teacher may offer beyond the contract, and the prompts that it is given.

Needs neither torch nor Ray, so that a teacher of your own needs neither. The packaged ones are in
`hts_ray.teacher.models`.

Shape legend: R regions, P prompts, C classes, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from hts_ray.config import CaptionConfig
from hts_ray.store.aliases import FloatArray, Pixels
from hts_ray.teacher.contract import Caption as Caption  # noqa: PLC0414 - its public place
from hts_ray.teacher.contract import Captioner as Captioner  # noqa: PLC0414 - its public place
from hts_ray.teacher.contract import PromptScores as PromptScores  # noqa: PLC0414 - its public place

# What counts as an answer, as far as a tokenizer has it as one token.
_SPELLED = ("{}", " {}")
ANSWERS = {
    word: [form.format(said) for said in (word, word.title(), word.upper()) for form in _SPELLED]
    for word in ("yes", "no")
}
Reduction = Literal["log_mean_exp", "mean", "max"]


@dataclass(frozen=True, eq=False)
class TopSearch:
    """Which classes a search keeps, and how the templates of each become one score.

    The `top_k` classes with the largest score + `offsets_C` are exact (ties broken either way).
    """

    top_k: int
    reduction: Reduction = "log_mean_exp"
    offsets_C: FloatArray | None = None

    def keep(self, scores_RC: FloatArray) -> FloatArray:
        """Return scores with -inf for the classes that a search would have left out.

        For teachers that know no search, so that search=top_k means the same on every teacher. A
        row with NaN is NaN throughout: it sorts last, and would pass for a class that was left out.
        """
        result = scores_RC.astype(np.float32)
        if self.top_k < scores_RC.shape[1]:
            ranked = scores_RC if self.offsets_C is None else scores_RC + self.offsets_C
            best = np.argsort(-ranked, axis=1, kind="stable")[:, : self.top_k]
            result = np.full_like(scores_RC, -np.inf, dtype=np.float32)
            np.put_along_axis(result, best, np.take_along_axis(scores_RC, best, axis=1), axis=1)
        result[np.isnan(scores_RC).any(axis=1)] = np.nan
        return result


@runtime_checkable
class ClassCaptioner(Captioner, Protocol):
    """A teacher that makes one score of a class's prompts itself."""

    def score_classes(self, images: Sequence[Pixels], prompts: ClassPrompts) -> FloatArray:
        """Return the scores (R, C) of every class on every image."""


@runtime_checkable
class SearchingCaptioner(Captioner, Protocol):
    """A teacher that can leave out classes which cannot matter."""

    def score_top(
        self, images: Sequence[Pixels], prompts: ClassPrompts, search: TopSearch
    ) -> FloatArray:
        """Return class log-likelihoods (R, C), -inf for the classes that were left out."""


@runtime_checkable
class LimitedCaptioner(Captioner, Protocol):
    """A teacher that knows how long a sentence it can read."""

    def fed_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of P prompts, or of the questions about them."""

    def longest_prompt(self) -> int | None:
        """Return how many tokens a prompt may have, None for any number."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers to P questions about R regions.

    `log_odds` is (R, P) float32, log P(yes) - log P(no) in nats. `token_counts` is (P,) int64, how
    many tokens of each question were read.
    """

    log_odds: FloatArray
    token_counts: npt.NDArray[np.int64]


@runtime_checkable
class AskedCaptioner(Captioner, Protocol):
    """A teacher that can be asked, for mode=questions."""

    def ask(self, images: Sequence[Pixels], phrases: Sequence[str]) -> Answers:
        """Return the answers to `config.question` with each phrase in the place of its {}."""


class DummyCaptioner:
    """A teacher that costs nothing: numbers drawn from hashes of the pixels and the prompts.

    For dry runs and load tests of everything around the teacher. The same image and
    prompt always get the same score, in (-40, -5). `seconds` is what a region takes, asleep as
    if a GPU were at work.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def score(self, images: Sequence[Pixels], prompts: Sequence[str]) -> PromptScores:
        """Return pseudo-random log-likelihoods (R, P); a token is a word."""
        scores = (-5.0 - 35.0 * self._drawn(images, prompts)).astype(np.float32)
        return PromptScores(scores, _word_counts(prompts))

    def ask(self, images: Sequence[Pixels], phrases: Sequence[str]) -> Answers:
        """Return pseudo-random log odds (R, P) in (-8, 8)."""
        odds = (8.0 - 16.0 * self._drawn(images, phrases)).astype(np.float32)
        return Answers(odds, _word_counts(phrases))

    def _drawn(self, images: Sequence[Pixels], texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Draw a number in [0, 1) for every pair."""
        image_keys = np.array([_pixel_hash(image) for image in images], dtype=np.uint64)
        text_keys = np.array([zlib.crc32(text.encode()) for text in texts], dtype=np.uint64)
        mixed = _mix(_mix(image_keys)[:, None] ^ text_keys[None, :])
        time.sleep(self.seconds * len(images))
        return (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53)

    def caption(self, images: Sequence[Pixels], settings: CaptionConfig) -> list[list[Caption]]:
        """Return the image's hash as its captions."""
        return [
            [
                Caption(f"image {_pixel_hash(image):08x} {n}", -float(n))
                for n in range(settings.count)
            ]
            for image in images
        ]


def _word_counts(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.array([len(text.split()) for text in texts], dtype=np.int64)


def _pixel_hash(image: Pixels) -> int:
    return zlib.crc32(image.tobytes())


def _mix(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scatter 64-bit keys (the finalizer of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        keys = keys + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


@dataclass(frozen=True)
class ClassPrompts:
    """The prompts of C classes in one flat list.

    `texts` holds P prompts, class by class; `counts` (C,) how many each class has, at
    least 1.
    """

    texts: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[str]], templates: int) -> ClassPrompts:
        """Take the first `templates` prompts of every class, or all where it has fewer."""
        taken = [tuple(of_class[:templates]) for of_class in prompts]
        if not taken or any(not of_class for of_class in taken):
            raise ValueError("every class needs at least one prompt")
        return cls(
            texts=tuple(text for of_class in taken for text in of_class),
            counts=tuple(len(of_class) for of_class in taken),
        )

    def __len__(self) -> int:
        return len(self.counts)

    def fingerprint(self) -> str:
        """Return a hash of the prompts and of how they are shared out among classes."""
        text = json.dumps([self.texts, self.counts])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def by_class(self, values: Sequence[Any]) -> list[list[Any]]:
        """Share out P values, one list a class."""
        ends = np.cumsum(self.counts).tolist()
        return [list(values[end - n : end]) for end, n in zip(ends, self.counts, strict=True)]


def reduce_templates(
    values_RP: npt.NDArray[np.float64], counts: Sequence[int], reduction: Reduction
) -> npt.NDArray[np.float64]:
    """Make one score (R, C) of the templates of every class, `counts` (C,) of them.

    `log_mean_exp` is the log-likelihood of a sentence drawn by picking one of the templates at
    random: one awkward template costs a class at most log(templates). `mean` averages
    log-likelihoods, so that every template must fit; `max` takes the best.
    """
    sizes = np.asarray(counts)
    if values_RP.shape[1] != sizes.sum():
        raise ValueError(f"{values_RP.shape[1]} scores for {sizes.sum()} prompts")
    starts = np.cumsum(sizes) - sizes
    if reduction == "max":
        return np.maximum.reduceat(values_RP, starts, axis=1)
    with np.errstate(invalid="ignore"):  # NaN stays NaN and is checked later
        if reduction == "mean":
            means: npt.NDArray[np.float64] = np.add.reduceat(values_RP, starts, axis=1) / sizes
            return means
        sums: npt.NDArray[np.float64] = np.logaddexp.reduceat(values_RP, starts, axis=1)
    averages: npt.NDArray[np.float64] = sums - np.log(sizes)
    return averages


def score_classes(
    captioner: Captioner,
    images: Sequence[Pixels],
    prompts: ClassPrompts,
    *,
    length_normalize: bool = False,
    reduction: Reduction = "log_mean_exp",
) -> FloatArray:
    """Return log-likelihoods (R, C) of every class on every image; see `reduce_templates`.

    With `length_normalize` every prompt's sum is divided by its token count first.
    """
    if isinstance(captioner, ClassCaptioner):
        return captioner.score_classes(images, prompts)
    scores = captioner.score(images, prompts.texts)
    values = scores.log_likelihoods.astype(np.float64)
    if length_normalize:
        values = values / scores.token_counts[None, :]
    return reduce_templates(values, prompts.counts, reduction).astype(np.float32)
