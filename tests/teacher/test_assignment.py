"""Tests of what a teacher is asked, and of what is refused before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from assignments import plan, rows

from hts_ray.classes import load_class_table, name_prompts
from hts_ray.classes.prompts import what_is_shown
from hts_ray.config import LabelConfig, RegionsConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.teacher.assignment import check_lengths, region_sources


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


def test_prompts_too_long_are_refused_by_name(tmp_path: Path, tiny_path: Any) -> None:
    """Catches hours of quarantined images, or scores of half a prompt, for one long sentence."""
    source = tmp_path / "classes.csv"
    source.write_text(f"name,prompts\na dog,a dog\nlong one,{'a person riding a horse ' * 100}\n")
    table = load_class_table(str(source), None)

    def check(model: str, **settings: Any) -> None:
        teacher = {"model": model, "background": "none", **settings}
        check_lengths(LabelConfig.model_validate({"teacher": teacher}), table)

    said = r"class 'long one': its prompt 'a person.* has 500 tokens,.* at most 63 .*class file"
    with pytest.raises(ConfigError, match=said):
        check(str(tiny_path("blip")))
    with pytest.raises(ConfigError, match="at most 468"):  # 512 less image and instruction
        check(str(tiny_path("llava")))
    with pytest.raises(ConfigError, match=r"class 'long one'.*at most 4\d\d"):
        check(str(tiny_path("llava")), mode="questions")
    check(str(tiny_path("blip")), mode="captions")
    check(str(tiny_path("blip2_t5")))  # relative positions
    check("builtin:dummy")
    with pytest.raises(ConfigError, match=r"alone are \d+ tokens too long.*instruction"):
        check(str(tiny_path("blip")), instruction="a dog " * 50, mode="captions")


def test_questions_ask_for_what_a_prompt_shows(tmp_path: Path) -> None:
    """Catches "does this image show a photo of ...", and background sentences that are asked."""
    assignment = plan(tmp_path, rows(tmp_path, 1), mode="questions", prompt_templates=2)
    assert assignment.background == ()
    first = assignment.prompts.by_class(assignment.prompts.texts)[0]
    assert first == ["a person boarding an airplane", "someone boarding an airplane"]
    assert what_is_shown(name_prompts("red car")) == ("a red car",)
    assert what_is_shown(["a photo of "]) == ("a photo of ",)
