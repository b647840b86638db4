"""A folder that FiftyOne opens as a COCODetectionDataset: `labels.json` and `data/`.

Source: FiftyOne's documentation of `fiftyone.types.COCODetectionDataset`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from hts_ray.exports.coco import coco_document
from hts_ray.exports.files import FileNames
from hts_ray.exports.records import Context, ImageFile, LabeledImage

LABELS, DATA = "labels.json", "data"


def write_fiftyone(
    images: Iterable[tuple[LabeledImage, ImageFile]], context: Context, target: Path
) -> None:
    """Write the images to `data/` and their labels as COCO JSON that names them there."""
    (target / DATA).mkdir(parents=True)
    stored = _stored(images, target / DATA)
    document = coco_document(stored, replace(context, image_url_prefix=None))
    text = json.dumps(document, separators=(",", ":"))
    (target / LABELS).write_text(text, encoding="utf-8")


def _stored(
    images: Iterable[tuple[LabeledImage, ImageFile]], folder: Path
) -> Iterator[LabeledImage]:
    names = FileNames()
    for image, file in images:
        name = names.of(image.image_id, file.suffix)
        (folder / name).write_bytes(file.data)
        yield replace(image, uri=name)
