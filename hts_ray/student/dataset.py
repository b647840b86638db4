"""The decoded images of a training, and what could not be decoded.

Ray's tasks import this module, so it does without torch.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import ImagesConfig
from hts_ray.engine.decoding import decode_batch
from hts_ray.engine.image_pass import write_quarantine
from hts_ray.store import storage
from hts_ray.store.tables import QUARANTINE_SCHEMA, read_table, write_table
from hts_ray.student.targets import Task

if TYPE_CHECKING:
    import ray.data

_DECODE_ROWS = 32
_LOOP_COLUMNS = ("row", "positive", "ignored", "weight", "pixels")
_BLOCK_BYTES = 32 << 20


def decoded_images(table: pa.Table, size: int, bad_folder: str) -> tuple[ray.data.Dataset, int]:
    """Return decoded images with their labels as a dataset, and its number of rows.

    It is computed once when it fits into a third of the object store, which a shuffle and its
    neighbours have to live in as well; otherwise again every epoch.
    """
    import ray
    import ray.data

    image_bytes = size * size * 3
    block = max(1, min(_BLOCK_BYTES // image_bytes, -(-len(table) // 8)))
    slices = [table.slice(start, block) for start in range(0, len(table), block)]
    dataset = ray.data.from_arrow(slices).map_batches(
        partial(_decode_rows, size=size, bad_folder=bad_folder),
        batch_format="pyarrow",
        batch_size=_DECODE_ROWS,
    )
    store = ray.cluster_resources().get("object_store_memory", 0.0)
    if len(table) * image_bytes > store / 3:
        return dataset, len(table)
    dataset = dataset.materialize()
    return dataset, int(dataset.count())


def _decode_rows(table: pa.Table, *, size: int, bad_folder: str) -> pa.Table:
    """Decode a batch; bad rows leave it and are written to a file named by their ids."""
    decoded = decode_batch(table, ImagesConfig.model_validate({}), square=size)
    good = decoded["error_kind"].is_null()
    bad = decoded.filter(pc.invert(good))
    if len(bad):
        name = hashlib.sha256("\n".join(bad["image_id"].to_pylist()).encode()).hexdigest()[:24]
        columns = ["image_id", "uri", "error_kind", "error"]
        write_table(storage.join(bad_folder, f"{name}.parquet"), bad.select(columns))
    kept = [name for name in decoded.column_names if name in _LOOP_COLUMNS]
    return decoded.filter(good).select(kept)


def gather_quarantine(task: Task) -> int:
    """Write the bad images of all workers to the stage's quarantine.

    Returns how many of them were to be trained on.
    """
    found: dict[str, dict[str, Any]] = {}
    counts = []
    for images in ("train", "validation"):
        folder = task.bad_folder(images)
        rows = read_table(folder).to_pylist() if storage.list_names(folder) else []
        found.update({row["image_id"]: row for row in rows})
        counts.append(len({row["image_id"] for row in rows}))
    schema = pa.schema(
        [QUARANTINE_SCHEMA.field(n) for n in ("image_id", "uri", "error_kind", "error")]
    )
    table = pa.Table.from_pylist([found[key] for key in sorted(found)], schema)
    write_quarantine(task.stage, table, "train")
    return counts[0]
