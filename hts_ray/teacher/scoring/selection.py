"""Which classes of a region are scored, and what leaving the others out costs.

Functions on arrays, for every kind of teacher. Shape legend: R regions, C classes, O objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hts_ray.classes import NO_INTERACTION, pair_prompts
from hts_ray.teacher.captioner import FloatArray

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ObjectGate:
    """Which objects a region shows, told by scoring the objects alone.

    `prompts` are O phrases, one an object; `object_of_class` (C,) int64 names each class's, -1
    for a class without one, which is always scored. An approximation: a region whose object
    scores badly alone loses the classes of that object.
    """

    prompts: tuple[str, ...]
    object_of_class: npt.NDArray[np.int64]
    keep: int


def object_gate(objects: Sequence[str | None], keep: int) -> ObjectGate:
    """Return the gate of C classes with these objects, None for a class without one."""
    names = sorted({name for name in objects if name})
    place = {name: number for number, name in enumerate(names)}
    return ObjectGate(
        prompts=tuple(object_phrase(name) for name in names),
        object_of_class=np.array([place[name] if name else -1 for name in objects]),
        keep=keep,
    )


def alive_classes(
    object_scores_RO: npt.NDArray[np.floating[Any]],
    object_of_class: npt.NDArray[np.int64],
    keep: int,
) -> BoolArray:
    """Return which classes (R, C) belong to a region's `keep` best objects, or to none."""
    regions, objects = object_scores_RO.shape
    kept_RO = np.zeros((regions, objects + 1), dtype=np.bool_)
    best = np.argsort(-object_scores_RO, axis=1, kind="stable")[:, :keep]
    np.put_along_axis(kept_RO, best, True, axis=1)
    kept_RO[:, -1] = True  # index -1: no object
    return kept_RO[:, object_of_class]


def keep_top(
    scores_RC: FloatArray,
    top_k: int | None,
    offsets_C: FloatArray | None = None,
    alive_RC: BoolArray | None = None,
) -> FloatArray:
    """Return scores with -inf for the classes that a search would have left out.

    For teachers that know no search, so that search=top_k means the same on every teacher.
    """
    scores = scores_RC if alive_RC is None else np.where(alive_RC, scores_RC, -np.inf)
    if top_k is None or top_k >= scores.shape[1]:
        return scores.astype(np.float32)
    ranked = scores if offsets_C is None else scores + offsets_C
    best = np.argsort(-ranked, axis=1, kind="stable")[:, :top_k]
    result = np.full_like(scores, -np.inf, dtype=np.float32)
    np.put_along_axis(result, best, np.take_along_axis(scores, best, axis=1), axis=1)
    # NaN sorts last and would pass for a class that was left out.
    result[np.isnan(scores).any(axis=1)] = np.nan
    return result


def object_phrase(name: str) -> str:
    """Return an object with its determiner, as the prompts of pairs say it.

    HICO's objects keep HICO's meaning: "mouse" is "a computer mouse", "person" is "another
    person", which is not in every image.
    """
    # The sentence of a pair that ends with the noun and holds nothing else.
    return pair_prompts(NO_INTERACTION, name)[0].removeprefix("a person and ")


def agreement(exact_RC: FloatArray, approximate_RC: FloatArray, k: int) -> dict[str, float]:
    """Compare scores of some classes (-inf elsewhere) with the exact scores of all.

    `top_1` and `top_k` are the shares of the exact best class and best k that were kept;
    `kept` the share of all classes; `score_difference` the largest difference of a kept score
    in nats. Of probabilities, a softmax over the classes: `lost_mass` is the mean exact
    probability of what was left out, `worst_lost_mass` its maximum over regions,
    `probability_difference` the mean over regions of the largest difference.
    """
    kept = approximate_RC > -np.inf
    order = np.argsort(-exact_RC, axis=1, kind="stable")
    found = np.take_along_axis(kept, order, axis=1)
    exact, approximate = _softmax(exact_RC), _softmax(approximate_RC)
    lost = np.where(kept, 0.0, exact).sum(axis=1)
    difference = np.abs(np.where(kept, exact_RC - np.where(kept, approximate_RC, 0.0), 0.0))
    return {
        "top_1": float(found[:, 0].mean()),
        "top_k": float(found[:, :k].mean()),
        "kept": float(kept.mean()),
        "score_difference": float(difference.max()),
        "lost_mass": float(lost.mean()),
        "worst_lost_mass": float(lost.max()),
        "probability_difference": float(np.abs(exact - approximate).max(axis=1).mean()),
    }


def _softmax(scores_RC: FloatArray) -> npt.NDArray[np.float64]:
    top = scores_RC.max(axis=1, keepdims=True)
    shifted = np.exp(scores_RC.astype(np.float64) - np.where(np.isfinite(top), top, 0.0))
    total = shifted.sum(axis=1, keepdims=True)
    probabilities: npt.NDArray[np.float64] = shifted / np.where(total > 0, total, 1.0)
    return probabilities
