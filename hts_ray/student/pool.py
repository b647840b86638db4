"""A stored student at work on Ray Data: what scoring, encoding and region scoring share.

One student a worker process, on that process's device: an actor pool with GPUs, or plain tasks
without, whose processes keep the student between batches.

Shape legend: N rows of a batch, G of them good, S image size, V numbers of a row.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hts_ray.config import PoolConfig
from hts_ray.engine.image_pass import OK, QUARANTINED, Pixels
from hts_ray.engine.telemetry import HeldGpus, Meter
from hts_ray.student.checkpoints import load_student, student_fingerprint

if TYPE_CHECKING:
    import ray.data
    import torch

    from hts_ray.student.model import Student

FloatArray = npt.NDArray[np.float32]


class StudentWorker(ABC):
    """A stored student on this process's device, which turns batches into rows of a table."""

    def __init__(self, folder: str, fingerprint: str, pool: PoolConfig) -> None:
        import torch

        del fingerprint  # tells cached workers apart, see `_cached_worker`
        self._gpu = pool.num_gpus > 0 and torch.cuda.is_available()
        if pool.num_gpus > 0 and not self._gpu:
            logging.getLogger(__name__).warning("no GPU is visible: the student runs on the CPU")
        if not self._gpu:
            torch.set_num_threads(pool.threads)
        self.student: Student = load_student(folder)
        self.student.to("cuda" if self._gpu else "cpu")

    @abstractmethod
    def __call__(self, table: pa.Table) -> pa.Table:
        """Turn N decoded rows into N rows of the table that the stage writes."""

    def run(self, module: Callable[[torch.Tensor], torch.Tensor], pixels: Pixels) -> FloatArray:
        """Return what the student or a part of it says of uint8 images (N, S, S, 3), in float32."""
        import torch

        # The precision that the student was trained in; CPUs gain nothing from it.
        dtype = torch.bfloat16 if self.student.config.precision == "bf16" else torch.float16
        half = self._gpu and self.student.config.precision != "no"
        with torch.inference_mode(), torch.autocast("cuda", dtype=dtype, enabled=half):
            answer = module(self.student.normalise(torch.from_numpy(pixels)))
        result: FloatArray = answer.float().cpu().numpy()
        return result


class MeteredActor:
    """The stateful UDF of Ray Data on GPUs: a student's worker, and a count of what it does."""

    def __init__(
        self,
        worker: type[StudentWorker],
        folder: str,
        fingerprint: str,
        pool: PoolConfig,
        meter: Meter,
        **arguments: Any,
    ) -> None:
        self._meter = meter
        self._held = HeldGpus(meter, pool.num_gpus)
        self._worker = worker(folder, fingerprint, pool, **arguments)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return what the worker makes of a batch."""
        result = _metered(self._worker, table, self._meter)
        self._held.tick()
        return result


def _metered(worker: StudentWorker, table: pa.Table, meter: Meter) -> pa.Table:
    with meter.busy():
        result = worker(table)
    meter.count_rows(result)
    return result


def map_on_students(
    decoded: ray.data.Dataset,
    worker: type[StudentWorker],
    *,
    folder: str,
    pool: PoolConfig,
    batch_images: int,
    meter: Meter,
    **arguments: Any,
) -> ray.data.Dataset:
    """Hand decoded rows to workers made with `arguments` (hashable), `batch_images` at a time.

    `meter` counts their work.
    """
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    memory = None if pool.memory_gib is None else pool.memory_gib * 2**30
    options: dict[str, Any] = {
        "batch_format": "pyarrow",
        "batch_size": batch_images,
        "memory": memory,
    }
    fingerprint = student_fingerprint(folder)
    if pool.num_gpus > 0:
        return decoded.map_batches(
            MeteredActor,
            fn_constructor_args=(worker, folder, fingerprint, pool, meter),
            fn_constructor_kwargs=arguments,
            num_gpus=pool.num_gpus,
            compute=ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size),
            **options,
        )
    # Tasks reuse worker processes and these keep the student, so that the seconds which
    # importing open_clip takes are not paid again by every pipeline of a session.
    task = partial(
        _work,
        worker=worker,
        folder=folder,
        fingerprint=fingerprint,
        threads=pool.threads,
        meter=meter,
        arguments=tuple(sorted(arguments.items())),
    )
    return decoded.map_batches(
        task, num_cpus=pool.num_cpus, compute=TaskPoolStrategy(size=pool.max_size), **options
    )


def _work(
    table: pa.Table,
    *,
    worker: type[StudentWorker],
    folder: str,
    fingerprint: str,
    threads: int,
    meter: Meter,
    arguments: tuple[tuple[str, Any], ...],
) -> pa.Table:
    cached = _cached_worker(worker, folder, fingerprint, threads, arguments)
    return _metered(cached, table, meter)


@lru_cache(maxsize=1)
def _cached_worker(
    worker: type[StudentWorker],
    folder: str,
    fingerprint: str,
    threads: int,
    arguments: tuple[tuple[str, Any], ...],
) -> StudentWorker:
    """Return this process's worker; the fingerprint sees a folder that was written anew."""
    pool = PoolConfig.model_validate({"threads": threads})
    return worker(folder, fingerprint, pool, **dict(arguments))


def vector_rows(
    table: pa.Table,
    good: npt.NDArray[np.bool_],
    vectors_GV: Mapping[str, FloatArray],
    schema: pa.Schema,
    problem: str,
) -> pa.Table:
    """Return N rows of `schema`, whose columns `vectors_GV` hold a vector for every good row.

    A row with a number that is not finite is quarantined as well, as `problem`. Other columns
    are the decoded rows' own; `status`, `error_kind` and `error` are filled in.
    """
    filled = {
        name: np.zeros((len(table), v.shape[1]), np.float32) for name, v in vectors_GV.items()
    }
    broken = np.zeros(len(table), dtype=bool)
    for name, vectors in vectors_GV.items():
        filled[name][good] = vectors
        broken |= ~np.isfinite(filled[name]).all(axis=1)
    null = ~good | broken
    kinds, errors = table["error_kind"].to_pylist(), table["error"].to_pylist()
    for row in np.flatnonzero(broken):
        kinds[row], errors[row] = "not_finite", problem
    columns: dict[str, Any] = {
        "status": [QUARANTINED if bad else OK for bad in null],
        "error_kind": kinds,
        "error": errors,
    }
    for name, values in filled.items():
        flat = pa.array(values.ravel(), pa.float32())
        columns[name] = pa.FixedSizeListArray.from_arrays(
            flat, values.shape[1], mask=pa.array(null)
        )
    arrays = [_column(columns.get(field.name, table), field) for field in schema]
    return pa.table(arrays, schema=schema)


def _column(source: Any, field: pa.Field) -> pa.Array | pa.ChunkedArray:
    if isinstance(source, pa.Table):
        source = source[field.name]
    if isinstance(source, pa.Array | pa.ChunkedArray):
        return source.cast(field.type)
    return pa.array(source, field.type)
