"""Compare training through Ray Train and Ray Data with a bare loop of the same model.

    python benchmarks/train_speed.py [--images 128] [--batch 32] [--rounds 3]

`bare` takes the same steps (forward, LSE-Sign, backward, AdamW) on one prepared batch that lies in
memory, in one process. `kept` is `train_student` on a Ray Train worker over JPEG files that Ray
Data decodes once and keeps in its object store; `decoded` decodes them again in every epoch, as it
does when the images do not fit. Both augment as the paper does, clip gradients and report to Ray.
A ViT-B/32 with random weights at 224 pixels, float32, 600 classes, as many threads as cores.
Rates are those of the second epoch; the bare loop runs before and after, rounds in turn. JSON goes
to benchmarks/results/train_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from hts_ray import storage
from hts_ray.classes import ClassTable, hico_classes
from hts_ray.config import RayConfig, StudentConfig, TrainConfig
from hts_ray.losses import make_loss
from hts_ray.provenance import measured_on, write_results
from hts_ray.runtime import ray_cluster
from hts_ray.student.model import build_student, parameter_groups, set_trainable
from hts_ray.student.training import train_student
from hts_ray.tables import StageFolder

RESULTS = Path(__file__).parent / "results" / "train_speed.json"
_STORE_GIB = {"kept": 2.0, "decoded": 0.1}


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


def bare_rate(
    student_config: StudentConfig, config: TrainConfig, class_table: ClassTable, steps: int
) -> float:
    """Return images/s of the model's own steps on one batch in memory."""
    student = build_student(student_config, class_table)
    set_trainable(student, config.trainable)
    student.train()
    optimizer = torch.optim.AdamW(parameter_groups(student, config.optim))
    loss = make_loss(config.loss, config.loss_temperature)
    images = torch.randn(config.batch_size, 3, student.image_size, student.image_size)
    targets = torch.full((config.batch_size, len(class_table)), -1, dtype=torch.int8)
    targets[:, :2] = 1
    started = 0.0
    for step in range(steps + 1):
        if step == 1:  # the first one allocates
            started = time.monotonic()
        loss(student(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return steps * config.batch_size / (time.monotonic() - started)


def pipeline_rate(
    student_config: StudentConfig,
    config: TrainConfig,
    class_table: ClassTable,
    labels: pa.Table,
    folder: Path,
) -> float:
    """Return images/s of the last epoch of a real training."""
    stage = StageFolder(str(folder), "student", str(time.time_ns()))
    train_student(
        config=config,
        student_config=student_config,
        class_table=class_table,
        labels=labels,
        stage=stage,
        seed=0,
    )
    rate: float = storage.read_json(stage.file("history.json"))[-1]["images_per_second"]
    storage.remove_tree(stage.path)
    return rate


def measure(options: argparse.Namespace, threads: int, folder: Path) -> list[dict[str, float]]:
    """Run the rounds; a cluster a kind, because the size of its store is what differs."""
    class_table = hico_classes()
    save_model(folder / "model")
    labels = save_labels(folder, options.images, class_table)
    student = StudentConfig(model=f"local-dir:{folder / 'model'}")
    config = TrainConfig(
        epochs=2, batch_size=options.batch, cpus_per_worker=threads, checkpoint_every=2
    )
    steps = options.images // options.batch
    rows = []
    for _ in range(options.rounds):
        row: dict[str, float] = {}
        before = bare_rate(student, config, class_table, steps)
        for kind, store in _STORE_GIB.items():
            with ray_cluster(RayConfig(object_store_gib=store)):
                row[kind] = pipeline_rate(student, config, class_table, labels, folder)
            after = bare_rate(student, config, class_table, steps)
            row[f"bare_{kind}"] = (before + after) / 2
            before = after
        rows.append(row)
        shares = "  ".join(f"{kind} {row[kind] / row[f'bare_{kind}']:.3f}" for kind in _STORE_GIB)
        print(f"bare {row['bare_kept']:.2f} images/s; share of it: {shares}", flush=True)
    return rows


def main() -> None:
    """Print and store the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        rows = measure(options, threads, Path(name))
    shares = {
        kind: statistics.median(row[kind] / row[f"bare_{kind}"] for row in rows)
        for kind in _STORE_GIB
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
