"""Label Studio: tasks with the machine's labels as pre-annotations, and the labeling interface.

A folder of `tasks.json`, which a project imports, and `labeling_config.xml`, to be pasted into the
project's settings before that. Source: Label Studio's documentation of tasks, predictions and the
tags Choices, Filter and RectangleLabels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from hts_ray.classes import ClassTable
from hts_ray.exports.records import Context, LabeledImage, SupportRegion

TASKS, INTERFACE = "tasks.json", "labeling_config.xml"
# Names of the interface's controls, by which `hts import-labels` finds their results.
LABELS, UNSURE, BOXES, IMAGE = "labels", "unsure", "boxes", "image"
_MANY_CLASSES = 40  # beyond these, a list to search replaces boxes to tick
_UNDECIDED_SHOWN = 12


def labeling_config(class_table: ClassTable, *, boxes: bool = True) -> str:
    """Return the interface: the image, its classes to tick, those to mark as unclear, and boxes."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=IMAGE, value="$image", zoom="true")
    ElementTree.SubElement(view, "Header", value="Tick every class that is in the image")
    many = len(class_table) > _MANY_CLASSES
    search, wall = {"layout": "select"}, {"showInline": "true"}
    _choices(view, LABELS, class_table, search if many else wall)
    ElementTree.SubElement(view, "Text", name="undecided", value="$undecided")
    ElementTree.SubElement(view, "Header", value="Classes that nobody could tell")
    _choices(view, UNSURE, class_table, search)
    if boxes:
        ElementTree.SubElement(view, "Header", value="Where the machine saw them (not imported)")
        if many:
            find = {"name": "filter", "toName": BOXES, "minlength": "0"}
            ElementTree.SubElement(view, "Filter", {**find, "placeholder": "Search the classes"})
        labels = ElementTree.SubElement(view, "RectangleLabels", name=BOXES, toName=IMAGE)
        for name in class_table.names:
            ElementTree.SubElement(labels, "Label", value=name)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def _choices(
    view: ElementTree.Element, name: str, class_table: ClassTable, layout: dict[str, str]
) -> None:
    tags = {"name": name, "toName": IMAGE, "choice": "multiple", **layout}
    choices = ElementTree.SubElement(view, "Choices", tags)
    for class_name in class_table.names:
        ElementTree.SubElement(choices, "Choice", value=class_name)


def task(image: LabeledImage, context: Context) -> dict[str, Any]:
    """Return the task of an image whose width and height are known.

    The machine's labels are its prediction. Its score is the least probability among them, so
    that sorting by it brings the doubtful images first. Annotations become an annotation.
    """
    result = _result(image, context)
    entry: dict[str, Any] = {
        "data": {
            "image": context.url_of(image.uri),
            "image_id": image.image_id,
            "split": image.split,
            "undecided": _undecided(image, context),
        }
    }
    if context.is_machine:
        score = min(image.probability, default=0.0)
        entry["predictions"] = [
            {"model_version": context.origin.name, "score": round(score, 6), "result": result}
        ]
    else:
        entry["annotations"] = [{"result": result, "ground_truth": True}]
    return entry


def write_label_studio(images: Iterable[LabeledImage], context: Context, target: Path) -> None:
    """Write the tasks and the interface; tasks are written one by one as they come."""
    target.mkdir(parents=True)
    boxes = False
    with open(target / TASKS, "w", encoding="utf-8") as stream:
        separator = "[\n"
        for image in images:
            boxes = boxes or bool(image.regions)
            stream.write(separator + json.dumps(task(image, context), ensure_ascii=False))
            separator = ",\n"
        stream.write("\n]\n" if separator != "[\n" else "[]\n")
    config = labeling_config(context.class_table, boxes=boxes)
    (target / INTERFACE).write_text(config, encoding="utf-8")


def _undecided(image: LabeledImage, context: Context) -> str:
    names = context.names_of(image.ignored_ids)
    if not names:
        return "The machine was unsure of no class."
    more = len(names) - _UNDECIDED_SHOWN
    rest = f" and {more} more" if more > 0 else ""
    return f"The machine was unsure of: {', '.join(names[:_UNDECIDED_SHOWN])}{rest}."


def _result(image: LabeledImage, context: Context) -> list[dict[str, Any]]:
    result = []
    if image.positive_ids:
        result.append(_ticked(LABELS, context.names_of(image.positive_ids)))
    if not context.is_machine and image.ignored_ids:
        result.append(_ticked(UNSURE, context.names_of(image.ignored_ids)))
    for number, region in enumerate(image.regions):
        result.append(_box(f"box-{number}", region, image, context.name_of(region.class_id)))
    return result


def _ticked(control: str, names: list[str]) -> dict[str, Any]:
    return {
        "id": control,
        "from_name": control,
        "to_name": IMAGE,
        "type": "choices",
        "value": {"choices": names},
    }


def _box(key: str, region: SupportRegion, image: LabeledImage, name: str) -> dict[str, Any]:
    assert image.width
    assert image.height
    left, top, right, bottom = region.box
    value = {
        # Label Studio counts in percents of the image.
        "x": 100 * left / image.width,
        "y": 100 * top / image.height,
        "width": 100 * (right - left) / image.width,
        "height": 100 * (bottom - top) / image.height,
        "rotation": 0,
        "rectanglelabels": [name],
    }
    return {
        "id": key,
        "from_name": BOXES,
        "to_name": IMAGE,
        "type": "rectanglelabels",
        "original_width": image.width,
        "original_height": image.height,
        "image_rotation": 0,
        "score": round(region.probability, 6),
        "value": value,
    }
