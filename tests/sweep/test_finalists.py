"""What finalists are compared by, on which images, and how many train at a time."""

import os
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy.stats import ttest_rel

from hts_ray.config import TrainConfig
from hts_ray.evaluate import label_matrix
from hts_ray.sweep.finalists import (
    final_objective,
    full_training,
    paired_error,
    sure_annotations,
)
from hts_ray.sweep.objectives import DEFAULT_OBJECTIVE, HELD_OUT, OBJECTIVES, VALIDATION
from hts_ray.sweep.trainings import training_slots


def test_finalists_are_compared_by_what_a_student_changes():
    """Would catch finalists whose training makes no difference to what they are compared by."""
    assert final_objective(VALIDATION) == VALIDATION
    assert HELD_OUT in OBJECTIVES
    for name in OBJECTIVES:
        assert final_objective(name) == HELD_OUT


def test_each_image_is_left_out_once(with_sweep):
    """Would catch students that are compared on images which they were trained on.

    And students without the means that `predict.center` asks for.
    """
    ids = np.array([f"image-{n:02d}" for n in range(21)])
    data = SimpleNamespace(image_ids=ids, labeled_N=ids == "image-03")
    plan = SimpleNamespace(
        run=with_sweep(sweep={"seed": 4}, train={"center_images": 5}),
        region_scores=None,
        stage=SimpleNamespace(file=str),
        images=pa.table({"image_id": ids}),
        validation=None,
        objective=DEFAULT_OBJECTIVE,
    )
    training = full_training(plan, data)
    assert len(set(training.center["image_id"].to_pylist())) == 5
    first, second = training.parts
    assert sorted([*first, *second]) == ids.tolist()
    assert not set(first) & set(second)
    assert abs(len(first) - len(second)) <= 1
    plan.objective = VALIDATION
    assert full_training(plan, data).parts == (tuple(ids[ids != "image-03"]),)


def test_a_curve_without_labels_is_of_what_the_reference_is_sure_of(swept_run):
    """Would catch a curve measured on images of the student's own half, or on doubtful classes."""
    images = swept_run.manifest().table.filter(
        pc.equal(swept_run.manifest().table["split"], "train")
    )
    ids = np.sort(images["image_id"].to_numpy())
    reference_NC = np.zeros((len(ids), len(swept_run.class_table)), np.float32)
    reference_NC[:, :3] = (0.5, 0.3, 0.1)
    data = SimpleNamespace(image_ids=ids, reference_NC=reference_NC)
    plan = SimpleNamespace(run=swept_run, images=images.select(["image_id", "uri", "split"]))
    chosen_N = np.arange(len(ids)) % 2 == 1
    table = sure_annotations(plan, data, chosen_N)
    assert table["image_id"].to_pylist() == ids[chosen_N].tolist()
    labels_NC = label_matrix(table, swept_run.class_table)
    assert (labels_NC[:, 0] == 1).all()
    assert (labels_NC[:, 1] == 0).all()
    assert (labels_NC[:, 2:] == -2).all()


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
