"""Training: determinism, resumption, failures, two workers, what is told and stored."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from hts_ray.config import AugmentConfig, OptimConfig, PredictConfig, TrainConfig
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError, UserError
from hts_ray.evaluate import label_matrix
from hts_ray.metrics import hico_average_precision
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import read_table, write_table
from hts_ray.student import load_student, loop
from hts_ray.student import train as training
from hts_ray.student.predict import score_images
from hts_ray.student.progress import read_history
from hts_ray.student.targets import center_rows, training_set
from hts_ray.student.train import estimate, plan_train, train_student

CONFIG = TrainConfig(epochs=4, batch_size=8, num_workers=0, optim=OptimConfig(lr=3e-3))


@pytest.fixture
def stage(tmp_path):
    return StageFolder(str(tmp_path), "student", "k")


@pytest.fixture
def train(run_of, student_config, color_world):
    def run(stage, config=CONFIG, labels=color_world, validation=None, **changes):
        student = student_config.model_copy(update=changes)
        made = run_of(stage.run_dir, train=config, student=student)
        return train_student(made, labels, stage, validation)

    return run


def weights(stage):
    return storage.read_bytes(stage.file("model.safetensors"))


def with_uris(labels, uris):
    place = labels.column_names.index("uri")
    changed = [uris.get(i, uri) for i, uri in enumerate(labels["uri"].to_pylist())]
    return labels.set_column(place, "uri", pa.array(changed, pa.string()))


def annotated(labels):
    """Return labels as annotated rows of a manifest."""
    nothing = pa.array([[]] * len(labels), pa.list_(pa.int16()))
    names = ["image_id", "uri", "positive_ids", "ambiguous_ids", "negative_ids"]
    return labels.append_column("negative_ids", nothing).rename_columns(names)


def test_estimate_plans_the_steps_that_training_takes(run_of, tmp_path, color_table):
    """Catches a plan that forgets repeats or workers, and one that accepts unusable labels."""
    ids = color_table.ids[:2].tolist()
    labels = pa.table(
        {
            "image_id": ["a", "b", "c"],
            "uri": ["", "", ""],
            "positive_ids": pa.array([[ids[0]], [ids[0]], [ids[1]]], pa.list_(pa.int16())),
            "ignored_ids": pa.array([[], [], []], pa.list_(pa.int16())),
        }
    )
    config = TrainConfig(epochs=3, batch_size=2, min_positives_per_class=2)
    run = run_of(tmp_path, train=config)
    figures = estimate(run, labels)
    assert (figures["images"], figures["images_per_epoch"]) == (3, 4)
    assert figures["steps"] == 6
    assert figures["images_kept"].startswith("pixels: ")
    assert 0 < figures["seconds"] < 60
    with pytest.raises(DataError, match="no image of 3 has a positive"):
        estimate(Run(run.config, color_table.subset(color_table.ids[2:])), labels)


def test_settings_that_do_not_fit_are_refused(train, stage):
    """Catches workers with unequal batches, and fp16 that fails minutes later inside a worker."""
    with pytest.raises(ConfigError, match="equal share"):
        train(stage, CONFIG.model_copy(update={"num_workers": 3}))
    with pytest.raises(ConfigError, match="fp16"):
        train(stage, precision="fp16")


def test_no_labels_store_the_zero_shot_student(train, stage, student_config, color_table):
    """Catches a baseline that was trained by accident."""
    from hts_ray.student.model import build_student

    stats = train(stage, labels=None)
    assert stats["epochs"] == 0
    student, expected = load_student(stage.path), build_student(student_config, color_table)
    assert torch.equal(student.classifier, expected.classifier)
    assert torch.equal(student.visual.conv1.weight, expected.visual.conv1.weight)


def test_mean_logits_of_a_sample_are_kept_with_the_student(
    run_of, student_config, color_world, stage, tmp_path
):
    """Catches means of another student or split, a sample as large as the set, an equal key."""
    splits = pa.array(["train"] * 30 + ["test"] * (len(color_world) - 30))
    path = str(tmp_path / "manifest.parquet")
    columns = color_world.select(["image_id", "uri"]).append_column("split", splits)
    write_table(path, columns)
    run = run_of(
        stage.run_dir,
        train=CONFIG.model_copy(update={"labels": "none", "center_images": 12}),
        student=student_config,
    )
    center = center_rows(run, path)
    assert len(center) == 12
    assert set(center["split"].to_pylist()) == {"train"}
    plans = [plan_train(run, None, center=rows).folder.key for rows in (None, center)]
    assert len(set(plans)) == 2
    train_student(run, None, stage, center=center)
    student = load_student(stage.path)
    _, logits = score_images(stage.path, center, PredictConfig())
    np.testing.assert_allclose(student.class_means, logits.mean(axis=0), rtol=1e-5)


@pytest.fixture(scope="module")
def unbroken(ray_session, tmp_path_factory, run_of, color_world):
    """One undisturbed run and what its progress told."""
    stage = StageFolder(str(tmp_path_factory.mktemp("run")), "student", "k")
    told = []
    run = run_of(stage.run_dir, train=CONFIG)
    stats = train_student(run, color_world, stage, progress=told.append)
    return stage, stats, told


def test_training_learns_and_tells(unbroken, color_world, color_table):
    """Catches labels shuffled against images, a frozen model, and a lost or doubled epoch."""
    stage, stats, told = unbroken
    epochs = [record for record in told if "of" not in record]
    assert [record["epoch"] for record in epochs] == [0, 1, 2, 3]
    assert epochs[-1]["loss"] < 0.75 * epochs[0]["loss"]
    assert all(record["images"] == 48 for record in epochs)
    assert (stats["rows_in"], stats["rows_out"], stats["quarantined"]) == (48, 48, 0)
    assert not any("ray_train" in name for name in storage.list_names(stage.path))
    from PIL import Image

    student = load_student(stage.path)
    pixels = [np.asarray(Image.open(uri)) for uri in color_world["uri"].to_pylist()]
    with torch.no_grad():
        logits = student(student.preprocess(pixels)).numpy()
    truth = np.array(
        [[i in ids for i in color_table.ids] for ids in color_world["positive_ids"].to_pylist()]
    )
    assert logits[truth].mean() > logits[~truth].mean() + 1


def test_the_same_labels_and_seed_give_the_same_bytes(unbroken, train, stage):
    """Catches any randomness beyond the seed: the proof without annotations compares bytes."""
    train(stage)
    assert weights(stage) == weights(unbroken[0])


# Takes the settings of a run and the number of steps after which it kills itself.
KILLED_RUN = """
import json, os, signal, sys
import ray
from hts_ray.config import HtsConfig
from hts_ray.classes import read_class_csv
from hts_ray.engine.run import Run
from hts_ray.student import loop
from hts_ray.student import train as training
from hts_ray.store.tables import read_table, write_table
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
run = json.loads(sys.argv[1])
ray.init(address=run["address"], log_to_driver=False)
take_step, taken = loop.take_step, []
def dying(*arguments):
    if len(taken) == run["steps"]:
        os.kill(os.getpid(), signal.SIGKILL)
    taken.append(1)
    return take_step(*arguments)
loop.take_step = dying
settings = HtsConfig.model_validate(run["config"])
training.train_student(
    Run(settings, read_class_csv(run["classes"])),
    read_table(run["labels"]),
    StageFolder(*run["stage"]),
)
"""
HARD = CONFIG.model_copy(
    update={"ema_decay": 0.9, "learn_logit_scale": True, "checkpoint_every_steps": 2}
)


def test_a_run_killed_at_any_step_ends_like_an_unbroken_one(
    ray_session, train, run_of, tmp_path, student_config, color_table, color_world, monkeypatch
):
    """Catches a lost average, optimizer, schedule, seed or place in the epoch after kill -9."""
    import ray

    whole = StageFolder(str(tmp_path / "whole"), "student", "k")
    train(whole, HARD)
    color_table.to_csv(tmp_path / "classes.csv")
    write_table(str(tmp_path / "labels.parquet"), color_world)
    steps = int(np.random.default_rng().integers(1, 24))  # of 4 epochs with 6 steps each
    stage = StageFolder(str(tmp_path / "killed"), "student", "k")
    run = {
        "address": ray.get_runtime_context().gcs_address,
        "steps": steps,
        "config": run_of(stage.run_dir, train=HARD).config.model_dump(mode="json"),
        "classes": str(tmp_path / "classes.csv"),
        "labels": str(tmp_path / "labels.parquet"),
        "stage": [stage.run_dir, stage.table, stage.key],
    }
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, json.dumps(run)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not stage.finished
    taken = []
    take_step = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda *a: (taken.append(1), take_step(*a))[1])
    train(stage, HARD)
    again = len(taken) - (24 - steps)  # steps since the last checkpoint are taken once more
    assert 0 <= again < 2, f"killed after {steps} steps"
    assert weights(stage) == weights(whole), f"killed after {steps} steps"
    history = [read_history(s.file("history.json")) for s in (stage, whole)]
    assert [r["loss"] for r in history[0]] == [r["loss"] for r in history[1]]
    scale = load_student(stage.path).logit_scale
    assert scale != student_config.logit_scale


def test_a_student_is_measured_while_it_trains_and_stays_the_same(
    unbroken, train, stage, color_world, color_table, tmp_path
):
    """Catches measuring that disturbs the training, misses a due epoch, or mixes up images."""
    manifest = annotated(color_world)
    (tmp_path / "broken.png").write_bytes(b"no image")
    manifest = with_uris(manifest, {5: str(tmp_path / "broken.png")})
    stats = train(stage, CONFIG.model_copy(update={"validate_every": 3}), validation=manifest)
    assert weights(stage) == weights(unbroken[0])
    measured = [r["validation_mAP"] for r in read_history(stage.file("history.json"))]
    assert [value is None for value in measured] == [True, True, False, False]
    assert stats["rows_out"] == 48  # all could be trained on; the bad one stands in quarantine
    bad = read_table(stage.file("quarantine", "part-0.parquet"))
    assert bad["image_id"].to_pylist() == ["i005"]
    ids, scores = score_images(
        stage.path,
        color_world.append_column("split", pa.array(["test"] * len(color_world))),
        PredictConfig(),
    )
    keep = [i for i, image_id in enumerate(ids) if image_id != "i005"]
    truth = label_matrix(manifest, color_table)
    expected = np.nanmean(hico_average_precision(scores[keep], truth[keep]))
    assert measured[-1] == pytest.approx(expected, abs=1e-6)


def test_curves_can_be_read_by_tensorboard(unbroken):
    """Catches a log that is empty, unreadable, or whose steps start over in every epoch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage, stats, _ = unbroken
    files = sorted(Path(stage.file("curves")).rglob("events.*"))
    assert len(files) == 1
    log = EventAccumulator(str(files[0].parent)).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [0, 10, 20]
    losses = log.Scalars("epoch/loss")
    assert [event.step for event in losses] == [6, 12, 18, 24]
    assert losses[-1].value == pytest.approx(stats["final_loss"])


def test_soft_labels_follow_their_class_and_change_the_student(
    unbroken, ray_session, train, stage, color_world, color_table
):
    """Catches probabilities that shift when an unknown class is dropped, and unused ones."""
    ids = color_world["positive_ids"].to_pylist()
    lists = [[99, *row] for row in ids]
    probability = [[0.9, *(0.1 + 0.2 * i for i in range(len(row)))] for row in ids]
    labels = color_world.set_column(2, "positive_ids", pa.array(lists, pa.list_(pa.int16())))
    labels = labels.append_column("probability", pa.array(probability, pa.list_(pa.float32())))
    soft = CONFIG.model_copy(update={"soft_labels": True})
    pieces = training_set(labels, color_table, soft).mapped(color_table, soft)
    rows = pa.concat_tables(pieces).to_pylist()
    place = {int(class_id): i for i, class_id in enumerate(color_table.ids)}
    expected = {
        image_id: {place[c]: 0.1 + 0.2 * i for i, c in enumerate(row)}
        for image_id, row in zip(color_world["image_id"].to_pylist(), ids, strict=True)
    }
    for row in rows:
        found = dict(zip(row["positive"], row["weight"], strict=True))
        assert found == pytest.approx(expected[row["image_id"]])
    train(stage, soft, labels)
    assert weights(stage) != weights(unbroken[0])
    with pytest.raises(ConfigError, match="soft_labels"):
        training_set(color_world, color_table, soft)
    annotated = soft.model_copy(update={"labels": "annotations"})  # they have none
    pieces = training_set(color_world, color_table, annotated).mapped(color_table, annotated)
    assert all("weight" not in piece.column_names for piece in pieces)


@pytest.mark.parametrize(("asked", "kept"), [("auto", "none"), ("bytes", "bytes")])
def test_images_that_are_decoded_in_every_epoch_give_the_same_student(
    unbroken, train, stage, monkeypatch, asked, kept
):
    """Catches an order that depends on timing, or on how images are kept when they do not fit."""
    import ray

    assert unbroken[1]["images_kept"] == "pixels"
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"object_store_memory": 1.0})
    stats = train(stage, CONFIG.model_copy(update={"images_kept": asked}))
    assert stats["images_kept"] == kept
    assert weights(stage) == weights(unbroken[0])


def test_bad_images_are_left_out_and_listed(ray_session, train, stage, color_world, tmp_path):
    """Catches one broken file that ends the run, or that is dropped without a trace."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    labels = with_uris(color_world, {3: str(tmp_path / "broken.png"), 9: "/nowhere.png", 12: None})
    config = CONFIG.model_copy(
        update={"epochs": 1, "min_positives_per_class": 40, "trainable": "last"}
    )
    stats = train(stage, config, labels)
    assert (stats["rows_in"], stats["rows_out"], stats["quarantined"]) == (48, 45, 3)
    bad = read_table(stage.file("quarantine", "part-0.parquet")).to_pylist()
    kinds = {row["image_id"]: row["error_kind"] for row in bad}
    assert kinds == {"i003": "not_an_image", "i009": "missing", "i012": "missing"}
    assert {row["stage"] for row in bad} == {"train"}


def test_unreadable_images_and_infinite_losses_are_told(ray_session, train, stage, color_world):
    """Catches a NaN that spoils the weights silently, and a run without any image."""
    nowhere = with_uris(color_world, dict.fromkeys(range(48), "/nowhere.png"))
    with pytest.raises(DataError, match="0 of 48 images can be read"):
        train(stage, labels=nowhere)
    wild = StageFolder(stage.run_dir, "student", "wild")
    optim = OptimConfig(lr=1e30, grad_clip=None)
    with pytest.raises(
        DataError, match=r"not finite in epoch 0; images i\d+.*lower train.optim.lr"
    ):
        train(wild, CONFIG.model_copy(update={"optim": optim}))
    assert not wild.finished


@pytest.mark.timeout(600)
def test_two_workers_take_the_same_steps_as_one(ray_session, train, tmp_path, color_world):
    """Catches a mean loss or mAP per worker, doubled gradients, and a lost last checkpoint."""
    plain = AugmentConfig(flip=False, crop_scale=(1.0, 1.0), color_jitter=0.0)
    config = CONFIG.model_copy(update={"epochs": 3, "batch_size": 48, "augment": plain})
    losses, states, measured = [], [], []
    for workers in (0, 2):
        stage = StageFolder(str(tmp_path), "student", str(workers))
        values = {"num_workers": workers, "cpus_per_worker": 0.5, "validate_every": 3}
        odd = annotated(color_world.slice(1))  # 47 images: no worker's may be dropped
        stats = train(stage, config.model_copy(update=values), validation=odd)
        measured.append(stats["validation_mAP"])
        losses.append([record["loss"] for record in read_history(stage.file("history.json"))])
        states.append(load_file(stage.file("model.safetensors")))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert measured[0] == pytest.approx(measured[1], abs=0.01)
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=2e-3), name


def test_settings_of_the_loss_reach_the_training(unbroken, ray_session, train, tmp_path):
    """Catches a loss, a parameter or a balance that the workers are not told."""
    found = {weights(unbroken[0])}
    variants = [
        {"loss": "weighted_bce"},
        {"loss": "asl"},
        {"loss": "asl", "asl_gamma_neg": 1.0},
        {"loss": "asl", "asl_gamma_neg": 1.0, "class_balance": 1.0},
    ]
    for i, changes in enumerate(variants):
        stage = StageFolder(str(tmp_path), "student", str(i))
        values = {**CONFIG.model_dump(), "epochs": 1, **changes}
        train(stage, TrainConfig.model_validate(values))
        found.add(weights(stage))
    assert len(found) == 5


def test_a_worker_that_keeps_failing_is_told_in_a_line():
    """Would catch the traceback that Ray Train keeps in an error's text in front of the user."""
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    cause = OSError(28, "No space left on device")
    text = f'Traceback (most recent call last):\n  File "loop.py", line 1\nOSError: {cause}'

    class Trainer:
        def fit(self):
            raise WorkerGroupError(text, {0: UserExceptionWithTraceback(cause, text)})

    with pytest.raises(UserError, match=r"worker 0: OSError: .*No space left on device; the same"):
        training._fit_or_explain(Trainer(), CONFIG)
