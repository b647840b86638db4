"""The student: a CLIP image encoder with a cosine classifier, trained on pseudo-labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hts_ray.student.model import Student

__all__ = ["load_student"]


def load_student(path: str) -> Student:
    """Return the student stored at `path`: a run directory, its student folder, or an export.

    The module maps normalised images (N, 3, S, S) to logits (N, C) and names the classes in
    `class_table`. Raises DataError when there is none or its files are damaged.
    """
    from hts_ray.student.checkpoints import load_student as load  # torch only when it is needed

    return load(path)
