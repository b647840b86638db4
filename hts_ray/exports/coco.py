"""COCO JSON, as one file or as the folder that FiftyOne opens.

An image-level label is a box around the whole image; a region has a box of its own. A category's id
is the class id, which HICO counts from 0. Sources: Lin et al., "Microsoft COCO", ECCV 2014 (data
format); `neg_category_ids` as in Gupta et al., "LVIS", CVPR 2019; FiftyOne's documentation of
`fiftyone.types.COCODetectionDataset`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hts_ray.exports.image_files import FileNames
from hts_ray.exports.records import Box, Context, LabeledImage

IMAGE_LEVEL = "image"


def coco_document(images: Iterable[LabeledImage], context: Context) -> dict[str, Any]:
    """Return the document of images whose width and height are known.

    An image's annotations are its positive classes, each with the `kind` "image" and a box of the
    whole image, then the regions that support them (`kind` grid, union, ...). `score` is the
    probability. `ignored_category_ids` of an image are the undecided classes and, of annotated
    images, `neg_category_ids` those that are known to be absent.
    """
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        listed.append(_image(number, image, context))
        for found in _annotations(image):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **found})
    origin = context.origin
    info = {
        "description": f"{origin.kind.replace('_', ' ')} by hts_ray, {origin.name}",
        "teacher": origin.teacher,
        "teacher_revision": origin.teacher_revision,
        **origin.details,
    }
    return {
        "info": {key: value for key, value in info.items() if value},
        "licenses": [],
        "categories": [
            {"id": of_class.class_id, "name": of_class.name}
            | ({"supercategory": of_class.object} if of_class.object else {})
            for of_class in context.class_table
        ],
        "images": listed,
        "annotations": annotations,
    }


def write_coco(images: Iterable[LabeledImage], context: Context, target: Path) -> None:
    """Write `coco_document` as one file; all images' labels are held in memory."""
    document = coco_document(images, context)
    target.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")


def write_fiftyone(images: Iterable[LabeledImage], context: Context, target: Path) -> None:
    """Write the images to `data/`, and to `labels.json` the COCO JSON that names them there."""
    folder, names = target / "data", FileNames()
    folder.mkdir(parents=True)

    def stored() -> Iterator[LabeledImage]:
        for image in images:
            assert image.file is not None
            name = names.of(image.image_id, image.file.suffix)
            (folder / name).write_bytes(image.file.data)
            yield replace(image, uri=name, file=None)

    config = context.config.model_copy(update={"image_url_prefix": None})
    write_coco(stored(), replace(context, config=config), target / "labels.json")


def _image(number: int, image: LabeledImage, context: Context) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": number,
        "file_name": image.uri,
        "width": image.width,
        "height": image.height,
        "hts_image_id": image.image_id,
        "split": image.split,
        "ignored_category_ids": list(image.ignored_ids),
    }
    if image.negative_ids is not None:
        entry["neg_category_ids"] = list(image.negative_ids)
    if context.config.image_url_prefix is not None:
        entry["coco_url"] = context.url_of(image.uri)
    return entry


def _annotations(image: LabeledImage) -> Iterator[dict[str, Any]]:
    assert image.width is not None
    assert image.height is not None
    for place, class_id in enumerate(image.positive_ids):
        score = image.probability[place] if image.probability else None
        whole = (0.0, 0.0, float(image.width), float(image.height))
        annotation = _annotation(class_id, whole, IMAGE_LEVEL, score)
        if image.support:
            annotation["support"] = image.support[place]
        yield annotation
    for region in image.regions:
        yield _annotation(region.class_id, region.box, region.kind, region.probability)


def _annotation(class_id: int, box: Box, kind: str, score: float | None) -> dict[str, Any]:
    left, top, right, bottom = (round(side, 2) for side in box)
    width, height = right - left, bottom - top
    annotation: dict[str, Any] = {
        "category_id": class_id,
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": 0,
        "segmentation": [],
        "kind": kind,
    }
    if score is not None:
        annotation["score"] = round(score, 6)
    return annotation
