"""Training: the label set, the schedule, determinism, resumption, failures, two workers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from hts_ray.config import AugmentConfig, OptimConfig, TrainConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.losses import make_loss
from hts_ray.student import load_student, loop, training
from hts_ray.student.loop import dense_targets, learning_rate_factor
from hts_ray.student.training import (
    estimate,
    repeat_indices,
    train_student,
    training_set,
)
from hts_ray.tables import StageFolder, read_table

CONFIG = TrainConfig(epochs=4, batch_size=8, num_workers=0, optim=OptimConfig(lr=3e-3))


@pytest.fixture
def stage(tmp_path):
    return StageFolder(str(tmp_path), "student", "k")


@pytest.fixture
def train(student_config, color_table, color_world):
    def run(stage, config=CONFIG, labels=color_world, **changes):
        return train_student(
            config=config,
            student_config=student_config.model_copy(update=changes),
            class_table=color_table,
            labels=labels,
            stage=stage,
            seed=5,
        )

    return run


def weights(stage):
    return training.storage.read_bytes(stage.file("model.safetensors"))


def with_uris(labels, uris):
    place = labels.column_names.index("uri")
    changed = [uris.get(i, uri) for i, uri in enumerate(labels["uri"].to_pylist())]
    return labels.set_column(place, "uri", pa.array(changed, pa.string()))


def test_repeats_reach_the_minimum_and_keep_every_image():
    """Catches a rare class that stays rare, a lost image, and repeats of the wrong image."""
    targets = -np.ones((6, 4), np.int8)
    targets[:, 0] = 1
    targets[1, 1] = targets[2, 1] = targets[2, 2] = 1
    targets[3, 2] = 0  # ignored is not positive
    chosen = repeat_indices(targets, 5)
    assert set(chosen) == set(range(6))
    counts = (targets[chosen] == 1).sum(axis=0)
    assert list(counts[1:]) == [6, 5, 0]  # image 2 counts for both of its rare classes
    assert (np.bincount(chosen)[[0, 3, 4, 5]] == 1).all()
    assert np.array_equal(repeat_indices(targets, 0), np.arange(6))
    assert np.array_equal(repeat_indices(targets, 1), np.arange(6))


def test_repeats_hold_for_random_labels():
    """Catches counts that are not updated for the other classes of a repeated image."""
    random = np.random.default_rng(0)
    for _ in range(20):
        targets = random.choice([-1, 0, 1], p=[0.9, 0.05, 0.05], size=(30, 8)).astype(np.int8)
        counts = (targets[repeat_indices(targets, 7)] == 1).sum(axis=0)
        present = (targets == 1).any(axis=0)
        assert (counts[present] >= 7).all()
        assert (counts[~present] == 0).all()


def test_targets_are_positive_ignored_negative():
    """Catches ignored classes that count as negative, and rows that slip by one."""
    lists = pa.list_(pa.int32())
    targets = dense_targets(
        pa.array([[], [2], [0, 1]], lists), pa.array([[0], [2, 1], []], lists), 3
    )
    assert targets.tolist() == [[0, -1, -1], [-1, 0, 1], [1, 1, -1]]


def test_estimate_plans_the_steps_that_training_takes(student_config, color_table):
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
    figures = estimate(config, student_config, color_table, labels)
    assert (figures["images"], figures["images_per_epoch"]) == (3, 4)
    assert figures["steps"] == 6
    assert 0 < figures["seconds"] < 60
    with pytest.raises(DataError, match="no image of 3 has a positive"):
        estimate(config, student_config, color_table.subset(color_table.ids[2:]), labels)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "warm_restarts"])
def test_learning_rate_warms_up_and_ends(schedule):
    """Catches a first step at rate 0, a rate above 1, and a run that ends at a high rate."""
    optim = OptimConfig(schedule=schedule, warmup_steps=10)
    rates = [learning_rate_factor(step, 150, optim, 10) for step in range(150)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) <= 1.0
    jumps = [step for step, (a, b) in enumerate(itertools.pairwise(rates), 1) if b > a + 0.5]
    assert jumps == {"constant": [], "cosine": [], "warm_restarts": [50, 100]}[schedule]
    assert (rates[-1] < 0.01) == (schedule != "constant")


def test_label_set_maps_ids_counts_unknown_ones_and_is_seeded(color_table):
    """Catches class ids used as positions, unknown ids that wrap around, and unseeded order."""
    lists = pa.list_(pa.int16())
    labels = pa.table(
        {
            "image_id": ["a", "b", "c"],
            "uri": ["a", "b", "c"],
            "positive_ids": pa.array([[11, 99], [7], []], lists),
            "ignored_ids": pa.array([[3], None, [-1]], lists),
        }
    )
    data = training_set(labels, color_table, CONFIG, 0)
    rows = {row["image_id"]: row for row in data.table.to_pylist()}
    assert (rows["a"]["positive"], rows["a"]["ignored"]) == ([2], [1])
    assert (rows["b"]["positive"], rows["b"]["ignored"]) == ([0], [])
    assert (data.dropped_ids, data.classes_with_positives, data.images) == (2, 2, 3)
    assert data.table["row"].to_pylist() == [0, 1, 2]
    orders = {
        tuple(training_set(labels, color_table, CONFIG, s).table["uri"].to_pylist())
        for s in range(9)
    }
    assert len(orders) > 2
    empty = labels.set_column(2, "positive_ids", pa.array([[], [99], []], lists))
    with pytest.raises(DataError, match=r"no image of 3 .*1 are of other classes.*lower"):
        training_set(empty, color_table, CONFIG, 0)


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


@pytest.fixture(scope="module")
def unbroken(ray_session, tmp_path_factory, student_config, color_table, color_world):
    """One undisturbed run and what its progress told."""
    stage = StageFolder(str(tmp_path_factory.mktemp("run")), "student", "k")
    told = []
    stats = train_student(
        config=CONFIG,
        student_config=student_config,
        class_table=color_table,
        labels=color_world,
        stage=stage,
        seed=5,
        progress=told.append,
    )
    return stage, stats, told


def test_training_learns_and_tells(unbroken, color_world, color_table):
    """Catches labels shuffled against images, a frozen model, and a lost or doubled epoch."""
    stage, stats, told = unbroken
    assert [record["epoch"] for record in told] == [0, 1, 2, 3]
    assert told[-1]["loss"] < 0.75 * told[0]["loss"]
    assert all(record["images"] == 48 for record in told)
    assert (stats["rows_in"], stats["rows_out"], stats["quarantined"]) == (48, 48, 0)
    assert not any("ray_train" in name for name in training.storage.list_names(stage.path))
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


def test_a_run_killed_between_epochs_ends_like_an_unbroken_one(unbroken, train, stage, monkeypatch):
    """Catches a lost optimizer state, schedule position or random state on resumption."""
    run_epoch = loop._run_epoch
    epochs = []

    def dying(worker, shard, epoch):
        epochs.append(epoch)
        if epochs == [0, 1, 2]:
            raise KeyboardInterrupt
        return run_epoch(worker, shard, epoch)

    monkeypatch.setattr(loop, "_run_epoch", dying)
    with pytest.raises(KeyboardInterrupt):
        train(stage)
    assert not stage.finished
    train(stage)
    assert epochs == [0, 1, 2, 2, 3]
    assert weights(stage) == weights(unbroken[0])
    assert len(training.storage.read_json(stage.file("history.json"))) == 4


def test_decoding_again_every_epoch_gives_the_same_student(unbroken, train, stage, monkeypatch):
    """Catches an order that depends on timing once the images no longer fit into memory."""
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"object_store_memory": 1.0})
    train(stage)
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
def test_two_workers_take_the_same_steps_as_one(ray_session, train, tmp_path):
    """Catches a loss that is a mean per worker, doubled gradients, and a lost last checkpoint."""
    plain = AugmentConfig(flip=False, crop_scale=(1.0, 1.0), color_jitter=0.0)
    config = CONFIG.model_copy(update={"epochs": 3, "batch_size": 48, "augment": plain})
    losses, states = [], []
    for workers in (0, 2):
        stage = StageFolder(str(tmp_path), "student", str(workers))
        train(stage, config.model_copy(update={"num_workers": workers, "cpus_per_worker": 0.5}))
        losses.append(
            [record["loss"] for record in training._read_history(stage.file("history.json"))]
        )
        states.append(load_file(stage.file("model.safetensors")))
    assert np.allclose(losses[0], losses[1], rtol=1e-3)
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=2e-3), name


def test_class_weights_follow_the_positives(color_table):
    """Catches weights by class id, a mean other than 1, and the largest for an empty class."""
    positive = pa.chunked_array([[[0, 2], [0]], [[0], [0, 2], []]], pa.list_(pa.int32()))
    assert training.class_weights(positive, 4, 0.0) is None
    half = training.class_weights(positive, 4, 0.5)
    assert np.mean(half) == pytest.approx(1)
    assert np.array(half) / half[0] == pytest.approx([1, 1, 2**0.5, 1])
    full = training.class_weights(positive, 4, 1.0)
    assert np.array(full) / full[0] == pytest.approx([1, 1, 2, 1])


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


class _LinearStudent(torch.nn.Module):
    """What a training step needs of a student, over images of 2 x 2 pixels and 5 classes."""

    image_size = 2

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(12, 5)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-2, 2, 60).view(5, 12))
            self.linear.bias.zero_()

    def standardise(self, images):
        return images

    def forward(self, images):
        return self.linear(images.flatten(1))


SHARDED_LOSSES = ("lse_sign", "bce", "asl")
SHARDED_STEPS = ((4, 4), (5, 1))  # rows of each worker; the last batch is uneven


def sharded_batches():
    """The global batches: pixels and targets, in one of them a row that is ignored."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows in map(sum, SHARDED_STEPS):
        pixels = torch.randint(0, 256, (rows, 2, 2, 3), generator=generator, dtype=torch.uint8)
        targets = torch.randint(-1, 2, (rows, 5), generator=generator, dtype=torch.int8)
        targets[1] = 0
        batches.append((pixels, targets))
    return batches


def sharded_loss(name, reduction):
    return make_loss(name, 0.5, reduction, class_weights=torch.linspace(0.5, 1.5, 5))


def run_shard(rank, folder):
    """Take the real loop's steps as one of two workers; this file's `__main__`."""
    from accelerate import Accelerator

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="unused", MASTER_PORT="0")  # Accelerate asks for them
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    accelerator = Accelerator(cpu=True)
    plain = AugmentConfig(flip=False, crop_scale=(1.0, 1.0), color_jitter=0.0)
    config = TrainConfig(augment=plain, optim=OptimConfig(grad_clip=None))
    result = {}
    for name in SHARDED_LOSSES:
        student = _LinearStudent()
        model, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), 1.0))
        loss = sharded_loss(name, "sum")
        worker = loop._Worker(
            {}, config, accelerator, student, model, optimizer, [1.0], loss, rank, 2
        )
        for sizes, (pixels, targets) in zip(SHARDED_STEPS, sharded_batches(), strict=True):
            mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            rows = torch.arange(len(pixels))[mine]
            batch = {"pixels": pixels[mine], "targets": targets[mine], "rows": rows}
            loop._train_step(worker, batch, torch.Generator(), 0)
        result[name] = student.linear.weight.detach().clone()
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_uneven_shards_give_the_gradient_of_the_global_mean(tmp_path):
    """Catches a mean per worker, which weighs a small shard's rows more, and a sum."""
    # pytest's import mode gives this module no name that a spawned process could import.
    command = [sys.executable, __file__]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in SHARDED_LOSSES:
        expected, unscaled = _LinearStudent(), _LinearStudent()
        loss = sharded_loss(name, "mean")
        for sizes, (pixels, targets) in zip(SHARDED_STEPS, sharded_batches(), strict=True):
            images = pixels.permute(0, 3, 1, 2) / 255
            step(expected, loss(expected(images), targets))
            shards = zip(unscaled(images).split(sizes), targets.split(sizes), strict=True)
            step(unscaled, sum(loss(*shard) for shard in shards) / 2)
        wanted = expected.linear.weight
        assert not torch.allclose(unscaled.linear.weight, wanted, atol=1e-3)
        for rank in range(2):
            torch.testing.assert_close(found[rank][name], wanted)


def step(student, loss):
    """Take a step of plain gradient descent at rate 1."""
    optimizer = torch.optim.SGD(student.parameters(), 1.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


if __name__ == "__main__":
    run_shard(int(sys.argv[1]), sys.argv[2])
