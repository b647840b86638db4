"""The manifest: which images there are. A command reads it once, here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.run import content_hash, require_stage, settings_hash
from hts_ray.store.tables import (
    ANNOTATION_COLUMNS,
    MANIFEST_SCHEMA,
    STAMPS_SCHEMA,
    check_table,
    read_table,
    require_unique_ids,
)

FILE = "manifest.parquet"
STAMPS_FILE = "_stamps.parquet"  # beside it; who reads the folder passes over such names
IMAGE_COLUMNS = ("image_id", "uri", "split")  # all that a stage over images looks at


@dataclass(frozen=True, eq=False)
class Manifest:
    """A manifest that was read and checked: `table` has the columns of MANIFEST_SCHEMA.

    `path` is its Parquet file, which workers read for themselves. `stamps` has the columns of
    STAMPS_SCHEMA and a row for every image whose file is known.
    """

    path: str
    table: pa.Table
    stamps: pa.Table = field(default_factory=STAMPS_SCHEMA.empty_table)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images. Annotations are left out: no teacher or student may see them."""
        return images_hash(self.table.drop_columns(list(ANNOTATION_COLUMNS)), self.stamps)

    def rows(
        self, splits: Sequence[str] | None = None, limit: int | None = None, seed: int = 0
    ) -> pa.Table:
        """Return image_id, uri and split of the images that a stage has to answer, in order.

        `splits` None takes all; `limit` draws so many at random, the same for the same `seed`.
        Raises DataError when no image is left, naming the splits that exist.
        """
        table = self.table.select(list(IMAGE_COLUMNS))
        chosen = table
        if splits is not None:
            chosen = table.filter(pc.is_in(table["split"], pa.array(splits)))
        if not len(chosen):
            found = ", ".join(sorted(str(name) for name in table["split"].unique().to_pylist()))
            asked = "" if splits is None else f" in split {', '.join(splits)}"
            raise DataError(f"{self.path} holds no image{asked}: it has {found or 'no rows'}")
        if limit is not None and limit < len(chosen):
            drawn = np.random.default_rng(seed).choice(len(chosen), limit, replace=False)
            chosen = chosen.take(np.sort(drawn))
        return chosen.combine_chunks()

    def annotated(self, split: str | None = None) -> pa.Table:
        """Return the annotated rows of a split, or of all; there may be none."""
        known = self.table["positive_ids"].is_valid()
        if split is not None:
            known = pc.and_(pc.equal(self.table["split"], split), known)
        return self.table.filter(known)


def images_hash(table: pa.Table, stamps: pa.Table) -> str:
    """Return a hash of a manifest's rows and of what is known of their files."""
    parts = [content_hash(part) for part in (table, stamps) if len(part)]
    return parts[0] if len(parts) == 1 else settings_hash(parts)


def open_manifest(path: str) -> Manifest:
    """Read and check a manifest: a Parquet file, or a folder that holds `manifest.parquet`.

    Of a manifest that others made `image_id`, `uri` and `split` are needed; sizes and annotations
    that are not there are unknown. In one of ours a missing column is damage.
    Raises DataError naming a missing column, a wrong type, missing values or an id that repeats.
    """
    path = storage.absolute(path)
    file = path if path.endswith(".parquet") else storage.join(path, FILE)
    table = read_table(file)
    ours = b"hts_table" in (table.schema.metadata or {})
    for column in MANIFEST_SCHEMA:
        if not ours and column.nullable and column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table), column.type))
    table = check_table(table, MANIFEST_SCHEMA, file)
    require_unique_ids(table, file)
    stamps = storage.join(file.rpartition("/")[0], STAMPS_FILE)
    if ours and storage.exists(stamps):
        return Manifest(file, table, check_table(read_table(stamps), STAMPS_SCHEMA, stamps))
    return Manifest(file, table)


def latest_manifest(run_dir: str) -> str:
    """Return the file of a run's latest manifest; DataError when none was prepared."""
    return require_stage(run_dir, "manifest", "prepare").file(FILE)
