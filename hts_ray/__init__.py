"""Unlabeled images and a class list in, a fast multi-label classifier out, on Ray.

`label` labels a folder of images; `load` opens a trained student.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hts_ray.classifier import load as load
    from hts_ray.stages.autolabel import label as label

__version__ = "0.1.0"
__all__ = ["label", "load"]

_HOMES = {"label": "hts_ray.stages.autolabel", "load": "hts_ray.classifier"}


def __getattr__(name: str) -> Any:
    """Import a function when it is asked for: what it needs loads slowly."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
