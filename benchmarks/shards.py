"""Images in tar shards beside loose files, and resuming a stage of many files, on an S3 server.

    python benchmarks/shards.py [--parts reading resume] [--images 7200] [--files 20000]

The S3 server is moto's, on this machine; requests are counted in its log. **Reading**: the same
JPEG files lie in a bucket alone and in tar shards. Batches of `label.batch_images` are read and
decoded by the function that the teacher's and the students' decoding tasks call, in this process,
loose files and shards in turn. `prepare` looks at all images of the shards, of which `--read` are
then read, and `--loose` loose files. moto reads an object whole for every range of it that is asked
for; here it reads the range. **Resume**: a stage's folder holds `--files` committed blocks of 16
rows, with their checkpoint. What a command does with it before any work starts is timed: finding
the commits and counting their rows by their footers. On S3 the commits are found only, and list
requests are counted; Ray lists the checkpoint once more for itself.

The table goes to stdout, the numbers with hardware, versions, settings and date to
benchmarks/results/shards.json.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from measured import measured_on, read_results, write_results
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from servers import BUCKET, await_port, free_ports, kill_tree, s3_environment  # type: ignore[import-not-found]

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
# Puts a folder's files into moto's memory, and serves them.
SERVER = '''
import sys
from pathlib import Path
from moto.s3.models import FakeKey, s3_backends
from moto.server import main

class Large(bytes):
    """The bytes of a large object, read when they are cut."""

    def __new__(cls, key):
        made = super().__new__(cls)
        made.key = key
        return made

    def __len__(self):
        return self.key.contentsize

    def __getitem__(self, part):
        with self.key.lock:
            self.key._value_buffer.seek(part.start)
            return self.key._value_buffer.read(part.stop - part.start)

value = FakeKey.value
FakeKey.value = value.getter(lambda k: value.fget(k) if k.contentsize < 1 << 24 else Large(k))
folder, bucket, port = sys.argv[1:]
backend = s3_backends["123456789012"]["aws"]
backend.create_bucket(bucket, "us-east-1")
for path in sorted(Path(folder).rglob("*")):
    if path.is_file():
        backend.put_object(bucket, path.relative_to(folder).as_posix(), path.read_bytes())
main(["-H", "127.0.0.1", "-p", port])
'''


def main() -> None:
    """Measure both parts, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--images", type=int, default=7200)
    parser.add_argument("--read", type=int, default=2400)
    parser.add_argument("--loose", type=int, default=600)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--files", type=int, default=20_000)
    arguments = parser.parse_args()
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as name:
            rows = PARTS[part](arguments, Path(name))
        for row in rows:
            print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in row.items()), flush=True)  # fmt: skip
        kept = {key: value for key, value in read_results(RESULTS).items() if key in PARTS}
        write_results(RESULTS, {**measured_on(), **kept, part: rows})


@contextmanager
def s3_server_of(folder: Path, log: Path) -> Iterator[dict[str, str]]:
    """Start an S3 server whose bucket has a folder's files; gives its clients' environment."""
    (port,) = free_ports(1)
    command = [sys.executable, "-c", SERVER, str(folder), BUCKET, str(port)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            await_port(process, port, log)
            yield s3_environment(port)
        finally:
            kill_tree(process)


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


def write_shards(folder: Path, arguments: argparse.Namespace, images: Sequence[bytes]) -> None:
    """Write loose files, and the tar shards of all images."""
    (folder / "loose").mkdir(parents=True)
    (folder / "tars").mkdir()
    for n in range(arguments.loose):
        (folder / "loose" / f"{n:06d}.jpg").write_bytes(image(images, n))
    each = -(-arguments.images // arguments.shards)
    for number in range(arguments.shards):
        with tarfile.open(folder / "tars" / f"train-{number:03d}.tar", "w") as tar:
            for n in range(number * each, min((number + 1) * each, arguments.images)):
                member = tarfile.TarInfo(f"{n:06d}.jpg")
                member.size = len(image(images, n))
                tar.addfile(member, io.BytesIO(image(images, n)))


def image(images: Sequence[bytes], number: int) -> bytes:
    """Return a file unlike all others: `prepare` reads files of one size whole, to compare them."""
    data = images[number % DISTINCT]
    return data + bytes(max(map(len, images)) - len(data) + number)


def measure_reading(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Prepare loose files and shards, and read them in turn."""
    images, log = jpegs(), folder / "s3.log"
    write_shards(folder / "bucket", arguments, images)
    with s3_server_of(folder / "bucket", log) as environment:
        os.environ.update(environment)
        return read_in_turn(folder, images, log, arguments.read)


def read_in_turn(folder: Path, images: Sequence[bytes], log: Path, most: int) -> list[Any]:
    """Return rows of what was asked for an image, and of the rates."""
    rows, tables = [], {}
    roots = {"folder": f"s3://{BUCKET}/loose", "webdataset": f"s3://{BUCKET}/tars"}
    for source, root in roots.items():
        before, started = len(requests(log)), time.monotonic()
        stage = prepare_manifest(PrepareConfig(), str(folder / source), source, root)
        seconds = time.monotonic() - started
        table = tables[source] = read_table(stage.path, ["image_id", "uri"])
        asked = len(requests(log)) - before
        rows.append({"part": "prepare", "source": source, "images": len(table),
                     "gib": gib(table, images), "requests_per_image": asked / len(table),
                     "images_per_s": len(table) / seconds})  # fmt: skip
    spent = dict.fromkeys(tables, (0, 0, 0.0))  # images, requests, seconds
    for turn in range(ROUNDS):
        for source, table in tables.items():
            step = -(-min(len(table), most) // ROUNDS)
            before, started = len(requests(log)), time.monotonic()
            read = read_all(table.slice(turn * step, step))
            asked, seconds = len(requests(log)) - before, time.monotonic() - started
            total = spent[source]
            spent[source] = (total[0] + read, total[1] + asked, total[2] + seconds)
    for source, (read, asked, seconds) in spent.items():
        rows.append({"part": "read and decode", "source": source, "images": read,
                     "gib": gib(tables[source][:read], images),
                     "requests_per_image": asked / read,
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


def measure_resume(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Find and count what a stage of many files has committed, on a disk and on S3."""
    files, log, bucket = arguments.files, folder / "s3.log", folder / "bucket"
    write_stage(bucket / "run", files)
    stage = StageFolder(str(bucket / "run"), "region_scores", "k")
    started = time.monotonic()
    assert committed_rows(stage) == files * BLOCK_ROWS
    seconds = time.monotonic() - started
    rows = [{"place": "disk", "seconds": seconds, "lists": None, "counted": True}]
    storage.remove_tree(stage.file(BLOCKS))  # nobody looks at them
    with s3_server_of(bucket, log) as environment:
        os.environ.update(environment)
        started = time.monotonic()
        assert (
            len(committed_names(StageFolder(f"s3://{BUCKET}/run", "region_scores", "k"))) == files
        )
        seconds = time.monotonic() - started
        lists = sum("list-type=2" in line for line in requests(log))
        rows.append({"place": "S3", "seconds": seconds, "lists": lists, "counted": False})
    return [{**row, "files": files} for row in rows]


def write_stage(folder: Path, files: int) -> None:
    """Write blocks and their checkpoint as workers of Ray's do; only their names differ."""
    stage = StageFolder(str(folder), "region_scores", "k")
    ids = pa.table({"image_id": [str(row) for row in range(BLOCK_ROWS)]})
    write_table(stage.file(BLOCKS, "write_000000-0.parquet"), ids)
    block = Path(stage.file(BLOCKS, "write_000000-0.parquet")).read_bytes()
    Path(stage.file(CHECKPOINT)).mkdir()
    for number in range(files):
        name = f"write_{number:06d}"
        Path(stage.file(BLOCKS, f"{name}-0.parquet")).write_bytes(block)
        Path(stage.file(CHECKPOINT, f"{name}.parquet")).write_bytes(block)


PARTS = {"reading": measure_reading, "resume": measure_resume}

if __name__ == "__main__":
    main()
