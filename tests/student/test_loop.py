"""The training loop: gradients over shards and parts, label weights, averages, waiting."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
import torch

from hts_ray.config import AugmentConfig, OptimConfig, TrainConfig
from hts_ray.engine.telemetry import HeldGpus, Meter
from hts_ray.losses import make_loss
from hts_ray.metrics import hico_average_precision, mean_average_precision
from hts_ray.student import loop
from hts_ray.student.augment import draw
from hts_ray.student.optimizer import Optimizer
from hts_ray.student.resume import Position
from hts_ray.student.step import Stepper, take_step

PLAIN = AugmentConfig(flip=False, crop_scale=(1.0, 1.0), color_jitter=0.0)


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
    config = TrainConfig(augment=PLAIN, optim=OptimConfig(grad_clip=None))
    result = {}
    for name in SHARDED_LOSSES:
        student = _LinearStudent()
        model, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), 1.0))
        loss, own = sharded_loss(name, "sum"), Optimizer(student, optimizer, config)
        stepper = Stepper(config, accelerator, student, model, own, loss, world=2)
        for sizes, (pixels, targets) in zip(SHARDED_STEPS, sharded_batches(), strict=True):
            mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            take_step(stepper, batch_of(pixels[mine], targets[mine]))
        result[name] = student.linear.weight.detach().clone()
    result["epoch"] = sharded_epoch(make_stepper({}, world=2), rank)
    result["error"] = sharded_epoch(make_stepper({}, world=2), rank, spoiled=5)
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def sharded_epoch(stepper, rank, spoiled=None):
    """Run the loop's epoch over a worker's shards, or over all rows if there is but one.

    Returns its loss and images, or the error of a row whose weights are not numbers.
    """

    def batches(*_):
        for sizes, (pixels, targets) in zip(SHARDED_STEPS, sharded_batches(), strict=True):
            batch = batch_of(pixels, targets, weights=torch.ones(len(pixels), 5))
            if spoiled is not None and len(pixels) > spoiled:
                batch["weights"][spoiled] = torch.nan
            first = sum(sizes[:rank])
            end = first + sizes[rank] if stepper.world > 1 else len(pixels)
            yield {name: value[first:end] for name, value in batch.items()}

    stepper.loss.checks_values = False
    meter, job = Meter("train", "test"), {"rows": 14, "seed": 0, "validation": None}
    held = HeldGpus(meter, 0.0)
    worker = loop._Worker(job, stepper.config, stepper, rank, stepper.world, meter, held)
    with patch.object(loop, "_batches", batches):
        try:
            done = loop._run_epoch(worker, None, Position(workers=stepper.world))
        except loop._BadLossError as error:
            return error.error["rows"]
    return [done.history[0]["loss"], done.history[0]["images"]]


def test_uneven_shards_give_the_gradient_of_the_global_mean(tmp_path):
    """Catches a mean per worker, which weighs a small shard's rows more, and a sum.

    And an epoch's loss of one worker alone, and a loss that is not finite on one worker of which
    the other never hears: it would wait for ever.
    """
    # pytest's import mode gives this module no name that a spawned process could import.
    command = [sys.executable, __file__]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = sharded_epoch(make_stepper({}), 0)
    for of_worker in found:
        assert of_worker["epoch"] == pytest.approx(alone, rel=1e-6)
        assert of_worker["error"] == [4, 5, 6, 7]
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


def batch_of(pixels, targets, **more):
    rows = torch.arange(len(pixels))
    table = draw(range(len(rows)), 0, 0, 2, PLAIN).table(2)
    return {"pixels": pixels, "targets": targets, "rows": rows, "augmentation": table, **more}


def make_stepper(changes, world=1):
    """Return what takes the steps of a linear student, with plain gradient descent at rate 1."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optim = OptimConfig(grad_clip=changes.pop("grad_clip", None))
    config = TrainConfig(augment=PLAIN, optim=optim, **changes)
    student = _LinearStudent()
    average = config.ema_decay and copy.deepcopy(student)
    model, inner = accelerator.prepare(student, torch.optim.SGD(student.parameters(), 1.0))
    optimizer = Optimizer(student, inner, config, average)
    loss = sharded_loss("asl", "sum")
    return Stepper(config, accelerator, student, model, optimizer, loss, world)


def after_steps(changes, batches, weights=None):
    """Return what took the loop's steps with some settings."""
    stepper = make_stepper(dict(changes))
    for pixels, targets in batches:
        more = {} if weights is None else {"weights": weights(targets)}
        take_step(stepper, batch_of(pixels, targets, **more))
    return stepper


def test_parts_of_a_step_add_up_to_the_whole_step():
    """Catches a mean over parts instead of images, a step a part, and a part left out."""
    whole = after_steps({"batch_size": 8}, sharded_batches())
    parts = after_steps({"batch_size": 8, "accumulation": 3}, sharded_batches())
    start = _LinearStudent().linear.weight
    assert not torch.allclose(whole.student.linear.weight, start, atol=1e-2)
    torch.testing.assert_close(parts.student.linear.weight, whole.student.linear.weight)


def test_label_weights_reach_the_loss_of_every_part():
    """Catches soft labels that are read and never used, and weights of another part's rows."""
    half = lambda targets: torch.where(targets == 1, 0.5, 1.0)  # noqa: E731
    plain = after_steps({}, sharded_batches())
    soft = after_steps({}, sharded_batches(), half)
    parts = after_steps({"batch_size": 8, "accumulation": 4}, sharded_batches(), half)
    assert not torch.allclose(plain.student.linear.weight, soft.student.linear.weight, atol=1e-3)
    torch.testing.assert_close(parts.student.linear.weight, soft.student.linear.weight)


def test_moving_average_follows_the_formula():
    """Catches an average of the start only, a decay without warm-up, and a lagging step."""
    batches = [batch for batch in sharded_batches() for _ in range(2)]
    expected = None
    for n in range(1, len(batches) + 1):
        weight = after_steps({}, batches[:n]).student.linear.weight.detach()
        decay = min(0.3, n / (9 + n))  # n - 1 steps are in the average already
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
    averaged = after_steps({"ema_decay": 0.3}, batches)
    assert averaged.optimizer.published is averaged.optimizer.average
    torch.testing.assert_close(averaged.optimizer.published.linear.weight.detach(), expected)
    assert not torch.allclose(expected, averaged.student.linear.weight, atol=1e-3)


class _Curves:
    """Keeps what is logged of steps."""

    def __init__(self):
        self.steps = {}

    def log_step(self, loss, lr, norm, step):
        self.steps[step] = (loss, norm)


def run_epoch(monkeypatch, count, changes, spoiled=None):
    """Run the loop's epoch over batches of 8 rows; `spoiled` gets a weight that is not a number."""
    torch.manual_seed(0)
    batches = []
    for number in range(count):
        pixels = torch.randint(0, 256, (8, 2, 2, 3), dtype=torch.uint8)
        weights = torch.ones(8, 5)
        weights[:] = torch.nan if number == spoiled else 1.0
        batch = batch_of(pixels, torch.randint(-1, 2, (8, 5), dtype=torch.int8), weights=weights)
        batches.append({**batch, "rows": batch["rows"] + 8 * number})
    monkeypatch.setattr(loop, "_batches", lambda *_: iter(batches))
    stepper, meter, curves = make_stepper(changes), Meter("train", "test"), _Curves()
    stepper.loss.checks_values = False
    job = {"rows": 8 * count, "seed": 0, "validation": None}
    held = HeldGpus(meter, 0.0)
    worker = loop._Worker(job, stepper.config, stepper, 0, 1, meter, held, curves)
    return loop._run_epoch(worker, None, Position()), curves


def test_a_step_waits_for_the_device_once_and_late(monkeypatch):
    """Catches a GPU that idles because the host looks at a number before it queues more work."""
    asked = Counter()

    def counted(name):
        method = getattr(torch.Tensor, name)

        def call(*arguments, **named):
            asked[name] += 1
            return method(*arguments, **named)

        monkeypatch.setattr(torch.Tensor, name, call)

    changes = {"batch_size": 8, "accumulation": 2, "ema_decay": 0.9, "log_every": 1}
    changes["grad_clip"] = 1.0
    run_epoch(monkeypatch, 2, dict(changes))
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        counted(name)
    totals = []
    for count in (4, 14):
        asked.clear()
        _, curves = run_epoch(monkeypatch, count, dict(changes))
        totals.append(asked.total())
        assert sorted(curves.steps) == list(range(count))
    assert totals[1] - totals[0] <= 10, asked


@pytest.mark.parametrize("spoiled", [1, 3, 4])
def test_a_loss_that_is_not_finite_names_its_own_images_and_spoils_no_checkpoint(
    monkeypatch, spoiled
):
    """Catches a late look that names the next step's images or comes after a checkpoint."""
    written = []
    monkeypatch.setattr(loop, "_report_checkpoint", lambda _, at: written.append(at.step))
    changes = {"batch_size": 8, "checkpoint_every_steps": 2}
    with pytest.raises(loop._BadLossError) as caught:
        run_epoch(monkeypatch, 5, changes, spoiled)
    assert caught.value.error["rows"] == list(range(8 * spoiled, 8 * spoiled + 8))
    assert written == [2, 4][: spoiled // 2]
    history, _ = run_epoch(monkeypatch, 5, changes)
    assert history.history[0]["images"] == 40


def test_shares_of_the_validation_images_are_measured_together():
    """Catches a mean of the workers' means, and rows that slip against their annotations."""
    random = np.random.default_rng(0)
    truth_NC = random.choice([1, -1], size=(41, 5)).astype(np.int8)
    logits_NC = random.normal(size=(41, 5)).astype(np.float32)
    logits_NC[::2] = 0  # ties are broken by the order of the rows
    rows_N = random.permutation(41)[:40]
    parts = [(rows, logits_NC[rows]) for rows in np.split(rows_N, 4)]
    found = loop._whole_mean([parts[:1], parts[1:], []], truth_NC)
    kept = np.sort(rows_N)
    aps = hico_average_precision(logits_NC[kept], truth_NC[kept])
    assert found == mean_average_precision(aps)
    assert np.isnan(loop._whole_mean([[], []], truth_NC))


def step(student, loss):
    """Take a step of plain gradient descent at rate 1."""
    optimizer = torch.optim.SGD(student.parameters(), 1.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


if __name__ == "__main__":
    run_shard(int(sys.argv[1]), sys.argv[2])
