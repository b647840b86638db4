"""What a training leaves for its driver to tell while an epoch runs."""

from __future__ import annotations

import pytest

from hts_ray.config import OptimConfig, TrainConfig
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.student import progress
from hts_ray.student.progress import StepLog, training_progress
from hts_ray.student.train import train_student


@pytest.fixture
def paths(tmp_path):
    return str(tmp_path / "history.json"), str(tmp_path / "steps.json")


def test_steps_are_written_now_and_then_and_at_the_end(paths):
    """Catches a write at every step, a last one that is lost, and 104 of 100 images."""
    with StepLog(paths[1], rows=100).writing() as steps:
        assert steps.due
        steps.tell(0, 8, 0.5)
        assert not steps.due
        steps.tell(1, 104, 0.25)
    assert storage.read_json(paths[1]) == {"epoch": 1, "images": 100, "of": 100, "loss": 0.25}


def test_a_training_that_told_nothing_writes_nothing(paths):
    """Catches an empty record, which a driver would take for a step."""
    with StepLog(paths[1], rows=100).writing():
        pass
    assert not storage.exists(paths[1])


def test_a_step_that_cannot_be_written_ends_no_training(tmp_path):
    """Catches a full disk that ends a training for the sake of its progress."""
    (tmp_path / "file").write_text("")
    with StepLog(str(tmp_path / "file" / "steps.json"), rows=100).writing() as steps:
        steps.tell(0, 8, 0.5)


def test_what_an_earlier_run_left_is_not_told(paths):
    """Catches a bar that starts where a killed run stood, and epochs told twice after a resume."""
    history, steps = paths
    storage.write_json(history, [{"epoch": 0}])
    storage.write_json(steps, {"epoch": 1, "images": 90, "of": 100, "loss": 0.1})
    told = []
    with training_progress(history, steps, told.append):
        pass
    assert told == []
    with training_progress(history, steps, told.append):
        storage.write_json(history, [{"epoch": 0}, {"epoch": 1}])
        storage.write_json(steps, {"epoch": 1, "images": 90, "of": 100, "loss": 0.1})
    assert told == [{"epoch": 1}]  # its steps are no news behind its end
    with training_progress(history, steps, told.append):
        storage.write_json(steps, {"epoch": 2, "images": 10, "of": 100, "loss": 0.1})
    assert told[1:] == [{"epoch": 2, "images": 10, "of": 100, "loss": 0.1}]


def test_a_training_tells_of_its_steps(ray_session, run_of, color_world, tmp_path, monkeypatch):
    """Catches an epoch of which nothing is heard until its end."""
    told = []
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.01)
    monkeypatch.setattr(progress, "_LOOK_S", 0.01)
    optim = OptimConfig(lr=3e-3)
    config = TrainConfig(epochs=3, batch_size=2, num_workers=0, optim=optim)
    stage = StageFolder(str(tmp_path), "student", "k")
    train_student(run_of(tmp_path, train=config), color_world, stage, progress=told.append)
    steps = [record for record in told if "of" in record]
    assert steps, "72 steps and not a word"
    for record in steps:
        assert record["of"] == 48
        assert 0 < record["images"] <= 48
        assert record["images"] % 2 == 0
        assert record["loss"] > 0
    ends = [told.index(record) for record in told if "of" not in record]
    assert [told[place]["images"] for place in ends] == [48] * 3
    for record in steps:  # of the epoch that runs, never of one that is told already
        assert sum(place < told.index(record) for place in ends) == record["epoch"]
