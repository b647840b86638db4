"""How a training goes: files that its first worker writes and the driver reads meanwhile.

Files serve workers on other machines and the driver's own process alike, and a reader that is slow
or gone costs a training nothing.

`TrainingTold` gets records of three kinds:
- a finished epoch, see `epoch_record`;
- an epoch that runs, every two seconds: epoch, loss (so far), images (done) and `of` (in all);
- features that are computed before a head is fitted: encoded, of, quarantined (images).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hts_ray.engine.progress import polled
from hts_ray.store import storage
from hts_ray.store.aliases import TrainingTold

_INTERVAL_S = 2.0  # between the steps that are reported
_LOOK_S = 1.0


def epoch_record(
    epoch: int, loss_sum: float, lr: float, images: int, seconds: float
) -> dict[str, Any]:
    """Return the record of one epoch, over all workers; `loss` is the mean over images."""
    return {
        "epoch": epoch,
        "loss": loss_sum / images,
        "lr": lr,
        "images": images,
        "images_per_second": images / max(seconds, 1e-9),
        "seconds": seconds,
        "validation_mAP": None,
    }


class StepLog:
    """Writes how far an epoch is, from a thread of its own because storage may be slow."""

    def __init__(self, path: str, rows: int) -> None:
        self._path, self._rows = path, rows
        self._last = 0.0
        self._latest: dict[str, Any] = {}
        self._written = self._latest

    @property
    def due(self) -> bool:
        """Whether the last report is long enough ago."""
        return time.monotonic() - self._last >= _INTERVAL_S

    def tell(self, epoch: int, images: int, loss: float) -> None:
        """Note how many images of an epoch are done, over all workers."""
        self._last = time.monotonic()
        images = min(images, self._rows)  # the last batch may be smaller
        self._latest = {"epoch": epoch, "images": images, "of": self._rows, "loss": loss}

    @contextmanager
    def writing(self) -> Iterator[StepLog]:
        """Write the reports of the block."""
        with polled(self._write, _INTERVAL_S):
            yield self

    def _write(self) -> None:
        latest = self._latest
        if latest is not self._written:
            storage.write_json(self._path, latest)
            self._written = latest


@contextmanager
def training_progress(
    history_path: str, steps_path: str, progress: TrainingTold | None
) -> Iterator[None]:
    """Hand new records of the two files to `progress` while the block runs."""
    if progress is None:
        yield
        return
    storage.write_json(steps_path, {})  # of a run that was killed
    finished = len(read_history(history_path))
    last: dict[str, Any] = {}

    def look() -> None:
        nonlocal finished, last
        for record in read_history(history_path)[finished:]:
            finished += 1
            progress(record)
        steps = storage.read_json(steps_path)
        if steps != last and steps["epoch"] == finished:
            last = steps
            progress(steps)

    with polled(look, _LOOK_S):
        yield


def read_history(path: str) -> list[dict[str, Any]]:
    """Return the records of the epochs that are finished; none before the first is."""
    history = storage.read_json(path) if storage.exists(path) else []
    return history if isinstance(history, list) else []
