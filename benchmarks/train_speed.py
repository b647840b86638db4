"""Compare training through Ray Train and Ray Data with a bare loop of the same model.

    python benchmarks/train_speed.py [--images 128] [--batch 32] [--epochs 6] [--workers 1]

`kept` is `train_student` on a Ray Train worker over JPEG files that are decoded once and kept in
Ray's object store; `decoded` decodes them again in every epoch, as it is done when the images do
not fit. Both augment as the paper does, clip gradients and report to Ray. `bare` takes as many
steps (forward, LSE-Sign, backward, AdamW) on one prepared batch that lies in memory. It runs in
the worker's own process between the epochs, so that an epoch is compared with the bare loops right
before and after it: the machine's speed drifts by more than what is measured. The first epoch,
which starts everything, does not count. A ViT-B/32 with random weights at 224 pixels, float32,
600 classes, as many threads as cores. `--workers 2` shares batch and cores out between two workers,
whose gradients, the bare loop's too, go over gloo. JSON goes to
benchmarks/results/train_speed.json.
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
from measured import measured_on, write_results
from PIL import Image

from hts_ray.classes import ClassTable, hico_classes
from hts_ray.config import HtsConfig, RayConfig, StudentConfig, TrainConfig
from hts_ray.engine.run import Run
from hts_ray.engine.session import ray_cluster
from hts_ray.losses import make_loss
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.student import loop
from hts_ray.student import train as training
from hts_ray.student.checkpoints import load_student
from hts_ray.student.model import parameter_groups, set_trainable

RESULTS = Path(__file__).parent / "results" / "train_speed.json"
_KINDS: dict[str, Literal["pixels", "none"]] = {"kept": "pixels", "decoded": "none"}


def save_model(folder: Path) -> None:
    """Write a CLIP whose image tower is a ViT-B/32, in open_clip's format; its text is tiny."""
    import open_clip
    from safetensors.torch import save_file

    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
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
    """The model's own steps on a worker's batch in memory; starts with one that allocates."""

    def __init__(self, initial: str, config: TrainConfig, world: int) -> None:
        self.student = load_student(initial)
        set_trainable(self.student, config.trainable)
        self.student.train()
        self.world = world
        distributed: Any = torch.nn.parallel.DistributedDataParallel
        self.model = distributed(self.student) if world > 1 else self.student
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student, config.optim))
        self.loss = make_loss(config.loss, config.loss_temperature)
        size, classes = self.student.image_size, len(self.student.class_table)
        batch = config.batch_size // world
        self.images = torch.randn(batch, 3, size, size)
        self.targets = torch.full((batch, classes), -1, dtype=torch.int8)
        self.targets[:, :2] = 1
        self.rate(1)

    def rate(self, steps: int) -> float:
        """Return images/s of so many steps, over all workers."""
        started = time.monotonic()
        for _ in range(steps):
            self.loss(self.model(self.images), self.targets).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return steps * len(self.images) * self.world / (time.monotonic() - started)


def with_bare_loops(rates_path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the workers' `train_loop` with bare loops around every epoch but the first.

    It writes the rates of epochs, and of the bare loops before and after each, to `rates_path`.
    """

    def timed_loop(job: dict[str, Any]) -> dict[str, Any]:
        run_epoch = loop._run_epoch
        bare: BareLoop | None = None
        rates: dict[str, list[float]] = {"bare": [], "epochs": []}

        def timed_epoch(worker: Any, shard: Any, position: Any) -> Any:
            nonlocal bare
            position = run_epoch(worker, shard, position)
            if bare is None:
                bare = BareLoop(job["initial"], worker.config, worker.world)
            else:
                rates["epochs"].append(position.history[-1]["images_per_second"])
            rates["bare"].append(bare.rate(worker.steps_per_epoch))
            if worker.rank == 0:
                storage.write_json(rates_path, rates)
            return position

        loop._run_epoch = timed_epoch
        try:
            return loop.train_loop(job)
        finally:
            loop._run_epoch = run_epoch

    return timed_loop


def epoch_rates(
    student_config: StudentConfig,
    config: TrainConfig,
    class_table: ClassTable,
    labels: pa.Table,
    folder: Path,
) -> list[tuple[float, float]]:
    """Return images/s of a real training's epochs, each with that of the bare loops around it."""
    stage = StageFolder(str(folder), "student", str(time.time_ns()))
    rates_path = str(folder / f"rates-{stage.key}.json")
    with patch.object(training, "train_loop", with_bare_loops(rates_path)):
        run = Run(HtsConfig(student=student_config, train=config), class_table)
        training.train_student(run, labels, stage)
    storage.remove_tree(stage.path)
    rates = storage.read_json(rates_path)
    around = [(a + b) / 2 for a, b in pairwise(rates["bare"])]
    return list(zip(rates["epochs"], around, strict=True))


def measure(options: argparse.Namespace, threads: int, folder: Path) -> list[dict[str, float]]:
    """Run the rounds, every kind on a cluster of its own."""
    class_table = hico_classes()
    save_model(folder / "model")
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
    for _ in range(options.rounds):
        found = {}
        for kind in options.kinds:
            chosen = config.model_copy(update={"images_kept": _KINDS[kind]})
            with ray_cluster(RayConfig(object_store_gib=1.0)):
                found[kind] = epoch_rates(student, chosen, class_table, labels, folder)
            shares = "  ".join(f"{rate / bare:.3f}" for rate, bare in found[kind])
            print(f"{kind}: share of the bare loop, epoch by epoch: {shares}", flush=True)
        for pairs in zip(*found.values(), strict=True):
            row: dict[str, float] = {}
            for kind, (rate, bare) in zip(found, pairs, strict=True):
                row |= {kind: rate, f"bare_{kind}": bare}
            rows.append(row)
    return rows


def main() -> None:
    """Print and store the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=list(_KINDS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        rows = measure(options, threads, Path(name))
    shares = {
        kind: statistics.median(row[kind] / row[f"bare_{kind}"] for row in rows)
        for kind in options.kinds
    }
    print("median share of the bare loop:", {k: round(v, 3) for k, v in shares.items()})
    settings: dict[str, Any] = {key: value for key, value in vars(options).items() if key != "out"}
    report = {
        **measured_on(),
        "settings": {**settings, "threads": threads, "model": "ViT-B/32, random weights"},
        "efficiency": shares,
        "rounds": rows,
    }
    write_results(options.out, report)


if __name__ == "__main__":
    main()
