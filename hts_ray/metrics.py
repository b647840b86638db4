"""The HICO classification protocol: 11-point average precision over partly known labels.

Shapes: N images, C classes, B classes of one block, P positives of one class, T recalls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

POSITIVE, NEGATIVE, AMBIGUOUS, UNKNOWN = 1, -1, 0, -2

Setting = Literal["default", "known_object"]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

# MATLAB fills 0:0.1:1 from both ends, which keeps 0.6 and 0.7 exact where i * 0.1 overshoots.
# 3 * 0.1 overshoots in both: a recall of 3 of 10 (0.3) does not reach the threshold 0.3.
RECALL_THRESHOLDS: FloatArray = np.array(
    [i * 0.1 if i <= 5 else 1.0 - (10 - i) * 0.1 for i in range(11)], dtype=np.float64
)

# Classes sorted at a time: 16 x 9,658 keys of 8 bytes stay within a core's level-2 cache.
# Of many images fewer, so that the keys take 64 MB at most, or one class's.
_BLOCK, _BLOCK_ENTRIES = 16, 1 << 23
_LOW_BITS = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """HICO results; AP and their means lie in [0, 1] and are NaN where nothing was positive.

    `ap` and `ap_known_object` are (C,); `mean_ap` and `mean_ap_known_object` average them over
    the `num_classes` classes that have a positive; `few_shot` and `few_shot_known_object` map n to
    the mean AP over the few-shot classes Few@n. `interpolated_precision` (C, 11) is the best
    precision at each of RECALL_THRESHOLDS or above, by default setting: its mean is the AP.
    """

    ap: FloatArray
    ap_known_object: FloatArray
    interpolated_precision: FloatArray
    mean_ap: float
    mean_ap_known_object: float
    num_classes: int
    num_images: int
    few_shot: dict[int, float] = field(default_factory=dict)
    few_shot_known_object: dict[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, fractions in [0, 1], with None for NaN."""
        few = {f"few@{n}": _plain(value) for n, value in self.few_shot.items()}
        known = {
            f"few@{n}_known_object": _plain(value)
            for n, value in self.few_shot_known_object.items()
        }
        return {
            "mAP": _plain(self.mean_ap),
            "mAP_known_object": _plain(self.mean_ap_known_object),
            **few,
            **known,
            "num_classes": self.num_classes,
            "num_images": self.num_images,
            "ap": [_plain(value) for value in self.ap.tolist()],
            "ap_known_object": [_plain(value) for value in self.ap_known_object.tolist()],
            "interpolated_precision": [
                None if math.isnan(curve[0]) else [round(value, 4) for value in curve]
                for curve in self.interpolated_precision.tolist()
            ],
        }


def hico_average_precision(
    scores: ArrayLike, annotations: ArrayLike, setting: Setting = "default"
) -> FloatArray:
    """Per-class 11-point interpolated AP (C,) as HICO's MATLAB code computes it, in [0, 1].

    `scores` (N, C), higher is likelier, any finite or infinite number; equal scores keep the order
    of the images, as MATLAB's stable sort does. `annotations` (N, C) in {1, -1, 0, -2}: positive,
    negative, ambiguous, unknown. Ambiguous images are left out of their class. Unknown ones count
    as negatives where their score puts them ("default") or behind all others ("known_object").
    AP is NaN for a class without a positive; upstream stops there, and also at a class
    without a negative, whose AP is 1 here.

    Raises ValueError for NaN scores, unequal shapes, other annotations or an unknown setting.
    Source: ywchao/hico_benchmark, evaluation/eval_vo.m and utils/eval_pr_score_label.m.
    """
    if setting not in get_args(Setting):
        raise ValueError(f"setting = {setting!r}: give one of {', '.join(get_args(Setting))}")
    scores_NC, annotations_NC = _checked(scores, annotations)
    ap_C = np.full(scores_NC.shape[1], np.nan)
    for c, labels_N in _ranked_labels(scores_NC, annotations_NC):
        ap_C[c] = _mean_precision(_interpolated_precision(labels_N, setting))
    return ap_C


def evaluate(
    scores: ArrayLike, annotations: ArrayLike, few_shot: Mapping[int, ArrayLike] | None = None
) -> Evaluation:
    """Everything HICO reports, in both settings, from one sort of each class.

    `scores` and `annotations` as for `hico_average_precision`; `few_shot` maps n to the (C,) bool
    mask of the classes in Few@n (at most n training positives). Raises the same
    errors, and ValueError for a mask of another shape or type.
    """
    return evaluate_parts([(scores, annotations)], few_shot)


def evaluate_parts(
    parts: Iterable[tuple[ArrayLike, ArrayLike]], few_shot: Mapping[int, ArrayLike] | None = None
) -> Evaluation:
    """Evaluate some classes after the other: `evaluate` of all of them side by side.

    A class's numbers do not depend on the others, so only one part's scores and annotations need
    to be in memory.
    """
    found = [_precisions(*_checked(*part)) for part in parts]
    precision_CT, known_C = (np.concatenate([one[i] for one in found]) for i in (0, 1))
    ap_C = np.array([_mean_precision(precision_T) for precision_T in precision_CT])
    masks: dict[int, BoolArray] = {}
    for n, mask in (few_shot or {}).items():
        mask_C = np.asarray(mask)
        if mask_C.dtype != np.bool_ or mask_C.shape != ap_C.shape:
            raise ValueError(
                f"few_shot[{n}] is {mask_C.dtype} {mask_C.shape}:"
                f" give a bool mask of shape {ap_C.shape}"
            )
        masks[int(n)] = mask_C
    return Evaluation(
        ap=ap_C,
        ap_known_object=known_C,
        interpolated_precision=precision_CT,
        mean_ap=mean_average_precision(ap_C),
        mean_ap_known_object=mean_average_precision(known_C),
        num_classes=int(np.isfinite(ap_C).sum()),
        num_images=found[0][2],
        few_shot={n: mean_average_precision(ap_C[mask]) for n, mask in masks.items()},
        few_shot_known_object={
            n: mean_average_precision(known_C[mask]) for n, mask in masks.items()
        },
    )


def _precisions(
    scores_NC: NDArray[Any], annotations_NC: NDArray[np.int8]
) -> tuple[FloatArray, FloatArray, int]:
    """Return the interpolated precision (C, T), the known-object AP (C,), and N."""
    images, classes = scores_NC.shape
    precision_CT = np.full((classes, len(RECALL_THRESHOLDS)), np.nan)
    known_C = np.full(classes, np.nan)
    for c, labels_N in _ranked_labels(scores_NC, annotations_NC):
        precision_CT[c] = _interpolated_precision(labels_N, "default")
        known_C[c] = _mean_precision(_interpolated_precision(labels_N, "known_object"))
    return precision_CT, known_C, images


def mean_average_precision(ap: ArrayLike) -> float:
    """Mean of the (C,) AP over the classes that have one; NaN, without a warning, if none has."""
    ap_C = np.asarray(ap, dtype=np.float64)
    present = ap_C[~np.isnan(ap_C)]
    return float(present.mean()) if present.size else math.nan


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval, in [0, 1], of a share that was measured as `hits` of `total`.

    Its z is 1.959964, the 97.5 % quantile of the normal distribution to seven digits. It stays
    sensible for few trials and near 0 and 1, where the normal interval does not. It takes the
    trials to be independent; labels of one image are not quite, so the truth is a bit wider.
    `total` is at least 1. Source: Wilson 1927.
    """
    z = 1.959964
    share = hits / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _checked(scores: ArrayLike, annotations: ArrayLike) -> tuple[NDArray[Any], NDArray[np.int8]]:
    """Both as (N, C) arrays, scores of a float type and annotations int8; ValueError otherwise."""
    scores_NC, labels = np.asarray(scores), np.asarray(annotations)
    if scores_NC.ndim != 2 or scores_NC.shape != labels.shape:
        raise ValueError(
            f"scores {scores_NC.shape} and annotations {labels.shape}:"
            " both have to be (images, classes)"
        )
    if scores_NC.dtype.kind != "f" or scores_NC.dtype.itemsize > 8:
        scores_NC = scores_NC.astype(np.float64)
    # A minimum is NaN if any entry is, and needs no mask of the whole matrix.
    if scores_NC.size and np.isnan(scores_NC.min()):
        row, column = np.argwhere(np.isnan(scores_NC))[0]
        raise ValueError(
            f"scores[{row}, {column}] is NaN, which has no rank: repeat that prediction or leave"
            " the image out"
        )
    labels_NC = labels if labels.dtype == np.int8 else _as_int8(labels)
    # The four codes are exactly the integers from -2 to 1, so two passes check them all.
    if labels_NC.size and (labels_NC.min() < UNKNOWN or labels_NC.max() > POSITIVE):
        raise _annotation_error(labels)
    return scores_NC, labels_NC


def _as_int8(labels: NDArray[Any]) -> NDArray[np.int8]:
    if labels.dtype == np.bool_:
        raise ValueError(
            "annotations are bool, whose False would mean ambiguous: give 1 for positive and"
            " -1 for negative"
        )
    with np.errstate(invalid="ignore"):
        small = labels.astype(np.int8)
    if not np.array_equal(small, labels):
        raise _annotation_error(labels)
    return small


def _annotation_error(labels: NDArray[Any]) -> ValueError:
    wrong = labels[~np.isin(labels, (POSITIVE, NEGATIVE, AMBIGUOUS, UNKNOWN))]
    return ValueError(
        f"annotations hold {wrong.flat[0]}: give 1 for positive, -1 for negative, 0 for ambiguous"
        " and -2 for unknown (NaN in anno.mat)"
    )


def _ranked_labels(
    scores_NC: NDArray[Any], annotations_NC: NDArray[np.int8]
) -> Iterator[tuple[int, NDArray[np.int8]]]:
    """Each class with its annotations (N,), those of the highest score first."""
    size = min(_BLOCK, max(1, _BLOCK_ENTRIES // max(1, len(scores_NC))))
    for start in range(0, scores_NC.shape[1], size):
        block = slice(start, start + size)
        order_BN = _descending_order(np.ascontiguousarray(scores_NC[:, block].T))
        labels_BN = np.ascontiguousarray(annotations_NC[:, block].T)
        for b, order_N in enumerate(order_BN):
            yield start + b, labels_BN[b][order_N]


def _descending_order(scores_BN: NDArray[Any]) -> NDArray[np.intp]:
    """Order (B, N) of each row from high to low, equal scores in the order of the images.

    Sorting integers that hold (score, image) is stable by construction and two to three times as
    fast as numpy's stable argsort, because numpy sorts plain numbers with SIMD instructions.
    """
    images_N = np.arange(scores_BN.shape[1], dtype=np.uint64)
    if scores_BN.dtype.itemsize <= 4:
        # Adding 0 turns -0.0, whose bits differ, into 0.0. Read as integers, non-negative floats
        # ascend and negative ones descend: flip the former so that the highest score comes first.
        bits_BN = (scores_BN.astype(np.float32) + np.float32(0)).view(np.uint32)
        negative_BN = bits_BN >> np.uint32(31) != 0
        ranks_BN = np.where(negative_BN, bits_BN, bits_BN ^ np.uint32(0x7FFFFFFF))
    else:
        # A float64 leaves no room for the image: sort it first, then number the distinct scores.
        order_BN = np.argsort(-scores_BN, axis=1)
        sorted_BN = np.take_along_axis(scores_BN, order_BN, axis=1)
        new_BN = sorted_BN[:, 1:] != sorted_BN[:, :-1]
        if new_BN.all():
            return order_BN
        ranks_BN = np.zeros(scores_BN.shape, dtype=np.uint32)
        ranks_BN[:, 1:] = np.cumsum(new_BN, axis=1)
        images_N = order_BN.astype(np.uint64)
    keys_BN = (ranks_BN.astype(np.uint64) << np.uint64(32)) | images_N
    keys_BN.sort(axis=1)
    return (keys_BN & _LOW_BITS).astype(np.intp)


def _interpolated_precision(labels_N: NDArray[np.int8], setting: Setting) -> FloatArray:
    """Best precision (T,) at each of T recalls or above, from annotations in falling score.

    Precision only ever falls between one positive and the next, so its maximum over "recall >= t"
    is attained at a positive, and the ranks of the P positives are all that is needed. For the
    same reason unknowns moved behind all others have no effect: every positive lies before
    them. They are left out here. NaN without a positive.
    """
    if setting == "default":
        labels_N = labels_N[labels_N != AMBIGUOUS]
    else:
        labels_N = labels_N[(labels_N == POSITIVE) | (labels_N == NEGATIVE)]
    ranks_P = np.flatnonzero(labels_N == POSITIVE) + 1
    if not ranks_P.size:
        return np.full(len(RECALL_THRESHOLDS), np.nan)
    found_P = np.arange(1, ranks_P.size + 1)
    recall_P = found_P / ranks_P.size
    best_P = np.maximum.accumulate((found_P / ranks_P)[::-1])[::-1]
    precision_T: FloatArray = best_P[np.searchsorted(recall_P, RECALL_THRESHOLDS)]
    return precision_T


def _mean_precision(precision_T: FloatArray) -> float:
    """AP as upstream adds it up, to the last bit, but 1 where the sum is 1.0000000000000002."""
    # One by one: a pairwise sum could differ in the last bit. NaN stays NaN.
    total = float(np.add.accumulate(precision_T / 11)[-1])
    return total if math.isnan(total) else min(total, 1.0)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
