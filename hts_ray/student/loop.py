"""The training loop that every Ray Train worker runs, and the checkpoints it goes on from.

Every epoch is seeded by its number alone, so a run that goes on from a checkpoint after a crash
equals one that was never interrupted.

Shape legend: N images of a batch, C classes, P pixels of a stored side.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray import storage
from hts_ray.config import OptimConfig, TrainConfig
from hts_ray.errors import DataError
from hts_ray.image_pipeline import stack_pixels

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from hts_ray.student.model import Student

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
KEPT_CHECKPOINTS = 2
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
    model: Any  # the student as Accelerate wrapped it
    optimizer: Any
    base_lrs: list[float]
    loss: Any
    rank: int
    world: int

    @property
    def batch_size(self) -> int:
        return self.config.batch_size // self.world

    @property
    def steps_per_epoch(self) -> int:
        rows: int = self.job["rows"] // self.world
        return max(1, -(-rows // self.batch_size))


@dataclass
class _Record:
    """One epoch, over all workers."""

    epoch: int
    loss: float
    lr: float
    images: int
    images_per_second: float
    seconds: float


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
        history = _resume(worker)
        shard = ray.train.get_dataset_shard("train")
        try:
            for epoch in range(len(history), worker.config.epochs):
                record = _run_epoch(worker, shard, epoch)
                history = [*history, asdict(record)]
                _report(worker, history)
        except _BadLossError as error:
            return {"error": error.error}
    return {"error": None}


def _start(job: dict[str, Any]) -> _Worker:
    """Load the zero-shot student and hand it to Accelerate, which joins Ray's process group."""
    import ray.train
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from hts_ray.losses import make_loss
    from hts_ray.student.checkpoints import load_student
    from hts_ray.student.model import parameter_groups, set_trainable

    config = TrainConfig.model_validate(job["config"])
    if job["local"] is not None:
        # The driver's process may have trained with other settings, and its threads would fight
        # with the processes that decode; Ray limits a worker's own threads likewise.
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    accelerator = Accelerator(mixed_precision=job["precision"], cpu=not config.use_gpu)
    student = load_student(job["initial"])
    set_trainable(student, config.trainable, config.trainable_blocks)
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
        job,
        config,
        accelerator,
        student,
        model,
        optimizer,
        base_lrs,
        loss.to(accelerator.device),
        context.get_world_rank(),
        context.get_world_size(),
    )


def _run_epoch(worker: _Worker, shard: Any, epoch: int) -> _Record:
    """Pass over the images once; everything random in it follows from the seed and the epoch."""
    import torch

    started = time.monotonic()
    device = worker.accelerator.device
    seed = _epoch_seed(worker.job["seed"], epoch, worker.rank)
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss, images
    worker.model.train()
    step = epoch * worker.steps_per_epoch
    lr = 0.0
    for batch in _batches(worker, shard, seed):
        lr = _set_learning_rate(worker, step)
        totals += _train_step(worker, batch, draws, epoch)
        step += 1
    totals = worker.accelerator.reduce(totals, "sum")
    loss, images = float(totals[0]), int(totals[1])
    if not images:
        raise DataError("no image could be read in a whole epoch: see the quarantine")
    seconds = time.monotonic() - started
    return _Record(epoch, loss / images, lr, images, images / seconds, seconds)


def _epoch_seed(seed: int, epoch: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


def _batches(worker: _Worker, shard: Any, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of pixels uint8 (N, P, P, 3), targets int8 (N, C) and row numbers (N,)."""
    size = worker.job["stored_size"]
    rows = min(worker.job["rows"], max(worker.batch_size, _SHUFFLE_BYTES // (size * size * 3)))
    yield from shard.iter_torch_batches(
        batch_size=worker.batch_size,
        collate_fn=_collate(size, len(worker.student.class_table)),
        device=worker.accelerator.device,
        local_shuffle_buffer_size=rows,
        local_shuffle_seed=seed,
        prefetch_batches=2,
        drop_last=False,
    )


def _collate(size: int, num_classes: int) -> Any:
    """Make the object that turns Arrow batches into tensors."""
    import torch
    from ray.data.collate_fn import ArrowBatchCollateFn

    class Collate(ArrowBatchCollateFn):  # type: ignore[misc]
        def __call__(self, batch: pa.Table) -> dict[str, torch.Tensor]:
            targets_NC = dense_targets(
                batch["positive"].combine_chunks(), batch["ignored"].combine_chunks(), num_classes
            )
            return {
                "pixels": torch.from_numpy(stack_pixels(batch, size)),
                "targets": torch.from_numpy(targets_NC),
                "rows": torch.from_numpy(batch["row"].to_numpy().copy()),
            }

    return Collate()


def _set_learning_rate(worker: _Worker, step: int) -> float:
    """Set the rate of every group for this step; returns the trunk's, or the head's alone."""
    total = worker.config.epochs * worker.steps_per_epoch
    factor = learning_rate_factor(step, total, worker.config.optim, worker.steps_per_epoch)
    for group, base in zip(worker.optimizer.param_groups, worker.base_lrs, strict=True):
        group["lr"] = base * factor
    return worker.base_lrs[0] * factor


def _train_step(
    worker: _Worker, batch: dict[str, torch.Tensor], draws: torch.Generator, epoch: int
) -> torch.Tensor:
    """Take one optimizer step; returns (loss summed over this worker's images, images).

    Raises _BadLossError on every worker, before the step, when one worker's loss is not finite.
    """
    import torch

    from hts_ray.student.augment import augment

    images = augment(batch["pixels"], worker.student.image_size, worker.config.augment, draws)
    logits = worker.model(worker.student.standardise(images))
    loss_sum = worker.loss(logits, batch["targets"])
    finite = torch.isfinite(loss_sum.detach())
    infinite = (~finite).double()  # a count made like the boolean `finite` would end at 1
    counts = torch.stack([torch.full_like(infinite, len(images)), infinite])
    if worker.world > 1:
        counts = worker.accelerator.reduce(counts, "sum")
    if counts[1]:
        _refuse(worker, batch["rows"], bool(finite), epoch)
    # DDP averages gradients over workers; their sum over the global batch is what is meant.
    loss = loss_sum * worker.world / counts[0]
    worker.accelerator.backward(loss)
    if worker.config.optim.grad_clip is not None:
        worker.accelerator.clip_grad_norm_(worker.model.parameters(), worker.config.optim.grad_clip)
    worker.optimizer.step()
    worker.optimizer.zero_grad()
    return torch.stack([loss_sum.detach().double(), loss_sum.new_tensor(len(images)).double()])


def _refuse(worker: _Worker, rows: torch.Tensor, finite: bool, epoch: int) -> None:
    from accelerate.utils import gather_object

    mine = [] if finite else rows.tolist()[:8]
    found = gather_object(mine) if worker.world > 1 else mine
    raise _BadLossError(f"the loss is not finite in epoch {epoch}", list(found)[:16])


def _report(worker: _Worker, history: list[dict[str, Any]]) -> None:
    """Tell Ray Train about the epoch, on every worker, with a checkpoint when one is due."""
    import ray.train

    epoch = len(history)
    due = epoch % worker.config.checkpoint_every == 0 or epoch == worker.config.epochs
    metrics = history[-1]
    if worker.rank != 0 or not due:
        if worker.rank == 0:
            storage.write_json(worker.job["history"], history)
        ray.train.report(metrics)
        return
    files = _checkpoint_files(worker, history)
    storage.write_json(worker.job["history"], history)
    if worker.job["local"] is not None:  # Ray Train's local mode keeps no checkpoints
        _write_local(worker.job["local"], epoch, files)
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _checkpoint_files(worker: _Worker, history: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return the checkpoint's files, the one that makes it valid last."""
    import safetensors.torch
    import torch

    state = worker.student.state_dict()
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    scaler = worker.accelerator.scaler
    buffer = io.BytesIO()
    torch.save(
        {
            "optimizer": worker.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
        },
        buffer,
    )
    return {
        MODEL: safetensors.torch.save(weights),
        OPTIMIZER: buffer.getvalue(),
        STATE: json.dumps({"history": history}).encode(),
    }


def _resume(worker: _Worker) -> list[dict[str, Any]]:
    """Load the last checkpoint, where there is one, and return the history up to it."""
    import ray.train
    import safetensors.torch
    import torch

    if worker.job["local"] is not None:
        files = read_local(worker.job["local"])
    else:
        checkpoint = ray.train.get_checkpoint()
        files = None
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                names = (MODEL, OPTIMIZER, STATE)
                files = {name: (Path(folder) / name).read_bytes() for name in names}
    if files is None:
        return []
    worker.student.load_state_dict(safetensors.torch.load(files[MODEL]))
    # weights_only: a checkpoint that someone else wrote cannot run code
    saved = torch.load(io.BytesIO(files[OPTIMIZER]), map_location="cpu", weights_only=True)
    worker.optimizer.load_state_dict(saved["optimizer"])
    if worker.accelerator.scaler is not None and saved["scaler"]:
        worker.accelerator.scaler.load_state_dict(saved["scaler"])
    history = json.loads(files[STATE])["history"]
    assert isinstance(history, list)
    return history


def _write_local(folder: str, epoch: int, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, f"epoch-{epoch:06d}", name), data)
    for old in _local_checkpoints(folder)[:-KEPT_CHECKPOINTS]:
        storage.remove_tree(storage.join(folder, old))


def read_local(folder: str) -> dict[str, bytes] | None:
    """Return the files of the last complete checkpoint of local mode, None where there is none."""
    names = _local_checkpoints(folder)
    if not names:
        return None
    files = (MODEL, OPTIMIZER, STATE)
    return {name: storage.read_bytes(storage.join(folder, names[-1], name)) for name in files}


def _local_checkpoints(folder: str) -> Sequence[str]:
    """Return the complete checkpoints' names, oldest first."""
    names = storage.list_names(folder)
    return [name for name in names if storage.exists(storage.join(folder, name, STATE))]
