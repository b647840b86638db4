"""The manifest: which images there are. It is read here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.parts import ContentHash
from hts_ray.store.run import require_stage, settings_hash
from hts_ray.store.tables import (
    ANNOTATION_COLUMNS,
    MANIFEST_SCHEMA,
    STAMPS_SCHEMA,
    check_table,
    read_batches,
    read_table,
    require_unique_ids,
    table_schema,
)

FILE = "manifest.parquet"
STAMPS_FILE = "_stamps.parquet"  # beside it; who reads the folder passes over such names
_ROWS = 1 << 17  # read at a time
IMAGE_COLUMNS = ("image_id", "uri", "split")  # all that a stage over images looks at


def sampled(rows: pa.Table, limit: int | None, seed: int) -> pa.Table:
    """Return `limit` rows drawn at random, in order and the same for the same `seed`; None: all."""
    if limit is None or limit >= len(rows):
        return rows
    drawn = np.random.default_rng(seed).choice(len(rows), limit, replace=False)
    return rows.take(np.sort(drawn))


@dataclass(frozen=True, eq=False)
class Manifest:
    """A manifest that was checked. Ids, URIs and splits are in memory, the other columns are not.

    `path` is its Parquet file or a folder of part files, which workers read for themselves.
    `images` has IMAGE_COLUMNS or all of MANIFEST_SCHEMA, `stamps` a row of STAMPS_SCHEMA for every
    file that is known.
    """

    path: str
    images: pa.Table
    stamps: pa.Table = field(default_factory=STAMPS_SCHEMA.empty_table)

    @cached_property
    def table(self) -> pa.Table:
        """All columns of MANIFEST_SCHEMA, read when they are first asked for."""
        if self.images.column_names == MANIFEST_SCHEMA.names:
            return self.images
        return pa.concat_tables(self._pieces(MANIFEST_SCHEMA.names))

    def _pieces(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        if set(columns) <= set(self.images.column_names):
            return iter([self.images.select(columns)])
        return _checked_pieces(self.path, columns)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images. Annotations are left out: no teacher or student may see them."""
        names = [name for name in MANIFEST_SCHEMA.names if name not in ANNOTATION_COLUMNS]
        return images_hash(ContentHash(*self._pieces(names)), ContentHash(self.stamps))

    def rows(
        self, splits: Sequence[str] | None = None, limit: int | None = None, seed: int = 0
    ) -> pa.Table:
        """Return image_id, uri and split of the images that a stage has to answer, in order.

        `splits` None takes all; `limit` draws so many at random, the same for the same `seed`.
        Raises DataError when no image is left, naming the splits that exist.
        """
        table = self.images.select(list(IMAGE_COLUMNS))
        wanted = None if splits is None else pc.is_in(table["split"], pa.array(splits))
        # Filtering would copy the table.
        chosen = table if wanted is None or pc.all(wanted).as_py() else table.filter(wanted)
        if not len(chosen):
            found = ", ".join(sorted(str(name) for name in table["split"].unique().to_pylist()))
            asked = "" if splits is None else f" in split {', '.join(splits)}"
            raise DataError(f"{self.path} holds no image{asked}: it has {found or 'no rows'}")
        return sampled(chosen, limit, seed).combine_chunks()

    def annotated(self, split: str | None = None) -> pa.Table:
        """Return the annotated rows of a split, or of all; there may be none."""
        known = self.table["positive_ids"].is_valid()
        if split is not None:
            known = pc.and_(pc.equal(self.table["split"], split), known)
        return self.table.filter(known)


def images_hash(images: ContentHash, stamps: ContentHash) -> str:
    """Return a hash of a manifest's rows and of what is known of their files."""
    parts = [part.digest() for part in (images, stamps) if part.rows]
    return parts[0] if len(parts) == 1 else settings_hash(parts)


def open_manifest(path: str) -> Manifest:
    """Open and check a manifest: a Parquet file, a folder of them, or one with `manifest.parquet`.

    Of a manifest that others made `image_id`, `uri` and `split` are needed; sizes and annotations
    that are not there are unknown. In one of ours a missing column is damage.
    Raises DataError naming a missing column, a wrong type, missing values or an id that repeats.
    """
    path = storage.absolute(path)
    inner = storage.join(path, FILE)
    file = path if path.endswith(".parquet") or not storage.exists(inner) else inner
    images = pa.concat_tables(_checked_pieces(file, IMAGE_COLUMNS)).combine_chunks()
    require_unique_ids(images, file)
    stamps = storage.join(file.rpartition("/")[0], STAMPS_FILE)
    if _is_ours(table_schema(file)) and storage.exists(stamps):
        return Manifest(file, images, check_table(read_table(stamps), STAMPS_SCHEMA, stamps))
    return Manifest(file, images)


def _checked_pieces(path: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield some columns of a manifest, in MANIFEST_SCHEMA's types."""
    there = table_schema(path)
    known = pa.schema([f for f in there if f.name in MANIFEST_SCHEMA.names], there.metadata)
    _whole(known.empty_table(), MANIFEST_SCHEMA, path)
    schema = pa.schema([MANIFEST_SCHEMA.field(name) for name in columns], MANIFEST_SCHEMA.metadata)
    found = [name for name in columns if name in there.names]
    yield schema.empty_table()
    for batch in read_batches(path, found, _ROWS):
        piece = pa.Table.from_batches([batch]).replace_schema_metadata(there.metadata)
        try:
            piece.validate(full=True)  # else text that is not UTF-8 fails later, far from here
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error
        yield _whole(piece, schema, path)


def _whole(table: pa.Table, schema: pa.Schema, path: str) -> pa.Table:
    for column in () if _is_ours(table.schema) else schema:
        if column.nullable and column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table), column.type))
    return check_table(table, schema, path)


def _is_ours(schema: pa.Schema) -> bool:
    return b"hts_table" in (schema.metadata or {})


def latest_manifest(run_dir: str) -> str:
    """Return the file of a run's latest manifest; DataError when none was prepared."""
    return require_stage(run_dir, "manifest", "prepare").file(FILE)
