"""A small labeled run on disk: six images, a teacher pass over them and its pseudo-labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hts_ray.config import HtsConfig, parse_config
from hts_ray.engine.run import Run, open_run
from hts_ray.labels.stage import plan_filter
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import MANIFEST_SCHEMA, REGION_SCORES_SCHEMA, write_table

IDS = [18, 19, 74]  # of HICO: ride bicycle, sit on bicycle, and one of another object
SIZE = (60, 40)
# Region probabilities of the three classes: whole image, left half, right half.
STRONG, WEAK, NONE = 0.9, 0.15, 0.01
SCORES = {
    "a/1": [[STRONG, NONE, NONE], [STRONG, NONE, NONE], [NONE, NONE, NONE]],
    "a/2": [[STRONG, STRONG, NONE], [NONE, STRONG, NONE], [STRONG, NONE, NONE]],
    "b/1": [[NONE, NONE, STRONG], [NONE, NONE, WEAK], [NONE, NONE, STRONG]],
    "b/2": [[WEAK, NONE, STRONG], [NONE, NONE, STRONG], [WEAK, NONE, STRONG]],
    "b/3": [[NONE, NONE, NONE], [NONE, NONE, NONE], [NONE, NONE, NONE]],
    "gone": [[STRONG, NONE, NONE], [STRONG, NONE, NONE], [STRONG, NONE, NONE]],
}
POSITIVES = {"a/1": [18], "a/2": [18, 19], "b/1": [74], "b/2": [74], "b/3": [], "gone": [18]}
IGNORED = {"b/2": [18]}


def region_row(image_id: str, uri: str) -> dict[str, object]:
    width, height = SIZE
    return {
        "image_id": image_id,
        "uri": uri,
        "split": "train",
        "width": width,
        "height": height,
        "boxes": [[0, 0, width, height], [0, 0, 30, height], [30, 0, width, height]],
        "region_kinds": ["whole", "grid", "grid"],
        "margins": [0.0, 0.0, 0.0],
        "captions": [[], [], []],
        "scores": np.log(np.array(SCORES[image_id], np.float32)).ravel().tolist(),
        "status": "ok",
    }


def save_run(root: Path, changes: dict[str, object] | None = None) -> HtsConfig:
    """Write images, manifest, region_scores and pseudo_labels; `gone` has no file."""
    images = root / "images"
    rows, regions = [], []
    for number, image_id in enumerate(SCORES):
        suffix = ".png" if image_id == "a/2" else ".jpg"
        path = images / f"{image_id}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if image_id != "gone":
            Image.new("RGB", SIZE, (40 * number, 100, 50)).save(path)
        row = {"image_id": image_id, "uri": str(path), "width": SIZE[0], "height": SIZE[1]}
        if image_id != "b/3":
            row |= {"positive_ids": [18], "negative_ids": [19], "ambiguous_ids": []}
        rows.append({**row, "split": "train"})
        regions.append(region_row(image_id, str(path)))
    run_dir = str(root / "run")
    manifest = StageFolder(run_dir, "manifest", "m")
    write_table(manifest.file("manifest.parquet"), pa.Table.from_pylist(rows, MANIFEST_SCHEMA))
    manifest.publish({"root": str(images), "rows_out": len(rows)})
    scores = StageFolder(run_dir, "region_scores", "s")
    table = pa.Table.from_pylist(regions, REGION_SCORES_SCHEMA)
    write_table(scores.file("part-0.parquet"), table)
    storage.write_json(
        scores.file("table.json"),
        {
            "class_ids": IDS,
            "score_kind": "log_probability",
            "model": "Some/captioner",
            "model_fingerprint": "Some/captioner@0123abc",
        },
    )
    scores.publish({"rows_out": len(regions)})
    config = parse_config(
        {
            "run_dir": run_dir,
            "classes": {"ids": IDS},
            "filter": {"per_class_quantile": None},
            **(changes or {}),
        }
    )
    run = open_run(config)
    plan_filter(run, scores).run()
    return config


@pytest.fixture(scope="session")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the run; tests read it and write elsewhere."""
    return open_run(save_run(tmp_path_factory.mktemp("labeled")))


@pytest.fixture(scope="session")
def own_classes(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the same run under other class names, which are no verb-object pairs."""
    root = tmp_path_factory.mktemp("own")
    (root / "classes.csv").write_text(
        "class_id,name\n18,a red thing\n19,a <blue> & green thing\n74,café\n", encoding="utf-8"
    )
    return open_run(save_run(root, {"classes": {"source": str(root / "classes.csv")}}))
