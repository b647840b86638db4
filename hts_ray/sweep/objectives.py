"""What tells a good sweep setting from a bad one without a single annotation.

Every objective is a function of one `Outcome`, what a setting led to, and returns one number;
higher is better. They compare students with a reference: the teacher's evidence read in a fixed
way, once a sweep, whatever the settings. So a filter that keeps almost nothing cannot lower the
bar that it is measured by. docs/sweep.md has how well each of them ranks settings, and what was
tried besides.

Shapes: N images, C classes, 2 disjoint halves of the images (folds) or of each image's regions
(views).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hts_ray.errors import ConfigError, DataError
from hts_ray.metrics import mean_average_precision
from hts_ray.store.aliases import FloatArray

# Classes ranked at a time, which bounds the memory of the sorted copies.
_BLOCK = 64
# A class is compared on a set of images only where the reference expects so many positives there.
_LEAST_EXPECTED = 1.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one setting led to, on the N images of the reference.

    `reference_NC` are probabilities in [0, 1]. `fold_N` int8 in {0, 1} splits the images.
    `logits_2NC` are of two students, each trained on the pseudo-labels of one fold, in as many
    steps as one that is trained on all images; `whole_NC` are of that one, None where there is
    none.
    """

    reference_NC: FloatArray
    fold_N: NDArray[np.int8]
    logits_2NC: FloatArray
    whole_NC: FloatArray | None = None


def make_reference(consensus_NC: ArrayLike, views_2NC: ArrayLike) -> FloatArray:
    """Pool what two halves of every image's regions say: (N, C), sure only where both are.

    It is their geometric mean. A class that is seen in a stray region is in one half alone and
    almost vanishes, while a mean would keep half of it; small probabilities everywhere, which add
    up to many positives that are not there, stay small. `views_2NC` (2, N, C) is NaN where an image
    has no region of a half; it keeps its `consensus_NC` (N, C) of all regions there. Raises
    DataError when the evidence expects no positive of any class: there is nothing to compare with.
    Source: logarithmic opinion pool with equal weights, Genest and Zidek 1986, not normalised.
    """
    consensus = np.asarray(consensus_NC, dtype=np.float32)
    first, second = np.asarray(views_2NC, dtype=np.float32)
    pooled_NC = np.sqrt(first * second)
    agreed_NC = np.where(np.isnan(pooled_NC), consensus, pooled_NC).astype(np.float32)
    if not (agreed_NC.sum(axis=0) >= _LEAST_EXPECTED).any():
        raise DataError(
            "the teacher expects less than one positive of every class: no label-free objective"
            " can tell settings apart; look at `hts label --preview`"
        )
    return agreed_NC


def expected_average_precision(scores_NC: ArrayLike, probabilities_NC: ArrayLike) -> FloatArray:
    """Average precision (C,) in [0, 1] of a ranking whose labels are known by probability only.

    With images in falling order of score and p_k the probability that the k-th is a positive,
    independent of the others, it is E[sum_k y_k (sum_{j<=k} y_j) / k] / E[sum_k y_k] =
    sum_k p_k (1 + sum_{j<k} p_j) / k / sum_k p_k: the ratio of two exact expectations. For p in
    {0, 1} it is average precision itself, without interpolation. NaN for a class of total
    probability 0; equal scores keep the images' order. ValueError for unequal shapes or p outside
    [0, 1].
    Source: average precision from uncertain judgments, Yilmaz and Aslam 2006 and Aslam and
    Yilmaz 2007.
    """
    scores, probabilities = np.asarray(scores_NC), np.asarray(probabilities_NC)
    if scores.ndim != 2 or scores.shape != probabilities.shape:
        raise ValueError(
            f"scores {scores.shape} and probabilities {probabilities.shape}:"
            " both have to be (images, classes)"
        )
    if probabilities.size and not (probabilities.min() >= 0 and probabilities.max() <= 1):
        raise ValueError("probabilities_NC must lie in [0, 1]")
    rank_N = np.arange(1, len(scores) + 1)
    ap_C = np.full(scores.shape[1], np.nan)
    for start in range(0, scores.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        order_BN = np.argsort(-scores[:, block].T, axis=1, kind="stable")
        p_BN = np.take_along_axis(probabilities[:, block].T, order_BN, axis=1).astype(np.float64)
        before_BN = np.cumsum(p_BN, axis=1) - p_BN
        total_B = p_BN.sum(axis=1)
        found_B = (p_BN * (1 + before_BN) / rank_N).sum(axis=1)
        np.divide(found_B, total_B, out=ap_C[block], where=total_B > 0)
    return ap_C


def expected_ap(logits_NC: FloatArray, reference_NC: FloatArray) -> FloatArray:
    """Return the expected AP (C,); NaN for a class of which the reference expects no positive."""
    ap_C = expected_average_precision(logits_NC, reference_NC)
    return np.where(reference_NC.sum(axis=0) >= _LEAST_EXPECTED, ap_C, np.nan)


def unseen_expected_ap(outcome: Outcome) -> FloatArray:
    """Return the expected AP (C,) of students on images they did not see."""
    first, second = outcome.logits_2NC
    unseen_NC = np.where(outcome.fold_N[:, None] == 0, second, first)
    return expected_ap(unseen_NC, outcome.reference_NC)


def unseen_ap(outcome: Outcome) -> float:
    """Mean expected AP of students on images they did not see."""
    return mean_average_precision(unseen_expected_ap(outcome))


def seen_ap(outcome: Outcome) -> float:
    """The same of the student of all images, on these images."""
    assert outcome.whole_NC is not None
    return mean_average_precision(expected_ap(outcome.whole_NC, outcome.reference_NC))


def blended_ap(outcome: Outcome) -> float:
    """Mean of `unseen_ap` and `seen_ap`.

    The one is measured on students of half the images, which learn less; the other on images
    that the student was trained on, where it looks too good. Efron's .632 estimator mixes the two
    for the same reason.
    """
    return (unseen_ap(outcome) + seen_ap(outcome)) / 2


OBJECTIVES: dict[str, Callable[[Outcome], float]] = {
    "blended_ap": blended_ap,
    "unseen_ap": unseen_ap,
    "seen_ap": seen_ap,
}
DEFAULT_OBJECTIVE = "blended_ap"
HELD_OUT = "unseen_ap"  # the one that only looks at images which students did not see
VALIDATION = "mAP_validation"  # no function of an outcome: it takes labels


def choose_objective(name: str | None, labeled: bool, full: bool = False) -> str:
    """Return what a sweep compares by: `name`, or the default for `labeled` images or none.

    Students that are trained in full are compared on images that they did not see. ConfigError
    with the known names for another, and for a validation without labels.
    """
    without_labels = HELD_OUT if full else DEFAULT_OBJECTIVE
    if name is None:
        return VALIDATION if labeled else without_labels
    known = [*([HELD_OUT] if full else OBJECTIVES), *([VALIDATION] if labeled else [])]
    if name not in known:
        missing = "it needs sweep.validation=PATH"
        remedy = missing if name == VALIDATION else f"choose one of {', '.join(known)}"
        raise ConfigError(field="sweep.objective", value=name, remedy=remedy)
    return name
