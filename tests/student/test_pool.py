"""Students at work on Ray Data: what their actors count."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from hts_ray.config import PoolConfig
from hts_ray.engine.telemetry import Meter
from hts_ray.student.pool import MeteredActor

KEPT: list[dict[str, float]] = []


class _Recorder(Meter):
    def count(self, **values):
        KEPT.append({name: value for name, value in values.items() if value})


class _Worker:
    """Quarantines what is bad, as StudentWorkers do."""

    def __init__(self, folder: str, fingerprint: str, pool: PoolConfig, **arguments: Any) -> None:
        assert (folder, fingerprint, arguments) == ("student", "f1", {"flipped": True})

    def __call__(self, table: pa.Table) -> pa.Table:
        if not len(table):
            raise RuntimeError("nothing to do")
        return pa.table(
            {"status": ["quarantined" if bad.as_py() else "ok" for bad in table["bad"]]}
        )


@pytest.fixture
def actor() -> MeteredActor:
    KEPT.clear()
    pool = PoolConfig.model_validate({"num_gpus": 0.5})
    return MeteredActor(_Worker, "student", "f1", pool, _Recorder("predict", "r"), flipped=True)


def test_an_actor_counts_what_its_worker_does(actor):
    """Would catch rows that nobody counts, GPUs that nobody pays, and arguments that get lost."""
    actor(pa.table({"bad": [False, True, False]}))
    total: dict[str, float] = {}
    for values in KEPT:
        for name, value in values.items():
            total[name] = total.get(name, 0) + value
    assert total.keys() == {"images", "quarantined", "busy_seconds", "gpu_hours"}
    assert (total["images"], total["quarantined"]) == (2, 1)


def test_a_worker_that_fails_is_not_counted_as_done(actor):
    """Would catch images of a failing batch that count as finished, to be counted again."""
    with pytest.raises(RuntimeError, match="nothing to do"):
        actor(pa.table({"bad": []}))
    assert [set(values) for values in KEPT] == [{"busy_seconds"}]
