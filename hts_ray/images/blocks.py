"""A large `prepare`: what is listed is looked at in blocks, on all machines, and can be resumed.

A folder of its own in the run holds what was listed and a file for every block that was looked at;
each appears in one step. So a prepare that was killed goes on after the last one, and neither the
driver nor a worker holds more than a few blocks. The folder is named by all that decides what is
in it, and removed when the manifest is there.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hts_ray.images.prepared import Found, Look, Seen, look_at_images
from hts_ray.store import storage
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.parts import ahead
from hts_ray.store.tables import read_table, write_table

# Calls a function with every tuple of arguments, anywhere, as `itertools.starmap` does here.
Spread = Callable[[Callable[[int], tuple[int, int]], Iterable[tuple[int]]], Iterable[Any]]
FOLDER = "_prepare-"  # and a key
_LISTED = "listed"
_ABANDONED_SECONDS = 24 * 3600  # a prepare that runs writes a block more often
_BLOCKS_PER_LIST = 256  # a list's footer has an entry a block, and every block reads one


@dataclass(frozen=True)
class Blocks:
    """Blocks of listed rows in a folder. Workers are given it, and call it with a number."""

    folder: str
    look: Look
    rows: int  # listed, of all blocks
    block: int

    @classmethod
    def of(cls, found: Found, folder: str, *, workers: int, headers: bool) -> Blocks:
        """Write what was found to a folder, as far as it is not there."""
        look = found.look or partial(look_at_images, workers=workers, headers=headers)
        there = set(storage.list_names(storage.join(folder, _LISTED)))
        step = found.block * _BLOCKS_PER_LIST
        for start in range(0, len(found.listed), step):
            name = _name(start // step)
            if name not in there:
                path = storage.join(folder, _LISTED, name)
                write_table(path, found.listed.slice(start, step), row_group_size=found.block)
        return cls(folder, look, len(found.listed), found.block)

    @property
    def numbers(self) -> range:
        """The blocks."""
        return range(-(-self.rows // self.block))

    def __call__(self, number: int) -> tuple[int, int]:
        """Look at a block, write what was seen; returns how many rows it has, and how many bad."""
        bad = 0

        def each(wrong: int) -> None:
            nonlocal bad
            bad += wrong

        rows, counts = self.look(self._listed(number), each)
        known = {"counts": json.dumps(counts)}
        write_table(self._file(number), rows.replace_schema_metadata(known))
        return self._length(number), bad

    def finish(self, spread: Spread, progress: ImagesDone | None) -> None:
        """Look at the blocks that no earlier run has looked at."""
        there = set(storage.list_names(self.folder))
        pending = [number for number in self.numbers if _name(number) not in there]
        done, bad = self.rows - sum(map(self._length, pending)), 0
        for looked, wrong in spread(self, zip(pending, strict=True)):
            done, bad = done + looked, bad + wrong
            if progress is not None:
                progress(done, self.rows, bad)

    def seen(self) -> Iterator[Seen]:
        """Yield what was seen, in the order in which it was listed."""
        for table in ahead(read_table, map(self._file, self.numbers)):
            counts = json.loads((table.schema.metadata or {}).get(b"counts", b"{}"))
            yield Seen(table, Counter(counts))

    def remove(self) -> None:
        """Remove the folder."""
        storage.remove_tree(self.folder)

    def _length(self, number: int) -> int:
        return min(self.block, self.rows - number * self.block)

    def _file(self, number: int) -> str:
        return storage.join(self.folder, _name(number))

    def _listed(self, number: int) -> pa.Table:
        path = storage.join(self.folder, _LISTED, _name(number // _BLOCKS_PER_LIST))
        filesystem, inner = storage.resolve(path)

        def read() -> pa.Table:
            with filesystem.open_input_file(inner) as stream:
                return pq.ParquetFile(stream).read_row_group(number % _BLOCKS_PER_LIST)

        return storage.patiently(path, read)


def remove_abandoned(run_dir: str) -> None:
    """Remove the blocks of prepares that were cut off and that nobody went on with for a day."""
    for name in storage.list_names(run_dir):
        path = storage.join(run_dir, name)
        if name.startswith(FOLDER) and time.time() - storage.changed(path) > _ABANDONED_SECONDS:
            storage.remove_tree(path)


def _name(number: int) -> str:
    return f"{number:08d}.parquet"
