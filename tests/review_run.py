"""A labeled run of any size on disk, for the page that people correct labels on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from hts_ray.classes import hico_classes
from hts_ray.config import HtsConfig, parse_config
from hts_ray.engine.run import open_run
from hts_ray.labels.stage import plan_filter
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import MANIFEST_SCHEMA, REGION_SCORES_SCHEMA, write_table

IDS = [18, 19, 74, 111, 150, 209, 226, 250, 300, 400, 450, 500, 550]
SIZE = (96, 72)
BOXES = [[0, 0, 96, 72], [0, 0, 48, 72], [48, 0, 96, 72], [24, 18, 72, 54]]
KINDS = ["whole", "grid", "grid", "grid"]


def plain(number: int) -> Image.Image:
    """Return an image that tells its number by its colour."""
    return Image.new("RGB", SIZE, (number % 256, 100 + number // 256, 50))


def save_review_run(
    root: Path, count: int, draw: Callable[[int], Image.Image] = plain, ids: list[int] = IDS
) -> HtsConfig:
    """Write `count` images, their teacher pass and pseudo-labels: one to three an image."""
    rng = np.random.default_rng(3)
    images, rows, regions = root / "images", [], []
    images.mkdir(parents=True)
    for number in range(count):
        name, picture = f"im{number:04d}.jpg", draw(number)
        picture.save(images / name)
        p_RC = rng.uniform(0.001, 0.1, (len(BOXES), len(ids)))
        for column in rng.choice(len(ids), 1 + number % 3, replace=False):
            p_RC[rng.integers(len(BOXES)), column] = rng.uniform(0.4, 0.99)
        p_RC[1, rng.integers(len(ids))] = 0.2
        scale = np.tile(np.divide(picture.size, SIZE), 2)
        row = {"image_id": name, "uri": str(images / name), "split": "train"}
        row |= {"width": picture.width, "height": picture.height}
        rows.append(row)
        scored = {"boxes": (np.array(BOXES) * scale).tolist(), "region_kinds": KINDS}
        scored |= {"margins": [0.0] * len(BOXES), "captions": [[]] * len(BOXES)}
        scores = np.log(p_RC).astype(np.float32).ravel().tolist()
        regions.append({**row, **scored, "scores": scores, "status": "ok"})
    run_dir = str(root / "run")
    manifest = StageFolder(run_dir, "manifest", "m")
    write_table(manifest.file("manifest.parquet"), pa.Table.from_pylist(rows, MANIFEST_SCHEMA))
    manifest.publish({"root": str(images), "rows_out": count})
    scores = StageFolder(run_dir, "region_scores", "s")
    table = pa.Table.from_pylist(regions, REGION_SCORES_SCHEMA)
    write_table(scores.file("part-0.parquet"), table)
    info = {"class_ids": ids, "score_kind": "log_probability", "model": "Some/captioner"}
    storage.write_json(scores.file("table.json"), info)
    scores.publish({"rows_out": count})
    settings = {"per_class_quantile": None, "positive_threshold": 0.35, "negative_threshold": 0.15}
    config = parse_config(
        {
            "run_dir": run_dir,
            "classes": {"ids": ids},
            "filter": {**settings, "support_threshold": 0.3, "aggregation": "max"},
        }
    )
    run = open_run(config)
    run.record()
    plan_filter(run, scores).run()
    return config


__all__ = ["IDS", "hico_classes", "save_review_run"]
