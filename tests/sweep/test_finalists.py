"""What finalists are compared by, on which images, and how many train at a time."""

import os
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import ttest_rel

from hts_ray.config import TrainConfig
from hts_ray.sweep.finalists import (
    HELD_OUT,
    _Final,
    final_objective,
    paired_error,
    training_slots,
)
from hts_ray.sweep.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, VALIDATION


def test_finalists_are_compared_by_what_a_student_changes():
    """Would catch finalists whose training makes no difference to what they are compared by."""
    assert final_objective(VALIDATION) == VALIDATION
    assert HELD_OUT in OBJECTIVES
    for name in OBJECTIVES:
        assert final_objective(name) == HELD_OUT


def test_each_image_is_left_out_once():
    """Would catch students that are compared on images which they were trained on.

    And students without the means that `predict.center` asks for.
    """
    ids = np.array([f"image-{n:02d}" for n in range(21)])
    data = SimpleNamespace(regions=SimpleNamespace(image_ids=ids))
    train = SimpleNamespace(center_images=5)
    config = SimpleNamespace(sweep=SimpleNamespace(seed=4), seed=0, train=train)
    plan = SimpleNamespace(
        run=SimpleNamespace(config=config),
        stage=SimpleNamespace(file=str),
        images=pa.table({"image_id": ids}),
        validation=None,
    )
    final = _Final(plan, data, DEFAULT_OBJECTIVE)
    assert len(set(final._center["image_id"].to_pylist())) == 5
    first, second = final.parts
    assert sorted([*first, *second]) == ids.tolist()
    assert not set(first) & set(second)
    assert abs(len(first) - len(second)) <= 1


def test_the_error_of_a_gain_is_that_of_a_paired_test():
    """Would catch an error that ignores the pairing, or classes without AP that count as zero."""
    rng = np.random.default_rng(0)
    ap_C = rng.random(40)
    gain_C = rng.normal(0.02, 0.05, 40)
    found = paired_error(np.append(ap_C + gain_C, np.nan), np.append(ap_C, 0.3))
    test = ttest_rel(ap_C + gain_C, ap_C)
    assert gain_C.mean() / found == pytest.approx(test.statistic)
    assert paired_error(np.array([0.1, np.nan]), np.array([0.2, 0.3])) == np.inf


@pytest.mark.parametrize(
    ("resources", "nodes", "train", "slots"),
    [
        ({"CPU": 64.0}, 2, {"num_workers": 1}, 32),
        ({"CPU": 64.0}, 2, {"num_workers": 4, "cpus_per_worker": 2.0}, 7),
        ({"CPU": 64.0, "GPU": 8.0}, 2, {"num_workers": 4, "use_gpu": True}, 2),
        ({"CPU": 64.0, "GPU": 2.0}, 2, {"num_workers": 4, "use_gpu": True}, 1),
        ({"CPU": 1.0}, 2, {"num_workers": 4}, 1),
        ({"CPU": 64.0}, 1, {"num_workers": 1}, 4),  # logical ones of a machine with four
        ({"CPU": 6.0}, 1, {"num_workers": 1}, 3),
        ({"CPU": 64.0}, 1, {"num_workers": 8}, 1),
    ],
)
def test_trainings_that_run_together_find_room(monkeypatch, resources, nodes, train, slots):
    """Would catch trainings that each hold a part of what the others wait for."""
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * nodes)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    config = TrainConfig.model_validate({"batch_size": 64, **train})
    assert training_slots(config) == slots
