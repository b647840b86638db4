"""The run directory: one folder a stage, named by a hash of what made it.

A stage writes to a folder named `<table>-<key>`. The folder is finished when its `stats.json`
exists, which is written last and in one step. Readers refuse a folder without it, so an unfinished
folder is never read as a result.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.parts import ContentHash
from hts_ray.store.tables import STATS_FILE, read_table, stream


def settings_hash(*parts: Any) -> str:
    """Return 12 hexadecimal digits that change whenever any of the JSON-able parts does."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def content_hash(table: pa.Table) -> str:
    """Return a hash of a table's rows, whatever its chunks and file layout."""
    return ContentHash(table).digest()


def rows_hash(rows: pads.Dataset, columns: Iterable[str]) -> str:
    """Return a hash of some columns of rows that may not fit into memory, whatever their files.

    The columns hold text, numbers or lists of them.
    """
    digests: dict[str, Any] = {}
    for piece in stream(rows, columns):
        for name in piece.column_names:
            for chunk in piece[name].chunks:
                _add_to(digests, name, chunk)
    return settings_hash({name: digest.hexdigest() for name, digest in digests.items()})


def _add_to(digests: dict[str, Any], name: str, values: pa.Array) -> None:
    """Add values to the digests of a column: which are null, the lengths, what they hold."""
    parts = {"valid": values.is_valid()}
    if pa.types.is_list(values.type):
        parts["length"] = values.value_lengths().drop_null()
        _add_to(digests, f"{name}.item", values.flatten())
    else:
        parts[str(values.type)] = values.drop_null()
    for part, array in parts.items():
        text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
        data = "".join(array.to_pylist()).encode() if text else array.to_numpy(False).tobytes()
        digests.setdefault(f"{name}.{part}", hashlib.sha256()).update(data)
        if text:
            lengths = pc.binary_length(array).to_numpy(False).tobytes()
            digests.setdefault(f"{name}.length", hashlib.sha256()).update(lengths)


@dataclass(frozen=True)
class StageFolder:
    """One stage's output folder inside a run directory: `<table>-<key>`."""

    run_dir: str
    table: str
    key: str

    @property
    def path(self) -> str:
        """The folder's path or URI."""
        return storage.join(self.run_dir, f"{self.table}-{self.key}")

    def file(self, *names: str) -> str:
        """The path of a file inside the folder."""
        return storage.join(self.path, *names)

    @property
    def finished(self) -> bool:
        """Whether the stage's last step, its `stats.json`, was written."""
        return storage.exists(self.file(STATS_FILE))

    @property
    def stats(self) -> dict[str, Any]:
        """What the finished stage counted."""
        stats = storage.read_json(self.file(STATS_FILE))
        assert isinstance(stats, dict)
        return stats

    def read(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Return the stage's rows, of some columns or all; DataError where there is nothing."""
        return read_table(self.path, columns)

    def publish(self, stats: Mapping[str, Any]) -> None:
        """Make the folder's contents a result; `stats` holds rows in, out, quarantined, seconds."""
        storage.write_json(
            self.file(STATS_FILE),
            {**stats, "table": self.table, "key": self.key, "finished_at": time.time()},
        )


def stage_folders(run_dir: str, table: str) -> list[StageFolder]:
    """Return every folder of `table`, finished or not, by key."""
    prefix = f"{table}-"
    names = [name for name in storage.list_names(run_dir) if name.startswith(prefix)]
    return [StageFolder(run_dir, table, name[len(prefix) :]) for name in names]


def finished_stages(run_dir: str, table: str) -> list[StageFolder]:
    """Return every finished folder of `table`, the latest last."""
    finished = [folder for folder in stage_folders(run_dir, table) if folder.finished]
    return sorted(finished, key=lambda folder: float(folder.stats["finished_at"]))


def find_stage(run_dir: str, table: str) -> StageFolder | None:
    """Return the most recently finished folder of `table`, or None."""
    return next(reversed(finished_stages(run_dir, table)), None)


def require_stage(run_dir: str, table: str, command: str) -> StageFolder:
    """Return the latest finished folder of `table`; DataError naming the command to run first."""
    folder = find_stage(run_dir, table)
    if folder is None:
        raise DataError(f"{run_dir} holds no finished {table}: run `hts {command}` first")
    return folder


def given_stage(path: str, table: str) -> StageFolder:
    """Return the finished stage folder at `path`; DataError when it is another table's."""
    folder, _, name = storage.absolute(path).rstrip("/").rpartition("/")
    if not name.startswith(f"{table}-"):
        raise DataError(f"{path} is not a {table} folder: its name must start with {table}-")
    stage = StageFolder(folder, table, name.removeprefix(f"{table}-"))
    if not stage.finished:
        raise DataError(f"{path} is not finished: run the stage again, it resumes")
    return stage
