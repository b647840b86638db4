"""The progress of a running stage: every two seconds, the rows that it has written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hts_ray.engine.compaction import BLOCKS
from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.parts import ahead
from hts_ray.store.run import StageFolder


class WrittenRows:
    """Counts the rows that a stage's folder holds so far, opening every file once."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._counts: dict[str, tuple[int, int]] = {}

    def __call__(self) -> tuple[int, int]:
        """Return (rows, quarantined rows) of the files that are complete."""
        names = storage.list_names(storage.join(self._path, BLOCKS))
        new = [name for name in names if name.endswith(".parquet") and name not in self._counts]
        # A resumed pass begins with thousands of files.
        for name, found in zip(new, ahead(self._count, new), strict=True):
            if found is not None:
                self._counts[name] = found
        counts = self._counts.values()
        return sum(rows for rows, _ in counts), sum(bad for _, bad in counts)

    def _count(self, name: str) -> tuple[int, int] | None:
        """Return the rows of a file and the bad ones among them, None while it is written."""
        filesystem, inner = storage.resolve(storage.join(self._path, BLOCKS, name))
        try:
            status = pq.read_table(inner, columns=["status"], filesystem=filesystem)["status"]
        except (OSError, pa.ArrowException):
            return None
        return len(status), int(pc.sum(pc.not_equal(status, "ok")).as_py() or 0)


@contextmanager
def polled(look: Callable[[], None], interval: float = 2.0) -> Iterator[None]:
    """Call `look` every `interval` seconds while the block runs, and once at its end.

    A look that fails is skipped: progress must never end a run.
    """
    ended = threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = ended.wait(interval)
            with suppress(OSError, ValueError, KeyError, DataError):
                look()

    thread = threading.Thread(target=watch, name="hts-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def row_progress(stage: StageFolder, total: int, progress: ImagesDone | None) -> Iterator[None]:
    """Call `progress(done, total, quarantined)` about every two seconds inside the block."""
    if progress is None:
        yield
        return
    written = WrittenRows(stage.path)

    def look() -> None:
        done, bad = written()
        progress(done, total, bad)

    with polled(look):
        yield
