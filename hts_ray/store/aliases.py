"""Short names of types that many rooms use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]
Pixels = NDArray[np.uint8]  # (H, W, 3), RGB

# Progress of a step over images: called with (done, total, quarantined).
ImagesDone = Callable[[int, int, int], None]
# Progress of a training: called with the records that `hts_ray.student.progress` lists.
TrainingTold = Callable[[Mapping[str, Any]], None]
