"""What the stages over images share: manifest in, one row an image out, resumable.

A stage reads the manifest, decodes, runs its model and writes a Parquet file a block to its folder.
Ray Data's checkpoint keeps the ids of the written rows. Each image gives exactly one row, good or
quarantined, so a rerun after a crash continues where the files end, and `finish` checks that every
image came out once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from hts_ray.engine.compaction import BLOCKS, CHECKPOINT, publish
from hts_ray.engine.compat import committed_writes, written_by
from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import (
    QUARANTINE_SCHEMA,
    STATS_FILE,
    count_rows,
    read_table,
    write_table,
)

OK = "ok"
QUARANTINED = "quarantined"


def committed_names(stage: StageFolder) -> set[str]:
    """Return the names, without suffix, under which Ray's checkpoint has committed writes."""
    return _written(stage)[1]


def committed_files(stage: StageFolder, prefix: str = "") -> list[str]:
    """Return the paths of the rows that count: of a finished stage all, else what is committed.

    `prefix` is how the names of the commits begin that count. Lists the folder once.
    """
    data, committed = _written(stage)
    chosen = {name for name in committed if name.startswith(prefix)}
    return [stage.file(path) for path, write in data.items() if write in chosen]


def committed_rows(stage: StageFolder, prefix: str = "") -> int:
    """Return how many rows `committed_files` have, by their footers."""
    return count_rows(committed_files(stage, prefix))


def remove_uncommitted(stage: StageFolder) -> None:
    """Remove data whose write was not committed: a worker may outlive a killed driver."""
    data, committed = _written(stage)
    for path, write in data.items():
        if write not in committed:
            storage.delete_file(stage.file(path))


def _written(stage: StageFolder) -> tuple[dict[str, str], set[str]]:
    """Return the writes by the paths of their files, and the writes that are committed.

    Files of blocks are in BLOCKS; where an older version wrote, and in a finished stage's folder,
    they lie in the folder itself.
    """
    names = storage.walk(stage.path)
    folders = {"", BLOCKS}
    data = {n: n for n in names if n.endswith(".parquet") and n.rpartition("/")[0] in folders}
    data = {path: written_by(path.rpartition("/")[2]) for path in data}
    if STATS_FILE in names:
        return data, set(data.values())
    ids = [n.removeprefix(f"{CHECKPOINT}/") for n in names if n.startswith(f"{CHECKPOINT}/")]
    return data, committed_writes(ids)


def finish(
    stage: StageFolder,
    expected_ids: pa.Array,
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
    data, committed = _written(stage)
    if committed:
        remove_uncommitted(stage)
        data = {path: write for path, write in data.items() if write in committed}
    ids = read_table(stage.path, ["image_id"])["image_id"]
    _require_exactly_once(ids, expected_ids, stage.path)
    rows = len(ids)
    columns = ["image_id", "uri", "error_kind", "error"]
    bad = read_table(stage.path, columns, pads.field("status") != OK)
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
        [stage.file(path) for path in data],
        {
            "rows_in": len(expected_ids),
            "rows_out": rows - len(bad),
            "quarantined": len(bad),
            "quarantined_by_kind": dict(kinds),
            "blocks": len(data),
            "seconds": seconds,
            "rows_per_second": rows / max(seconds, 1e-9),
            **(more_stats or {}),
        },
    )
    return stage.stats


def _require_exactly_once(found: pa.ChunkedArray, expected: pa.Array, path: str) -> None:
    # One look-up of every row; sets of all ids would take more memory than the ids.
    place = pc.index_in(found, value_set=expected)
    counts = np.bincount(place.drop_null().to_numpy(), minlength=len(expected))
    twice, missing = int((counts - 1).clip(0).sum()), int((counts == 0).sum())
    if twice or missing or place.null_count:
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
