"""Tests of what a teacher is asked, and of what is refused before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from assignments import plan, rows

from hts_ray.config import RegionsConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.teacher.assignment import region_sources


def test_boxes_that_fit_no_image_are_refused_before_the_run(tmp_path: Path) -> None:
    """Catches a run that is paid for and has used none of the boxes it was given."""
    table = rows(tmp_path, 2)
    boxes = {
        "images": [{"id": 1, "file_name": "elsewhere.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(boxes))
    with pytest.raises(DataError, match="none is in the manifest"):
        plan(tmp_path, table, {"boxes": str(path)})
    before = region_sources(RegionsConfig(boxes=str(path)))
    boxes["images"][0]["file_name"] = "0.png"
    path.write_text(json.dumps(boxes))
    assert plan(tmp_path, table, {"boxes": str(path)}).given is not None
    assert region_sources(RegionsConfig(boxes=str(path))) != before
    with pytest.raises(ConfigError, match=r"label.regions.boxes = '/no/such.json'"):
        region_sources(RegionsConfig(boxes="/no/such.json"))
