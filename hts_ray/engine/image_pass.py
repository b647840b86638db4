"""What the stages over images share: manifest in, one row an image out, resumable.

A stage reads the manifest, decodes, runs its model and writes a Parquet file a block to its folder.
Ray Data's checkpoint keeps the ids of the written rows. Each image gives exactly one row, good or
quarantined, so a rerun after a crash continues where the files end, and `finish` checks that every
image came out once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.engine.compaction import BLOCKS, CHECKPOINT, publish
from hts_ray.engine.compat import committed_writes, written_by
from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import (
    QUARANTINE_SCHEMA,
    STATS_FILE,
    count_rows,
    read_pieces,
    read_table,
    write_table,
)

OK = "ok"
QUARANTINED = "quarantined"
_ROWS = 1 << 17  # whose ids are looked at at a time


def committed_names(stage: StageFolder) -> set[str]:
    """Return the names, without suffix, under which Ray's checkpoint has committed writes."""
    return committed_writes(storage.list_names(stage.file(CHECKPOINT)))


def committed_rows(stage: StageFolder, prefix: str = "") -> int:
    """Return how many rows an unfinished stage has committed; lists its checkpoint and no more.

    `prefix` is how the names of the commits begin that count.
    """
    names = sorted(name for name in committed_names(stage) if name.startswith(prefix))
    return count_rows([stage.file(CHECKPOINT, f"{name}.parquet") for name in names])


def committed_files(stage: StageFolder) -> list[str]:
    """Return the paths of the rows that count: of a finished stage all, else what is committed."""
    return [stage.file(path) for path in _written(stage)[0]]


def remove_uncommitted(stage: StageFolder) -> list[str]:
    """Remove data whose write was not committed, and return the paths of the rest.

    A worker may outlive a killed driver.
    """
    kept, others = _written(stage)
    for path in others:
        storage.delete_file(stage.file(path))
    return [stage.file(path) for path in kept]


def _written(stage: StageFolder) -> tuple[list[str], list[str]]:
    """Return the paths of data that counts, and of data that does not, from one listing.

    Files of blocks are in BLOCKS; where an older version wrote, and in a finished stage's folder,
    they lie in the folder itself. Everything counts in a finished stage, and what this process
    has written, without Ray.
    """
    names = storage.walk(stage.path)
    data = [n for n in names if n.endswith(".parquet") and n.rpartition("/")[0] in {"", BLOCKS}]
    ids = [n.removeprefix(f"{CHECKPOINT}/") for n in names if n.startswith(f"{CHECKPOINT}/")]
    if STATS_FILE in names or not (ids or any(path.startswith(BLOCKS) for path in data)):
        return data, []
    committed = committed_writes(ids)
    kept = [path for path in data if written_by(path.rpartition("/")[2]) in committed]
    return kept, sorted({*data} - {*kept})


def finish(
    stage: StageFolder,
    expected_ids: pa.Array | pa.ChunkedArray,
    *,
    name: str,
    seconds: float,
    table_info: Mapping[str, Any] | None = None,
    more_stats: Mapping[str, Any] | None = None,
    notes: pa.Table | None = None,
) -> dict[str, Any]:
    """Check that every expected image came out exactly once, then publish the stage.

    Writes the bad rows to `quarantine/part-0.parquet` and `table_info`, if given, to
    `table.json`; `name` is the stage's name in the quarantine. `notes` (image_id, uri,
    error_kind, error) are what was wrong with images that are good all the same, such as a bad
    box; they go to the quarantine table too. Returns what was published: rows_in, rows_out,
    quarantined, quarantined_by_kind, blocks (that were written), seconds, rows_per_second and
    `more_stats`. Raises DataError when no image could be used; the folder is emptied then, so that
    a rerun tries the images anew.
    """
    files = remove_uncommitted(stage)
    rows = len(expected_ids)
    bad = _bad_rows(stage, files, expected_ids)
    kinds = Counter(bad["error_kind"].to_pylist())
    if len(bad) == rows:
        storage.remove_tree(stage.path)
        write_quarantine(stage, bad, name)
        first = bad.slice(0, 1).to_pylist()[0]
        counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        raise DataError(
            f"none of {rows} images can be used ({counts}): the first is {first['uri']},"
            f" {first['error']}; all are listed in {stage.file('quarantine')}"
        )
    if notes is not None:
        bad_rows = bad.select(notes.column_names).cast(notes.schema)
        notes = pa.concat_tables([bad_rows, notes])
    write_quarantine(stage, bad if notes is None else notes, name)
    if table_info is not None:
        storage.write_json(stage.file("table.json"), dict(table_info))
    publish(
        stage,
        files,
        {
            "rows_in": len(expected_ids),
            "rows_out": rows - len(bad),
            "quarantined": len(bad),
            "quarantined_by_kind": dict(kinds),
            "blocks": len(files),
            "seconds": seconds,
            "rows_per_second": rows / max(seconds, 1e-9),
            **(more_stats or {}),
        },
    )
    return stage.stats


def _bad_rows(
    stage: StageFolder, files: list[str], expected: pa.Array | pa.ChunkedArray
) -> pa.Table:
    """Return the rows that cannot be used; DataError unless every expected image is there once."""
    columns, rows, mark, bad = ["image_id", "uri", "error_kind", "error"], 0, 0, list[pa.Table]()
    for piece in read_pieces(files, [*columns, "status"]):
        rows, mark = rows + len(piece), mark + _mark(piece["image_id"])
        bad.append(piece.filter(pc.not_equal(piece["status"], OK)).select(columns))
    starts = range(0, len(expected), _ROWS)
    of_expected = sum(_mark(expected.slice(start, _ROWS)) for start in starts)
    if (rows, mark) != (len(expected), of_expected):
        _refuse(stage.path, expected)
    return pa.concat_tables(bad)


def _mark(ids: pa.Array | pa.ChunkedArray) -> int:
    """Return a number that other ids do not have, whatever their order, but for 1 chance in 2^60.

    A table of all ids, to look them up, would take several times their memory.
    """
    return sum(map(hash, ids.to_pylist()))


def _refuse(path: str, expected: pa.Array | pa.ChunkedArray) -> NoReturn:
    place = pc.index_in(read_table(path, ["image_id"])["image_id"], value_set=expected)
    counts = np.bincount(place.drop_null().to_numpy(), minlength=len(expected))
    twice, missing = int((counts - 1).clip(0).sum()), int((counts == 0).sum())
    raise DataError(
        f"{path} does not hold every image once ({missing} missing, {twice} repeated,"
        f" {place.null_count} of another manifest): remove the folder and run the stage again"
    )


def write_quarantine(stage: StageFolder, bad: pa.Table, name: str) -> None:
    """Write `quarantine/part-0.parquet` from image_id, uri, error_kind and error of bad rows."""
    columns = {
        "image_id": bad["image_id"],
        "stage": pa.array([name] * len(bad), pa.string()),
        "uri": bad["uri"],
        "error_kind": pc.fill_null(bad["error_kind"], "unknown"),
        "error": bad["error"],
    }
    table = pa.table(columns).cast(QUARANTINE_SCHEMA)
    write_table(stage.file("quarantine", "part-0.parquet"), table)
