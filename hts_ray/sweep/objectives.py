"""What tells a good sweep setting from a bad one without a single annotation.

Every objective is a function of one `Outcome`, what a setting led to, and returns one number;
higher is better. They compare students and pseudo-labels with a `Reference`: the teacher's evidence
read in a fixed way, once a sweep, whatever the settings. So a filter that keeps almost nothing
cannot lower the bar that it is measured by. docs/sweep.md has how well each of them ranks settings.

Shapes: N images, C classes, 2 disjoint halves of the images (folds) or of each image's regions
(views).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hts_ray.errors import ConfigError, DataError
from hts_ray.store.aliases import FloatArray

Labels = NDArray[np.int8]

# Classes ranked at a time, which bounds the memory of the sorted copies.
_BLOCK = 64
# A class is compared on a set of images only where the reference expects so many positives there.
_LEAST_EXPECTED = 1.0
_NEIGHBOURS = 2000  # images whose pairwise similarities are taken
_SURE = 0.5


@dataclass(frozen=True, eq=False)
class Reference:
    """What a sweep believes of N images; it does not depend on the settings that are tried.

    Probabilities (N, C) float32 in [0, 1]: `consensus_NC` of all stored regions; `calibrated_NC`
    the same, calibrated by the agreement of two disjoint halves of every image's regions;
    `views_2NC` (2, N, C) what each of these halves says, NaN where an image has none of it;
    `agreed_NC` what both say. `start_NC` are the zero-shot student's logits.
    """

    consensus_NC: FloatArray
    calibrated_NC: FloatArray
    agreed_NC: FloatArray
    views_2NC: FloatArray
    start_NC: FloatArray


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one setting led to, on the N images of the reference.

    `targets_NC` int8 are its pseudo-labels (1 positive, 0 ignored, -1 negative) and
    `view_targets_2NC` those that it draws from each half of the regions alone. `fold_N` int8 in
    {0, 1} splits the images. `logits_2NC` are of two students, each trained on the pseudo-labels
    of one fold, in as many steps as one that is trained on all images; `whole_NC` are of that one.
    `view_logits_2NC` are like `logits_2NC`, with the pseudo-labels of view 0 on fold 0 and of view
    1 on fold 1. What no objective asked for is None.
    """

    reference: Reference
    fold_N: NDArray[np.int8]
    targets_NC: Labels
    view_targets_2NC: Labels | None = None
    logits_2NC: FloatArray | None = None
    view_logits_2NC: FloatArray | None = None
    whole_NC: FloatArray | None = None


Compute = Callable[[Outcome], float]


@dataclass(frozen=True)
class Objective:
    """A criterion by name: `compute(outcome)`, higher is better.

    `needs` names the fields of the outcome that may be None and are used here.
    """

    name: str
    compute: Compute
    needs: frozenset[str]


OBJECTIVES: dict[str, Objective] = {}
DEFAULT_OBJECTIVE = "blended_ap"
VALIDATION = "mAP_validation"  # no function of an outcome: it takes labels


def objective(*needs: str) -> Callable[[Compute], Compute]:
    """Register a function of an outcome as an objective, by its name and what it needs."""

    def register(compute: Compute) -> Compute:
        name = compute.__name__
        OBJECTIVES[name] = Objective(name, compute, frozenset(needs))
        return compute

    return register


def choose_objective(name: str | None, labeled: bool) -> str:
    """Return what a sweep compares by: `name`, or the default for `labeled` images or none.

    ConfigError with the known names for another, and for a validation without labels.
    """
    if name is None:
        return VALIDATION if labeled else DEFAULT_OBJECTIVE
    known = [*OBJECTIVES, *([VALIDATION] if labeled else [])]
    if name not in known:
        missing = "it needs sweep.validation=PATH"
        remedy = missing if name == VALIDATION else f"choose one of {', '.join(known)}"
        raise ConfigError(field="sweep.objective", value=name, remedy=remedy)
    return name


def make_reference(consensus_NC: ArrayLike, views_2NC: ArrayLike, start_NC: ArrayLike) -> Reference:
    """Derive what objectives compare with from the teacher's evidence.

    `consensus_NC` (N, C) and `views_2NC` (2, N, C) are probabilities, NaN in a view where an image
    has no region of it; `start_NC` are the zero-shot student's logits. Raises DataError when the
    evidence expects no positive of any class, for then there is nothing to compare with.
    """
    consensus = np.asarray(consensus_NC, dtype=np.float32)
    views = np.asarray(views_2NC, dtype=np.float32)
    agreed = pool_views(consensus, views)
    if not (agreed.sum(axis=0) >= _LEAST_EXPECTED).any():
        raise DataError(
            "the teacher expects less than one positive of every class: no label-free objective"
            " can tell settings apart; look at `hts label --preview`"
        )
    return Reference(
        consensus,
        calibrate_by_views(consensus, views),
        agreed,
        views,
        np.asarray(start_NC, dtype=np.float32),
    )


def pool_views(consensus_NC: FloatArray, views_2NC: FloatArray) -> FloatArray:
    """Geometric mean (N, C) of what two halves of the regions say: sure only where both are.

    A class that is seen in a stray region is in one half alone and almost vanishes, while a mean
    would keep half of it; small probabilities everywhere, which add up to many positives that
    are not there, stay small. An image without a region in one of the halves keeps its consensus.
    Source: logarithmic opinion pool with equal weights, Genest and Zidek 1986, not normalised.
    """
    pooled_NC = np.sqrt(views_2NC[0] * views_2NC[1])
    return np.asarray(np.where(np.isnan(pooled_NC), consensus_NC, pooled_NC), dtype=np.float32)


def calibrate_by_views(consensus_NC: FloatArray, views_2NC: FloatArray) -> FloatArray:
    """Replace each probability by how often the other half of the regions is sure, (N, C).

    g is the isotonic regression of [view b >= 1/2] on view a, over all images and classes and
    both orders of the views; the result is g(consensus). Where half of the regions says 0.4 and
    the other half rarely agrees, 0.4 becomes small. Both halves share the teacher's systematic
    errors, which no agreement within the teacher can show. Source: isotonic calibration (Zadrozny
    and Elkan 2002) with the second view in place of labels, as in co-training (Blum and Mitchell
    1998).
    """
    first, second = (np.asarray(view).ravel() for view in views_2NC)
    both = np.isfinite(first) & np.isfinite(second)
    evidence = np.concatenate([first[both], second[both]])
    agrees = np.concatenate([second[both], first[both]]) >= _SURE
    if not agrees.any():  # a timid teacher: nothing is ever sure, so there is nothing to learn
        return consensus_NC
    return isotonic_map(evidence, agrees, consensus_NC)


def isotonic_map(x: FloatArray, y: NDArray[Any], at: FloatArray) -> FloatArray:
    """Fit y (M,) by a rising function of x (M,), least squares, and return it at `at`, float32.

    Between the fitted points it is interpolated, beyond them constant; equal x count as one point
    with as many times the weight. Source: pool adjacent violators (Barlow et al. 1972), by SciPy.
    """
    from scipy.optimize import isotonic_regression

    points, place = np.unique(x, return_inverse=True)
    counts = np.bincount(place).astype(np.float64)
    fitted = isotonic_regression(np.bincount(place, weights=y) / counts, weights=counts).x
    return np.asarray(np.interp(at, points, fitted), dtype=np.float32)


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


def rank_agreement(first_NC: ArrayLike, second_NC: ArrayLike) -> float:
    """Mean over the classes of Spearman's rank correlation of two students' scores, in [-1, 1].

    A class that one of them scores alike everywhere counts 0. Source: Spearman 1904.
    """
    first, second = _centred_ranks(first_NC), _centred_ranks(second_NC)
    norm_C = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    product_C = (first * second).sum(axis=0)
    return float(np.divide(product_C, norm_C, out=np.zeros_like(norm_C), where=norm_C > 0).mean())


def _centred_ranks(scores_NC: ArrayLike) -> FloatArray:
    from scipy.stats import rankdata

    ranks: FloatArray = rankdata(np.asarray(scores_NC), axis=0)
    return np.asarray(ranks - ranks.mean(axis=0))


def expected_f1(targets_NC: Labels, probabilities_NC: FloatArray) -> FloatArray:
    """F1 (C,) in [0, 1] of the positives where labels are known by probability only.

    2 sum_{positives} p / (number of positives + sum p): the ratio of expectations. A class without
    positives has 0, and so has one of which everything is a positive unless p says so: too few and
    too many both cost. NaN for a class of total probability 0. Source: van Rijsbergen 1979.
    """
    positive_NC = targets_NC == 1
    total_C = probabilities_NC.sum(axis=0, dtype=np.float64)
    hit_C = np.where(positive_NC, probabilities_NC, 0).sum(axis=0, dtype=np.float64)
    f1_C = np.full(len(total_C), np.nan)
    counted_C = positive_NC.sum(axis=0) + total_C
    np.divide(2 * hit_C, counted_C, out=f1_C, where=total_C > 0)
    return f1_C


def overlap(first_NC: Labels, second_NC: Labels, expected_C: FloatArray) -> FloatArray:
    """Share (C,) in [0, 1] of positives that two labelings have in common.

    min(|A and B|, expected) / max(|A or B|, expected): Jaccard's index, bounded by the number of
    positives that the class is expected to have, so that two labelings agree perfectly neither
    by naming one image each nor by naming all.
    """
    first, second = first_NC == 1, second_NC == 1
    common_C = np.minimum((first & second).sum(axis=0), expected_C)
    union_C = np.maximum((first | second).sum(axis=0), expected_C)
    shares_C = np.zeros(len(union_C))
    np.divide(common_C, union_C, out=shares_C, where=union_C > 0)
    return shares_C


def _softmax(scores: FloatArray) -> FloatArray:
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _entropy(probabilities: FloatArray) -> FloatArray:
    logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return np.asarray(-(probabilities * logs).sum(axis=1))


def mean_expected_ap(logits_NC: FloatArray | None, reference_NC: FloatArray) -> float:
    """Mean expected AP over the classes of which the reference expects a positive; 0 if of none."""
    assert logits_NC is not None
    p_NC = np.nan_to_num(reference_NC)
    ap_C = expected_average_precision(logits_NC, p_NC)
    counted_C = p_NC.sum(axis=0) >= _LEAST_EXPECTED
    return float(ap_C[counted_C].mean()) if counted_C.any() else 0.0


def heldout_logits(logits_2NC: FloatArray | None, fold_N: NDArray[np.int8]) -> FloatArray:
    """Logits (N, C) of every image by the student of the fold that it is not in."""
    assert logits_2NC is not None
    return np.asarray(np.where(fold_N[:, None] == 0, logits_2NC[1], logits_2NC[0]))


def _unseen(outcome: Outcome) -> FloatArray:
    return heldout_logits(outcome.logits_2NC, outcome.fold_N)


@objective("logits_2NC", "whole_NC")
def blended_ap(outcome: Outcome) -> float:
    """Mean of `unseen_ap` and `seen_ap`; the former alone where only halves were trained on.

    The one is measured on students of half the images, which learn less; the other on images
    that the student was trained on, where it looks too good. Efron's .632 estimator mixes the two
    for the same reason.
    """
    unseen = unseen_ap(outcome)
    return unseen if outcome.whole_NC is None else (unseen + seen_ap(outcome)) / 2


@objective("logits_2NC")
def unseen_ap(outcome: Outcome) -> float:
    """Expected AP of students on images they did not see, by what both halves of regions say."""
    return mean_expected_ap(_unseen(outcome), outcome.reference.agreed_NC)


@objective("whole_NC")
def seen_ap(outcome: Outcome) -> float:
    """The same of the student of all images, on these images."""
    return mean_expected_ap(outcome.whole_NC, outcome.reference.agreed_NC)


@objective("logits_2NC")
def expected_ap(outcome: Outcome) -> float:
    """As `unseen_ap`, compared with the mean over all regions and aggregations."""
    return mean_expected_ap(_unseen(outcome), outcome.reference.consensus_NC)


@objective("logits_2NC")
def calibrated_ap(outcome: Outcome) -> float:
    """As `expected_ap`, calibrated by how often one half of the regions confirms the other."""
    return mean_expected_ap(_unseen(outcome), outcome.reference.calibrated_NC)


@objective("view_targets_2NC", "view_logits_2NC")
def unused_region_ap(outcome: Outcome) -> float:
    """Students of one half of the regions, compared with the other half on other images."""
    # An image of fold 0 is scored by the student of fold 1, which was taught by view 1.
    views = outcome.reference.views_2NC
    unused_NC = np.where(outcome.fold_N[:, None] == 0, views[0], views[1])
    unseen_NC = heldout_logits(outcome.view_logits_2NC, outcome.fold_N)
    return mean_expected_ap(unseen_NC, unused_NC)


@objective("view_targets_2NC")
def view_agreement(outcome: Outcome) -> float:
    """Pseudo-labels that both halves of the regions lead to, of those that are expected."""
    assert outcome.view_targets_2NC is not None
    expected_C = outcome.reference.agreed_NC.sum(axis=0)
    first, second = outcome.view_targets_2NC
    return float(overlap(first, second, expected_C)[expected_C >= _LEAST_EXPECTED].mean())


@objective("logits_2NC")
def half_agreement(outcome: Outcome) -> float:
    """How much two students of disjoint images agree beyond what zero-shot already said."""
    assert outcome.logits_2NC is not None
    first, second = outcome.logits_2NC
    start = outcome.reference.start_NC
    from_start = (rank_agreement(first, start) + rank_agreement(second, start)) / 2
    return rank_agreement(first, second) - from_start


@objective()
def label_f1(outcome: Outcome) -> float:
    """Expected F1 of the pseudo-labels by what both halves of the regions say; no student."""
    expected_C = outcome.reference.agreed_NC.sum(axis=0)
    f1_C = expected_f1(outcome.targets_NC, outcome.reference.agreed_NC)
    return float(f1_C[expected_C >= _LEAST_EXPECTED].mean())


@objective("logits_2NC")
def own_label_ap(outcome: Outcome) -> float:
    """AP on unseen images under the setting's own pseudo-labels: a bar that moves."""
    return mean_expected_ap(_unseen(outcome), (outcome.targets_NC == 1).astype(np.float32))


@objective("logits_2NC")
def soft_neighborhood_density(outcome: Outcome) -> float:
    """Mean entropy in nats of each image's softmax over its similarities to the other images.

    Similarities are cosines of softmax outputs over a temperature of 0.05. High means dense
    neighbourhoods: images of a class look alike to the student. Beyond 2,000 images an even choice
    of them is taken. Source: Saito et al. 2021, "Tune it the Right Way".
    """
    logits_NC = _unseen(outcome)
    step = -(-len(logits_NC) // _NEIGHBOURS)
    outputs_NC = _softmax(logits_NC[::step])
    unit_NC = outputs_NC / np.linalg.norm(outputs_NC, axis=1, keepdims=True)
    similarity_NN = unit_NC @ unit_NC.T / 0.05
    np.fill_diagonal(similarity_NN, -1 / 0.05)
    return float(_entropy(_softmax(similarity_NN)).mean())


@objective("logits_2NC")
def information_maximization(outcome: Outcome) -> float:
    """Mutual information in nats of image and predicted class: H(mean p) - mean H(p), at most ln C.

    High when every image is decided and all classes are in use. Source: Krause et al. 2010.
    """
    outputs_NC = _softmax(_unseen(outcome))
    whole = outputs_NC.mean(axis=0, keepdims=True)
    return float(_entropy(whole)[0] - _entropy(outputs_NC).mean())
