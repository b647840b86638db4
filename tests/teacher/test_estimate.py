"""Tests of what is told before a teacher pass is paid for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hts_ray.classes import hico_classes
from hts_ray.config import FilterConfig, LabelConfig
from hts_ray.errors import ConfigError
from hts_ray.images.manifest import open_manifest
from hts_ray.store.tables import MANIFEST_SCHEMA, write_table
from hts_ray.teacher.estimate import estimate

CLASSES = hico_classes().subset(range(6))


def make_manifest(folder: Path, good: int, bad: Sequence[str] = ()) -> str:
    (folder / "images").mkdir(parents=True)
    names = [f"{i}.png" for i in range(good)]
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    for name in bad:
        (folder / "images" / name).write_bytes(b"")
    rows = [
        {"image_id": name, "uri": str(folder / "images" / name), "split": "train"}
        for name in [*names, *bad]
    ]
    path = str(folder / "manifest.parquet")
    write_table(path, pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    return path


def config(**teacher: object) -> LabelConfig:
    return LabelConfig.model_validate({"teacher": {"model": "builtin:dummy:0.001", **teacher}})


def test_figures_and_examples(tmp_path: Path) -> None:
    """Catches a dry run that writes, counts wrongly, or shows other classes than the filter."""
    manifest = make_manifest(tmp_path, 8, ["empty.jpg"])
    before = sorted(tmp_path.rglob("*"))
    images = open_manifest(manifest)
    found = estimate(config(), images, CLASSES, sample=3, filtering=FilterConfig())
    assert [found.figures[name] for name in ("images", "sample", "sample quarantined")] == [9, 2, 1]
    assert found.figures["seconds an image"] is not None
    assert found.figures["seconds an image"] > 14 * 0.001
    assert found.figures["seconds in all"] == pytest.approx(
        found.figures["seconds to load"] + 9 * found.figures["seconds an image"]
    )
    assert found.figures["GPU-hours"] == 0
    assert found.figures["regions an image"] == 14
    assert found.figures["prompts"] == 6
    assert found.figures["tokens a region"] == sum(len(p.split()) for p in CLASSES.primary_prompts)
    assert found.figures["regions"] == 14 * 9
    assert sorted(tmp_path.rglob("*")) == before
    assert [len(example.regions) for example in found.examples] == [14, 14]
    shown = found.examples[0].regions[0]
    assert shown.caption.startswith("image ")
    assert len(shown.top_classes) == 3
    assert shown.top_classes[0][0] in CLASSES.names
    assert shown.top_classes[0][1] >= shown.top_classes[1][1] > 0


def test_questions_are_measured_too(tmp_path: Path) -> None:
    """Catches a preview that reads odds as likelihoods, or captions lost for want of prompts."""
    images = open_manifest(make_manifest(tmp_path, 3))
    found = estimate(config(mode="questions"), images, CLASSES, filtering=FilterConfig())
    assert found.figures["prompts"] == 6
    assert found.figures["background sentences"] == 0
    assert found.figures["tokens a region"] == sum(len(p.split()) for p in CLASSES.primary_prompts)
    tops = [region.top_classes for example in found.examples for region in example.regions]
    assert all(len(top) == 3 for top in tops)
    assert max(sum(p for _, p in top) for top in tops) > 1.5  # they do not compete
    assert found.examples[0].regions[0].caption.startswith("image ")


def test_gpu_hours_are_of_all_actors(tmp_path: Path) -> None:
    """Catches a price told for one actor of many."""
    manifest = make_manifest(tmp_path, 4)
    pool = {"min_size": 1, "max_size": 4, "num_gpus": 0.5}
    settings = config().model_copy(
        update={"pool": type(config().pool).model_validate(pool)},
    )
    found = estimate(settings, open_manifest(manifest), CLASSES, sample=2)
    assert found.figures["seconds an image"] is not None
    assert found.figures["seconds in all"] == pytest.approx(
        found.figures["seconds to load"] + found.figures["seconds an image"]
    )
    assert found.figures["GPU-hours"] == pytest.approx(
        4 * found.figures["seconds an image"] * 0.5 / 3600
    )


def test_nothing_readable(tmp_path: Path) -> None:
    """Catches a division by an empty sample."""
    manifest = make_manifest(tmp_path, 0, ["empty.jpg"])
    found = estimate(config(), open_manifest(manifest), CLASSES)
    assert found.figures["seconds in all"] is None
    assert found.figures["regions"] is None


def test_wrong_settings_are_refused_first(tmp_path: Path) -> None:
    """Catches a dry run that passes and a run that then fails."""
    manifest = make_manifest(tmp_path, 1)
    with pytest.raises(ConfigError, match="no such folder"):
        estimate(config(model="/no/such/model"), open_manifest(manifest), CLASSES)
