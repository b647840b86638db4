"""What a training's steps, reading and decoding take, measured in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from hts_ray.config import ImagesConfig
from hts_ray.engine.decoding import decode_batch
from hts_ray.engine.run import Run
from hts_ray.engine.telemetry import on_ray
from hts_ray.store.provenance import usable_cores
from hts_ray.student.augment import draw, stored_size
from hts_ray.student.feed import Kept, Loaded, load_bytes
from hts_ray.student.model import build_student
from hts_ray.student.step import Stepper, take_step

_TIMED_STEPS = 2  # behind one that allocates and compiles


@dataclass(frozen=True)
class Pace:
    """Images a second that each part of a training could do alone, on all workers and nodes."""

    steps: float
    decoding: float
    reading: float
    device: str

    def bound(self, kept: Kept) -> tuple[str, float]:
        """Return what sets the pace of every epoch but the first, and that pace.

        Images that are kept as pixels are neither read nor decoded again, their files are not
        read again.
        """
        parts = {"GPU" if self.device == "cuda" else "CPU": self.steps}
        if kept != "pixels":
            parts["decoding"] = self.decoding
        if kept == "none":
            parts["storage"] = self.reading
        name = min(parts, key=lambda part: parts[part])
        return name, parts[name]


def seconds_per_step(run: Run, device: str) -> tuple[float, int]:
    """Return the seconds of a worker's step on noise, and the stored side of its images.

    The step is the workers' own: precision, accumulation, checkpointing, augmentation and batch
    are those of the settings. fp16 is for GPUs: a CPU takes its place in float32.
    """
    config = run.config.train
    student = build_student(run.config.student, run.class_table)
    if device == "cpu" and student.config.precision == "fp16":
        student.config = student.config.model_copy(update={"precision": "no"})
    config = config.model_copy(update={"use_gpu": device == "cuda"})
    stepper = Stepper.of(student, config, world=max(1, config.num_workers))
    batch = {name: value.to(device) for name, value in noise_batch(stepper).items()}
    take_step(stepper, batch).read()
    started = time.monotonic()
    for _ in range(_TIMED_STEPS):
        told = take_step(stepper, batch)
    told.read()
    seconds = (time.monotonic() - started) / _TIMED_STEPS
    return seconds, stored_size(student.image_size, config.augment)


def noise_batch(stepper: Stepper) -> dict[str, Tensor]:
    """Return a worker's batch of noise on the CPU, one class positive, as `take_step` wants it."""
    size, config, student = stepper.batch_size, stepper.config.augment, stepper.student
    stored = stored_size(student.image_size, config)
    targets = torch.full((size, len(student.class_table)), -1, dtype=torch.int8)
    targets[:, 0] = 1
    return {
        "pixels": torch.randint(0, 256, (size, stored, stored, 3), dtype=torch.uint8),
        "rows": torch.arange(size),
        "augmentation": draw(range(size), 0, 0, stored, config).table(student.image_size),
        "targets": targets,
    }


def measure_pace(
    run: Run, uris: Sequence[str | None], stored: int, steps: float, device: str
) -> Pace:
    """Read and decode some images here, and return what `steps` images a second have to go with.

    Reading is by as many threads as a task has; decoding counts processor time. Both are taken
    times the CPUs that the workers leave free. Infinite where no image can be read.
    """
    config = run.config.train
    table = pa.table({"uri": pa.array(uris, pa.string())})
    started = time.monotonic()
    loaded = load_bytes(table)
    reading, started = time.monotonic() - started, time.process_time()
    images = ImagesConfig.model_validate({})
    decoded = decode_batch(table, images, square=stored, reader=Loaded(loaded))
    decoding = time.process_time() - started
    good = len(table) - decoded["error_kind"].drop_null().length()
    workers = max(1, config.num_workers)
    free = max(1.0, _cpus() - workers * config.worker_cpus)
    if config.decode_tasks is not None:
        free = min(free, config.decode_tasks * workers)
    decoded_a_second, read_a_second = (
        good * free / max(seconds, 1e-9) or math.inf for seconds in (decoding, reading)
    )
    return Pace(steps, decoded_a_second, read_a_second, device)


def _cpus() -> float:
    """Return the CPUs of the cluster that this process has joined, else of this machine."""
    if not on_ray():
        return usable_cores()
    import ray

    return float(ray.cluster_resources().get("CPU", 1.0))
