"""Scale the teacher pass by simulation: actors that sleep as long as a GPU would work.

    python benchmarks/scale.py [--actors 1 4 16 64] [--images 100000] [--seconds 0.5]

Everything is real but the model: Ray Data's pipeline, reading, decoding, checkpoints, Parquet.
Each of n actors holds one logical GPU and sleeps `--seconds` an image. The largest pool gets all
the images, a smaller one `--images-per-actor` for each actor. Every run has a driver and a Ray
cluster of its own, and rows of earlier calls with the same settings are kept.

Efficiency is images/s over n / seconds: `steady` between a quarter and nine tenths of the images,
`whole` from the first to the last second, the start of the workers included. Memory is that of the
driver and of all processes: the median while the second tenth of the images is made, and while the
last tenth is, which shows whether it grows with their number. The table goes to stdout, the
numbers with hardware, versions, settings and date to benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from measured import measured_on, read_results, write_results
from PIL import Image

from hts_ray.classes import hico_classes
from hts_ray.config import LabelConfig, RayConfig
from hts_ray.engine.session import ray_cluster
from hts_ray.images.manifest import open_manifest
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import MANIFEST_SCHEMA, write_table
from hts_ray.teacher.stage import label_images

RESULTS = Path(__file__).parent / "results" / "scale.json"
DISTINCT_FILES = 64
CLASSES = 55
MIB = 1 << 20


class MemoryWatch(threading.Thread):
    """Samples this process and all that it started, the object store included, in MiB."""

    def __init__(self, interval: float = 10.0) -> None:
        super().__init__(daemon=True)
        self.interval = interval
        self.images = 0  # done so far; the run sets it
        self._samples: list[tuple[int, float, float]] = []
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        me = psutil.Process()
        while not self._stopped.wait(self.interval):
            total = 0.0
            for process in [me, *me.children(recursive=True)]:
                try:
                    # Shared pages count once, however many workers map them.
                    total += process.memory_full_info().pss / MIB
                except psutil.Error:
                    continue
            self._samples.append((self.images, me.memory_info().rss / MIB, total))

    def stop(self, images: int) -> dict[str, float]:
        """Return the medians early and late in a run over so many images."""
        self._stopped.set()
        self.join()
        found = {}
        for name, low, high in (("early", 0.1, 0.2), ("late", 0.9, 1.0)):
            chosen = [s for s in self._samples if low * images <= s[0] <= high * images]
            values = np.median(chosen, axis=0) if chosen else np.full(3, np.nan)
            found[f"driver_mib_{name}"] = float(values[1])
            found[f"total_mib_{name}"] = float(values[2])
        return found


def write_images(folder: Path, count: int) -> str:
    """Write a few small files and a manifest of `count` rows that name them in turn."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(DISTINCT_FILES):
        path = folder / f"{number}.jpg"
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    table = pa.table(
        {
            "image_id": [f"{number:07d}" for number in range(count)],
            "uri": [paths[number % DISTINCT_FILES] for number in range(count)],
            "width": pa.array([64] * count, pa.int32()),
            "height": pa.array([48] * count, pa.int32()),
            "split": ["train"] * count,
            **{
                name: pa.nulls(count, MANIFEST_SCHEMA.field(name).type)
                for name in ("positive_ids", "negative_ids", "ambiguous_ids")
            },
        },
        schema=MANIFEST_SCHEMA,
    )
    manifest = str(folder / "manifest.parquet")
    write_table(manifest, table)
    return manifest


def run_one(actors: int, images: int, seconds: float) -> dict[str, Any]:
    """Run one pass in this process and return its figures."""
    config = LabelConfig.model_validate(
        {
            "teacher": {"model": f"builtin:dummy:{seconds}"},
            "regions": {"whole": True, "grid_scales": [], "grid_steps": []},
            "pool": {"min_size": actors, "max_size": actors, "num_gpus": 1},
        }
    )
    done: list[tuple[float, int]] = []
    watch = MemoryWatch()

    def told(count: int, _total: int, _bad: int) -> None:
        done.append((time.monotonic(), count))
        watch.images = count

    with (
        tempfile.TemporaryDirectory() as folder,
        ray_cluster(RayConfig(num_gpus=actors), [config.pool]),
    ):
        manifest = write_images(Path(folder), images)
        stage = StageFolder(folder, "region_scores", "k")
        watch.start()
        started = time.monotonic()
        stats = label_images(
            config,
            manifest=open_manifest(manifest),
            class_table=hico_classes().subset(range(CLASSES)),
            stage=stage,
            progress=told,
        )
        wall = time.monotonic() - started
        memory = watch.stop(images)
    assert stats["rows_out"] == images, stats
    times, counts = np.array(done).T
    first, last = (np.searchsorted(counts, share * images) for share in (0.25, 0.9))
    steady = (counts[last] - counts[first]) / (times[last] - times[first])
    ideal = actors / seconds
    return {
        "actors": actors,
        "images": images,
        "ideal_images_per_second": ideal,
        "steady_images_per_second": float(steady),
        "steady_efficiency": float(steady / ideal),
        "whole_seconds": wall,
        "whole_efficiency": images / wall / ideal,
        "cpu_seconds_of_driver": sum(psutil.Process().cpu_times()[:2]),
        **memory,
    }


def main() -> None:
    """Print and store the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--images", type=int, default=100_000, help="of the largest pool")
    parser.add_argument("--images-per-actor", type=int, default=300, help="of smaller pools")
    parser.add_argument("--seconds", type=float, default=0.5, help="a GPU's time an image")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", type=int, nargs=2, metavar=("ACTORS", "IMAGES"))
    options = parser.parse_args()
    if options.one:
        count, images = options.one
        print(json.dumps(run_one(count, images, options.seconds)))
        return
    actors, most = sorted(options.actors), max(options.actors)
    plan = [(n, options.images if n == most else n * options.images_per_actor) for n in actors]
    settings = {"seconds": options.seconds, "classes": CLASSES}
    rows = earlier_rows(options.out, settings)
    print(" actors   images  ideal/s  steady/s  efficiency  whole run  driver MiB      total MiB")
    for count, images in plan:
        command = [sys.executable, __file__, "--one", str(count), str(images)]
        command += ["--seconds", str(options.seconds)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = {**json.loads(output.strip().splitlines()[-1]), "date": measured_on()["date"]}
        rows = [old for old in rows if old["actors"] != count] + [row]
        print(
            f"{count:7d} {images:8d} {row['ideal_images_per_second']:8.1f}"
            f" {row['steady_images_per_second']:9.1f} {row['steady_efficiency']:11.3f}"
            f" {row['whole_efficiency']:10.3f}"
            f" {row['driver_mib_early']:5.0f} {row['driver_mib_late']:5.0f}"
            f" {row['total_mib_early']:7.0f} {row['total_mib_late']:6.0f}",
            flush=True,
        )
        report = {**measured_on(), "settings": settings}
        report["rows"] = sorted(rows, key=lambda row: row["actors"])
        write_results(options.out, report)


def earlier_rows(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an earlier call with the same settings."""
    report = read_results(path)
    rows: list[dict[str, Any]] = report["rows"] if report.get("settings") == settings else []
    return rows


if __name__ == "__main__":
    main()
