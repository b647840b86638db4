"""Images in tar shards beside loose files, and resuming a stage of many files, on an S3 server.

    python benchmarks/shards.py [--images 7000] [--files 20000]

The S3 server is moto's, on this machine; requests are counted in its log. **Reading**: the same
JPEG files lie in a bucket alone and in tar shards. Batches of `label.batch_images` are read and
decoded by the function that the teacher's and the students' decoding tasks call, in this process,
loose files and shards in turn. Of the shards every image is read, of the loose files as many as
`--loose`. **Resume**: a stage's folder holds `--files` committed blocks of 16 rows, with their
checkpoint. What a command does with it before any work starts is timed: finding the commits and
counting their rows by their footers. On S3 the commits are found only, and list requests are
counted; Ray lists the checkpoint once more for itself.

The table goes to stdout, the numbers with hardware, versions, settings and date to
benchmarks/results/shards.json.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from measured import measured_on, write_results
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from servers import BUCKET, s3_server  # type: ignore[import-not-found]

from hts_ray.config import LabelConfig, PrepareConfig
from hts_ray.engine.compaction import BLOCKS, CHECKPOINT
from hts_ray.engine.decoding import decode_batch
from hts_ray.engine.image_pass import committed_names, committed_rows
from hts_ray.images.stage import prepare_manifest
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import read_table, write_table

RESULTS = Path(__file__).parent / "results" / "shards.json"
DISTINCT = 64
ROUNDS = 4
SIDE = 448  # about 160 KB as JPEG, as photographs of 500 pixels are
BLOCK_ROWS = 16


def main() -> None:
    """Measure both parts, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=7000)
    parser.add_argument("--loose", type=int, default=1600)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--files", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as environment:
        os.environ.update(environment)
        log = Path(folder) / "s3.log"
        reading = measure_reading(arguments, folder, log)
        resume = measure_resume(arguments.files, folder, log)
    results = {**measured_on(), "settings": vars(arguments) | {"batch": LabelConfig().batch_images}}
    results |= {"reading": reading, "resume": resume}
    for row in [*reading, *resume]:
        print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in row.items()))  # fmt: skip
    write_results(RESULTS, results)


def requests(log: Path) -> list[str]:
    """Return the requests that the server has answered, as it logs them."""
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if '" 20' in line or '" 30' in line or '" 40' in line]


def jpegs() -> list[bytes]:
    """Return a few JPEG files of a photo's size."""
    found = []
    for seed in range(DISTINCT):
        small = np.random.default_rng(seed).integers(0, 255, (SIDE // 2, SIDE // 2, 3), np.uint8)
        sink = io.BytesIO()
        Image.fromarray(small).resize((SIDE, SIDE)).save(sink, "JPEG", quality=92)
        found.append(sink.getvalue())
    return found


def upload(work: Callable[[int], None], count: int) -> None:
    """Do a number of uploads in threads."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(count)))


def measure_reading(arguments: argparse.Namespace, folder: str, log: Path) -> list[dict[str, Any]]:
    """Read loose files and shards in turn."""
    images, each = jpegs(), -(-arguments.images // arguments.shards)
    loose = f"s3://{BUCKET}/loose"
    upload(lambda n: storage.write_bytes(f"{loose}/{n:06d}.jpg", images[n % DISTINCT]),
           arguments.loose)  # fmt: skip

    def shard(number: int) -> None:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for n in range(number * each, min((number + 1) * each, arguments.images)):
                member = tarfile.TarInfo(f"{n:06d}.jpg")
                member.size = len(images[n % DISTINCT])
                tar.addfile(member, io.BytesIO(images[n % DISTINCT]))
        storage.write_bytes(f"s3://{BUCKET}/tars/train-{number:03d}.tar", data.getvalue())

    upload(shard, arguments.shards)
    rows = []
    tables = {}
    for source, root in (("folder", loose), ("webdataset", f"s3://{BUCKET}/tars")):
        before, started = len(requests(log)), time.monotonic()
        stage = prepare_manifest(PrepareConfig(), f"{folder}/{source}", source, root)
        seconds = time.monotonic() - started
        table = tables[source] = read_table(stage.path, ["image_id", "uri"])
        asked = len(requests(log)) - before
        rows.append({"part": "prepare", "source": source, "images": len(table),
                     "gib": gib(table, images), "requests_per_image": asked / len(table),
                     "images_per_s": len(table) / seconds})  # fmt: skip
    spent = dict.fromkeys(tables, (0, 0, 0.0))  # images, requests, seconds
    for turn in range(ROUNDS):
        for source, table in tables.items():
            step = -(-len(table) // ROUNDS)
            before, started = len(requests(log)), time.monotonic()
            read = read_all(table.slice(turn * step, step))
            asked, seconds = len(requests(log)) - before, time.monotonic() - started
            total = spent[source]
            spent[source] = (total[0] + read, total[1] + asked, total[2] + seconds)
    for source, (read, asked, seconds) in spent.items():
        rows.append({"part": "read and decode", "source": source, "images": read,
                     "gib": gib(tables[source], images), "requests_per_image": asked / read,
                     "images_per_s": read / seconds})  # fmt: skip
    return rows


def gib(table: pa.Table, images: Sequence[bytes]) -> float:
    """Return the size of a table's images."""
    return len(table) * float(np.mean([len(image) for image in images])) / 2**30


def read_all(table: pa.Table) -> int:
    """Read and decode a table's images, a batch after the other."""
    config = LabelConfig()
    for start in range(0, len(table), config.batch_images):
        decoded = decode_batch(table.slice(start, config.batch_images), config.images)
        assert decoded["error_kind"].null_count == len(decoded), decoded["error"].to_pylist()
    return len(table)


def measure_resume(files: int, folder: str, log: Path) -> list[dict[str, Any]]:
    """Find and count what a stage of many files has committed, on a disk and on S3."""
    rows = []
    for place, run_dir in (("disk", f"{folder}/run"), ("S3", f"s3://{BUCKET}/run")):
        stage = StageFolder(run_dir, "region_scores", "k")
        upload(partial(commit, stage), files)
        lists = len(listings(log))
        started = time.monotonic()
        disk = place == "disk"
        count = committed_rows(stage) if disk else BLOCK_ROWS * len(committed_names(stage))
        seconds = time.monotonic() - started
        assert count == files * BLOCK_ROWS
        asked = None if disk else len(listings(log)) - lists
        rows.append({"place": place, "files": files, "seconds": seconds, "lists": asked,
                     "counted": disk})  # fmt: skip
    return rows


def listings(log: Path) -> list[str]:
    """Return the server's list requests."""
    return [line for line in requests(log) if "list-type=2" in line]


def commit(stage: StageFolder, number: int) -> None:
    """Write a block as a worker of Ray's does: the rows, and their ids in the checkpoint."""
    name = f"write_{number:06d}"
    ids = pa.table({"image_id": [f"{number}-{row}" for row in range(BLOCK_ROWS)]})
    if not storage.is_remote(stage.path):  # where blocks are not looked at
        write_table(stage.file(BLOCKS, f"{name}-0.parquet"), ids)
    write_table(stage.file(CHECKPOINT, f"{name}.parquet"), ids)


if __name__ == "__main__":
    main()
