"""How a training stands: what its first worker leaves in files while the driver looks at them.

Files serve workers on other machines and the driver's own process alike, and a reader that is slow
or gone costs a training nothing.

`Progress` gets records of three kinds:
- a finished epoch: epoch, loss, images, images_per_second, validation_mAP and more;
- an epoch that runs, every two seconds: epoch, loss (so far), images (done) and `of` (in all);
- features that are computed before a head is fitted: encoded, of, quarantined (images).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hts_ray.engine.image_pass import ProgressPoller
from hts_ray.store import storage

Progress = Callable[[Mapping[str, Any]], None]

_INTERVAL_S = 2.0


class StepLog:
    """Writes how far an epoch is, from a thread of its own: storage may be slow."""

    def __init__(self, path: str, rows: int) -> None:
        self._path, self._rows = path, rows
        self._last = 0.0
        self._latest: dict[str, Any] = {}
        self._written = self._latest

    @property
    def due(self) -> bool:
        """Whether it is time to tell of a step again."""
        return time.monotonic() - self._last >= _INTERVAL_S

    def tell(self, epoch: int, images: int, loss: float) -> None:
        """Take in that an epoch has done so many images, over all workers."""
        self._last = time.monotonic()
        images = min(images, self._rows)  # the last batch may be smaller
        self._latest = {"epoch": epoch, "images": images, "of": self._rows, "loss": loss}

    @contextmanager
    def writing(self) -> Iterator[StepLog]:
        """Write what is told in the block."""
        with ProgressPoller(self._write, _INTERVAL_S):
            yield self

    def _write(self) -> None:
        latest = self._latest
        if latest is not self._written:
            storage.write_json(self._path, latest)
            self._written = latest


@contextmanager
def training_progress(
    history_path: str, steps_path: str, progress: Progress | None
) -> Iterator[None]:
    """Hand what the two files tell anew to `progress` while the block runs."""
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

    with ProgressPoller(look, interval=1.0):
        yield


def read_history(path: str) -> list[dict[str, Any]]:
    """Return the records of the epochs that are finished; none before the first is."""
    history = storage.read_json(path) if storage.exists(path) else []
    return history if isinstance(history, list) else []
