"""What feeds a training: its images, in another order every epoch, kept in memory or not.

The rows lie in Parquet files, each of which is a random part of them. Rows side by side form
units. An epoch passes over the files in a random order, over a file's units in a random order, and
mixes the rows of some units that follow each other; all of that follows from the seed and the
epoch, on whatever machine and however the images are kept. Tasks of one kind read, mix and decode:
no batch waits for a buffer to fill, and the process that started the training sees no row.

Images can be kept in Ray's object store as pixels, as the bytes of their files, or not at all.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
Places = npt.NDArray[np.int64]  # of rows in a file
_LOOP_COLUMNS = ("row", "positive", "ignored", "weight", "pixels")
_BAD_COLUMNS = ("row", "image_id", "uri", "error_kind", "error")
_UNIT_BYTES, _UNIT_ROWS = 32 << 20, 64
_MIXED_ROWS = 512  # at the least, but for few images
_MOST_STRETCHES = 1024
# Every task costs the start of an epoch a millisecond, and what a task makes waits for the tasks
# before it: the first ones make a unit each, later ones more.
_GROWTH, _MOST_UNITS, _MOST_TASKS = 8, 8, 4096
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
    def task_units(self) -> int:
        """The most units that a task of an epoch decodes."""
        return max(_MOST_UNITS, -(-self.rows // self.unit // _MOST_TASKS))

    @property
    def blocks(self) -> Any:
        """Ray Data's settings for this feed: in order, and a unit of pixels a block."""
        # Ray hands on what is larger than its target, and cuts what is half as large again.
        target = max(1 << 20, int(0.7 * self.unit * self.size**2 * 3))
        return data_context(keep_order=True, block_bytes=target)

    def tasks(self, least: int, most: int) -> list[tuple[int, Places]]:
        """Return, in order, a file and the places of the rows in it for each task of the epoch.

        Tasks have `least` units at first, later ones up to `most`, but never more than are mixed.
        """
        epoch = None
        if self.epoch_file is not None:
            known = storage.exists(self.epoch_file)  # Ray also asks before an epoch runs
            epoch = storage.read_json(self.epoch_file) if known else 0
        found: list[tuple[int, Places]] = []
        for file, mixed in self._mixed(epoch):
            rest = mixed
            while len(rest):
                size = min(most, least + len(found) // _GROWTH) * self.unit
                found.append((file, rest[:size]))
                rest = rest[size:]
        return found

    def _mixed(self, epoch: int | None) -> Iterator[tuple[int, Places]]:
        """Yield files and the places of rows that are mixed; without an epoch nothing is."""
        together = -(-max(_MIXED_ROWS, -(-self.rows // _MOST_STRETCHES)) // self.unit)
        files = np.arange(len(self.counts))
        if epoch is not None:
            random = np.random.default_rng([self.seed, epoch])
            files = random.permutation(files)
        for file in files.tolist():
            units = np.arange(-(-self.counts[file] // self.unit))
            if epoch is not None:
                units = random.permutation(units)
            for start in range(0, len(units), together):
                chosen = units[start : start + together, None]
                places = (chosen * self.unit + np.arange(self.unit)).ravel()
                places = places[places < self.counts[file]]
                if epoch is not None:
                    mixed = np.random.default_rng((self.seed, epoch, file, start))
                    places = places[mixed.permutation(len(places))]
                yield file, places


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
    refs = None if kept == "none" else _keep(feed, kept)
    with feed.blocks:
        if kept == "pixels":  # a task takes all rows that are mixed: a unit travels once
            return dataset_of(feed, _good, refs, least=feed.rows, most=feed.rows)
        decode = partial(_decode, size=feed.size, bad_folder=feed.bad_folder, drop_bad=True)
        return dataset_of(feed, decode, refs, most=feed.task_units, concurrency=tasks)


def _keep(feed: Feed, kept: Kept) -> list[Any]:
    """Return references to the units' images in the object store, bad rows among them."""
    plain = Feed(feed.folder, feed.counts, feed.size, feed.bad_folder)
    work: Callable[[pa.Table], pa.Table] = load_bytes
    if kept == "pixels":
        work = partial(_decode, size=feed.size, bad_folder=feed.bad_folder, drop_bad=False)
    with data_context(keep_order=True, block_bytes=_NEVER_CUT):
        refs: list[Any] = dataset_of(plain, work, most=1).materialize().to_arrow_refs()
    assert len(refs) == sum(-(-count // plain.unit) for count in plain.counts)
    return refs


def dataset_of(
    feed: Feed,
    work: Callable[[pa.Table], pa.Table],
    refs: list[Any] | None = None,
    *,
    most: int,
    least: int = 1,
    concurrency: int | None = None,
) -> ray.data.Dataset:
    """Return what `work` makes of a feed's units, anew in the order of every epoch.

    Rows come from the feed's files or, with references, as they are kept. `least` and `most` are
    those of `Feed.tasks`, `concurrency` is how many tasks run at the same time.
    """
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    first = np.concatenate([[0], np.cumsum([-(-count // feed.unit) for count in feed.counts])])

    class Rows(Datasource):  # type: ignore[misc]
        """Ray asks for the tasks anew whenever the dataset runs: once an epoch."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            return [self.task(*task) for task in feed.tasks(least, most)]

        def task(self, file: int, places: Places) -> Any:
            source: str | dict[int, Any] = row_file(feed.folder, file)
            if refs is not None:
                units = np.unique(places // feed.unit).tolist()
                source = {unit: refs[first[file] + unit] for unit in units}
            read = partial(_units_of, source, places, feed.unit, work)
            # How many rows are good shows only when they are read.
            about = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return ReadTask(read, about)

    # Ray would cut what tasks make if they were fewer than the blocks asked for.
    return ray.data.read_datasource(Rows(), override_num_blocks=1, concurrency=concurrency)


def _units_of(
    source: str | Mapping[int, Any],
    places: Places,
    unit: int,
    work: Callable[[pa.Table], pa.Table],
) -> Iterator[pa.Table]:
    """Yield what `work` makes of a file's rows at some places, a unit at a time.

    `source` is the file, or references to what is kept of its units.
    """
    import ray

    kept: dict[int, pa.Table] = {}
    if not isinstance(source, str):
        kept = dict(zip(source, ray.get(list(source.values())), strict=True))
    for start in range(0, len(places), unit):
        mine = places[start : start + unit]
        if isinstance(source, str):
            yield work(_file(source).take(pa.array(mine)))
        else:  # row by row: `take` would first join whole units
            rows = [kept[place // unit].slice(place % unit, 1) for place in mine.tolist()]
            yield work(pa.concat_tables(rows).combine_chunks())


@functools.lru_cache(maxsize=2)
def _file(path: str) -> pa.Table:
    """Return the rows of a file, which many tasks read in turn."""
    return read_table(path).combine_chunks()


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
