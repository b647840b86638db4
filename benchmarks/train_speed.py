"""Compare steps through Ray Train and Ray Data with those of a bare loop of the same model.

    python benchmarks/train_speed.py [--images 128] [--batch 32] [--epochs 6] [--workers 1]

`kept` is `train_student` on Ray Train workers over JPEG files that are decoded once and kept in
Ray's object store; `decoded` reads and decodes them again in every epoch, as it is done when the
images do not fit. Both augment as the paper does, clip gradients and report to Ray.

The bare loop takes as many steps (forward, LSE-Sign, backward, AdamW) in the worker's own process
between the epochs, so that an epoch is compared with the loops right before and after it: the
machine's speed drifts by more than what is measured. Beside `kept` it has one prepared batch in
memory. Beside `decoded` it reads, decodes and augments every batch itself, with the package's own
functions, in turn with its steps: on processors alone decoding takes cores from the steps in
whatever loop, and what is asked here is what Ray adds. With GPUs decoding runs beside the steps.

Times run from the first batch on, whose images are decoded before in both loops; the seconds that
an epoch waits for it are told beside (`epoch_start.py` measures them). The first epoch, which
starts everything, does not count. A ViT-B/32 of `--layers` with random weights at 224 pixels,
float32, 600 classes, as many threads as cores. `--workers 2` shares batch and cores out between two
workers, whose gradients, the bare loop's too, go over gloo. JSON goes to
benchmarks/results/train_speed.json, a row for each kind and number of workers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
from measured import measured_on, read_results, write_results
from PIL import Image

from hts_ray.classes import ClassTable, hico_classes
from hts_ray.config import HtsConfig, ImagesConfig, RayConfig, StudentConfig, TrainConfig
from hts_ray.engine.decoding import decode_batch, stack_pixels
from hts_ray.engine.run import Run
from hts_ray.engine.session import ray_cluster
from hts_ray.losses import make_loss
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.student import loop
from hts_ray.student import train as training
from hts_ray.student.augment import augment, draw, stored_size
from hts_ray.student.checkpoints import load_student
from hts_ray.student.model import parameter_groups, set_trainable
from hts_ray.student.step import take_step

RESULTS = Path(__file__).parent / "results" / "train_speed.json"
_KINDS: dict[str, Literal["pixels", "none"]] = {"kept": "pixels", "decoded": "none"}


def save_model(folder: Path, layers: int) -> None:
    """Write a CLIP whose image tower is a ViT-B/32, in open_clip's format; its text is tiny."""
    import open_clip
    from safetensors.torch import save_file

    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    vision = {"image_size": 224, "layers": layers, "width": 768, "patch_size": 32}
    folder.mkdir()
    config = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    state = {name: value.contiguous() for name, value in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def save_labels(folder: Path, count: int, class_table: ClassTable) -> pa.Table:
    """Write smooth noise as JPEG files of 640 x 480 pixels; returns labels for them."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        small = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        path = folder / f"{number:05d}.jpg"
        Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
        positive = rng.choice(class_table.ids, 2, replace=False).tolist()
        rows.append(
            {"image_id": path.stem, "uri": str(path), "positive_ids": positive, "ignored_ids": []}
        )
    ids = pa.list_(pa.int16())
    names = [("image_id", pa.string()), ("uri", pa.string())]
    return pa.Table.from_pylist(
        rows, pa.schema([*names, ("positive_ids", ids), ("ignored_ids", ids)])
    )


class BareLoop:
    """The model's own steps, on one batch in memory or on the images of `paths` from disk.

    It starts with a step that allocates.
    """

    def __init__(self, job: dict[str, Any], config: TrainConfig, world: int, paths: list[str]):
        self.student = load_student(job["initial"])
        set_trainable(self.student, config.trainable)
        self.student.train()
        self.config, self.world, self.paths = config, world, paths
        distributed: Any = torch.nn.parallel.DistributedDataParallel
        self.model = distributed(self.student) if world > 1 else self.student
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student, config.optim))
        self.loss = make_loss(config.loss, config.loss_temperature)
        size, classes = self.student.image_size, len(self.student.class_table)
        self.stored = stored_size(size, config.augment)
        self.batch = config.batch_size // world
        self.images = torch.randn(self.batch, 3, size, size)
        self.targets = torch.full((self.batch, classes), -1, dtype=torch.int8)
        self.targets[:, :2] = 1
        self.rate(1)

    def rate(self, steps: int) -> float:
        """Return images/s of so many steps, over all workers."""
        images = self.images_of(0)
        started = time.monotonic()
        for step in range(steps):
            self.loss(self.model(images), self.targets).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if step + 1 < steps:
                images = self.images_of(step + 1)
        return steps * self.batch * self.world / (time.monotonic() - started)

    def images_of(self, step: int) -> torch.Tensor:
        """Return a step's images as the model takes them."""
        if not self.paths:
            return self.images
        rows = np.arange(step * self.batch, (step + 1) * self.batch) % len(self.paths)
        table = pa.table({"uri": [self.paths[row] for row in rows]})
        decoded = decode_batch(table, ImagesConfig(), square=self.stored)
        pixels, size = torch.from_numpy(stack_pixels(decoded, self.stored)), self.student.image_size
        drawn = draw(rows.tolist(), 0, 0, self.stored, self.config.augment).table(size)
        images = augment(pixels, drawn, size, self.config.augment)
        return self.student.standardise(images)


def with_bare_loops(
    rates_path: str, paths: list[str]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the workers' `train_loop` with bare loops around every epoch but the first.

    It writes the rates of epochs, of the bare loops before and after each, and the seconds until
    an epoch's first batch, to `rates_path`.
    """

    def timed_loop(job: dict[str, Any]) -> dict[str, Any]:
        run_epoch = loop._run_epoch
        bare: BareLoop | None = None
        rates: dict[str, list[float]] = {"bare": [], "rates": [], "starts": []}
        steps: list[float] = []

        def timed_step(*given: Any) -> Any:
            steps.append(time.monotonic())
            return take_step(*given)

        def timed_epoch(worker: Any, shard: Any, position: Any) -> Any:
            nonlocal bare
            steps.clear()
            started = time.monotonic()
            position = run_epoch(worker, shard, position)
            seconds = time.monotonic() - steps[0]
            if bare is None:
                mine = paths[worker.rank :: worker.world]
                bare = BareLoop(job, worker.config, worker.world, mine)
            else:
                rates["rates"].append(position.history[-1]["images"] / seconds)
                rates["starts"].append(steps[0] - started)
            rates["bare"].append(bare.rate(worker.steps_per_epoch))
            if worker.rank == 0:
                storage.write_json(rates_path, rates)
            return position

        with patch.multiple(loop, _run_epoch=timed_epoch, take_step=timed_step):
            return loop.train_loop(job)

    return timed_loop


def epoch_rates(
    student_config: StudentConfig,
    config: TrainConfig,
    class_table: ClassTable,
    labels: pa.Table,
    folder: Path,
) -> dict[str, list[float]]:
    """Return images/s of a training's epochs, those of the bare loops around each, and starts."""
    stage = StageFolder(str(folder), "student", str(time.time_ns()))
    rates_path = str(folder / f"rates-{stage.key}.json")
    paths = labels["uri"].to_pylist() if config.images_kept == "none" else []
    with patch.object(training, "train_loop", with_bare_loops(rates_path, paths)):
        run = Run(HtsConfig(student=student_config, train=config), class_table)
        training.train_student(run, labels, stage)
    storage.remove_tree(stage.path)
    rates: dict[str, list[float]] = storage.read_json(rates_path)
    rates["bare"] = [(a + b) / 2 for a, b in pairwise(rates["bare"])]
    return rates


def measure(options: argparse.Namespace, threads: int, folder: Path) -> list[dict[str, Any]]:
    """Return a row for every kind, each measured on a cluster of its own."""
    class_table = hico_classes()
    save_model(folder / "model", options.layers)
    labels = save_labels(folder, options.images, class_table)
    student = StudentConfig(model=f"local-dir:{folder / 'model'}")
    config = TrainConfig(
        epochs=options.epochs,
        batch_size=options.batch,
        num_workers=options.workers,
        cpus_per_worker=max(1, threads // options.workers),
        checkpoint_every=options.epochs,
    )
    rows = []
    for kind in options.kinds:
        chosen = config.model_copy(update={"images_kept": _KINDS[kind]})
        with ray_cluster(RayConfig(object_store_gib=1.0)):
            found = epoch_rates(student, chosen, class_table, labels, folder)
        shares = [rate / bare for rate, bare in zip(found["rates"], found["bare"], strict=True)]
        print(f"{kind}: share of the bare loop, epoch by epoch:", [round(s, 3) for s in shares])
        names = ("workers", "images", "batch", "epochs", "layers")
        row = {"kind": kind, **{name: getattr(options, name) for name in names}}
        rows.append({**row, "threads": threads, **found, "share": statistics.median(shares)})
    return rows


def main() -> None:
    """Print and store the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=list(_KINDS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = measure(options, len(os.sched_getaffinity(0)), Path(name))
    for row in rows:
        print(f"{row['kind']}: median share of the bare loop {row['share']:.3f}")
    mine = {(row["kind"], row["workers"]) for row in rows}
    earlier = read_results(options.out).get("rows", [])
    kept = [row for row in earlier if (row["kind"], row["workers"]) not in mine]
    write_results(options.out, {**measured_on(), "rows": [*kept, *rows]})


if __name__ == "__main__":
    main()
