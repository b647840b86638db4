"""mAP on annotated images while a training runs; it is told and logged, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from hts_ray.student.model import Student


def share_of(batches: Iterator[Any], rank: int, world: int) -> Iterator[Any]:
    """Yield every `world`-th batch, from `rank` on: each worker scores batches of its own."""
    for number, batch in enumerate(batches):
        if number % world == rank:
            yield batch


def validation_mean_ap(
    student: Student,
    batches: Iterator[dict[str, torch.Tensor]],
    annotations_NC: npt.NDArray[np.int8],
    accelerator: Accelerator,
) -> float:
    """Return HICO's mAP, in 0..1, of the images that all workers' batches hold together.

    A batch has pixels uint8 (B, S, S, 3) and rows (B,), its rows in `annotations_NC`, which holds
    1, -1, 0 and -2 (positive, negative, ambiguous, unknown). NaN when no image could be read or
    no class has a positive. To be called by every worker at once; the student's mode is kept.
    """
    import torch
    from accelerate.utils import gather_object

    from hts_ray.metrics import hico_average_precision

    mode = student.training
    student.eval()
    found: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []
    with torch.no_grad(), accelerator.autocast():
        for batch in batches:
            logits_BC = student(student.normalise(batch["pixels"]))
            found.append((batch["rows"].cpu().numpy(), logits_BC.float().cpu().numpy()))
    student.train(mode)
    found = gather_object(found) if accelerator.num_processes > 1 else found
    if not found:
        return float("nan")
    rows_N = np.concatenate([rows for rows, _ in found])
    scores_NC = np.concatenate([scores for _, scores in found])
    average_precision_C = hico_average_precision(scores_NC, annotations_NC[rows_N])
    if np.isnan(average_precision_C).all():
        return float("nan")
    return float(np.nanmean(average_precision_C))
