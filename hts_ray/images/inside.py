"""Images inside larger files: a member of a tar shard, a cell of a Parquet file.

Such an image has a URI of its own, so that every stage, report and export opens it like a file:

    s3://bucket/train-000.tar#bytes=1536+48213        offset and length, in bytes
    s3://bucket/train-000.parquet#image.bytes=3,17    column, row group, row of that group

Images of a batch that lie side by side in a shard are read by one request.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from hts_ray.store import storage

_SPAN = re.compile(r"(?P<file>.+)#bytes=(?P<offset>\d+)\+(?P<length>\d+)")
_CELL = re.compile(r"(?P<file>.+)#(?P<column>[^#=]+)=(?P<group>\d+),(?P<row>\d+)")
# What lies between two images of a shard is read too, when it is less than another request costs.
_LARGEST_GAP, _LARGEST_READ = 1 << 18, 1 << 26


class Span(NamedTuple):
    """Bytes of a file."""

    file: str
    offset: int
    length: int

    @property
    def uri(self) -> str:
        """What `place_of` reads."""
        return f"{self.file}#bytes={self.offset}+{self.length}"

    def read(self, most: int | None = None) -> bytes:
        """Return the bytes, or the first `most`; fewer where the file ends before."""
        filesystem, inner = storage.resolve(self.file)
        with filesystem.open_input_file(inner) as stream:
            length = self.length if most is None else min(most, self.length)
            return bytes(stream.read_at(length, self.offset))


class Cell(NamedTuple):
    """A value of a Parquet file's column, which may be a field of a struct: `image.bytes`."""

    file: str
    column: str
    group: int
    row: int

    @property
    def uri(self) -> str:
        """What `place_of` reads."""
        return f"{self.file}#{self.column}={self.group},{self.row}"

    def read(self) -> bytes:
        """Return the bytes, none for a null; FileNotFoundError when the file has no such row."""
        values = _cells.column(self.file, self.column, self.group)
        if self.row >= len(values):
            raise FileNotFoundError(f"row group {self.group} has {len(values)} rows")
        return values[self.row].as_py() or b""


Place = Span | Cell


def place_of(uri: str) -> Place | None:
    """Return where an image lies inside a larger file; None for a file of its own."""
    if match := _SPAN.fullmatch(uri):
        return Span(match["file"], int(match["offset"]), int(match["length"]))
    if match := _CELL.fullmatch(uri):
        return Cell(match["file"], match["column"], int(match["group"]), int(match["row"]))
    return None


class _LastColumn:
    """The column of the row group that was read last: the rows of a block follow each other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[str, str, int] | None = None
        self._values = pa.nulls(0)

    def column(self, file: str, column: str, group: int) -> pa.Array:
        """Return binary values, one for every row of the group."""
        with self._lock:
            if self._key != (file, column, group):
                self._values = read_column(file, column, group)
                self._key = (file, column, group)
            return self._values


_cells = _LastColumn()


def read_column(file: str, column: str, group: int) -> pa.Array:
    """Return a binary column of a row group; FileNotFoundError when there is no such group."""
    filesystem, inner = storage.resolve(file)
    with filesystem.open_input_file(inner) as stream:
        table = pq.ParquetFile(stream)
        if group >= table.num_row_groups:
            raise FileNotFoundError(f"{file} has {table.num_row_groups} row groups, not {group}")
        read = table.read_row_group(group, columns=[column])
    name, *fields = column.split(".")
    values = read[name].combine_chunks()
    for part in fields:
        values = values.field(part)
    return values


@dataclass(frozen=True)
class Stretch:
    """Images that lie side by side in a shard: what one request reads."""

    spans: list[Span] = field(default_factory=list)  # by offset

    def read(self) -> dict[str, bytes]:
        """Return the bytes of every image, by its URI."""
        first = self.spans[0]
        end = max(span.offset + span.length for span in self.spans)
        data = Span(first.file, first.offset, end - first.offset).read()
        starts = [span.offset - first.offset for span in self.spans]
        return {
            span.uri: data[start : start + span.length]
            for span, start in zip(self.spans, starts, strict=True)
        }


def stretches(uris: Iterable[str]) -> list[Stretch]:
    """Return what to read at once for the images of `uris` that are in shards."""
    by_file: defaultdict[str, set[Span]] = defaultdict(set)
    for uri in uris:
        if isinstance(place := place_of(uri), Span):
            by_file[place.file].add(place)
    found = []
    for spans in by_file.values():
        ordered = sorted(spans, key=lambda span: span.offset)
        found.append(Stretch([ordered[0]]))
        for before, span in pairwise(ordered):
            start = found[-1].spans[0].offset
            near = span.offset - before.offset - before.length <= _LARGEST_GAP
            if not near or span.offset + span.length - start > _LARGEST_READ:
                found.append(Stretch())
            found[-1].spans.append(span)
    return [stretch for stretch in found if len(stretch.spans) > 1]
