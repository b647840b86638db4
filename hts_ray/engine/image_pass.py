"""What the stages over images share: manifest in, one row an image out, resumable.

A stage reads the manifest, decodes, runs its model and appends Parquet files to its folder,
while Ray Data's checkpoint keeps the ids of the rows that are written. Because each image
gives exactly one row, good or quarantined, a rerun after a crash goes on where the files end
and `finish` can prove that every image came out once.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hts_ray import errors
from hts_ray.config import ImagesConfig
from hts_ray.engine.deaths import KILLED_WORKER, Log, each_in_a_process
from hts_ray.errors import DataError, UserError
from hts_ray.images.decode import DecodedImage
from hts_ray.images.manifest import IMAGE_COLUMNS
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import (
    QUARANTINE_SCHEMA,
    read_table,
    write_table,
)

if TYPE_CHECKING:
    import ray.data

    from hts_ray.engine.telemetry import Meter

OK = "ok"
QUARANTINED = "quarantined"
CHECKPOINT = "checkpoint"  # the folder in a stage where Ray keeps the ids of written rows
DECODED_FIELDS = (
    pa.field("pixels", pa.large_binary()),
    pa.field("pixel_height", pa.int32()),
    pa.field("pixel_width", pa.int32()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("error_kind", pa.string()),
    pa.field("error", pa.string()),
)
# Waiting for GPUs of an autoscaling cluster counts as no progress; Ray's own limit is 30 min.
_NO_PROGRESS_SECONDS = 6 * 3600
_READ_THREADS = 4  # a task's reads overlap; storage is mostly waited for

Pixels = npt.NDArray[np.uint8]


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

    with _context_lock, users_mistakes_unwrapped():
        context = DataContext.get_current()
        options = context.execution_options
        before = (
            context.checkpoint_config,
            context.enable_progress_bars,
            context.execution_no_progress_timeout_s,
            options.preserve_order,
        )
        context.checkpoint_config = None
        if checkpoint_path is not None:
            context.checkpoint_config = CheckpointConfig(
                id_column="image_id",
                checkpoint_path=checkpoint_path,
                override_filesystem=storage.resolve(checkpoint_path)[0],
                # Deleting would make a rerun of a finished pipeline append every row again.
                delete_checkpoint_on_success=False,
            )
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = _NO_PROGRESS_SECONDS
        options.preserve_order = keep_order
        try:
            yield
        finally:
            context.checkpoint_config = before[0]
            context.enable_progress_bars = before[1]
            context.execution_no_progress_timeout_s = before[2]
            options.preserve_order = before[3]


@contextmanager
def users_mistakes_unwrapped() -> Iterator[None]:
    """Raise a UserError that Ray wrapped as itself; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        mistake = user_error(error)
        if mistake is None:
            raise
        # Without the cause: Ray's wrappers print the worker's traceback.
        raise mistake from None


_NAMED_IN_TEXT = re.compile(r"^hts_ray\.errors\.(ConfigError|DataError|UserError): (.+)", re.M)


def user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError inside a chain of Ray's wrappers, or None.

    Of an actor that died while it was made Ray keeps the traceback's text alone, whose last
    line names the error.
    """
    named = _NAMED_IN_TEXT.findall(str(error)) if error is not None else []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # A RayTaskError is made to be an instance of its cause's class as well: look inside.
        inner = getattr(error, "cause", None)
        if isinstance(error, UserError) and not isinstance(inner, BaseException):
            return error
        error = inner if isinstance(inner, BaseException) else error.__cause__
    if named:
        kind, message = named[-1]
        return getattr(errors, kind)(message)  # type: ignore[no-any-return]
    return None


def decode_batch(
    table: pa.Table,
    images: ImagesConfig,
    square: int | None = None,
    *,
    retries: int | None = None,
    attempts: Log | None = None,
    meter: Meter | None = None,
) -> pa.Table:
    """Add the decoded pixels of each row's `uri`, or the reason why there are none.

    Adds `pixels` (H * W * 3 bytes, RGB, row-major), `pixel_height`, `pixel_width`, the upright
    original's `width` and `height`, `error_kind` and `error`; a bad row has null pixels.
    `square` squashes the pixels to `square` x `square`, which is all that a student looks at.
    Storage that fails is asked again up to `retries` times, a few times by default. With a log of
    `attempts`, a batch that has killed its worker is decoded in a process apart. A `meter` counts
    what is asked again. Raises DataError where it is the storage that fails and not an image, see
    `hts_ray.images.retry.patiently`.
    """
    uris = table["uri"].to_pylist()
    work = partial(_decode_row, images=images, square=square, retries=retries, meter=meter)
    ids = [f"decode {image_id}" for image_id in table["image_id"].to_pylist()] if attempts else []
    if attempts is not None and attempts.begin(ids) is not None:
        rows = each_in_a_process(work, uris, _killed_by)
    else:
        with ThreadPoolExecutor(min(_READ_THREADS, max(1, len(uris)))) as threads:
            rows = list(threads.map(work, uris))
    if attempts is not None:
        attempts.end(ids)
    for field in DECODED_FIELDS:
        if field.name in table.column_names:  # a manifest may know the size already
            table = table.drop_columns([field.name])
        values = pa.array([row.get(field.name) for row in rows], field.type)
        table = table.append_column(field, values)
    return table


def _killed_by(_uri: str | None) -> dict[str, Any]:
    return {"error_kind": KILLED_WORKER, "error": "the process that decoded it died"}


def _decode_row(
    uri: str | None,
    images: ImagesConfig,
    square: int | None,
    retries: int | None = None,
    meter: Meter | None = None,
) -> dict[str, Any]:
    from hts_ray.images.decode import ImageError, decode_image
    from hts_ray.images.retry import RETRIES, read_image_bytes

    def retried() -> None:
        if meter is not None:
            meter.count(retries=1)

    try:
        if not uri:
            raise ImageError("missing", "the row has no uri")
        image = decode_image(
            read_image_bytes(uri, RETRIES if retries is None else retries, retried),
            max_pixels=images.max_pixels,
            min_side=images.min_side,
            max_side=images.max_side,
        )
    except ImageError as error:
        return {"error_kind": error.kind, "error": str(error)[:500]}
    except DataError:
        raise  # the storage is down: no image is bad for that
    except Exception as error:  # one image must not cost a block, whatever a decoder throws
        return {"error_kind": "decode_error", "error": f"{type(error).__name__}: {error}"[:500]}
    pixels = image.pixels if square is None else squash(image.pixels, square)
    return {
        "pixels": pixels.tobytes(),
        "pixel_height": pixels.shape[0],
        "pixel_width": pixels.shape[1],
        "width": image.width,
        "height": image.height,
    }


def decoded_image(batch: pa.Table, row: int) -> DecodedImage:
    """Return the pixels of a row of `decode_batch`, a view."""
    height, width = batch["pixel_height"][row].as_py(), batch["pixel_width"][row].as_py()
    pixels = np.frombuffer(batch["pixels"][row].as_buffer(), dtype=np.uint8)
    return DecodedImage(
        pixels=pixels.reshape(height, width, 3),
        width=batch["width"][row].as_py(),
        height=batch["height"][row].as_py(),
    )


def squash(pixels: Pixels, size: int) -> Pixels:
    """Resize uint8 (H, W, 3) to (size, size, 3) without keeping the aspect, bicubic, antialiased.

    Pillow's kernel, which CLIP was trained with, and which workers have without importing torch.
    """
    from PIL import Image

    if pixels.shape[:2] == (size, size):
        return pixels
    resized = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.uint8)


def stack_pixels(table: pa.Table, size: int) -> Pixels:
    """Return the pixels of rows squashed to `size`, uint8 (N, size, size, 3); none may be null."""
    column = table["pixels"].combine_chunks()
    if len(column) == 0:
        return np.zeros((0, size, size, 3), np.uint8)
    flat = [np.frombuffer(value.as_buffer(), np.uint8) for value in column]
    return np.stack(flat).reshape(len(column), size, size, 3)


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
    return {
        name.removesuffix(".parquet")
        for name in storage.list_names(stage.file(CHECKPOINT))
        if name.endswith(".parquet") and not name.endswith(".pending.parquet")
    }


def data_files(stage: StageFolder, name: str | None = None) -> list[str]:
    """Return the stage's data files: those of one committed write, or all."""
    return [
        stage.file(file)
        for file in storage.list_names(stage.path)
        if file.endswith(".parquet") and name in {None, _write_of(file)}
    ]


def _write_of(file: str) -> str:
    """Return the write that made a data file: NAME of `NAME-0.parquet`."""
    return file.rpartition("-")[0]


def committed_rows(stage: StageFolder) -> int:
    """Return how many rows an earlier run committed, which a rerun leaves as they are."""
    files = [path for name in committed_names(stage) for path in data_files(stage, name)]
    return sum(len(read_table(path, ["image_id"])) for path in files)


def remove_uncommitted(stage: StageFolder) -> None:
    """Remove data whose write was not committed: a worker may outlive a killed driver."""
    committed = committed_names(stage)
    for path in data_files(stage):
        if _write_of(path.rpartition("/")[2]) not in committed:
            filesystem, inner = storage.resolve(path)
            filesystem.delete_file(inner)


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
        write_quarantine(stage, pa.concat_tables([bad_rows, notes]), name)
    else:
        write_quarantine(stage, bad, name)
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
    table = pa.table(columns).cast(pa.schema(QUARANTINE_SCHEMA, metadata=None))
    table = table.replace_schema_metadata(QUARANTINE_SCHEMA.metadata)
    write_table(stage.file("quarantine", "part-0.parquet"), table)


class WrittenRows:
    """Counts the rows that a stage's folder holds so far, opening every file once."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._counts: dict[str, tuple[int, int]] = {}

    def __call__(self) -> tuple[int, int]:
        """Return (rows, quarantined rows) of the files that are complete."""
        for name in storage.list_names(self._path):
            if name.endswith(".parquet") and name not in self._counts:
                try:
                    filesystem, inner = storage.resolve(storage.join(self._path, name))
                    status = pq.read_table(inner, columns=["status"], filesystem=filesystem)
                except (OSError, pa.ArrowException):
                    continue  # still being written
                bad = pc.sum(pc.not_equal(status["status"], OK)).as_py() or 0
                self._counts[name] = (len(status), int(bad))
        counts = self._counts.values()
        return sum(rows for rows, _ in counts), sum(bad for _, bad in counts)


class ProgressPoller:
    """Calls `look` every `interval` seconds while the block runs, and once at its end.

    A look that fails is skipped: progress must never end a run.
    """

    def __init__(self, look: Callable[[], None], interval: float = 2.0) -> None:
        self._look = look
        self._interval = interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hts-progress", daemon=True)

    def __enter__(self) -> ProgressPoller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._try()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self._try()

    def _try(self) -> None:
        try:
            self._look()
        except (OSError, ValueError, KeyError, DataError):
            return


@contextmanager
def row_progress(
    stage: StageFolder, total: int, progress: Callable[[int, int, int], None] | None
) -> Iterator[None]:
    """Call `progress(done, total, quarantined)` about every two seconds inside the block."""
    if progress is None:
        yield
        return
    written = WrittenRows(stage.path)

    def look() -> None:
        done, bad = written()
        progress(done, total, bad)

    with ProgressPoller(look):
        yield
