"""`train.trainable=head` on cached features: what the full training gives, and computed once."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load as load_weights

from hts_ray.config import AugmentConfig, OptimConfig, TrainConfig
from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import read_table
from hts_ray.student import load_student
from hts_ray.student import train as training
from hts_ray.student.targets import Task, training_set
from hts_ray.student.train import train_student

PLAIN = AugmentConfig(flip=False, crop_scale=(1.0, 1.0), color_jitter=0.0)
CONFIG = TrainConfig(
    trainable="head",
    epochs=3,
    batch_size=8,
    num_workers=0,
    optim=OptimConfig(lr=1e-5, head_lr=0.03),
    augment=PLAIN,
)


@pytest.fixture
def train(run_of, color_world, tmp_path):
    def run(name, config=CONFIG, labels=color_world, **arguments):
        stage = StageFolder(str(tmp_path), "student", name)
        made = run_of(tmp_path, train=config)
        return stage, train_student(made, labels, stage, **arguments)

    return run


def changed(**values):
    return TrainConfig.model_validate({**CONFIG.model_dump(), **values})


def test_cached_features_give_what_full_training_gives(
    ray_session, train, run_of, color_table, color_world, tmp_path
):
    """Catches another rate, decode or preprocessing than the loop's; all images in every step."""
    config = changed(batch_size=48)
    stage, stats = train("cached", config)
    full = StageFolder(str(tmp_path), "student", "full")
    data = training_set(color_world, color_table, config)
    run = run_of(tmp_path, train=config)
    task = Task(run, data, None, full, training._write_initial(run, full), None)
    outcome = training._fit(task)
    expected = load_weights(outcome["weights"])
    student = load_student(stage.path)
    np.testing.assert_allclose(
        student.classifier.detach(), expected["classifier"], rtol=1e-3, atol=1e-4
    )
    history = storage.read_json(stage.file("history.json"))
    assert [record["loss"] for record in history] == pytest.approx(
        [record["loss"] for record in outcome["history"]], rel=1e-4
    )
    assert {"epoch", "loss", "lr", "images", "images_per_second", "seconds"} <= set(history[0])
    for name, value in student.state_dict().items():
        assert name == "classifier" or np.array_equal(value, expected[name]), name
    assert stats["epochs"] == 3
    assert (stats["rows_in"], stats["rows_out"], stats["rows_trained"]) == (48, 48, 48)


def test_the_same_images_are_encoded_once(train, color_world, tmp_path):
    """Catches a tower that runs again for other labels, and a fit that ignores the labels."""
    first, _ = train("first", changed(epochs=2))
    folder = next(name for name in storage.list_names(str(tmp_path)) if "features-" in name)
    stamp = storage.read_bytes(str(tmp_path / folder / "stats.json"))
    swapped = pa.array([[11]] * 24, pa.list_(pa.int16()))
    labels = color_world.slice(10, 24).set_column(2, "positive_ids", swapped)
    second, stats = train("second", labels=labels)
    assert stats["rows_in"] == 24
    folders = [name for name in storage.list_names(str(tmp_path)) if "features-" in name]
    assert folders == [folder]
    assert storage.read_bytes(str(tmp_path / folder / "stats.json")) == stamp
    again, _ = train("third", changed(epochs=2))
    weights = [storage.read_bytes(s.file("model.safetensors")) for s in (first, second, again)]
    assert weights[0] == weights[2] != weights[1]


def test_features_that_do_not_fit_into_memory_give_the_same_student(train, color_world):
    """Catches rows of a file that slip, and another order than that of the memory."""
    probability = [
        [0.3 + 0.4 * (i % 2)] * len(ids) for i, ids in enumerate(color_world[2].to_pylist())
    ]
    labels = color_world.append_column("probability", pa.array(probability, pa.list_(pa.float32())))
    found = []
    for gib in (1.0, 0.0):
        config = changed(
            soft_labels=True,
            min_positives_per_class=40,
            class_balance=0.5,
            augment=AugmentConfig(flip=True, crop_scale=(1.0, 1.0), color_jitter=0.0),
            features={"memory_gib": gib},
        )
        stage, _ = train(f"memory{gib}", config, labels)
        found.append(storage.read_bytes(stage.file("model.safetensors")))
    assert found[0] == found[1]


def test_flips_soft_labels_and_validation_reach_the_fit(train, color_world):
    """Catches settings of the training that the short way forgets."""
    weights = [storage.read_bytes(train("plain")[0].file("model.safetensors"))]
    flips = changed(augment=AugmentConfig(flip=True))
    weights.append(storage.read_bytes(train("flips", flips)[0].file("model.safetensors")))
    lengths = [len(ids) for ids in color_world["positive_ids"].to_pylist()]
    probability = pa.array([[0.3] * n for n in lengths], pa.list_(pa.float32()))
    labels = color_world.append_column("probability", probability)
    soft, _ = train("soft", changed(soft_labels=True), labels)
    weights.append(storage.read_bytes(soft.file("model.safetensors")))
    assert len(set(weights)) == 3
    empty = pa.array([[]] * 48, pa.list_(pa.int16()))
    annotated = color_world.select(["image_id", "uri", "positive_ids"])
    for name in ("negative_ids", "ambiguous_ids"):
        annotated = annotated.append_column(name, empty)
    told = []
    measured, stats = train(
        "measured",
        changed(validation_split="val", validate_every=2),
        validation=annotated,
        progress=told.append,
    )
    assert storage.read_bytes(measured.file("model.safetensors")) == weights[0]
    found = [record["validation_mAP"] for record in told]
    assert found[0] is None
    assert 0.5 < found[1] <= found[2] + 0.1
    assert stats["validation_mAP"] == found[2]
    assert any(
        "tfevents" in name for name in storage.list_names(measured.file("curves", "hts_ray"))
    )


def test_bad_images_and_infinite_losses_are_told(train, color_world, tmp_path):
    """Catches one broken file that ends the run, is dropped silently, or spoils the weights."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    uris = color_world["uri"].to_pylist()
    uris[3], uris[9], uris[12] = str(tmp_path / "broken.png"), "/nowhere.png", None
    labels = color_world.set_column(1, "uri", pa.array(uris, pa.string()))
    stage, stats = train("bad", changed(min_positives_per_class=40), labels)
    assert (stats["rows_in"], stats["rows_out"], stats["quarantined"]) == (48, 45, 3)
    bad = read_table(stage.file("quarantine", "part-0.parquet")).to_pylist()
    kinds = {row["image_id"]: row["error_kind"] for row in bad}
    assert kinds == {"i003": "not_an_image", "i009": "missing", "i012": "missing"}
    assert {row["stage"] for row in bad} == {"train"}
    assert json.loads(storage.read_bytes(stage.file("history.json")))[0]["images"] > 45
    with pytest.raises(DataError, match=r"not finite in epoch 0; images i\d+"):
        train("wild", changed(loss_temperature=1e-38))
    assert not StageFolder(str(tmp_path), "student", "wild").finished


def test_a_plan_counts_every_image_once(run_of, tmp_path, color_world):
    """Catches a plan that has the frozen tower run in every epoch."""
    many = changed(epochs=500, min_positives_per_class=100, augment=AugmentConfig(flip=True))
    figures = training.estimate(run_of(tmp_path, train=many), color_world)
    assert figures["images"] == 48
    assert figures["steps"] >= 500 * 12
    # 48 images and their mirror images in batches of 8
    assert figures["seconds"] == pytest.approx(12 * figures["seconds_per_step"], rel=0.01, abs=1e-3)
    assert figures["gpu_hours"] == 0
