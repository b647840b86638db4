"""From a teacher's regional log-likelihoods to positive, ignored and negative classes.

Pure functions on arrays: regional probabilities, aggregated over an image's regions, and then a
selection over all images at once. No annotation is used anywhere.

Shapes: R regions of one image, C classes, N images, E entries (an image and a class).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hts_ray.config import FilterConfig
from hts_ray.metrics import UNKNOWN
from hts_ray.store.aliases import BoolArray, FloatArray

Aggregation = Literal["max", "mean", "top_k_mean", "noisy_or"]

# Why a candidate class, one at or above the negative threshold, did not become a positive.
REASONS = ("ignored_band", "below_support", "over_cap")
REASON_DTYPE = np.dtype([(reason, np.int32) for reason in REASONS])

UNDECIDED = UNKNOWN  # where no person corrected an entry

_FAR_ABOVE = 100.0  # nats
# Of some entries: the bins that they fall into, each once, and how many fall into it.
Counted = tuple[NDArray[np.int64], NDArray[np.int64]]
_DIGIT = 8  # bits of a probability's pattern that are found in a round
_BINS = 1 << _DIGIT


@dataclass(frozen=True, eq=False)
class Selection:
    """Pseudo-labels of N images and what became of every candidate.

    `targets_NC` int8: 1 positive, 0 ignored, -1 negative. `reason_counts_N`: a structured array
    with one int32 column for each of `REASONS`.
    """

    targets_NC: NDArray[np.int8]
    reason_counts_N: NDArray[np.void]

    def reason_totals(self) -> dict[str, int]:
        """Sum the dropped candidates of all images, by reason."""
        return {name: int(self.reason_counts_N[name].sum(dtype=np.int64)) for name in REASONS}

    def summary(self) -> dict[str, int | float]:
        """Return `summary` of it."""
        positive_NC = self.targets_NC == 1
        counts = {
            "images": len(positive_NC),
            "bare": int((~positive_NC.any(axis=1)).sum()),
            "positives_C": positive_NC.sum(axis=0),
            "ignored": int((self.targets_NC == 0).sum()),
        }
        return summary(counts | self.reason_totals())


def summary(counts: Mapping[str, Any]) -> dict[str, int | float]:
    """Return what needs no ground truth: how much was kept, and of how many classes.

    Of N images (`images`) and C classes: `bare` have no positive, `positives_C` and `ignored` count
    the labels, and `REASONS` what was dropped. A good filter leaves few images and few classes
    without a positive while dropping much; `positives_per_image` far from what the images show says
    the thresholds are off.
    """
    images, positives = counts["images"], int(counts["positives_C"].sum())
    return {
        "images": images,
        "positives": positives,
        "positives_per_image": positives / max(images, 1),
        "images_without_positive": counts["bare"],
        "classes_without_positive": int((counts["positives_C"] == 0).sum()),
        "ignored_share": counts["ignored"] / max(images * len(counts["positives_C"]), 1),
        **{name: counts[name] for name in REASONS},
    }


def region_probabilities(
    log_likelihoods_RC: ArrayLike,
    prior_C: ArrayLike | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
    null_score: float | None = None,
) -> FloatArray:
    """Probability (R, C) in [0, 1] of each class in each region.

    The score in nats is s = log P(t|r) - alpha * log P(t): alpha 0 trusts the captioner, alpha 1
    removes all of its preference for frequent phrases. The result is softmax(s / temperature) over
    the classes. `null_score` adds the option "none of these" with that score, in nats on the scale
    of s, so that the classes of a region that matches nothing need not sum to 1.

    `log_likelihoods_RC` (R, C) may hold -inf (probability 0; a softmax over nothing but -inf is 0
    throughout). The result is float32, or float64 for float64 input. Raises ValueError for NaN or
    +inf, wrong shapes, a prior that is not finite, or scores that overflow. The settings are taken
    as `FilterConfig` has checked them; an alpha above 0 needs a prior.
    Source: Lin et al. 2023, VisualGPTScore (the score).
    """
    scores = _floats("log_likelihoods_RC", log_likelihoods_RC)
    # A maximum is NaN if any entry is, and +inf if any is.
    if scores.size and not scores.max() < np.inf:
        raise ValueError(
            f"log_likelihoods_RC holds {scores.max()}: log-likelihoods are finite or -inf; mark"
            " the image as failed instead"
        )
    if alpha > 0:
        prior = np.asarray(prior_C, dtype=scores.dtype)
        if prior.shape != scores.shape[1:] or not np.isfinite(prior).all():
            raise ValueError(
                f"prior_C has the shape {prior.shape}: give one finite number for each of"
                f" {scores.shape[1]} classes"
            )
        scores = scores - float(alpha) * prior
    with np.errstate(over="ignore", under="ignore"):
        scaled_RC = scores / float(temperature)
        if np.isposinf(scaled_RC).any():
            raise ValueError(f"temperature = {temperature!r}: too small, the scores overflow")
        return _softmax(scaled_RC, None if null_score is None else null_score / temperature)


def odds_probabilities(
    log_odds_RC: ArrayLike, nothing_C: ArrayLike | None = None, temperature: float = 1.0
) -> FloatArray:
    """Probability (R, C) in [0, 1] of each class, asked for by itself: sigmoid(odds / temperature).

    Odds in nats are log P(yes) - log P(no), -inf for a class that was not asked for. Many models
    say yes to whatever they are asked. `nothing_C` are the odds where there is nothing to see; a
    class that gets more than 5 % there is moved down to that. ValueError for NaN or +inf.
    """
    odds = _floats("log_odds_RC", log_odds_RC)
    if odds.size and not odds.max() < np.inf:
        raise ValueError(f"log_odds_RC holds {odds.max()}: log odds are finite or -inf")
    if nothing_C is not None:
        bias_C = np.asarray(nothing_C, dtype=odds.dtype) + odds.dtype.type(math.log(19))
        odds = odds - np.maximum(bias_C, 0)
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-odds / float(temperature))), dtype=odds.dtype)


def background_log_odds(log_likelihoods_RC: FloatArray, background_RB: FloatArray) -> FloatArray:
    """Log-odds (R, C) of each class against all B background sentences together, in nats.

    Each class stands alone beside the background. -inf for a class that a search left out;
    `_FAR_ABOVE` where it left out the whole background.
    """
    top_R1 = background_RB.max(axis=1, keepdims=True, initial=-np.inf)
    top_R1 = np.where(np.isneginf(top_R1), 0, top_R1).astype(background_RB.dtype)
    with np.errstate(divide="ignore"):
        total_R1 = np.log(np.exp(background_RB - top_R1).sum(axis=1, keepdims=True)) + top_R1
    left_out_RC = np.isneginf(log_likelihoods_RC)
    with np.errstate(invalid="ignore"):
        odds_RC = log_likelihoods_RC - total_R1
    return np.where(left_out_RC, log_likelihoods_RC, np.minimum(odds_RC, _FAR_ABOVE))


def aggregate(
    probabilities_RC: ArrayLike, method: Aggregation = "max", top_k: int = 2
) -> FloatArray:
    """Probability (C,) in [0, 1] of each class in the image, from its R >= 1 regions.

    "max": the most certain region. "mean": all agree. "top_k_mean": the mean of the `top_k` most
    certain (of all, if there are fewer), which one stray region cannot win alone. "noisy_or":
    1 - prod(1 - p), that not all regions err; many weak regions add up, so it suits few regions.
    For the same input noisy_or >= max >= top_k_mean >= mean, up to rounding.

    Raises ValueError for no regions and for values outside [0, 1].
    """
    probabilities = _probabilities("probabilities_RC", probabilities_RC)
    if not len(probabilities):
        raise ValueError("probabilities_RC has no regions: give at least the whole image")
    if method == "max" or (method == "top_k_mean" and top_k == 1):
        return np.asarray(probabilities.max(axis=0))
    if method == "noisy_or":
        with np.errstate(divide="ignore"):  # log(0) = -inf at a certain region gives 1
            log_miss_C = np.log1p(-probabilities.astype(np.float64)).sum(axis=0)
        return np.asarray(-np.expm1(log_miss_C), dtype=probabilities.dtype)
    if method == "top_k_mean" and top_k < len(probabilities):
        probabilities = np.partition(probabilities, -top_k, axis=0)[-top_k:]
    return np.asarray(probabilities.mean(axis=0, dtype=np.float64), dtype=probabilities.dtype)


def support(probabilities_RC: ArrayLike, threshold: float) -> NDArray[np.int32]:
    """Count (C,) the regions that agree on a class: those with probability >= `threshold`.

    ValueError for probabilities outside [0, 1].
    """
    probabilities = _probabilities("probabilities_RC", probabilities_RC)
    return np.asarray((probabilities >= float(threshold)).sum(axis=0), dtype=np.int32)


def select(
    image_probabilities_NC: ArrayLike,
    support_NC: ArrayLike,
    config: FilterConfig,
    decided_NC: NDArray[np.int8] | None = None,
) -> Selection:
    """Positive, ignored and negative classes of N images at once.

    By the settings of `filter`: below `negative_threshold` a class is negative. All others are
    candidates, and each ends as a positive or as *ignored*, never as a negative, under the first
    reason that applies:

    - `ignored_band`: below its class's threshold (see `class_thresholds`);
    - `below_support`: fewer than `min_support` agreeing regions;
    - `over_cap`: not among the image's `max_positives_per_image` most probable remaining classes
      (ties: more support first, then the lower class).

    `image_probabilities_NC` (N, C) in [0, 1]; `support_NC` (N, C) integers, the regions that agree
    on a class. What a person decided, as `Entries` has it, takes the place of the targets; reasons
    are those of before. Without per-class settings, raising the positive threshold can only remove
    positives. Raises ValueError for probabilities out of range and unequal shapes.
    """
    probabilities = _probabilities("image_probabilities_NC", image_probabilities_NC)
    regions_NC = np.asarray(support_NC)
    if regions_NC.shape != probabilities.shape or regions_NC.dtype.kind not in "iu":
        raise ValueError(
            f"support_NC is {regions_NC.dtype} {regions_NC.shape}:"
            f" give integers of shape {probabilities.shape}"
        )
    found = find_entries(probabilities, regions_NC, config, decided_NC)
    thresholds_C = class_thresholds(found, probabilities.shape[1], config)
    target_E, reason_counts_N = choose(found, thresholds_C, config)
    targets_NC = np.full(probabilities.shape, -1, np.int8)
    targets_NC[found.row_E, found.column_E] = corrected(found, target_E)
    return Selection(targets_NC, reason_counts_N)


@dataclass(frozen=True, eq=False)
class Entries:
    """What decides the labels of N images: E of their N x C entries, by image and then by class.

    Those at or above `negative_threshold`, and those that a person decided: no threshold is lower.
    `row_E` and `column_E` are places among the images and classes, `decided_E` int8 in {1, 0, -1}
    as a correction has it (positive, ignored, negative), or `UNDECIDED`.
    """

    images: int
    row_E: NDArray[np.intp]
    column_E: NDArray[np.integer[Any]]
    probability_E: FloatArray
    support_E: NDArray[np.integer[Any]]
    decided_E: NDArray[np.int8]


def find_entries(
    probabilities_NC: FloatArray,
    support_NC: NDArray[np.integer[Any]],
    config: FilterConfig,
    decided_NC: NDArray[np.int8] | None = None,
) -> Entries:
    """Return the entries of N images that can become a positive or ignored, or were decided."""
    chosen_NC = probabilities_NC >= probabilities_NC.dtype.type(config.negative_threshold)
    if decided_NC is not None:
        chosen_NC |= decided_NC != UNDECIDED
    row_E, column_E = np.nonzero(chosen_NC)
    return Entries(
        len(probabilities_NC),
        row_E,
        column_E,
        probabilities_NC[row_E, column_E],
        support_NC[row_E, column_E],
        np.full(len(row_E), UNDECIDED, np.int8)
        if decided_NC is None
        else decided_NC[row_E, column_E],
    )


def choose(
    found: Entries, thresholds_C: FloatArray, config: FilterConfig
) -> tuple[NDArray[np.int8], NDArray[np.void]]:
    """Return the target (E,) of every entry, 1, 0 or -1, and the reasons by image (N,).

    As `select` says, before corrections: those are `decided_E`.
    """
    value_E = found.probability_E
    candidate_E = value_E >= value_E.dtype.type(config.negative_threshold)
    positive_E = value_E >= thresholds_C[found.column_E]
    counts_N = np.zeros(found.images, dtype=REASON_DTYPE)

    def count(reason: str, dropped_E: BoolArray) -> None:
        counts_N[reason] = np.bincount(found.row_E[dropped_E], minlength=found.images)

    count("ignored_band", candidate_E & ~positive_E)
    unsupported_E = positive_E & (found.support_E < config.min_support)
    count("below_support", unsupported_E)
    positive_E &= ~unsupported_E
    over_E = _over_cap(found, positive_E, config.max_positives_per_image)
    count("over_cap", over_E)
    positive_E &= ~over_E
    # Candidate + positive is 0, 1 or 2: negative, ignored, positive.
    return candidate_E.astype(np.int8) + positive_E.astype(np.int8) - np.int8(1), counts_N


def corrected(found: Entries, target_E: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return the targets (E,) with what people decided in their place."""
    return np.where(found.decided_E == UNDECIDED, target_E, found.decided_E)


@dataclass(frozen=True, eq=False)
class Bins:
    """Where a round of the search for thresholds counts: 256 bins a class, by bit pattern.

    Bit patterns of non-negative floats are in the order of the floats. Bin b of class c holds those
    from `low_C[c] + b * 2**shift`. Probabilities below `lowest` do not count, and those above
    `highest` count as that.
    """

    low_C: NDArray[np.int64]
    shift: int
    lowest: np.floating[Any]
    highest: np.floating[Any]

    @classmethod
    def first(cls, classes: int, config: FilterConfig, dtype: np.dtype[Any]) -> Bins:
        """Return those of the first round, which hold all that a threshold can be."""
        floor = max(config.quantile_floor, config.negative_threshold)
        lowest = dtype.type(min(floor, config.positive_threshold))
        highest = dtype.type(config.positive_threshold)
        low, high = _bits(lowest), _bits(highest)
        shift = max(0, int(high - low).bit_length() - _DIGIT)
        return cls(np.full(classes, low), shift, lowest, highest)

    def count(self, found: Entries) -> Counted:
        """Return the bins (class * 256 + bin) that entries fall into, each once, and how many."""
        counts_E = found.probability_E >= self.lowest
        column_E = found.column_E[counts_E].astype(np.int64)
        bits_E = _bits(np.minimum(found.probability_E[counts_E], self.highest))
        bin_E = (bits_E - self.low_C[column_E]) >> self.shift
        inside_E = (bin_E >= 0) & (bin_E < _BINS)
        return np.unique((column_E * _BINS + bin_E)[inside_E], return_counts=True)

    def total(self, counted: Iterable[Counted]) -> NDArray[np.int64]:
        """Add up what `count` finds of every part of the entries: (C, 256) and a column of 0."""
        total_CB = np.zeros((len(self.low_C), _BINS + 1), np.int64)
        for key, number in counted:
            total_CB[key // _BINS, key % _BINS] += number
        return total_CB

    def thresholds(
        self,
        total_CB: NDArray[np.int64],
        count: Callable[[Bins], Iterable[Counted]],
        images: int,
        config: FilterConfig,
    ) -> FloatArray:
        """Return the threshold (C,) of every class over all entries of N images, exactly.

        `total_CB` are these bins' `total`, and `count` gives what `Bins.count` finds of every part
        of the entries in the bins of later rounds, in any order. The k-th largest is found digit by
        digit, eight bits of its pattern a round, as a radix sort would.
        """
        thresholds_C = np.full(len(self.low_C), self.highest)
        if config.per_class_quantile is None:
            return thresholds_C
        # The small number makes (1 - 0.9) * 10 = 0.9999999999999998 a whole image.
        claim = int((1 - config.per_class_quantile) * images + 1e-9)
        if claim == 0:
            return thresholds_C
        bins, need_C = self, np.full(len(self.low_C), claim)
        while True:
            from_here_CB = total_CB[:, ::-1].cumsum(axis=1)[:, ::-1]
            # The highest bin that the k-th largest can be in; the lowest where there are too few,
            # whose low end is `lowest`.
            place_C = np.maximum((from_here_CB >= need_C[:, None]).sum(axis=1) - 1, 0)
            need_C = need_C - from_here_CB[np.arange(len(need_C)), place_C + 1]
            low_C = bins.low_C + (place_C << bins.shift)
            if bins.shift == 0:
                kind = np.int32 if self.highest.dtype.itemsize == 4 else np.int64
                return np.asarray(low_C.astype(kind).view(self.highest.dtype))
            bins = replace(bins, low_C=low_C, shift=max(0, bins.shift - _DIGIT))
            total_CB = bins.total(count(bins))


def class_thresholds(found: Entries, classes: int, config: FilterConfig) -> FloatArray:
    """Probability (C,) from which each class is taken, over N images.

    One global threshold starves the tail: a captioner is less sure of rare phrases. So a class may
    claim its k most probable images, k being the share 1 - `per_class_quantile` of the N images,
    rounded down: 0.98 claims none of 49 images. Its threshold falls from `positive_threshold` to
    its k-th largest probability, never rises above it, and never falls below `quantile_floor`. The
    floor keeps a class that is in no image from being forced on its k least unlikely ones; one
    below `negative_threshold` is raised to that.
    """
    bins = Bins.first(classes, config, found.probability_E.dtype)
    first_CB = bins.total([bins.count(found)])
    return bins.thresholds(first_CB, lambda now: [now.count(found)], found.images, config)


def _bits(values: FloatArray | np.floating[Any]) -> NDArray[np.int64]:
    """Return the bit patterns of non-negative floats as integers, in their order."""
    plain = np.asarray(values) + values.dtype.type(0)  # -0.0 becomes 0.0
    return plain.view(np.int32 if plain.dtype.itemsize == 4 else np.int64).astype(np.int64)


def _over_cap(found: Entries, positive_E: BoolArray, cap: int) -> BoolArray:
    """Return which positives (E,) are beyond the `cap` most probable of their image."""
    over_E = np.zeros(len(positive_E), dtype=bool)
    crowded_N = np.bincount(found.row_E[positive_E], minlength=found.images) > cap
    places = np.flatnonzero(positive_E & crowded_N[found.row_E])
    keys = (
        found.column_E[places],
        -found.support_E[places].astype(np.float64),
        -found.probability_E[places],
        found.row_E[places],
    )
    places = places[np.lexsort(keys)]
    rows = found.row_E[places]
    over_E[places[np.arange(len(rows)) - np.searchsorted(rows, rows) >= cap]] = True
    return over_E


def _softmax(scaled_RC: FloatArray, null: float | None) -> FloatArray:
    """Softmax over the classes, and a null option if given; a row of -inf gives zeros."""
    top_R1 = scaled_RC.max(axis=1, keepdims=True, initial=-np.inf)
    if null is not None:
        top_R1 = np.maximum(top_R1, scaled_RC.dtype.type(null))
    top_R1 = np.where(np.isneginf(top_R1), 0, top_R1).astype(scaled_RC.dtype)
    weights_RC = np.exp(scaled_RC - top_R1)
    total_R1 = weights_RC.sum(axis=1, keepdims=True)
    if null is not None:
        total_R1 = total_R1 + np.exp(scaled_RC.dtype.type(null) - top_R1)
    # The total is at least 1, the largest weight, except in a row of -inf.
    return np.asarray(weights_RC / np.where(total_R1 > 0, total_R1, 1), dtype=scaled_RC.dtype)


def _floats(name: str, values: ArrayLike) -> FloatArray:
    """As float32, or float64 if it was; ValueError for what has not two dimensions."""
    array = np.asarray(values)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}: give 2 dimensions")
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32, copy=False)


def _probabilities(name: str, values: ArrayLike) -> FloatArray:
    array = _floats(name, values)
    # Written so that NaN, which makes both extremes NaN, fails as well.
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"{name} ranges from {array.min()} to {array.max()}: give probabilities in [0, 1]"
            " (region_probabilities makes them)"
        )
    return array
