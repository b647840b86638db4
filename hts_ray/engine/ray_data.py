"""Ray Data as the stages use it: its settings, the images that it reads, the nodes it works on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import NodesConfig
from hts_ray.engine.mistakes import users_mistakes_unwrapped
from hts_ray.images.manifest import IMAGE_COLUMNS
from hts_ray.store import storage

if TYPE_CHECKING:
    import ray.data

# Waiting for GPUs of an autoscaling cluster counts as no progress; Ray's own limit is 30 min.
_NO_PROGRESS_SECONDS = 6 * 3600


def image_dataset(
    path: str, splits: Sequence[str] | None = None, only: pa.Array | None = None
) -> ray.data.Dataset:
    """Return image_id, uri and split of a Parquet file's rows as a dataset that workers read.

    `splits` and `only`, image ids, cut it down. It starts with a read, as Ray's checkpoints ask.
    """
    import ray.data
    from ray.data.expressions import col

    dataset = ray.data.read_parquet(path).select_columns(list(IMAGE_COLUMNS))
    if only is not None:
        # Not Dataset.limit: on a resumed run that would count from the images still to do.
        return dataset.map_batches(partial(_keep_ids, ids=only), batch_format="pyarrow")
    return dataset if splits is None else dataset.filter(expr=col("split").is_in(list(splits)))


def _keep_ids(table: pa.Table, ids: pa.Array) -> pa.Table:
    return table.filter(pc.is_in(table["image_id"], ids))


_context_lock = threading.RLock()


@contextmanager
def data_context(
    checkpoint_path: str | None = None, *, keep_order: bool = False, block_bytes: int | None = None
) -> Iterator[None]:
    """Set Ray Data up for one pipeline: resume from `checkpoint_path`, no progress bars.

    `keep_order` has blocks come out in order, and `block_bytes` is a size other than Ray's.
    A user's mistake that a worker finds is raised here as it was there, without Ray's wrapping.
    Ray's context belongs to the process, so blocks in several threads wait for each other; a
    dataset keeps the context that it was made under.
    """
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig

    checkpoint = None
    if checkpoint_path is not None:
        checkpoint = CheckpointConfig(
            id_column="image_id",
            checkpoint_path=checkpoint_path,
            override_filesystem=storage.resolve(checkpoint_path)[0],
            # Deleting would make a rerun of a finished pipeline append every row again.
            delete_checkpoint_on_success=False,
        )
    with _context_lock, users_mistakes_unwrapped():
        context = DataContext.get_current()
        with (
            _changed(context, "checkpoint_config", checkpoint),
            _changed(context, "enable_progress_bars", False),
            _changed(context, "execution_no_progress_timeout_s", _NO_PROGRESS_SECONDS),
            _changed(
                context, "target_max_block_size", block_bytes or context.target_max_block_size
            ),
            _changed(context.execution_options, "preserve_order", keep_order),
        ):
            yield


@contextmanager
def _changed(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def on_nodes(nodes: NodesConfig) -> dict[str, Any]:
    """Return the arguments of Ray Data's maps that send their work to some nodes."""
    options = {
        "label_selector": dict(nodes.labels),
        "fallback_strategy": [{"label_selector": dict(labels)} for labels in nodes.fallbacks],
        "accelerator_type": nodes.accelerator_type,
    }
    return {name: value for name, value in options.items() if value}


def rows_per_block(rows: int, batch: int, largest: int = 1024) -> int:
    """Return how many rows a block gets: a multiple of `batch`, a few blocks for every CPU.

    A block is what a crash can cost, and also a file.
    """
    import ray

    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    share = -(-rows // (4 * cpus))
    return batch * max(1, min(-(-share // batch), largest // batch))
