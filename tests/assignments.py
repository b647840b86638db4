"""Assignments of a few small images, for the tests of this room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from hts_ray.classes import hico_classes
from hts_ray.config import LabelConfig
from hts_ray.store.run import StageFolder
from hts_ray.teacher.assignment import Assignment

CLASSES = hico_classes().subset([0, 5, 9, 100])


def rows(folder: Path, good: int, bad: int = 0) -> pa.Table:
    uris = []
    for number in range(good):
        path = folder / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        uris.append(str(path))
    uris += [str(folder / f"missing-{number}.png") for number in range(bad)]
    ids = [Path(uri).stem for uri in uris]
    return pa.table({"image_id": ids, "uri": uris, "split": ["train"] * len(uris)})


def plan(folder: Path, table: pa.Table, regions: Any = None, **teacher: Any) -> Assignment:
    config = LabelConfig.model_validate(
        {"teacher": {"model": "builtin:dummy", **teacher}, "regions": regions or {}}
    )
    stage = StageFolder(str(folder), "region_scores", "k")
    return Assignment.plan(config, CLASSES, table, fingerprint="model@1", stage=stage)
