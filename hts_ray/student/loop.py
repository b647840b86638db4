"""The training loop that every Ray Train worker runs.

Everything random in a step follows from the seed, the epoch, the step and the worker, and an
image's augmentation from its row, so a run that goes on from a checkpoint after a crash equals one
that was never interrupted.

Shape legend: N images of a batch, C classes, P pixels of a stored side.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from hts_ray.config import TrainConfig
from hts_ray.engine.decoding import stack_pixels
from hts_ray.engine.telemetry import HeldGpus, Meter
from hts_ray.errors import DataError
from hts_ray.metrics import hico_average_precision, mean_average_precision
from hts_ray.store import storage
from hts_ray.store.provenance import usable_cores
from hts_ray.student import resume
from hts_ray.student.augment import Drawn, draw
from hts_ray.student.checkpoints import load_student
from hts_ray.student.loggers import CurveLog
from hts_ray.student.model import Student
from hts_ray.student.progress import StepLog, epoch_record
from hts_ray.student.step import Stepper, Told, take_step
from hts_ray.student.targets import dense_targets, dense_weights, validation_due

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class _Worker:
    """What a worker's epochs share."""

    job: dict[str, Any]
    config: TrainConfig
    stepper: Stepper
    rank: int
    world: int
    meter: Meter
    held: HeldGpus
    curves: CurveLog | None = None  # both of the first worker alone
    steps: StepLog | None = None

    @property
    def accelerator(self) -> Accelerator:
        """Accelerate's view of this worker."""
        return self.stepper.accelerator

    @property
    def steps_per_epoch(self) -> int:
        rows: int = self.job["rows"] // self.world
        return max(1, -(-rows // self.stepper.batch_size))


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

    with torch.random.fork_rng():
        worker = _start(job)
        position = _resume(worker)
        shard = ray.train.get_dataset_shard("train")
        with ExitStack() as stack:
            if worker.rank == 0:
                first = position.epoch * worker.steps_per_epoch + position.step
                log = CurveLog(worker.config.loggers, job["curves"], job["config"], first)
                worker.curves = stack.enter_context(closing(log))
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
    """Load the zero-shot student and make it ready for steps among Ray's workers."""
    import ray.train

    config = TrainConfig.model_validate(job["config"])
    meter = Meter(**job["meter"])
    held = HeldGpus(meter, float(config.gpu))
    torch.set_num_threads(_threads(config, local=job["local"] is not None))
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    stepper = Stepper.of(load_student(job["initial"]), config, job["class_weights"], world)
    return _Worker(job, config, stepper, rank, world, meter, held)


def _threads(config: TrainConfig, *, local: bool) -> int:
    """Return the torch threads of this worker: its logical CPUs, or its share of the node's cores.

    Sums, and with them the last digits of the weights, depend on the number of threads. In the
    driver's process it is one: there they would fight with the processes that decode.
    """
    import ray
    import ray.train

    if config.cpus_per_worker != "auto" or config.gpu or local:
        return max(1, int(config.worker_cpus))
    here = ray.get_runtime_context().get_node_id()
    logical = next(node["Resources"]["CPU"] for node in ray.nodes() if node["NodeID"] == here)
    # A node may count more CPUs than there are, and a container may see more than it may use.
    cores = min(usable_cores(), int(logical))
    workers: int = ray.train.get_context().get_local_world_size()
    return max(1, cores // workers)


class _Sums:
    """An epoch's loss and images on this worker, read from a step when the next one is queued."""

    def __init__(self, worker: _Worker, position: resume.Position) -> None:
        self._worker, self._epoch = worker, position.epoch
        # What all workers had before a crash is carried on by the first.
        mine = worker.rank == 0
        self.loss, self.images = (position.loss_sum, position.images) if mine else (0.0, 0)
        self._queued: tuple[Told, float, int] | None = None

    def add(self, told: Told, lr: float, number: int) -> None:
        """Take on a step that is queued, of a number over all epochs, and read the one before."""
        before, self._queued = self._queued, (told, lr, number)
        self._read(before)

    def _read(self, queued: tuple[Told, float, int] | None) -> None:
        """Raise _BadLossError on every worker when the loss of one is not finite."""
        from accelerate.utils import gather_object

        if queued is None:
            return
        told, lr, number = queued
        loss, finite, norm = told.read()
        if not finite:
            bad = [] if math.isfinite(loss) else told.rows()[:8]
            bad = gather_object(bad) if self._worker.world > 1 else bad
            raise _BadLossError(f"the loss is not finite in epoch {self._epoch}", bad[:16])
        self.loss, self.images = self.loss + loss, self.images + len(told)
        curves = self._worker.curves
        if curves is not None and number % self._worker.config.log_every == 0:
            curves.log_step(loss / len(told), lr, norm, number)

    def everywhere(self) -> tuple[float, int]:
        """Return the loss and the images of all workers, up to the step that is queued."""
        queued, self._queued = self._queued, None
        self._read(queued)
        accelerator = self._worker.accelerator
        mine = [self.loss, float(self.images)]
        totals = torch.tensor(mine, dtype=torch.float64, device=accelerator.device)
        loss, images = accelerator.reduce(totals, "sum").tolist()
        return loss, int(images)


def _run_epoch(worker: _Worker, shard: Any, position: resume.Position) -> resume.Position:
    """Finish the epoch that runs; returns the beginning of the next one."""
    started = time.monotonic() - position.seconds
    epoch, config = position.epoch, worker.config
    first = epoch * worker.steps_per_epoch
    sums = _Sums(worker, position)
    worker.stepper.model.train()
    every = config.checkpoint_every_steps
    lr = 0.0
    for step, batch in enumerate(_batches(worker, shard, epoch)):
        if step < position.step:
            continue
        torch.manual_seed(_seed(worker, epoch, step))
        lr = worker.stepper.optimizer.set_rates(first + step, worker.steps_per_epoch)
        with worker.meter.busy():
            sums.add(take_step(worker.stepper, batch), lr, first + step)
        worker.meter.count(images=len(batch["rows"]))
        worker.held.tick()
        done = step + 1
        if worker.steps is not None and worker.steps.due and sums.images:
            # This worker's, close enough for a display.
            worker.steps.tell(epoch, done * config.batch_size, sums.loss / sums.images)
        if every is not None and done % every == 0 and done < worker.steps_per_epoch:
            within = (done, *sums.everywhere(), time.monotonic() - started, worker.world)
            _report_checkpoint(worker, resume.Position(position.history, *within))
    loss, images = sums.everywhere()
    if not images:
        raise DataError("no image could be read in a whole epoch: see the quarantine")
    record = epoch_record(epoch, loss, lr, images, time.monotonic() - started)
    record["validation_mAP"] = _validate(worker, epoch)
    return resume.Position([*position.history, record], workers=worker.world)


def _validate(worker: _Worker, epoch: int) -> float | None:
    """Return the validation images' mAP (HICO, in 0..1) where it is due after `epoch`.

    Every worker scores its share. NaN when no image could be read or no class has a positive.
    The student's mode is kept, and nothing of the training changes.
    """
    import ray.train
    from accelerate.utils import broadcast_object_list

    truth_NC = worker.job["validation"]
    if truth_NC is None or not validation_due(worker.config, epoch):
        return None
    batches = ray.train.get_dataset_shard("validation").iter_torch_batches(
        batch_size=worker.stepper.batch_size,
        collate_fn=_collate(worker.stepper.student.image_size),
        device=worker.accelerator.device,
    )
    student: Student = worker.stepper.optimizer.published
    mode = student.training
    student.eval()
    found: list[tuple[Any, Any]] = []
    with torch.no_grad(), worker.accelerator.autocast():
        for batch in batches:
            logits_BC = student(student.normalise(batch["pixels"]))
            found.append((batch["rows"].cpu().numpy(), logits_BC.float().cpu().numpy()))
    student.train(mode)
    shares = [found]
    if worker.world > 1:
        everyones: list[Any] | None = [None] * worker.world if worker.rank == 0 else None
        torch.distributed.gather_object(found, everyones)
        shares = everyones or []
    value = [_whole_mean(shares, truth_NC)]
    return float(broadcast_object_list(value)[0] if worker.world > 1 else value[0])


def _whole_mean(shares: list[list[tuple[Any, Any]]], truth_NC: Any) -> float:
    """Return the mAP over the rows and logits of all workers' shares; NaN for none."""
    pairs = [pair for share in shares for pair in share]
    if not pairs:
        return float("nan")
    rows_N = np.concatenate([rows for rows, _ in pairs])
    logits_NC = np.concatenate([logits for _, logits in pairs])
    order_N = np.argsort(rows_N)  # ties in a class are broken by the order
    aps_C = hico_average_precision(logits_NC[order_N], truth_NC[rows_N[order_N]])
    return mean_average_precision(aps_C)


def _seed(worker: _Worker, epoch: int, step: int) -> int:
    """Return the seed of one step."""
    parts = [worker.job["seed"], epoch, step + 1, worker.rank]
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _batches(worker: _Worker, shard: Any, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield an epoch's steps, as `take_step` wants them.

    Ray makes batches in threads of its own and copies the next one to the device meanwhile.
    """
    if worker.rank == 0:  # the order follows from it; all workers wait for each other
        storage.write_json(worker.job["epoch"], epoch)
    size = worker.job["stored_size"]
    drawn = partial(
        draw, seed=worker.job["seed"], epoch=epoch, stored=size, config=worker.config.augment
    )
    device = worker.accelerator.device
    yield from shard.iter_torch_batches(
        batch_size=worker.stepper.batch_size,
        collate_fn=_collate(size, worker.stepper.student, drawn),
        device=device,
        pin_memory=device.type == "cuda",
        prefetch_batches=2,
        drop_last=False,
    )


def _collate(
    size: int, student: Student | None = None, drawn: Callable[[list[int]], Drawn] | None = None
) -> Any:
    """Make the object that turns Arrow batches into tensors; without a student, of images alone."""
    from ray.data.collate_fn import ArrowBatchCollateFn

    class Collate(ArrowBatchCollateFn):  # type: ignore[misc]
        def __call__(self, batch: pa.Table) -> dict[str, torch.Tensor]:
            tensors = {
                "pixels": torch.from_numpy(stack_pixels(batch, size)),
                "rows": torch.from_numpy(batch["row"].to_numpy().copy()),
            }
            if student is None or drawn is None:
                return tensors
            tensors["augmentation"] = drawn(batch["row"].to_pylist()).table(student.image_size)
            classes = len(student.class_table)
            positive = batch["positive"].combine_chunks()
            ignored = batch["ignored"].combine_chunks()
            tensors["targets"] = torch.from_numpy(dense_targets(positive, ignored, classes))
            if "weight" in batch.column_names:
                weights_NC = dense_weights(positive, batch["weight"].combine_chunks(), classes)
                tensors["weights"] = torch.from_numpy(weights_NC)
            return tensors

    return Collate()


def _report(worker: _Worker, position: resume.Position) -> None:
    """Tell Ray Train about a finished epoch, with a checkpoint when one is due."""
    import ray.train

    epochs, record = position.epoch, position.history[-1]
    if worker.curves is not None:
        worker.curves.log_epoch(record, epochs * worker.steps_per_epoch)
    if epochs % worker.config.checkpoint_every == 0 or epochs == worker.config.epochs:
        _report_checkpoint(worker, position)
    else:
        ray.train.report(record)
    if worker.rank == 0:
        storage.write_json(worker.job["history"], position.history)


def _report_checkpoint(worker: _Worker, position: resume.Position) -> None:
    """Hand a checkpoint to Ray Train, on every worker; the first one writes it."""
    import ray.train

    metrics = position.history[-1] if position.history else {"step": position.step}
    if worker.rank != 0:
        ray.train.report(metrics)
        return
    optimizer, scaler = worker.stepper.optimizer, worker.accelerator.scaler
    files = resume.checkpoint_files(optimizer, scaler, position)
    if worker.job["local"] is not None:  # Ray Train's local mode keeps no checkpoints
        resume.write_local(worker.job["local"], files)
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _resume(worker: _Worker) -> resume.Position:
    """Load the last checkpoint, where there is one, and return how far the run was."""
    import ray.train

    checkpoint, unlisted = ray.train.get_checkpoint(), worker.job["unlisted"]
    if checkpoint is None and unlisted is None:
        return resume.Position(workers=worker.world)
    with checkpoint.as_directory() if checkpoint else nullcontext(unlisted) as folder:
        files = resume.read_files(folder)
    scaler = worker.accelerator.scaler
    return resume.restore(files, worker.stepper.optimizer, scaler, worker.world)
