"""Time from the start of an epoch to the first batch of every training worker.

    python benchmarks/epoch_start.py [--workers 8] [--side 201] [--rounds 5]

`buffer` is the feeding of earlier versions: blocks of decoded images, and on every worker a shuffle
buffer of 1 GiB of images that fills before the first batch. `mixed` is `hts_ray.student.feed`: rows
mixed by seed and epoch before they are decoded. Both run on one Ray cluster in turn, an epoch each.
Decoding is a plain NumPy fill, so the figures hold what feeding costs without it; with real
decoding the buffer's rows cost more. Workers are logical: threads of one process. The buffer's
rows are those of images of `--stored` pixels a side, 804 for a student of 672; with a smaller
`--side` the images are smaller and the rows as many, since eight workers with such buffers take
13 GB. The first epoch of each, which starts processes, does not count. The load average is the
machine's at the end, its other work included. JSON goes to benchmarks/results/epoch_start.json, a
row a call.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from measured import measured_on, read_results, write_results

from hts_ray.config import RayConfig
from hts_ray.engine.ray_data import data_context
from hts_ray.engine.session import ray_cluster
from hts_ray.store import storage
from hts_ray.store.tables import write_table
from hts_ray.student.feed import Feed, dataset_of
from hts_ray.student.targets import row_file

if TYPE_CHECKING:
    import ray.data

RESULTS = Path(__file__).parent / "results" / "epoch_start.json"
_SHUFFLE_BYTES = 1 << 30  # of a worker's buffer, in earlier versions
_BLOCK_BYTES, _DECODE_ROWS = 32 << 20, 32


def fill(table: pa.Table, side: int) -> pa.Table:
    """Add pixels to rows."""
    image = np.full(side * side * 3, 7, np.uint8).tobytes()
    return table.append_column("pixels", pa.array([image] * len(table), pa.large_binary()))


def buffered(rows: pa.Table, options: argparse.Namespace) -> ray.data.Dataset:
    """Return the images as earlier versions fed them."""
    import ray.data

    block = max(1, _BLOCK_BYTES // (options.stored**2 * 3))
    slices = [rows.slice(start, block) for start in range(0, len(rows), block)]
    with data_context(keep_order=True):
        return ray.data.from_arrow(slices).map_batches(
            partial(fill, side=options.side), batch_format="pyarrow", batch_size=_DECODE_ROWS
        )


def mixed(rows: pa.Table, options: argparse.Namespace, folder: str) -> tuple[Feed, Any]:
    """Return the feed of the images, and its dataset."""
    write_table(row_file(folder, 0), rows)
    feed = Feed(folder, (len(rows),), options.stored, "", 0, f"{folder}/epoch.json")
    with feed.blocks:
        return feed, dataset_of(feed, partial(fill, side=options.side), most=feed.task_units)


def first_batches(shards: list[Any], batch: int, **options: Any) -> float:
    """Return the seconds until every worker has its first batch; the epoch is left then."""
    sizes: list[int] = []

    def take(shard: Any) -> None:
        batches = shard.iter_batches(batch_size=batch, batch_format="pyarrow", **options)
        sizes.append(len(next(iter(batches))))

    threads = [threading.Thread(target=take, args=(shard,)) for shard in shards]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [batch] * len(shards), sizes
    return time.monotonic() - started


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of every counted epoch."""
    rows = pa.table(
        {
            "row": np.arange(options.rows),
            "uri": [f"/images/{number:06d}.jpg" for number in range(options.rows)],
        }
    )
    size = options.stored**2 * 3
    kept = {"local_shuffle_buffer_size": _SHUFFLE_BYTES // size, "local_shuffle_seed": 0}
    found: dict[str, list[float]] = {"buffer": [], "mixed": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_cluster(RayConfig(object_store_gib=options.store_gib)),
    ):
        feed, dataset = mixed(rows, options, folder)
        shards = {
            "buffer": buffered(rows, options).streaming_split(options.workers, equal=True),
            "mixed": dataset.streaming_split(options.workers, equal=True),
        }
        for epoch in range(options.rounds + 1):
            for kind, parts in shards.items():
                storage.write_json(str(feed.epoch_file), epoch)
                more = kept if kind == "buffer" else {}
                seconds = first_batches(parts, options.batch, **more)
                print(f"epoch {epoch} {kind}: {seconds:.2f} s", flush=True)
                if epoch:
                    found[kind].append(seconds)
    return found


def main() -> None:
    """Print and store the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=16, help="images of a step on a worker")
    parser.add_argument("--stored", type=int, default=804)
    parser.add_argument("--side", type=int, default=201)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store-gib", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = measure(options)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    row = {
        **settings,
        "load": os.getloadavg()[0],
        "seconds": found,
        "median": {kind: statistics.median(seconds) for kind, seconds in found.items()},
        "ratio": statistics.median(
            b / a for a, b in zip(found["buffer"], found["mixed"], strict=True)
        ),
    }
    print({"median": row["median"], "ratio": row["ratio"]})
    same = ("workers", "side", "stored", "batch")
    earlier = read_results(options.out).get("rows", [])
    rows = [one for one in earlier if any(one[name] != row[name] for name in same)]
    write_results(options.out, {**measured_on(), "rows": [*rows, row]})


if __name__ == "__main__":
    main()
