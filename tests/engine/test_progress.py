"""How far a stage is, read from what it has written."""

from __future__ import annotations

import threading

import pyarrow as pa
import pytest

from hts_ray.engine.compaction import BLOCKS
from hts_ray.engine.progress import WrittenRows, polled
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import write_table


@pytest.fixture
def stage(tmp_path):
    return StageFolder(str(tmp_path), "predictions", "k")


def rows(ids, bad=()):
    status = ["quarantined" if i in bad else "ok" for i in ids]
    kinds = pa.array(["missing" if i in bad else None for i in ids], pa.string())
    columns = {"image_id": ids, "uri": [f"/{i}" for i in ids], "status": status}
    return pa.table({**columns, "error_kind": kinds, "error": kinds})


def test_written_rows_skip_files_in_the_making(stage):
    """Catches progress that ends a run because it met half a file."""
    written = WrittenRows(stage.path)
    assert written() == (0, 0)
    write_table(stage.file(BLOCKS, "one.parquet"), rows(["a", "b"], bad=["a"]))
    storage.write_bytes(stage.file(BLOCKS, "two.parquet"), b"PAR1")
    assert written() == (2, 1)
    write_table(stage.file(BLOCKS, "two.parquet"), rows(["c"]))
    assert written() == (3, 1)


def test_poller_looks_while_waiting_and_at_the_end():
    """Catches a last count that is never told, and an exception that ends the polling."""
    looked = threading.Event()
    counts = []

    def look():
        counts.append(1)
        if len(counts) == 2:
            looked.set()
        raise OSError("storage is away")

    with polled(look, interval=0.01):
        assert looked.wait(5)
    assert len(counts) >= 3
