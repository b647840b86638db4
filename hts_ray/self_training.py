"""A second opinion for the filter: the trained student's, beside the teacher's, region by region.

The teacher reads sentences off pixels and knows nothing of the pile; the student has learnt from
all of the pile's pseudo-labels together what a class looks like in it. Where they differ, their
mixed probability moves a label into the ignored band or over a threshold. No annotation is used.

Shapes: R regions of one image, C classes.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

from hts_ray.config import SelfTrainingConfig
from hts_ray.errors import DataError

Mixture = Literal["geometric", "arithmetic"]
FloatArray = npt.NDArray[np.float32]


class Scores(Protocol):
    """A student's logits (R, C) of images' regions, its columns being `class_ids`."""

    class_ids: list[int]

    def get(self, image_id: str) -> FloatArray | None:
        """Return an image's logits; None where there are none."""


def student_probabilities(logits_RC: ArrayLike, temperature: float = 1.0) -> FloatArray:
    """Return sigmoid(logits / temperature) (R, C): each class for itself.

    LSE-Sign and the other losses put the border between a class and its absence at logit 0.
    ValueError for a temperature of 0 or below.
    """
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature!r}: give a number above 0")
    scaled_RC = np.asarray(logits_RC, dtype=np.float32) / np.float32(temperature)
    # exp(-log(1 + exp(-z))): neither end overflows.
    return np.asarray(np.exp(-np.logaddexp(np.float32(0), -scaled_RC)), dtype=np.float32)


def mix_probabilities(
    teacher_RC: ArrayLike, student_RC: ArrayLike, weight: float, mixture: Mixture
) -> FloatArray:
    """Return the weighted mean (R, C) of two probabilities, the student's with `weight` in 0..1.

    "arithmetic" is (1 - w) p + w q: one of both can carry a class. "geometric" is p^(1-w) q^w,
    which is low where either is low and never above the arithmetic mean. Weight 0 is the teacher
    alone and 1 the student alone, exactly. ValueError for unequal shapes or another weight.
    """
    if mixture not in get_args(Mixture):
        raise ValueError(f"mixture = {mixture!r}: give one of {', '.join(get_args(Mixture))}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight = {weight!r}: give a number in [0, 1]")
    teacher = np.asarray(teacher_RC, dtype=np.float32)
    student = np.asarray(student_RC, dtype=np.float32)
    if teacher.shape != student.shape:
        raise ValueError(f"teacher {teacher.shape} and student {student.shape}: unequal shapes")
    own, other = np.float32(1 - weight), np.float32(weight)
    if mixture == "arithmetic":
        return np.clip(own * teacher + other * student, 0, 1)
    # 0 ** 0 is 1, so that a weight of 0 or 1 leaves one of them out.
    return np.clip(teacher**own * student**other, 0, 1)


class SecondOpinion:
    """Mixes a student's stored logits into the teacher's probabilities of an image's regions.

    `scores` are a student_scores folder's (`region_scoring.StudentScores`); `class_ids` (C,) the
    teacher's columns. Raises DataError when the student does not know one of them.
    """

    def __init__(
        self, scores: Scores, class_ids: npt.NDArray[np.int16], config: SelfTrainingConfig
    ) -> None:
        self._scores = scores
        self._config = config
        place = {class_id: column for column, class_id in enumerate(scores.class_ids)}
        missing = [int(i) for i in class_ids if int(i) not in place]
        if missing:
            raise DataError(f"the student has no class {missing[0]}: train it on the run's classes")
        self._columns = np.array([place[int(i)] for i in class_ids])

    def __call__(
        self, image_id: str, keep_R: npt.NDArray[np.bool_], teacher_RC: FloatArray
    ) -> FloatArray:
        """Return mixed probabilities of the regions that `keep_R` chose of all stored ones.

        Where the student has no answer, the teacher's stand alone.
        """
        logits_RC = self._scores.get(image_id)
        if logits_RC is None:
            return teacher_RC
        config = self._config
        student_RC = student_probabilities(logits_RC[keep_R][:, self._columns], config.temperature)
        return mix_probabilities(teacher_RC, student_RC, config.student_weight, config.mixture)
