"""What feeds a training: its images, in another order every epoch, kept in memory or not.

The rows lie in Parquet files, each of which is a random part of them. Rows side by side form
units. An epoch passes over the files in a random order, over a file's units in a random order, and
mixes the rows of some units that follow each other; all of that follows from the seed and the
epoch, on whatever machine and however the images are kept. Workers read, mix and decode: no batch
waits for a buffer to fill, and the process that started the training sees no row.

Images can be kept in Ray's object store as pixels, as the bytes of their files, or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import ImagesConfig, RayConfig
from hts_ray.engine.decoding import READ_THREADS, Reader, decode_batch
from hts_ray.engine.ray_data import data_context
from hts_ray.engine.telemetry import on_ray
from hts_ray.images.decode import ImageError
from hts_ray.store import storage
from hts_ray.store.provenance import hardware
from hts_ray.store.tables import read_table, write_table
from hts_ray.student.targets import row_file

if TYPE_CHECKING:
    import ray.data

Kept = Literal["pixels", "bytes", "none"]
_LOOP_COLUMNS = ("row", "positive", "ignored", "weight", "pixels")
_BAD_COLUMNS = ("row", "image_id", "uri", "error_kind", "error")
_UNIT_BYTES, _UNIT_ROWS = 32 << 20, 64
_MIXED_ROWS = 512  # at the least, but for few images
_MOST_TASKS = 1024  # of an epoch that read rows: each costs the start of the epoch a moment
_NEVER_CUT = 1 << 50  # bytes of a block
_SHARE_OF_STORE = 3  # what is kept takes a third: what is on its way to the workers needs room too


@dataclass(frozen=True)
class Feed:
    """The images of a folder's row files, `counts` rows in each, squashed to `size` pixels a side.

    Bad images are listed in `bad_folder`. `epoch_file` holds the number of the epoch that runs;
    without it the order is that of the files.
    """

    folder: str
    counts: tuple[int, ...]
    size: int
    bad_folder: str
    seed: int = 0
    epoch_file: str | None = None

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(self.counts)

    @property
    def pixel_bytes(self) -> int:
        """The bytes of all images as pixels."""
        return self.rows * self.size**2 * 3

    @property
    def unit(self) -> int:
        """The rows of a unit, which is also what is decoded and handed on at a time."""
        return max(1, min(_UNIT_BYTES // (self.size**2 * 3), _UNIT_ROWS, -(-self.rows // 8)))

    @property
    def blocks(self) -> Any:
        """Ray Data's settings for this feed: in order, and a unit of pixels a block."""
        # Ray hands on what is larger than its target, and cuts what is half as large again.
        target = max(1 << 20, int(0.7 * self.unit * self.size**2 * 3))
        return data_context(keep_order=True, block_bytes=target)

    def stretches(self) -> list[Stretch]:
        """Return what each task of the epoch that runs reads, in order."""
        together = -(-max(_MIXED_ROWS, -(-self.rows // _MOST_TASKS)) // self.unit)
        epoch, files = None, np.arange(len(self.counts))
        if self.epoch_file is not None:
            known = storage.exists(self.epoch_file)  # Ray also asks before an epoch runs
            epoch = storage.read_json(self.epoch_file) if known else 0
            random = np.random.default_rng([self.seed, epoch])
            files = random.permutation(files)
        found = []
        for file in files.tolist():
            units = np.arange(-(-self.counts[file] // self.unit))
            if epoch is not None:
                units = random.permutation(units)
            for start in range(0, len(units), together):
                chosen = units[start : start + together]
                seed = None if epoch is None else (self.seed, epoch, file, start)
                rows = int(np.minimum(self.counts[file] - chosen * self.unit, self.unit).sum())
                found.append(Stretch(file, chosen, rows, seed))
        return found


@dataclass(frozen=True)
class Stretch:
    """Some units of a file, `rows` in all, whose rows are mixed by `seed` where there is one."""

    file: int
    units: npt.NDArray[np.int64]
    rows: int
    seed: tuple[int, ...] | None

    def order(self) -> npt.NDArray[np.int64]:
        """Return the order of the rows, as numbers among those of the units."""
        if self.seed is None:
            return np.arange(self.rows)
        return np.random.default_rng(self.seed).permutation(self.rows)


def choose_kept(
    asked: Literal["auto"] | Kept, pixels: float, measure_files: Callable[[], float], store: float
) -> tuple[Kept, str]:
    """Return how images are kept, and why; all amounts are bytes.

    `asked` is `train.images_kept`, `pixels` what all images take as pixels and `measure_files`
    finds out what their files take. `store` is the object store's capacity.
    """
    room = store / _SHARE_OF_STORE
    if asked != "auto":
        return asked, "as train.images_kept says"
    third = f"a third of the object store ({_size(room)})"
    if pixels <= room:
        return "pixels", f"{_size(pixels)} fit into {third}: decoded once"
    files = measure_files()
    if files <= room:
        return "bytes", (
            f"{_size(pixels)} of pixels do not fit into {third}, {_size(files)} of files do:"
            " read once, decoded in every epoch"
        )
    return "none", (
        f"neither {_size(pixels)} of pixels nor {_size(files)} of files fit into {third}:"
        " read and decoded in every epoch"
    )


def object_store_bytes(config: RayConfig) -> float:
    """Return the capacity of the joined cluster's object store, else of a local one to come."""
    if on_ray():
        import ray

        return float(ray.cluster_resources().get("object_store_memory", 0.0))
    # Ray takes 30 % of a machine's memory for it.
    return (config.object_store_gib or 0.3 * hardware()["memory_gib"]) * 2**30


def _size(number: float) -> str:
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"


def mean_file_bytes(uris: Sequence[str | None]) -> float:
    """Return the mean size of the files that can be read, 0 when none can."""
    rows = load_bytes(pa.table({"uri": pa.array(uris, pa.string())}))
    return float(pc.mean(pc.binary_length(rows["bytes"])).as_py() or 0)


def fed_images(feed: Feed, kept: Kept, tasks: int | None = None) -> ray.data.Dataset:
    """Return the decoded images with their labels as a dataset that runs once an epoch.

    Keeping them is done here, once. At most `tasks` images are decoded at the same time, as many
    as there are free CPUs by default. Bad images are left out.
    """
    from ray.data import TaskPoolStrategy

    refs = None if kept == "none" else _keep(feed, kept)
    with feed.blocks:
        dataset = _read(feed, kept, refs)
        if kept == "pixels":
            return dataset
        compute = TaskPoolStrategy(size=tasks)
        decode = partial(_decode, size=feed.size, bad_folder=feed.bad_folder, drop_bad=True)
        units = dataset.repartition(target_num_rows_per_block=feed.unit)
        return units.map_batches(decode, batch_format="pyarrow", batch_size=None, compute=compute)


def _keep(feed: Feed, kept: Kept) -> list[Any]:
    """Return references to the units' images in the object store, bad rows among them."""
    plain = Feed(feed.folder, feed.counts, feed.size, feed.bad_folder)
    work: Any = load_bytes
    if kept == "pixels":
        work = partial(_decode, size=feed.size, bad_folder=feed.bad_folder, drop_bad=False)
    with data_context(keep_order=True, block_bytes=_NEVER_CUT):
        units = _read(plain, "none", None).repartition(target_num_rows_per_block=plain.unit)
        done = units.map_batches(work, batch_format="pyarrow", batch_size=None).materialize()
        refs: list[Any] = done.to_arrow_refs()
    assert len(refs) == sum(-(-count // plain.unit) for count in plain.counts)
    return refs


def _read(feed: Feed, kept: Kept, refs: list[Any] | None) -> ray.data.Dataset:
    """Return the dataset of a feed's rows, from its files or, with references, as they are kept."""
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    unit = feed.unit
    first = np.concatenate([[0], np.cumsum([-(-count // unit) for count in feed.counts])])

    class Rows(Datasource):  # type: ignore[misc]
        """Ray asks for the tasks anew whenever the dataset runs: once an epoch."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            return [self.task(stretch) for stretch in feed.stretches()]

        def task(self, stretch: Stretch) -> Any:
            if refs is None:
                read = partial(_rows_of, row_file(feed.folder, stretch.file), stretch, unit)
            else:
                mine = [refs[first[stretch.file] + number] for number in stretch.units]
                read = partial(_rows_kept, mine, stretch, unit, drop_bad=kept == "pixels")
            about = BlockMetadata(
                num_rows=stretch.rows, size_bytes=None, input_files=None, exec_stats=None
            )
            return ReadTask(read, about)

    tasks = len(feed.stretches())
    # Two tasks that read rows feed many that decode; pixels are copied by as many as can be.
    concurrency = None if kept == "pixels" else min(2, tasks)
    return ray.data.read_datasource(Rows(), override_num_blocks=tasks, concurrency=concurrency)


def _rows_of(path: str, stretch: Stretch, unit: int) -> Iterator[pa.Table]:
    """Yield the rows of a stretch."""
    table = read_table(path)
    starts = [np.arange(start, min(start + unit, len(table))) for start in stretch.units * unit]
    yield table.take(pa.array(np.concatenate(starts)[stretch.order()]))


def _rows_kept(
    refs: list[Any], stretch: Stretch, unit: int, *, drop_bad: bool
) -> Iterator[pa.Table]:
    """Yield the rows of a stretch, a unit at a time, from the kept images of its units."""
    import ray

    rows = [table.slice(i, 1) for table in ray.get(refs) for i in range(len(table))]
    order = stretch.order()
    for start in range(0, len(order), unit):
        # Rows are copied one by one: `take` would first join whole units.
        piece = pa.concat_tables([rows[i] for i in order[start : start + unit]]).combine_chunks()
        yield _good(piece) if drop_bad else piece


def load_bytes(table: pa.Table) -> pa.Table:
    """Add the `bytes` of each row's `uri`, or `error_kind` and `error`."""
    reader = Reader(storage.RETRIES, None)
    uris = table["uri"].to_pylist()
    reader.read_ahead(filter(None, uris))

    def load(uri: str | None) -> dict[str, Any]:
        try:
            return {"bytes": reader.read(uri) if uri else None}
        except ImageError as error:
            return {"error_kind": error.kind, "error": str(error)[:500]}

    with ThreadPoolExecutor(READ_THREADS) as threads:
        found = list(threads.map(load, uris))
    for name, kind in (
        ("bytes", pa.large_binary()),
        ("error_kind", pa.string()),
        ("error", pa.string()),
    ):
        table = table.append_column(name, pa.array([row.get(name) for row in found], kind))
    return table


class Loaded(Reader):
    """Hands out the bytes that `load_bytes` added to a table, and raises the errors it found."""

    def __init__(self, table: pa.Table) -> None:
        super().__init__(0, None)
        columns = (table[name].to_pylist() for name in ("uri", "bytes", "error_kind", "error"))
        self._rows = {uri: found for uri, *found in zip(*columns, strict=True)}

    def read_ahead(self, uris: Any) -> None:
        """Do nothing: all is there."""

    def read(self, uri: str) -> bytes:
        """Return an image's bytes."""
        data, kind, error = self._rows[uri]
        if data is None:
            raise ImageError(kind, error)
        return bytes(data)


def _decode(table: pa.Table, *, size: int, bad_folder: str, drop_bad: bool) -> pa.Table:
    """Decode a unit; bad rows are written to a file named by what they are, and may leave it."""
    reader = None
    if "bytes" in table.column_names:
        reader = Loaded(table)
        table = table.drop_columns(["bytes", "error_kind", "error"])
    decoded = decode_batch(table, ImagesConfig.model_validate({}), square=size, reader=reader)
    bad = decoded.filter(decoded["error_kind"].is_valid()).select(_BAD_COLUMNS)
    if len(bad):
        name = hashlib.sha256(str(bad["row"].to_pylist()).encode()).hexdigest()[:24]
        write_table(storage.join(bad_folder, f"{name}.parquet"), bad)
    if drop_bad:
        return _good(decoded)
    return decoded.select(
        [name for name in decoded.column_names if name in (*_LOOP_COLUMNS, "error_kind")]
    )


def _good(decoded: pa.Table) -> pa.Table:
    """Return the good rows, with what the loop reads."""
    kept = [name for name in decoded.column_names if name in _LOOP_COLUMNS]
    return decoded.filter(decoded["error_kind"].is_null()).select(kept)
