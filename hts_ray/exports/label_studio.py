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

from jinja2 import Environment

from hts_ray.classes import ClassTable
from hts_ray.exports.records import Context, LabeledImage, SupportRegion

TASKS, INTERFACE = "tasks.json", "labeling_config.xml"
# Names of the interface's controls, by which `hts import-labels` finds their results.
LABELS, UNSURE, BOXES, IMAGE = "labels", "unsure", "boxes", "image"
_MANY_CLASSES = 40  # beyond these, a list to search replaces boxes to tick
_UNDECIDED_SHOWN = 12


def labeling_config(class_table: ClassTable, *, boxes: bool = True) -> str:
    """Return the interface: the image, its classes to tick, those to mark as unclear, and boxes."""
    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    source = (Path(__file__).parent / "templates" / f"{INTERFACE}.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        names=class_table.names,
        many=len(class_table) > _MANY_CLASSES,
        image=IMAGE,
        labels=LABELS,
        unsure=UNSURE,
        boxes=BOXES if boxes else "",
    )


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
    ticked = {LABELS: image.positive_ids, UNSURE: () if context.is_machine else image.ignored_ids}
    result = [
        {"id": control, "from_name": control, "to_name": IMAGE, "type": "choices"}
        | {"value": {"choices": context.names_of(ids)}}
        for control, ids in ticked.items()
        if ids
    ]
    boxes = enumerate(image.regions)
    return result + [_box(f"box-{number}", region, image, context) for number, region in boxes]


def _box(key: str, region: SupportRegion, image: LabeledImage, context: Context) -> dict[str, Any]:
    assert image.width
    assert image.height
    left, top, right, bottom = region.box
    return {
        "id": key,
        "from_name": BOXES,
        "to_name": IMAGE,
        "type": "rectanglelabels",
        "original_width": image.width,
        "original_height": image.height,
        "image_rotation": 0,
        "score": round(region.probability, 6),
        "value": {
            # Label Studio counts in percents of the image.
            "x": 100 * left / image.width,
            "y": 100 * top / image.height,
            "width": 100 * (right - left) / image.width,
            "height": 100 * (bottom - top) / image.height,
            "rotation": 0,
            "rectanglelabels": [context.name_of(region.class_id)],
        },
    }
