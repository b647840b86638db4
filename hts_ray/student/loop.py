"""The training loop that every Ray Train worker runs.

Everything random in a step follows from the seed, the epoch, the step and the worker, so a run
that goes on from a checkpoint after a crash equals one that was never interrupted.

Shape legend: N images of a batch, C classes, P pixels of a stored side.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import OptimConfig, TrainConfig
from hts_ray.engine.image_pass import stack_pixels
from hts_ray.engine.telemetry import HeldGpus, Meter
from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.student.loggers import CurveLog
from hts_ray.student.progress import StepLog
from hts_ray.student.resume import (
    Position,
    checkpoint_files,
    read_files,
    read_local,
    read_stored,
    restore,
    write_local,
)
from hts_ray.student.validation import share_of, validation_mean_ap

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch.optim.swa_utils import AveragedModel

    from hts_ray.student.model import Student

_SHUFFLE_BYTES = 1 << 30  # of decoded images that a worker holds to draw its batches from


def dense_targets(
    positive: pa.Array | pa.ChunkedArray, ignored: pa.Array | pa.ChunkedArray, num_classes: int
) -> npt.NDArray[np.int8]:
    """Return targets (N, C) int8 of position lists: 1 positive, 0 ignored, -1 the others.

    A class that is in both lists is positive.
    """
    targets_NC = np.full((len(positive), num_classes), -1, dtype=np.int8)
    for lists, value in ((ignored, 0), (positive, 1)):
        rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
        targets_NC[rows, pc.list_flatten(lists).to_numpy(zero_copy_only=False)] = value
    return targets_NC


def dense_weights(
    positive: pa.Array | pa.ChunkedArray, weight: pa.Array | pa.ChunkedArray, num_classes: int
) -> npt.NDArray[np.float32]:
    """Return label weights (N, C) float32: those given with the positives, 1 elsewhere."""
    weights_NC = np.ones((len(positive), num_classes), dtype=np.float32)
    rows = pc.list_parent_indices(positive).to_numpy(zero_copy_only=False)
    columns = pc.list_flatten(positive).to_numpy(zero_copy_only=False)
    weights_NC[rows, columns] = pc.list_flatten(weight).to_numpy(zero_copy_only=False)
    return weights_NC


def learning_rate_factor(
    step: int, total: int, optim: OptimConfig, steps_per_epoch: int = 1
) -> float:
    """Return the share of the learning rate at `step` of `total`, in 0..1.

    Warm-up is linear over `warmup_steps`. `cosine` falls to 0 once; `warm_restarts` does so in
    every `restart_epochs` epochs anew (SGDR, T_mult 1; DEFR restarts after 5 epochs).
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "warm_restarts":
        period = optim.restart_epochs * steps_per_epoch
        done = step % period / period
    else:
        done = min(1.0, (step - optim.warmup_steps) / max(1, total - optim.warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class _Worker:
    """What a worker's epochs share."""

    job: dict[str, Any]
    config: TrainConfig
    accelerator: Accelerator
    student: Student
    average: AveragedModel | None  # of the student
    model: Any  # the student as Accelerate wrapped it
    optimizer: Any
    base_lrs: list[float]
    loss: Any
    rank: int
    world: int
    meter: Meter
    held: HeldGpus
    curves: CurveLog | None = None  # both of the first worker alone
    steps: StepLog | None = None

    @property
    def batch_size(self) -> int:
        """Images of a step on this worker."""
        return self.config.batch_size // self.world

    @property
    def steps_per_epoch(self) -> int:
        rows: int = self.job["rows"] // self.world
        return max(1, -(-rows // self.batch_size))

    @property
    def published(self) -> Student:
        """The student that would be published now."""
        return self.student if self.average is None else cast("Student", self.average.module)


@dataclass
class _Record:
    """One epoch, over all workers."""

    epoch: int
    loss: float
    lr: float
    images: int
    images_per_second: float
    seconds: float
    validation_mAP: float | None = None


class _BadLossError(Exception):
    """The loss of some worker is not finite; `rows` are rows of the training table."""

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message, rows)
        self.error = {"message": message, "rows": rows}


def train_loop(job: dict[str, Any]) -> dict[str, Any]:
    """Train from the last checkpoint to the last epoch; what every Ray Train worker runs.

    A loss that is not finite is returned, not raised: Ray Train would try it again.
    """
    import ray.train
    import torch

    with torch.random.fork_rng():
        worker = _start(job)
        position = _resume(worker)
        shard = ray.train.get_dataset_shard("train")
        with ExitStack() as stack:
            if worker.rank == 0:
                worker.curves = stack.enter_context(closing(_curves(worker, position)))
                worker.steps = stack.enter_context(StepLog(job["steps"], job["rows"]).writing())
            try:
                while position.epoch < worker.config.epochs:
                    position = _run_epoch(worker, shard, position)
                    _report(worker, position)
                    worker.held.tick()  # validating and storing take time too
            except _BadLossError as error:
                return {"error": error.error}
    return {"error": None}


def _start(job: dict[str, Any]) -> _Worker:
    """Load the zero-shot student and hand it to Accelerate, which joins Ray's process group."""
    import ray.train
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.optim.swa_utils import AveragedModel

    from hts_ray.losses import make_loss
    from hts_ray.student.checkpoints import load_student
    from hts_ray.student.model import checkpoint_activations, parameter_groups, set_trainable

    config = TrainConfig.model_validate(job["config"])
    meter = Meter(**job["meter"])
    held = HeldGpus(meter, float(config.use_gpu))
    if job["local"] is not None:
        # The driver's process may have trained with other settings, and its threads would fight
        # with the processes that decode; Ray limits a worker's own threads likewise.
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    accelerator = Accelerator(mixed_precision=job["precision"], cpu=not config.use_gpu)
    student = load_student(job["initial"])
    set_trainable(student, config.trainable, config.trainable_blocks)
    if config.learn_logit_scale:
        student.learn_logit_scale()
    student.to(accelerator.device)
    average = None
    if config.ema_decay is not None:
        average = AveragedModel(student, multi_avg_fn=_moving_average(config.ema_decay))
    if config.gradient_checkpointing:
        checkpoint_activations(student)
    if config.compile:
        student.visual.compile()
    student.train()
    groups = parameter_groups(student, config.optim)
    base_lrs = [group["lr"] for group in groups]
    model, optimizer = accelerator.prepare(student, torch.optim.AdamW(groups))
    weights = job["class_weights"]
    loss = make_loss(
        config.loss,
        config.loss_temperature,
        reduction="sum",
        parameters=config.loss_parameters,
        class_weights=None if weights is None else torch.tensor(weights),
    )
    context = ray.train.get_context()
    return _Worker(
        job=job,
        config=config,
        accelerator=accelerator,
        student=student,
        average=average,
        model=model,
        optimizer=optimizer,
        base_lrs=base_lrs,
        loss=loss.to(accelerator.device),
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        meter=meter,
        held=held,
    )


def average_decay(steps: int, decay: float) -> float:
    """Return the decay of a moving average of weights after `steps` steps; it grows to `decay`.

    It is 0 at first and then at most (1 + n) / (10 + n), or a short run's average would be its
    start. Source: TensorFlow's ExponentialMovingAverage with num_updates.
    """
    return min(decay, (1 + steps) / (10 + steps)) if steps else 0.0


def _moving_average(decay: float) -> Any:
    """Return the update of an exponential moving average, as `AveragedModel` takes it."""
    import torch

    @torch.no_grad()
    def update(averages: list[Any], values: list[Any], steps: torch.Tensor | int) -> None:
        torch._foreach_lerp_(averages, values, 1 - average_decay(int(steps), decay))

    return update


def _curves(worker: _Worker, position: Position) -> CurveLog:
    return CurveLog(
        worker.accelerator,
        worker.config.loggers,
        folder=worker.job["curves"],
        settings=worker.job["config"],
        first_step=position.epoch * worker.steps_per_epoch + position.step,
    )


def _run_epoch(worker: _Worker, shard: Any, position: Position) -> Position:
    """Finish the epoch that runs; returns the beginning of the next one."""
    import torch

    started = time.monotonic() - position.seconds
    epoch = position.epoch
    first = epoch * worker.steps_per_epoch
    # This worker's loss and images; what all had before a crash is carried on by the first.
    carried = [position.loss_sum, float(position.images)] if worker.rank == 0 else [0.0, 0.0]
    totals = torch.tensor(carried, dtype=torch.float64, device=worker.accelerator.device)
    worker.model.train()
    every = worker.config.checkpoint_every_steps
    lr = 0.0
    for step, batch in enumerate(_batches(worker, shard, epoch)):
        if step < position.step:
            continue
        torch.manual_seed(_seed(worker, epoch, step))
        lr = _set_learning_rate(worker, first + step)
        with worker.meter.busy():
            result = _train_step(worker, batch, epoch)
        worker.meter.count(images=len(batch["rows"]))
        worker.held.tick()
        totals += result.totals
        if worker.curves is not None and (first + step) % worker.config.log_every == 0:
            worker.curves.log(result.values(lr), first + step)
        done = step + 1
        if worker.steps is not None and worker.steps.due:
            loss_sum, images = totals.tolist()  # its own, which is close enough to tell
            worker.steps.tell(epoch, done * worker.config.batch_size, loss_sum / images)
        if every is not None and done % every == 0 and done < worker.steps_per_epoch:
            loss_sum, images = worker.accelerator.reduce(totals.clone(), "sum").tolist()
            _report_checkpoint(
                worker,
                Position(
                    position.history,
                    done,
                    loss_sum,
                    int(images),
                    time.monotonic() - started,
                    worker.world,
                ),
            )
    totals = worker.accelerator.reduce(totals, "sum")
    loss, images = float(totals[0]), int(totals[1])
    if not images:
        raise DataError("no image could be read in a whole epoch: see the quarantine")
    seconds = time.monotonic() - started
    record = _Record(epoch, loss / images, lr, images, images / seconds, seconds)
    record = replace(record, validation_mAP=_validate(worker, epoch))
    return Position([*position.history, asdict(record)], workers=worker.world)


def _validate(worker: _Worker, epoch: int) -> float | None:
    """Return the validation images' mAP where it is due after `epoch`."""
    import ray.train

    truth_NC = worker.job["validation"]
    last = epoch + 1 == worker.config.epochs
    if truth_NC is None or not (last or (epoch + 1) % worker.config.validate_every == 0):
        return None
    shard = ray.train.get_dataset_shard("validation")
    size = worker.student.image_size
    batches = shard.iter_torch_batches(
        batch_size=worker.batch_size,
        collate_fn=_collate(size, None),
        device=worker.accelerator.device,
    )
    mine = share_of(iter(batches), worker.rank, worker.world)
    return validation_mean_ap(worker.published, mine, truth_NC, worker.accelerator)


def _seed(worker: _Worker, epoch: int, step: int = -1) -> int:
    """Return the seed of one step, or with -1 that of an epoch's order."""
    parts = [worker.job["seed"], epoch, step + 1, worker.rank]
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _batches(worker: _Worker, shard: Any, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield an epoch's steps: pixels uint8 (N, P, P, 3), rows (N,), targets and weights (N, C).

    Weights are there with soft labels only.
    """
    size = worker.job["stored_size"]
    rows = min(worker.job["rows"], max(worker.batch_size, _SHUFFLE_BYTES // (size * size * 3)))
    yield from shard.iter_torch_batches(
        batch_size=worker.batch_size,
        collate_fn=_collate(size, len(worker.student.class_table)),
        device=worker.accelerator.device,
        local_shuffle_buffer_size=rows,
        local_shuffle_seed=_seed(worker, epoch),
        prefetch_batches=2,
        drop_last=False,
    )


def _collate(size: int, num_classes: int | None) -> Any:
    """Make the object that turns Arrow batches into tensors; without classes, of images alone."""
    import torch
    from ray.data.collate_fn import ArrowBatchCollateFn

    class Collate(ArrowBatchCollateFn):  # type: ignore[misc]
        def __call__(self, batch: pa.Table) -> dict[str, torch.Tensor]:
            tensors = {
                "pixels": torch.from_numpy(stack_pixels(batch, size)),
                "rows": torch.from_numpy(batch["row"].to_numpy().copy()),
            }
            if num_classes is None:
                return tensors
            positive = batch["positive"].combine_chunks()
            ignored = batch["ignored"].combine_chunks()
            tensors["targets"] = torch.from_numpy(dense_targets(positive, ignored, num_classes))
            if "weight" in batch.column_names:
                weights_NC = dense_weights(positive, batch["weight"].combine_chunks(), num_classes)
                tensors["weights"] = torch.from_numpy(weights_NC)
            return tensors

    return Collate()


def _set_learning_rate(worker: _Worker, step: int) -> float:
    """Set the rate of every group for this step; returns the trunk's, or the head's alone."""
    total = worker.config.epochs * worker.steps_per_epoch
    factor = learning_rate_factor(step, total, worker.config.optim, worker.steps_per_epoch)
    for group, base in zip(worker.optimizer.param_groups, worker.base_lrs, strict=True):
        group["lr"] = base * factor
    return worker.base_lrs[0] * factor


@dataclass
class _Step:
    """What a step tells: this worker's summed loss and images, and the gradient's norm."""

    totals: torch.Tensor
    gradient_norm: Any

    def values(self, lr: float) -> dict[str, float]:
        loss_sum, images = self.totals.tolist()
        values = {"train/loss": loss_sum / images, "train/lr": lr}
        if self.gradient_norm is not None:
            values["train/gradient_norm"] = float(self.gradient_norm)
        return values


def _train_step(worker: _Worker, batch: dict[str, torch.Tensor], epoch: int) -> _Step:
    """Take one optimizer step, in `accumulation` forward passes.

    Raises _BadLossError on every worker, before the step, when one worker's loss is not finite.
    """
    import torch

    from hts_ray.student.augment import augment

    accelerator, size = worker.accelerator, len(batch["rows"])
    totals = torch.tensor([0.0, size], dtype=torch.float64, device=accelerator.device)
    count = accelerator.reduce(totals[1].clone(), "sum") if worker.world > 1 else size
    part_size = -(-worker.batch_size // worker.config.accumulation)
    for start in range(0, size, part_size):
        part = {name: value[start : start + part_size] for name, value in batch.items()}
        last = start + part_size >= size
        with nullcontext() if last else accelerator.no_sync(worker.model):
            images = augment(part["pixels"], worker.student.image_size, worker.config.augment)
            logits = worker.model(worker.student.standardise(images))
            loss_sum = worker.loss(logits, part["targets"], part.get("weights"))
            # DDP averages gradients over workers; their sum over the global batch is meant.
            accelerator.backward(loss_sum * worker.world / count)
        totals[0] += loss_sum.detach()
    infinite = (~torch.isfinite(totals[0])).double()
    everywhere = accelerator.reduce(infinite.clone(), "sum") if worker.world > 1 else infinite
    if everywhere:
        _refuse(worker, batch["rows"], not infinite, epoch)
    norm = None
    if worker.config.optim.grad_clip is not None:
        norm = accelerator.clip_grad_norm_(worker.model.parameters(), worker.config.optim.grad_clip)
    worker.optimizer.step()
    worker.optimizer.zero_grad()
    if worker.average is not None:
        worker.average.update_parameters(worker.student)
    return _Step(totals, norm)


def _refuse(worker: _Worker, rows: torch.Tensor, finite: bool, epoch: int) -> None:
    from accelerate.utils import gather_object

    mine = [] if finite else rows.tolist()[:8]
    found = gather_object(mine) if worker.world > 1 else mine
    raise _BadLossError(f"the loss is not finite in epoch {epoch}", list(found)[:16])


def _report(worker: _Worker, position: Position) -> None:
    """Tell Ray Train about a finished epoch, with a checkpoint when one is due."""
    import ray.train

    epochs, record = position.epoch, position.history[-1]
    if worker.curves is not None:
        names = ("loss", "images_per_second", "validation_mAP")
        values = {f"epoch/{name}": record[name] for name in names if record[name] is not None}
        worker.curves.log(values, epochs * worker.steps_per_epoch)
        worker.curves.flush()
    if epochs % worker.config.checkpoint_every == 0 or epochs == worker.config.epochs:
        _report_checkpoint(worker, position)
    else:
        ray.train.report(record)
    if worker.rank == 0:
        storage.write_json(worker.job["history"], position.history)


def _report_checkpoint(worker: _Worker, position: Position) -> None:
    """Hand a checkpoint to Ray Train, on every worker; the first one writes it."""
    import ray.train

    metrics = position.history[-1] if position.history else {"step": position.step}
    if worker.rank != 0:
        ray.train.report(metrics)
        return
    files = checkpoint_files(
        worker.student, worker.average, worker.optimizer, worker.accelerator, position
    )
    if worker.job["local"] is not None:  # Ray Train's local mode keeps no checkpoints
        write_local(worker.job["local"], files)
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _resume(worker: _Worker) -> Position:
    """Load the last checkpoint, where there is one, and return where the run stood."""
    import ray.train

    files = None
    if worker.job["local"] is not None:
        files = read_local(worker.job["local"])
    elif (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            files = read_files(Path(folder))
    elif worker.job["unlisted"] is not None:
        files = read_stored(worker.job["unlisted"])
    if files is None:
        return Position(workers=worker.world)
    return restore(
        files, worker.student, worker.average, worker.optimizer, worker.accelerator, worker.world
    )
