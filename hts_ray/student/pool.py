"""A stored student over many images: what prediction, features and region scores share.

One student a worker process, on that process's device: an actor pool with GPUs, or plain tasks
without, whose processes keep the student between batches. Few images can be done in this process.

Shape legend: N rows of a batch, G of them good, S image size.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from hts_ray.config import ImagesConfig, PoolConfig
from hts_ray.engine.compaction import BLOCKS, CHECKPOINT, complete
from hts_ray.engine.decoding import decode_batch
from hts_ray.engine.image_pass import OK, QUARANTINED, finish
from hts_ray.engine.mistakes import users_mistakes_unwrapped
from hts_ray.engine.progress import row_progress
from hts_ray.engine.ray_data import data_context, on_nodes, rows_per_block
from hts_ray.engine.telemetry import HeldGpus, Meter
from hts_ray.store.aliases import FloatArray, ImagesDone
from hts_ray.store.run import StageFolder
from hts_ray.student.checkpoints import description_of, load_student, student_fingerprint
from hts_ray.student.model import Student

if TYPE_CHECKING:
    import ray.data


class StudentWorker(ABC):
    """A stored student on this process's device, which turns batches into rows of a table."""

    problem = "the student's logits are not finite"

    def __init__(self, folder: str, pool: PoolConfig) -> None:
        gpu = pool.gpus > 0 and torch.cuda.is_available()
        if pool.gpus > 0 and not gpu:
            logging.getLogger(__name__).warning("no GPU is visible: the student runs on the CPU")
        if not gpu:
            torch.set_num_threads(pool.threads)
        student: Any = load_student(folder)
        # Convolutions of some towers run twice as fast on a CPU with channels last.
        student.to("cuda" if gpu else "cpu", memory_format=torch.channels_last)
        self.student: Student = student

    def __call__(self, table: pa.Table) -> pa.Table:
        """Turn N decoded rows into N rows of `schema`, with the vectors of every good row.

        A row with a number that is not finite is quarantined as well, as `problem`.
        """
        rows = table.select(["image_id", "uri", "split", "error_kind", "error"]).to_pylist()
        good = [i for i, row in enumerate(rows) if row["error_kind"] is None]
        found: Mapping[str, FloatArray | Sequence[FloatArray]] = {}
        if good:
            found = self.vectors(table if len(good) == len(rows) else table.take(good))
        for row in rows:
            row["status"] = QUARANTINED
        for place, i in enumerate(good):
            vectors = {name: values[place] for name, values in found.items()}
            if all(np.isfinite(vector).all() for vector in vectors.values()):
                rows[i].update(vectors, status=OK)
            else:
                rows[i].update(error_kind="not_finite", error=self.problem)
        return pa.Table.from_pylist(rows, schema=self.schema)

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """The schema of the table that the stage writes."""

    @abstractmethod
    def vectors(self, table: pa.Table) -> Mapping[str, FloatArray | Sequence[FloatArray]]:
        """Return the columns (G,) that hold a vector a row, for G >= 1 rows with pixels."""


@dataclass(frozen=True)
class StudentPass:
    """A student at work: its folder, the worker that holds it, and what a worker is given.

    `arguments` are given to the worker besides folder and pool; they are hashable. With `square`
    images are squashed to the student's size when they are decoded; otherwise they keep theirs.
    """

    folder: str
    worker: type[StudentWorker]
    pool: PoolConfig
    images: ImagesConfig
    batch_images: int
    arguments: tuple[tuple[str, Any], ...] = ()
    square: bool = True

    def make(self) -> StudentWorker:
        """Make a worker in this process."""
        return self.worker(self.folder, self.pool, **dict(self.arguments))

    @cached_property
    def side(self) -> int | None:
        """The side that images are squashed to."""
        return int(description_of(self.folder)["image_size"]) if self.square else None

    def decode(self, table: pa.Table) -> pa.Table:
        """Decode the images of a batch."""
        return decode_batch(table, self.images, square=self.side)

    def here(self, images: pa.Table) -> pa.Table:
        """Return the rows of one image or more, computed in this process without Ray."""
        threads = torch.get_num_threads()
        try:
            worker, step = self.make(), self.batch_images
            parts = [
                worker(self.decode(images.slice(start, step)))
                for start in range(0, len(images), step)
            ]
        finally:
            torch.set_num_threads(threads)  # the pool's threads are meant for workers
        return pa.concat_tables(parts)

    def publish(
        self,
        stage: StageFolder,
        read: Callable[[], ray.data.Dataset],
        image_ids: pa.ChunkedArray,
        name: str,
        progress: ImagesDone | None,
        info: Mapping[str, Any],
        **more_stats: Any,
    ) -> dict[str, Any]:
        """Append the rows that are not there yet to the stage's folder, on Ray, and publish it.

        `read` makes the dataset of the images with these ids, with their `uri`; a run that was cut
        off goes on after the last block that was written. `name` is the stage's in metrics and
        quarantine, and `info` goes to `table.json`. Raises DataError when no image can be read.
        """
        if complete(stage):
            return stage.stats
        started, rows = time.monotonic(), len(image_ids)
        with data_context(stage.file(CHECKPOINT)):
            decoded = (
                read()
                .repartition(target_num_rows_per_block=rows_per_block(rows, self.batch_images))
                .map_batches(
                    partial(decode_batch, images=self.images, square=self.side),
                    batch_format="pyarrow",
                    batch_size=self.batch_images,
                    **on_nodes(self.pool.decode_nodes),
                )
            )
            dataset = self._map(decoded, Meter.of(stage, name))
        with row_progress(stage, rows, progress), users_mistakes_unwrapped():
            # Appending, because overwriting would delete what a resumed run counts as done.
            dataset.write_parquet(stage.file(BLOCKS))
        seconds = time.monotonic() - started
        more_stats["gpus"] = self.pool.max_size * self.pool.gpus
        return finish(
            stage, image_ids, name=name, seconds=seconds, table_info=info, more_stats=more_stats
        )

    def _map(self, decoded: ray.data.Dataset, meter: Meter) -> ray.data.Dataset:
        from ray.data import ActorPoolStrategy, TaskPoolStrategy

        pool = self.pool
        memory = None if pool.memory_gib is None else pool.memory_gib * 2**30
        options: dict[str, Any] = {
            "batch_format": "pyarrow",
            "batch_size": self.batch_images,
            "memory": memory,
            **on_nodes(pool.nodes),
        }
        if pool.gpus > 0:
            actors = ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size)
            options |= {"fn_constructor_args": (self, meter), "num_gpus": pool.gpus}
            return decoded.map_batches(StudentActor, compute=actors, **options)
        # Tasks reuse worker processes and these keep the student, so that the seconds which
        # importing open_clip takes are not paid again by every pipeline of a session.
        tasks, work = TaskPoolStrategy(size=pool.max_size), StudentActor(self, meter)
        return decoded.map_batches(work, compute=tasks, num_cpus=pool.num_cpus, **options)


class StudentActor:
    """A student's worker on Ray Data, whose work a meter counts: the state of an actor, or a task.

    The student is loaded in the process that gets the first batch.
    """

    def __init__(self, task: StudentPass, meter: Meter) -> None:
        self._task, self._meter = task, meter
        self._fingerprint = student_fingerprint(task.folder)
        self._held = HeldGpus(meter, task.pool.gpus)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return what the worker makes of a batch."""
        with self._meter.busy():
            result = _kept_worker(self._task, self._fingerprint)(table)
        self._meter.count_rows(result)
        self._held.tick()
        return result


@lru_cache(maxsize=1)
def _kept_worker(task: StudentPass, fingerprint: str) -> StudentWorker:
    """Return this process's worker; the fingerprint changes when the folder is written again."""
    del fingerprint
    return task.make()
