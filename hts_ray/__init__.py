"""Unlabeled images and a class list in, a fast multi-label classifier out, on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hts_ray.classifier import Classifier

__version__ = "0.1.0"
__all__ = ["load"]


def load(path: str, device: str | None = None) -> Classifier:
    """Return the student at `path` (run directory, student folder or export) as a classifier.

    `load("runs/mine").predict(["a.jpg"], top_k=3)` labels images. `device` is torch's name of
    one; a GPU where there is one, if not given. Raises DataError when there is no student,
    ConfigError for a device that is not there.
    """
    from hts_ray.classifier import load as load_classifier  # torch only when it is needed

    return load_classifier(path, device)
