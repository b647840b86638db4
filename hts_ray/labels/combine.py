"""Several opinions of the same images made into one, class by class.

Pure functions on what `image_evidence` found of each teacher pass. Shapes: N images, C classes,
O of the passes' opinions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hts_ray.errors import DataError
from hts_ray.images.manifest import IMAGE_COLUMNS
from hts_ray.labels.evidence import Evidence
from hts_ray.store.aliases import BoolArray, FloatArray

Combination = Literal["geometric", "mean"]

_CLASSES = 16  # that are combined at a time
_LEAST = 1e-4  # what 0 counts as among odds, and 1 as its opposite: no opinion is a veto


def combine(
    passes: Sequence[Evidence], weights: Sequence[float], method: Combination = "geometric"
) -> Evidence:
    """Return one Evidence of the images of all passes, in the order of their ids.

    `mean` is the weighted mean of the probabilities, `geometric` that of their odds: p / (1 - p) is
    the geometric mean of theirs, which one low opinion lowers more. An image that some passes lack
    is judged by the others.
    `support_NC` is the number of regions that agree, over all passes that count.

    A pass of weight 0 is as if it were not there. The order of the passes changes nothing but the
    last bits; passes that say the same are as good as one. Raises DataError when no weight is
    above 0.
    """
    counted = [(found, weight) for found, weight in zip(passes, weights, strict=True) if weight > 0]
    if not counted:
        raise DataError("no teacher pass to combine has a weight above 0")
    images, rows = _all_images([found for found, _ in counted])
    classes = counted[0][0].probabilities_NC.shape[1]
    together_NC = np.empty((len(images), classes), np.float32)
    support_NC = np.empty((len(images), classes), np.int16)
    weight_ON = np.zeros((len(counted), len(images)))
    for o, ((_, weight), row_N) in enumerate(zip(counted, rows, strict=True)):
        weight_ON[o, row_N] = weight
    # What a class becomes depends on no other, and some at a time need little memory.
    for start in range(0, classes, _CLASSES):
        some = slice(start, start + _CLASSES)
        agreeing_NC = np.zeros(support_NC[:, some].shape, np.int64)
        stacked_ONC = np.zeros((len(counted), *agreeing_NC.shape), np.float32)
        for o, ((found, _), row_N) in enumerate(zip(counted, rows, strict=True)):
            stacked_ONC[o, row_N] = found.probabilities_NC[:, some]
            agreeing_NC[row_N] += found.support_NC[:, some]
        support_NC[:, some] = agreeing_NC
        together_NC[:, some] = _mean(stacked_ONC, weight_ON, method).clip(0, 1)
    return Evidence(images, together_NC, support_NC, np.ones(len(images), dtype=bool))


def _mean(stacked_ONC: FloatArray, weight_ON: FloatArray, method: Combination) -> FloatArray:
    """Return the weighted mean (N, C) of O opinions, or that of their odds as a probability."""
    share_ON1 = (weight_ON / weight_ON.sum(axis=0))[:, :, None]
    if method == "mean":
        return np.asarray((share_ON1 * stacked_ONC).sum(axis=0))
    inner_ONC = _LEAST + (1 - 2 * _LEAST) * stacked_ONC.astype(np.float64)
    odds_NC = (share_ON1 * np.log(inner_ONC / (1 - inner_ONC))).sum(axis=0)
    return np.asarray((1 / (1 + np.exp(-odds_NC)) - _LEAST) / (1 - 2 * _LEAST))


def _all_images(passes: Sequence[Evidence]) -> tuple[pa.Table, list[npt.NDArray[np.int64]]]:
    """Return the images of all passes, each once and by id, and each pass's rows among them."""
    together = pa.concat_tables([found.images.select(IMAGE_COLUMNS) for found in passes])
    ids, firsts = np.unique(together["image_id"].to_numpy(), return_index=True)
    images = together.take(pa.array(firsts)).combine_chunks()
    rows = [np.searchsorted(ids, found.images["image_id"].to_numpy()) for found in passes]
    return images, rows


def only_some(passes: Sequence[Evidence]) -> BoolArray:
    """Return which of all images (N,) some passes lack."""
    images, rows = _all_images(passes)
    return np.asarray(np.bincount(np.concatenate(rows), minlength=len(images)) < len(passes))
