"""Students at work on Ray Data: what their actors count, and when a student is loaded again."""

from __future__ import annotations

import pyarrow as pa
import pytest

from hts_ray.config import ImagesConfig, PoolConfig
from hts_ray.engine.telemetry import Meter
from hts_ray.student import pool
from hts_ray.student.checkpoints import save_student, student_fingerprint
from hts_ray.student.model import build_student
from hts_ray.student.pool import StudentActor, StudentPass
from hts_ray.student.predict import StudentScorer

KEPT: list[dict[str, float]] = []


class _Recorder(Meter):
    def count(self, **values):
        KEPT.append({name: value for name, value in values.items() if value})


@pytest.fixture
def task(tmp_path, student_config, color_table) -> StudentPass:
    KEPT.clear()
    folder = str(tmp_path / "student-1")
    save_student(build_student(student_config, color_table), folder)
    gpus = PoolConfig.model_validate({"num_gpus": 0.5})
    return StudentPass(folder, StudentScorer, gpus, ImagesConfig.model_validate({}), 4)


@pytest.fixture
def decoded(task, color_world) -> pa.Table:
    """Three images, one of which cannot be read."""
    images = color_world.slice(0, 3).select(["image_id"])
    uris = [*color_world["uri"].to_pylist()[:2], "/nowhere.png"]
    images = images.append_column("uri", pa.array(uris))
    return task.decode(images.append_column("split", pa.array(["test"] * 3)))


def test_an_actor_counts_what_its_student_does(task, decoded):
    """Would catch rows that nobody counts, and GPUs that nobody pays."""
    actor = StudentActor(task, _Recorder("predict", "r"))
    assert actor(decoded)["status"].to_pylist() == ["ok", "ok", "quarantined"]
    total: dict[str, float] = {}
    for values in KEPT:
        for name, value in values.items():
            total[name] = total.get(name, 0) + value
    assert total.keys() == {"images", "quarantined", "busy_seconds", "gpu_hours"}
    assert (total["images"], total["quarantined"]) == (2, 1)


def test_a_batch_that_fails_is_not_counted_as_done(task, decoded):
    """Would catch images of a failing batch that count as finished, to be counted again."""
    actor = StudentActor(task, _Recorder("predict", "r"))
    with pytest.raises(KeyError, match="error_kind"):
        actor(decoded.drop_columns(["error_kind"]))
    assert [set(values) for values in KEPT] == [{"busy_seconds"}]


def test_a_process_keeps_its_student_until_another_is_written(task, color_table, student_config):
    """Would catch a student that is loaded for every batch, and one that is out of date."""
    first = pool._kept_worker(task, student_fingerprint(task.folder))
    assert pool._kept_worker(task, student_fingerprint(task.folder)) is first
    fewer = color_table.subset(color_table.ids[:2])
    save_student(build_student(student_config, fewer), task.folder)
    again = pool._kept_worker(task, student_fingerprint(task.folder))
    assert len(again.student.class_table) == 2
