"""The manifest: which images there are. A command reads it once, here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.run import content_hash, require_stage
from hts_ray.store.tables import (
    ANNOTATION_COLUMNS,
    MANIFEST_SCHEMA,
    check_table,
    read_table,
    require_unique_ids,
)

FILE = "manifest.parquet"
IMAGE_COLUMNS = ("image_id", "uri", "split")  # all that a stage over images looks at


@dataclass(frozen=True, eq=False)
class Manifest:
    """A manifest that was read and checked: `table` has the columns of MANIFEST_SCHEMA.

    `path` is its Parquet file, which workers read for themselves.
    """

    path: str
    table: pa.Table

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images. Annotations are left out: no teacher or student may see them."""
        unseen = list(ANNOTATION_COLUMNS)
        if not self.table["stamp"].is_valid().to_numpy().any():
            unseen.append("stamp")  # so that manifests of before keep their hash
        return content_hash(self.table.drop_columns(unseen))

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
        may_lack = not ours or column.name == "stamp"  # manifests of before have none
        if may_lack and column.nullable and column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table), column.type))
    table = check_table(table, MANIFEST_SCHEMA, file)
    require_unique_ids(table, file)
    return Manifest(file, table)


def latest_manifest(run_dir: str) -> str:
    """Return the file of a run's latest manifest; DataError when none was prepared."""
    return require_stage(run_dir, "manifest", "prepare").file(FILE)
