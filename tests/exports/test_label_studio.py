"""Label Studio's tasks and interface; the server (400 MB with its web framework) is not here.

Checked against the rules that its SDK applies to tasks: every `from_name` and `to_name` is a tag of
the interface of that very type, choices and labels are among the tag's own, scores lie in [0, 1],
and every variable of the interface is in the task's data.
"""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from labeled_run import POSITIVES

from hts_ray.classes import hico_classes
from hts_ray.config import override
from hts_ray.exports.label_studio import labeling_config
from hts_ray.exports.source import read_labels
from hts_ray.exports.writing import export_labels
from hts_ray.review.corrected_files import read_labels as read_back


def exported(run, target, **settings):
    run = replace(run, config=override(run.config, {"export": settings}))
    done = export_labels(run, read_labels(run), "label-studio", str(target))
    tasks = json.loads((target / "tasks.json").read_text())
    return done, tasks, (target / "labeling_config.xml").read_text()


def check(tasks, interface):
    """Raise AssertionError where a task does not fit the interface, as the SDK would."""
    tags = {tag.get("name"): tag for tag in ElementTree.fromstring(interface).iter()}
    options = {name: {child.get("value") for child in tag} for name, tag in tags.items() if name}
    variables = [
        tag.get("value")[1:] for tag in tags.values() if (tag.get("value") or "").startswith("$")
    ]
    for tag in tags.values():
        assert tag.get("toName") is None or tag.get("toName") in tags
    for task in tasks:
        assert all(task["data"].get(name) is not None for name in variables)
        for prediction in task.get("predictions", []):
            assert 0 <= prediction["score"] <= 1
            keys = [entry["id"] for entry in prediction["result"]]
            assert len(set(keys)) == len(keys)
            for entry in prediction["result"]:
                tag = tags[entry["from_name"]]
                assert tag.get("toName") == entry["to_name"]
                assert entry["type"] == tag.tag.lower()
                assert set(entry["value"][entry["type"]]) <= options[entry["from_name"]]


@pytest.mark.parametrize("which", ["labeled", "own_classes"])
def test_tasks_fit_the_interface(which, request, tmp_path):
    """Catches class names with marks of XML, and predictions that the import refuses."""
    run = request.getfixturevalue(which)
    _, tasks, interface = exported(run, tmp_path / "out")
    check(tasks, interface)
    names = dict(zip(run.class_table.positions, run.class_table.names, strict=True))
    for task in tasks:
        ticked = [e for e in task["predictions"][0]["result"] if e["type"] == "choices"]
        found = ticked[0]["value"]["choices"] if ticked else []
        assert found == [names[i] for i in POSITIVES[task["data"]["image_id"]]]


def test_boxes_are_percents_and_doubt_comes_first(labeled, tmp_path):
    """Catches boxes in pixels, and a score by which the surest images are reviewed first."""
    _, tasks, _ = exported(labeled, tmp_path / "out")
    by_id = {task["data"]["image_id"]: task for task in tasks}
    box = by_id["a/2"]["predictions"][0]["result"][2]
    assert (box["original_width"], box["original_height"]) == (60, 40)
    value = box["value"]
    assert (value["x"], value["y"], value["width"], value["height"]) == (50, 0, 50, 100)
    assert value["rectanglelabels"] == ["ride bicycle"]
    assert by_id["b/3"]["predictions"][0]["score"] < by_id["a/2"]["predictions"][0]["score"]
    assert "unsure of: ride bicycle" in by_id["b/2"]["data"]["undecided"]


def test_addresses_come_from_the_setting(labeled, tmp_path):
    """Catches tasks whose images no browser can load, without a word about it."""
    done, tasks, _ = exported(labeled, tmp_path / "one")
    assert any("export.image_url_prefix" in note for note in done.notes)
    assert tasks[0]["data"]["image"].startswith("/")
    done, tasks, _ = exported(labeled, tmp_path / "two", image_url_prefix="http://host/")
    assert tasks[0]["data"]["image"] == "http://host/a/1.jpg"
    assert not any("export.image_url_prefix" in note for note in done.notes)


def test_six_hundred_classes_are_searched_and_not_scrolled():
    """Catches an interface that shows HICO's 600 classes as a wall of boxes to tick."""
    root = ElementTree.fromstring(labeling_config(hico_classes()))
    choices = root.find("Choices[@name='labels']")
    assert choices.get("layout") == "select"
    assert choices.get("choice") == "multiple"
    assert len(choices) == 600
    assert root.find("Filter") is not None
    small = ElementTree.fromstring(labeling_config(hico_classes().subset([1, 2]), boxes=False))
    assert small.find("RectangleLabels") is None
    assert small.find("Filter") is None


def test_untouched_tasks_are_no_corrections(labeled, tmp_path):
    """Catches the machine's own predictions that come back as a person's labels."""
    exported(labeled, tmp_path / "out")
    read = read_back(str(tmp_path / "out" / "tasks.json"))
    assert read.images == ()
    assert read.counts["not_reviewed"] == 5
