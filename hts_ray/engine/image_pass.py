"""What the stages over images share: manifest in, one row an image out, resumable.

A stage reads the manifest, decodes, runs its model and appends Parquet files to its folder.
Ray Data's checkpoint keeps the ids of the written rows. Each image gives exactly one row, good or
quarantined, so a rerun after a crash continues where the files end, and `finish` checks that every
image came out once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.engine.compat import committed_writes, written_by
from hts_ray.engine.mistakes import users_mistakes_unwrapped
from hts_ray.errors import DataError
from hts_ray.images.manifest import IMAGE_COLUMNS
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import QUARANTINE_SCHEMA, count_rows, read_table, write_table

if TYPE_CHECKING:
    import ray.data

OK = "ok"
QUARANTINED = "quarantined"
CHECKPOINT = "checkpoint"  # the folder in a stage where Ray keeps the ids of written rows
# Waiting for GPUs of an autoscaling cluster counts as no progress; Ray's own limit is 30 min.
_NO_PROGRESS_SECONDS = 6 * 3600


def image_dataset(
    path: str, splits: Sequence[str] | None = None, only: pa.Array | None = None
) -> ray.data.Dataset:
    """Return image_id, uri and split of a Parquet file's rows as a dataset that workers read.

    `splits` and `only`, image ids, cut it down. It starts with a read, as Ray's checkpoints ask.
    """
    import ray.data
    from ray.data.expressions import col

    dataset = ray.data.read_parquet(path).select_columns(list(IMAGE_COLUMNS))
    if only is not None:
        # Not Dataset.limit: on a resumed run that would count from the images still to do.
        return dataset.map_batches(partial(_keep_ids, ids=only), batch_format="pyarrow")
    return dataset if splits is None else dataset.filter(expr=col("split").is_in(list(splits)))


def _keep_ids(table: pa.Table, ids: pa.Array) -> pa.Table:
    return table.filter(pc.is_in(table["image_id"], ids))


_context_lock = threading.RLock()


@contextmanager
def data_context(checkpoint_path: str | None = None, *, keep_order: bool = False) -> Iterator[None]:
    """Set Ray Data up for one pipeline: resume from `checkpoint_path`, no progress bars.

    A user's mistake that a worker finds is raised here as it was there, without Ray's wrapping.
    Ray's context belongs to the process, so blocks in several threads wait for each other; a
    dataset keeps the context that it was made under.
    """
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig

    checkpoint = None
    if checkpoint_path is not None:
        checkpoint = CheckpointConfig(
            id_column="image_id",
            checkpoint_path=checkpoint_path,
            override_filesystem=storage.resolve(checkpoint_path)[0],
            # Deleting would make a rerun of a finished pipeline append every row again.
            delete_checkpoint_on_success=False,
        )
    with _context_lock, users_mistakes_unwrapped():
        context = DataContext.get_current()
        with (
            _changed(context, "checkpoint_config", checkpoint),
            _changed(context, "enable_progress_bars", False),
            _changed(context, "execution_no_progress_timeout_s", _NO_PROGRESS_SECONDS),
            _changed(context.execution_options, "preserve_order", keep_order),
        ):
            yield


@contextmanager
def _changed(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def rows_per_block(rows: int, batch: int, largest: int = 1024) -> int:
    """Return how many rows a block gets: a multiple of `batch`, a few blocks for every CPU.

    A block is what a crash can cost, and also a file.
    """
    import ray

    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    share = -(-rows // (4 * cpus))
    return batch * max(1, min(-(-share // batch), largest // batch))


def committed_names(stage: StageFolder) -> set[str]:
    """Return the names, without suffix, under which Ray's checkpoint has committed writes."""
    return committed_writes(storage.list_names(stage.file(CHECKPOINT)))


def data_files(stage: StageFolder) -> list[str]:
    """Return the names of the stage's data files, from one listing of its folder."""
    return [name for name in storage.list_names(stage.path) if name.endswith(".parquet")]


def committed_files(stage: StageFolder, prefix: str = "") -> list[str]:
    """Return the paths of the data that an earlier run committed, which a rerun leaves as it is.

    `prefix` is how the names of the commits begin that count. Lists two folders.
    """
    committed = {name for name in committed_names(stage) if name.startswith(prefix)}
    return [stage.file(name) for name in data_files(stage) if written_by(name) in committed]


def committed_rows(stage: StageFolder, prefix: str = "") -> int:
    """Return how many rows `committed_files` have, by their footers."""
    return count_rows(committed_files(stage, prefix))


def remove_uncommitted(stage: StageFolder) -> None:
    """Remove data whose write was not committed: a worker may outlive a killed driver."""
    committed = committed_names(stage)
    for name in data_files(stage):
        if written_by(name) not in committed:
            storage.delete_file(stage.file(name))


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
    quarantined, quarantined_by_kind, seconds, rows_per_second and `more_stats`. Raises DataError
    when no image could be used; the folder is emptied then, so that a rerun tries the images
    anew.
    """
    if storage.exists(stage.file(CHECKPOINT)):
        remove_uncommitted(stage)
    columns = ["image_id", "uri", "status", "error_kind", "error"]
    rows = read_table(stage.path, columns=columns)
    _require_exactly_once(rows["image_id"], expected_ids, stage.path)
    bad = rows.filter(pc.not_equal(rows["status"], OK))
    kinds = Counter(bad["error_kind"].to_pylist())
    if len(bad) == len(rows):
        storage.remove_tree(stage.path)
        write_quarantine(stage, bad, name)
        first = bad.slice(0, 1).to_pylist()[0]
        counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        raise DataError(
            f"none of {len(rows)} images can be used ({counts}): the first is {first['uri']},"
            f" {first['error']}; all are listed in {stage.file('quarantine')}"
        )
    if notes is not None:
        bad_rows = bad.select(notes.column_names).cast(notes.schema)
        notes = pa.concat_tables([bad_rows, notes])
    write_quarantine(stage, bad if notes is None else notes, name)
    if table_info is not None:
        storage.write_json(stage.file("table.json"), dict(table_info))
    stage.publish(
        {
            "rows_in": len(expected_ids),
            "rows_out": len(rows) - len(bad),
            "quarantined": len(bad),
            "quarantined_by_kind": dict(kinds),
            "seconds": seconds,
            "rows_per_second": len(rows) / max(seconds, 1e-9),
            **(more_stats or {}),
        }
    )
    return stage.stats


def _require_exactly_once(found: pa.ChunkedArray, expected: pa.Array, path: str) -> None:
    twice = len(found) - len(found.unique())
    missing = pc.sum(pc.invert(pc.is_in(expected, found.combine_chunks()))).as_py() or 0
    strange = pc.sum(pc.invert(pc.is_in(found, expected))).as_py() or 0
    if twice or missing or strange:
        raise DataError(
            f"{path} does not hold every image once ({missing} missing, {twice} repeated,"
            f" {strange} of another manifest): remove the folder and run the stage again"
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
