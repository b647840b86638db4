"""One optimizer step of a training, on one worker: without Ray, and without waiting for a GPU.

`hts train`, its dry run and `make gpu` take the same one. What a step queues on a GPU is there
before the last one is done; numbers of a step are read when the next one is queued.

Shape legend: N images of a batch, C classes, P pixels of a stored side.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hts_ray.config import TrainConfig
from hts_ray.engine.compat import forget_accelerator
from hts_ray.losses import SignedLoss
from hts_ray.student.augment import augment
from hts_ray.student.model import Student, checkpoint_activations, set_trainable
from hts_ray.student.optimizer import Optimizer, settings_loss

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Stepper:
    """What a worker's steps need: the student on its device, wrapped for `world` workers."""

    config: TrainConfig
    accelerator: Accelerator
    student: Student
    model: Any  # the student as Accelerate wrapped it
    optimizer: Optimizer
    loss: SignedLoss
    world: int = 1

    @classmethod
    def of(
        cls,
        student: Student,
        config: TrainConfig,
        class_weights: list[float] | None = None,
        world: int = 1,
    ) -> Stepper:
        """Hand a student to Accelerate, which joins the process group where there is one.

        Raises what `checkpoint_activations` and `parameter_groups` raise.
        """
        from accelerate import Accelerator

        forget_accelerator()  # this process may have trained with other settings
        accelerator = Accelerator(mixed_precision=student.config.precision, cpu=not config.gpu)
        if accelerator.device.type == "cuda":
            # Products in float32 round their inputs to TF32's 10 bits: some eight times as fast.
            torch.set_float32_matmul_precision("high")
        set_trainable(student, config.trainable, config.trainable_blocks)
        if config.learn_logit_scale:
            student.learn_logit_scale()
        # Convolutions are faster with channels last, on GPUs in half precision and on CPUs.
        student.to(device=accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = Optimizer.of(student, config)
        if config.gradient_checkpointing:
            checkpoint_activations(student)
        if config.compile:
            student.visual.compile()
        student.train()
        model, optimizer.inner = accelerator.prepare(student, optimizer.inner)
        optimizer.clip = accelerator.clip_grad_norm_
        loss = settings_loss(config, class_weights, "sum").to(accelerator.device)
        loss.checks_values = False  # targets and weights are our own
        return cls(config, accelerator, student, model, optimizer, loss, world)

    @property
    def batch_size(self) -> int:
        """Images of a step on this worker."""
        return self.config.batch_size // self.world


class Told:
    """The numbers of a step on their way to the host; `rows` are its images' on the device."""

    def __init__(self, values: Tensor, rows: Tensor) -> None:
        # Into pinned memory, which a GPU writes while the host goes on.
        self._values = values.to("cpu", non_blocking=True)
        self._rows = rows
        event: Any = torch.cuda.Event
        self._done = event() if values.is_cuda else None
        if self._done is not None:
            self._done.record()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self) -> tuple[float, bool, float]:
        """Wait for the step, and for nothing that was queued after it.

        Returns this worker's summed loss, whether the loss of all workers is finite, and the
        gradient's norm (NaN where it is not clipped).
        """
        if self._done is not None:
            self._done.synchronize()
        loss_sum, infinite, norm = self._values.tolist()
        return loss_sum, not infinite, norm

    def rows(self) -> list[int]:
        """Return the rows of the step's images."""
        rows: list[int] = self._rows.tolist()
        return rows


def take_step(stepper: Stepper, batch: Mapping[str, Tensor]) -> Told:
    """Queue one optimizer step, in `accumulation` forward passes.

    `batch` has `pixels` uint8 (N, P, P, 3), `rows` (N,), `augmentation` (N, 18, 1, 1) of
    `augment`, `targets` (N, C) and, with soft labels, `weights` (N, C), all on the device. The
    step is taken even if the loss is not finite: what is told says so.
    """
    accelerator, config, size = stepper.accelerator, stepper.config, len(batch["rows"])
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    count: Any = size
    if stepper.world > 1:
        count = accelerator.reduce(torch.full_like(loss_sum, size), "sum")
    part_size = -(-stepper.batch_size // config.accumulation)
    for start in range(0, size, part_size):
        part = {name: value[start : start + part_size] for name, value in batch.items()}
        last = start + part_size >= size
        with nullcontext() if last else accelerator.no_sync(stepper.model):
            side = stepper.student.image_size
            images = augment(part["pixels"], part["augmentation"], side, config.augment)
            logits = stepper.model(stepper.student.standardise(images))
            loss = stepper.loss(logits, part["targets"], part.get("weights"))
            # DDP averages gradients over workers; their sum over the global batch is meant.
            accelerator.backward(loss * stepper.world / count)
        loss_sum += loss.detach()
    infinite = (~torch.isfinite(loss_sum)).double()
    if stepper.world > 1:
        infinite = accelerator.reduce(infinite, "sum")
    norm = stepper.optimizer.step()
    norm = torch.full_like(loss_sum, torch.nan) if norm is None else norm.double()
    return Told(torch.stack([loss_sum, infinite, norm]), batch["rows"])
