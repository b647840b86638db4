"""A small finished run, and the folder of helpers on the import path."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # pytest's import mode hides what lies beside
from report_pages import photo

from hts_ray.classes import hico_classes
from hts_ray.config import parse_config
from hts_ray.store import storage, tables
from hts_ray.store.run import StageFolder

CLASS_IDS = [5, 9, 400]


def _rows(folder):
    """Return the rows of manifest, region_scores and pseudo_labels of six images."""
    manifest, scores, labels = [], [], []
    for i in range(6):
        path = folder / f"im <{i}>.png"
        Image.fromarray(photo(i, 60, 80)).save(path)
        common = {"image_id": f"im{i}", "uri": str(path), "split": "train"}
        truth = {"positive_ids": [5], "negative_ids": [9], "ambiguous_ids": []} if i < 4 else {}
        manifest.append({**common, "width": 80, "height": 60, **truth})
        ok = {"status": "ok", "boxes": [[0, 0, 80, 60], [0, 0, 40, 30]]}
        ok |= {"region_kinds": ["whole", "grid"], "captions": [["a man"], []]}
        ok |= {"scores": [0.0, -9.0, -9.0, -9.0, 0.0, -9.0]}
        bad = {"status": "quarantined", "error_kind": "truncated", "error": "cut"}
        scores.append({**common, "width": 80, "height": 60, **(ok if i != 5 else bad)})
        kept = {"positive_ids": [5, 9] if i < 2 else [9], "ignored_ids": [400]}
        kept |= {"probability": [0.9, 0.6][: 2 if i < 2 else 1]}
        kept |= {"support": [1, 3] if i < 2 else [3]}
        labels.append({**common, **kept, "dropped": [("ignored_band", 1)]})
    return manifest, scores, labels[:5]


def _evaluations(run):
    curve = [1.0] * 6 + [0.1] * 5
    for key, name, value in (("a", "zero-shot", 0.2), ("b", "HTS", 0.5)):
        metrics = {"mAP": value, "mAP_known_object": None, "few@1": 0.1, "name": name}
        metrics |= {"ap": [value, None, 0.1], "class_ids": CLASS_IDS}
        metrics |= {"interpolated_precision": [curve, None, curve]}
        metrics["predictions"] = f"/where/it/was/predictions-{key}"
        storage.write_json(
            f"{run}/predictions-{key}/table.json", {"student": f"/old/student-{key}"}
        )
        storage.write_json(f"{run}/evaluation-{key}/metrics.json", metrics)
        student = StageFolder(run, "student", key)
        history = [{"loss": 2.0}, {"loss": 1.0, "validation_mAP": 0.4}] if key == "b" else []
        storage.write_json(student.file("history.json"), history)
        info = {"train": {"labels": "pseudo" if key == "b" else "none", "loss": "bce"}, "epochs": 2}
        storage.write_json(student.file("student.json"), {"info": info})
        student.publish({"seconds": 3, "gpus": 2})


@pytest.fixture
def run_dir(tmp_path):
    """Write a small finished run with one quarantined image and two evaluations."""
    folder = tmp_path / "run 1"
    folder.mkdir()
    run = str(folder)
    hico_classes().subset(CLASS_IDS).to_csv(f"{run}/classes.csv")
    settings = {
        "run_dir": run,
        "filter": {"prior_alpha": 0.0},
        "label": {"pool": {"max_size": 4, "num_gpus": 0.5}},
    }
    storage.write_bytes(f"{run}/config.yaml", parse_config(settings).to_yaml().encode())
    storage.write_json(f"{run}/provenance.json", {"versions": {"ray": "2.60"}})
    manifest, scores, labels = _rows(tmp_path)
    quarantine = [{"image_id": "im5", "stage": "label", "error_kind": "truncated", "error": "cut"}]
    for name, rows, schema in (
        ("manifest", manifest, tables.MANIFEST_SCHEMA),
        ("region_scores", scores, tables.REGION_SCORES_SCHEMA),
        ("pseudo_labels", labels, tables.PSEUDO_LABELS_SCHEMA),
    ):
        stage = StageFolder(run, name, "abc")
        tables.write_table(stage.file("part-0.parquet"), pa.Table.from_pylist(rows, schema))
        if name == "region_scores":
            table = pa.Table.from_pylist(quarantine, tables.QUARANTINE_SCHEMA)
            tables.write_table(stage.file("quarantine", "part-0.parquet"), table)
            info = {"class_ids": CLASS_IDS, "prior_log_likelihoods": None, "model": "me/captioner"}
            info["regions"] = {"whole": True, "grid_scales": [0.5], "grid_steps": [3]}
            storage.write_json(stage.file("table.json"), info)
        counts = {"rows_in": 6, "rows_out": len(rows), "quarantined": 0}
        stage.publish({**counts, "seconds": 1800, "gpus": 2.0})
    _evaluations(run)
    return run
