"""What finalists are compared by, on which images, and how many train at a time."""

from types import SimpleNamespace

import numpy as np
import pytest

from hts_ray.config import TrainConfig
from hts_ray.objectives import DEFAULT_OBJECTIVE, OBJECTIVES
from hts_ray.sweep.finalists import (
    HELD_OUT,
    _training_parts,
    final_objective,
    training_slots,
)
from hts_ray.sweep_trial import VALIDATION


def test_finalists_are_compared_by_what_a_student_changes():
    """Would catch finalists whose training makes no difference to what they are compared by."""
    assert final_objective(VALIDATION) == VALIDATION
    assert final_objective("expected_ap") == "expected_ap"
    for name in (DEFAULT_OBJECTIVE, "label_f1", "seen_ap", "unused_region_ap"):
        assert final_objective(name) == HELD_OUT
    assert OBJECTIVES[HELD_OUT].needs_students


def test_each_image_is_left_out_once():
    """Would catch students that are compared on images which they were trained on."""
    ids = np.array([f"image-{n:02d}" for n in range(21)])
    data = SimpleNamespace(regions=SimpleNamespace(image_ids=ids))
    plan = SimpleNamespace(
        run=SimpleNamespace(config=SimpleNamespace(sweep=SimpleNamespace(seed=4)))
    )
    first, second = _training_parts(plan, data, DEFAULT_OBJECTIVE)
    assert sorted([*first, *second]) == ids.tolist()
    assert not set(first) & set(second)
    assert abs(len(first) - len(second)) <= 1


@pytest.mark.parametrize(
    ("resources", "train", "slots"),
    [
        ({"CPU": 64.0}, {"num_workers": 1}, 32),
        ({"CPU": 64.0}, {"num_workers": 4, "cpus_per_worker": 2.0}, 7),
        ({"CPU": 64.0, "GPU": 8.0}, {"num_workers": 4, "use_gpu": True}, 2),
        ({"CPU": 64.0, "GPU": 2.0}, {"num_workers": 4, "use_gpu": True}, 1),
        ({"CPU": 1.0}, {"num_workers": 4}, 1),
    ],
)
def test_trainings_that_run_together_find_room(monkeypatch, resources, train, slots):
    """Would catch trainings that each hold a part of what the others wait for."""
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * 2)
    config = TrainConfig.model_validate({"batch_size": 64, **train})
    assert training_slots(config) == slots
