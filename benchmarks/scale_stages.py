"""Time and memory of the stages that call no model, from ten thousand to a million images.

    python benchmarks/scale_stages.py [--stages filter] [--images 10000 100000 1000000]

Every stage gets what the one before it would have written: `make_...` writes it, cheaply and
without being measured, and `run_...` does what the command does. Each stage and size runs in a
process of its own, with a Ray cluster of its own where the stage uses Ray.

Figures: seconds an image; the most memory of the driver (its largest resident set), and of any
other process of the run, with its name, as the proportional set size: a page that several processes
share, such as one of the object store, is split among them. CPU seconds are those of all processes,
Ray's own and its start included: they tell more than seconds on a machine that does other things
too. Against the smallest size: the time an image, and what an image more costs the driver in bytes.
Up to `filter.local_images` images the filter is one process without Ray, as `evaluate` always is,
which holds 512 MiB of scores and labels at a time. The table goes to stdout, the numbers with
hardware, versions, settings and date to benchmarks/results/scale_stages.json; rows of other stages
and sizes stay.

To add a stage: write the two functions and name them in STAGES.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from measured import measured_on, read_results, write_results
from PIL import Image

from hts_ray import stages
from hts_ray.classes import hico_classes
from hts_ray.config import HtsConfig, RayConfig, load_config
from hts_ray.engine.ray_data import image_dataset
from hts_ray.engine.run import Run, open_run
from hts_ray.engine.session import ray_cluster
from hts_ray.evaluate import evaluate_stored, read_annotations
from hts_ray.images.manifest import open_manifest
from hts_ray.images.stage import prepare_manifest
from hts_ray.labels.stage import plan_filter
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, require_stage, rows_hash
from hts_ray.store.tables import (
    MANIFEST_SCHEMA,
    PSEUDO_LABELS_SCHEMA,
    REGION_SCORES_SCHEMA,
    predictions_schema,
)
from hts_ray.student import pool as student_pool
from hts_ray.student.feed import Feed, dataset_of
from hts_ray.student.pool import StudentPass
from hts_ray.student.predict import StudentScorer
from hts_ray.student.targets import label_columns, label_source, training_set, write_rows

if TYPE_CHECKING:
    import ray.data

RESULTS = Path(__file__).parent / "results" / "scale_stages.json"
CLASSES = 600
FILE_IMAGES = 4096
SHARD_IMAGES = 1000
KNOWN = (("positive_ids", 1), ("negative_ids", 3), ("ambiguous_ids", 1))  # of an image
MIB = 1 << 20


class MemoryWatch(threading.Thread):
    """Samples all that this process started: the most memory (MiB) and the CPU time of each."""

    def __init__(self, interval: float = 0.5) -> None:
        super().__init__(daemon=True)
        self.interval = interval
        self.others, self.cpu = {"": 0.0}, dict[int, float]()
        self.cpu_before = sum(psutil.Process().cpu_times()[:2])
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        me = psutil.Process()
        while not self._stopped.wait(self.interval):
            for process in me.children(recursive=True):
                try:
                    name, used = process.name(), process.memory_full_info().pss / MIB
                    self.cpu[process.pid] = sum(process.cpu_times()[:2])
                except psutil.Error:
                    continue
                self.others[name] = max(self.others.get(name, 0.0), used)

    def stop(self) -> dict[str, Any]:
        """Return the driver's most, that of the largest other process, and all CPU seconds."""
        self._stopped.set()
        self.join()
        name = max(self.others, key=lambda name: self.others[name])
        driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cpu = sum(psutil.Process().cpu_times()[:2]) - self.cpu_before + sum(self.cpu.values())
        found = {"driver_mib": driver, "largest_mib": self.others[name], "largest": name}
        return {**found, "cpu_seconds": cpu}


def config_of(folder: Path, **sections: Any) -> HtsConfig:
    """Return the settings of a run in a folder, HICO's classes and defaults but for some."""
    return load_config(extra={"run_dir": str(folder), "seed": 0, **sections})


def image_columns(start: int, count: int) -> dict[str, Any]:
    """Return ids, URIs as long as real ones, and the split of some images."""
    ids = [f"{number:012d}" for number in range(start, start + count)]
    uris = [f"s3://bucket/images/train/{image_id}.jpg" for image_id in ids]
    return {"image_id": ids, "uri": uris, "split": ["train"] * count}


def make_filter(folder: Path, images: int) -> None:
    """Write a teacher pass of one region an image; files differ in their ids alone."""
    random = np.random.default_rng(0)
    scores_NC = random.normal(-12, 1.5, (FILE_IMAGES, CLASSES))
    rows, some = np.arange(FILE_IMAGES)[:, None], random.integers(0, CLASSES, (FILE_IMAGES, 3))
    scores_NC[rows, some] += random.uniform(3, 9, some.shape)
    # Tenths of a nat: few distinct values are a small file that is quickly written.
    scores = pa.array(scores_NC.round(1).astype(np.float32).ravel())
    stage = StageFolder(str(folder), "region_scores", "made")
    for number, start in enumerate(range(0, images, FILE_IMAGES)):
        count = min(FILE_IMAGES, images - start)
        ends = np.arange(count + 1, dtype=np.int32)
        columns = {name: pa.nulls(count, field.type) for name, field in schema_fields()}
        columns |= {n: pa.array(values) for n, values in image_columns(start, count).items()}
        columns["region_kinds"] = pa.ListArray.from_arrays(ends, pa.array(["whole"] * count))
        columns["scores"] = pa.ListArray.from_arrays(ends * CLASSES, scores[: count * CLASSES])
        columns["status"] = pa.array(["ok"] * count)
        Path(stage.path).mkdir(exist_ok=True)
        table = pa.table(columns, schema=REGION_SCORES_SCHEMA)
        pq.write_table(table, stage.file(f"part-{number:06d}.parquet"), compression="zstd")
    info = {"class_ids": hico_classes().ids.tolist(), "prior_log_likelihoods": [-12.0] * CLASSES}
    storage.write_json(stage.file("table.json"), info)
    stage.publish({"rows_in": images, "rows_out": images, "quarantined": 0, "seconds": 0})


def schema_fields() -> list[tuple[str, pa.Field]]:
    """Return the columns of region_scores by name."""
    return [(field.name, field) for field in REGION_SCORES_SCHEMA]


def run_filter(folder: Path, images: int) -> dict[str, Any]:
    """Filter what `make_filter` wrote, as `hts filter` does."""
    run = opened(folder)
    stage = plan_filter(run, require_stage(run.run_dir, "region_scores", "label")).run()
    assert stage.stats["rows_out"] == images, stage.stats
    sizes = storage.walk_sizes(stage.path)
    files = [size for name, size in sizes.items() if name.endswith(".parquet")]
    return {"files": len(files), "mib_a_file": max(files) / MIB}


def make_evaluate(folder: Path, images: int) -> None:
    """Write predictions, and a manifest with one positive an image and some negatives."""
    random, ids = np.random.default_rng(0), hico_classes().ids.tolist()
    scores = pa.array(random.normal(0, 3, FILE_IMAGES * CLASSES).round(1).astype(np.float32))
    schema = predictions_schema(CLASSES)
    stage = StageFolder(str(folder), "predictions", "made")
    Path(stage.path).mkdir()
    with pq.ParquetWriter(folder / "manifest.parquet", MANIFEST_SCHEMA) as manifest:
        for number, start in enumerate(range(0, images, FILE_IMAGES)):
            count = min(FILE_IMAGES, images - start)
            same = image_columns(start, count)
            columns = {field.name: pa.nulls(count, field.type) for field in schema}
            flat = scores[: count * CLASSES]
            columns |= {**same, "status": ["ok"] * count}
            columns["scores"] = pa.FixedSizeListArray.from_arrays(flat, CLASSES)
            table = pa.table(columns, schema=schema)
            pq.write_table(table, stage.file(f"part-{number:06d}.parquet"), compression="zstd")
            known = {name: random.integers(0, CLASSES, (count, n)).tolist() for name, n in KNOWN}
            columns = {field.name: pa.nulls(count, field.type) for field in MANIFEST_SCHEMA}
            manifest.write_table(pa.table({**columns, **same, **known}, schema=MANIFEST_SCHEMA))
    storage.write_json(stage.file("table.json"), {"class_ids": ids})
    stage.publish({"rows_in": images, "rows_out": images, "quarantined": 0, "seconds": 0})


def run_evaluate(folder: Path, images: int) -> dict[str, Any]:
    """Evaluate what `make_evaluate` wrote, as `hts evaluate` does."""
    run = opened(folder)
    predictions = require_stage(run.run_dir, "predictions", "predict").path
    truth = read_annotations(str(folder / "manifest.parquet"), run.class_table, "train")
    found = evaluate_stored(predictions, truth)
    assert found.num_images == images
    return {"mean_ap": found.mean_ap}


def make_prepare(folder: Path, images: int) -> None:
    """Write tar shards of small JPEG files, a few distinct ones in turn."""
    random, files = np.random.default_rng(0), []
    for _ in range(64):
        sink = io.BytesIO()
        pixels = random.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(sink, "JPEG")
        files.append(sink.getvalue())
    (folder / "shards").mkdir()
    for start in range(0, images, SHARD_IMAGES):
        path = folder / "shards" / f"train-{start // SHARD_IMAGES:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(start, min(start + SHARD_IMAGES, images)):
                data = files[number % len(files)]
                member = tarfile.TarInfo(f"{number:012d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def run_prepare(folder: Path, images: int) -> dict[str, Any]:
    """Prepare the shards on Ray, as `hts prepare webdataset` does with many."""
    config = config_of(folder, prepare={"local_images": 0})
    stage = stages.prepare(config, "webdataset", str(folder / "shards"))
    assert stage.stats["rows_out"] == images, stage.stats
    return {"shards": stage.stats["shards"]}


def make_label(folder: Path, images: int) -> None:
    """Write shards and their manifest."""
    make_prepare(folder, images)
    config = config_of(folder, prepare={"headers": False}).prepare
    prepare_manifest(config, str(folder), "webdataset", str(folder / "shards"))


def run_label(folder: Path, images: int) -> dict[str, Any]:
    """Let a teacher that computes nothing label the shards' images, one region each."""
    regions: dict[str, list[float]] = {"grid_scales": [], "grid_steps": []}
    label = {"teacher": {"model": "builtin:dummy", "prior": "none"}, "regions": regions}
    stage = stages.label(config_of(folder, label={**label, "pool": {"num_gpus": 0}}))
    assert stage.stats["rows_out"] == images, stage.stats
    parts = [name for name in storage.list_names(stage.path) if name.endswith(".parquet")]
    return {"blocks": stage.stats["blocks"], "files": len(parts)}


def make_train_rows(folder: Path, images: int) -> None:
    """Write pseudo-labels of one to three positives and as many ignored classes an image."""
    random = np.random.default_rng(0)
    stage = StageFolder(str(folder), "pseudo_labels", "made")
    Path(stage.path).mkdir()
    for number, start in enumerate(range(0, images, FILE_IMAGES)):
        count = min(FILE_IMAGES, images - start)
        ends = np.concatenate([[0], np.cumsum(random.integers(1, 4, count))]).astype(np.int32)
        ids = pa.array(random.integers(0, CLASSES, ends[-1]).astype(np.int16))
        columns = {field.name: pa.nulls(count, field.type) for field in PSEUDO_LABELS_SCHEMA}
        columns |= {n: pa.array(values) for n, values in image_columns(start, count).items()}
        for name in ("positive_ids", "ignored_ids"):
            columns[name] = pa.ListArray.from_arrays(ends, ids)
        table = pa.Table.from_arrays(list(columns.values()), names=list(columns))
        pq.write_table(table, stage.file(f"part-{number:06d}.parquet"), compression="zstd")
    stage.publish({"rows_in": images, "rows_out": images, "quarantined": 0, "seconds": 0})


def run_train_rows(folder: Path, images: int) -> dict[str, Any]:
    """Do to the rows what `hts train` does: its key, their order, an epoch on Ray, undecoded."""
    run = opened(folder, train={"min_positives_per_class": 40})
    config = run.config.train
    source = label_source(run)
    assert source is not None
    rows_hash(source, label_columns(config))
    data = training_set(source, run.class_table, config)
    counts = write_rows(data, run.class_table, config, 0, str(folder / "rows"))
    feed = Feed(str(folder / "rows"), tuple(counts), 280, "", 0, str(folder / "epoch.json"))
    before = time.monotonic()
    with ray_cluster(RayConfig(object_store_gib=1.0)):
        first, seen, started = 0.0, 0, time.monotonic()
        with feed.blocks:
            rows = dataset_of(feed, undecoded, most=feed.task_units)
            shards = rows.streaming_split(1, equal=True)
        for batch in shards[0].iter_batches(batch_size=4096, batch_format="pyarrow"):
            first = first or time.monotonic() - started
            seen += len(batch)
    assert seen == data.rows, (seen, data.rows)
    return {"rows": seen, "first_batch_seconds": first, "ray_seconds": time.monotonic() - before}


def make_predict_rows(folder: Path, images: int) -> None:
    """Write a manifest."""
    with pq.ParquetWriter(folder / "manifest.parquet", MANIFEST_SCHEMA) as manifest:
        for start in range(0, images, FILE_IMAGES):
            count = min(FILE_IMAGES, images - start)
            columns = {field.name: pa.nulls(count, field.type) for field in MANIFEST_SCHEMA}
            columns |= image_columns(start, count)
            manifest.write_table(pa.table(columns, schema=MANIFEST_SCHEMA))


class ModelFree(StudentPass):
    """A pass that reads rows, writes as many scores and calls no student."""

    def _map(self, decoded: ray.data.Dataset, meter: Any) -> ray.data.Dataset:
        return decoded.map_batches(scored, batch_format="pyarrow", batch_size=self.batch_images)


def undecoded(table: pa.Table, **_: Any) -> pa.Table:
    """Leave the images unread."""
    return table


def scored(table: pa.Table) -> pa.Table:
    """Return a row of predictions for every image."""
    schema = predictions_schema(CLASSES)
    columns = {field.name: pa.nulls(len(table), field.type) for field in schema}
    columns |= {name: table[name] for name in ("image_id", "uri", "split")}
    scores = np.resize(some_logits(), len(table) * CLASSES)
    columns["scores"] = pa.FixedSizeListArray.from_arrays(pa.array(scores), CLASSES)
    columns["status"] = pa.array(["ok"] * len(table))
    return pa.table(columns, schema=schema)


def some_logits() -> npt.NDArray[np.float32]:
    """Return numbers that do not shrink to nothing in a file, tenths as those of the filter."""
    return np.random.default_rng(0).normal(-6, 2, (64, CLASSES)).round(1).astype(np.float32)


def run_predict_rows(folder: Path, images: int) -> dict[str, Any]:
    """Do to the rows what `hts predict` does, but decode and score."""
    config = opened(folder).config.predict
    manifest = open_manifest(str(folder / "manifest.parquet"))
    stage = StageFolder(str(folder), "predictions", manifest.fingerprint)
    task = ModelFree("", StudentScorer, config.pool, config.images, config.batch_images)
    with (
        patch.object(student_pool, "decode_batch", undecoded),
        patch.object(ModelFree, "side", None),
        ray_cluster(RayConfig(object_store_gib=1.0), [config.pool]),
    ):
        ids = manifest.rows(("train",))["image_id"]
        read = partial(image_dataset, manifest.path, ("train",))
        stats = task.publish(stage, read, ids, "predict", None, {})
    assert stats["rows_out"] == images, stats
    return {"ray_seconds": stats["seconds"]}


def opened(folder: Path, **sections: Any) -> Run:
    """Return the run in a folder."""
    return open_run(config_of(folder, **sections))


STAGES: dict[str, tuple[Callable[[Path, int], None], Callable[[Path, int], dict[str, Any]]]] = {
    "prepare": (make_prepare, run_prepare),
    "label": (make_label, run_label),
    "filter": (make_filter, run_filter),
    "evaluate": (make_evaluate, run_evaluate),
    "train_rows": (make_train_rows, run_train_rows),
    "predict_rows": (make_predict_rows, run_predict_rows),
}


def run_one(stage: str, images: int, folder: Path) -> dict[str, Any]:
    """Run a stage over inputs that are made, and return its figures."""
    watch = MemoryWatch()
    watch.start()
    started = time.monotonic()
    more = STAGES[stage][1](folder, images)
    seconds = time.monotonic() - started
    found = watch.stop()
    return {"stage": stage, "images": images, "seconds": seconds, **found, **more}


def measure(stage: str, images: int) -> dict[str, Any]:
    """Make a stage's inputs, and run it in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        STAGES[stage][0](Path(folder), images)
        command = [sys.executable, __file__, "--one", stage, str(images), folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "date": measured_on()["date"]}


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows by stage and size, with time an image, and both against the smallest size."""
    ordered = sorted(rows, key=lambda row: (list(STAGES).index(row["stage"]), row["images"]))
    for row in ordered:
        first = next(one for one in ordered if one["stage"] == row["stage"])
        row["microseconds_an_image"] = 1e6 * row["seconds"] / row["images"]
        row["cpu_microseconds_an_image"] = 1e6 * row["cpu_seconds"] / row["images"]
        for name in ("microseconds_an_image", "cpu_microseconds_an_image"):
            row[f"{name}_of_smallest"] = row[name] / first[name]
        more = row["images"] - first["images"]
        slope = (row["driver_mib"] - first["driver_mib"]) * MIB / more if more else None
        row["driver_bytes_an_image"] = slope
    return ordered


def main() -> None:
    """Print and store the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, metavar=("STAGE", "IMAGES", "FOLDER"))
    options = parser.parse_args()
    if options.one:
        stage, images, folder = options.one
        print(json.dumps(run_one(stage, int(images), Path(folder))))
        return
    rows = read_results(options.out).get("rows", [])
    print(
        "stage        images   seconds  us/image  of smallest  driver MiB  bytes/image  largest MiB"
    )
    for stage in options.stages:
        for images in sorted(options.images):
            key = stage, images
            rows = [row for row in rows if (row["stage"], row["images"]) != key]
            rows = with_ratios([*rows, measure(stage, images)])
            row = next(row for row in rows if (row["stage"], row["images"]) == key)
            slope = row["driver_bytes_an_image"]
            print(
                f"{stage:10s} {images:8d} {row['seconds']:9.1f} {row['microseconds_an_image']:9.0f}"
                f" {row['microseconds_an_image_of_smallest']:12.2f}"
                f" {row['cpu_microseconds_an_image']:13.0f}"
                f" {row['cpu_microseconds_an_image_of_smallest']:12.2f} {row['driver_mib']:11.0f}"
                f" {'-' if slope is None else f'{slope:.0f}':>12s}"
                f" {row['largest_mib']:9.0f} {row['largest']}",
                flush=True,
            )
            write_results(options.out, {**measured_on(), "classes": CLASSES, "rows": rows})


if __name__ == "__main__":
    main()
