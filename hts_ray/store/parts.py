"""Tables that are too large to hold: written in part files, read ahead, hashed piece by piece."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from hts_ray.store import storage

Item = TypeVar("Item")
Result = TypeVar("Result")

PART_BYTES = 32 << 20  # of a file: few requests, and no reader waits long for one
_GROUP_BYTES = 16 << 20  # of a row group, in memory
_HASHED_ROWS = 1 << 17
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_AHEAD = 8


class PartWriter:
    """Writes tables one after another to files of about `size` bytes, in little memory.

    The files are `part-00000.parquet` and so on, counted from `first`. Each appears in one step,
    and there is at least one. Use as a context: the last file is written at its end, unless the
    block fails.
    """

    def __init__(
        self, folder: str, schema: pa.Schema, *, size: int = PART_BYTES, first: int = 0
    ) -> None:
        self._folder, self._schema, self._size = folder, schema, size
        self._first, self._next = first, first
        self._waiting: list[pa.Table] = []
        self._start()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if failed is None and (self._waiting or self._rows or self._next == self._first):
            self._write_group()
            self._finish_file()

    def write(self, table: pa.Table) -> None:
        """Add rows that have the schema's columns."""
        self._waiting.append(table.select(self._schema.names).cast(self._schema))
        if sum(waiting.nbytes for waiting in self._waiting) >= _GROUP_BYTES:
            self._write_group()
            if self._sink.tell() >= self._size:
                self._finish_file()
                self._start()

    def _start(self) -> None:
        self._sink, self._rows = io.BytesIO(), 0
        self._writer = pq.ParquetWriter(
            self._sink, self._schema, compression="zstd", write_page_checksum=True
        )

    def _write_group(self) -> None:
        for table in [pa.concat_tables(self._waiting)] if self._waiting else ():
            self._writer.write_table(table)
            self._rows += len(table)
        self._waiting = []

    def _finish_file(self) -> None:
        self._writer.close()
        name = f"part-{self._next:05d}.parquet"
        storage.write_bytes(storage.join(self._folder, name), self._sink.getvalue())
        self._next += 1
        self._rows = 0


def ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `work(item)` in order, from threads that are a few items ahead of the caller."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) == _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class ContentHash:
    """A hash of a table's rows, whatever its chunks, files and metadata; tables may be added.

    It is that of Arrow's stream of the rows, 131,072 to a batch.
    """

    def __init__(self, *tables: pa.Table) -> None:
        self.rows = 0
        self._sha, self._rest, self._begun = hashlib.sha256(), list[pa.Table](), False
        for table in tables:
            self.add(table)

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        self.rows += len(table)
        self._rest.append(table.replace_schema_metadata(None))
        waiting = sum(map(len, self._rest))
        if waiting >= _HASHED_ROWS:
            rest = pa.concat_tables(self._rest)
            whole = waiting - waiting % _HASHED_ROWS
            for start in range(0, whole, _HASHED_ROWS):
                self._take(rest.slice(start, _HASHED_ROWS))
            self._rest = [rest.slice(whole)]

    def digest(self) -> str:
        """Return 12 hexadecimal digits; nothing can be added then."""
        self._take(pa.concat_tables(self._rest))
        self._sha.update(_END_OF_STREAM)
        return self._sha.hexdigest()[:12]

    def _take(self, rows: pa.Table) -> None:
        if not self._begun:
            self._begun = True
            self._sha.update(rows.schema.serialize())
        for batch in rows.combine_chunks().to_batches():
            self._sha.update(batch.serialize())
