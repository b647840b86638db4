"""The folder that FiftyOne opens; its importer (300 MB with its database) is not installed here.

Checked against the documented layout of `COCODetectionDataset` and what `fiftyone/utils/coco.py`
reads of it.
"""

from __future__ import annotations

import json

from PIL import Image

from hts_ray.exports.source import read_labels
from hts_ray.exports.writing import export_labels


def test_the_documented_layout(labeled, tmp_path):
    """Catches images that are not where the labels name them, or labels without a size."""
    folder = tmp_path / "review"
    export_labels(labeled, read_labels(labeled), "fiftyone", str(folder))
    labels = json.loads((folder / "labels.json").read_text())
    files = {path.name for path in (folder / "data").iterdir()}
    assert files == {image["file_name"] for image in labels["images"]}
    assert len(files) == 5  # a/1 and b/1 have the same name
    classes = {category["id"]: category["name"] for category in labels["categories"]}
    for image in labels["images"]:
        with Image.open(folder / "data" / image["file_name"]) as stored:
            assert stored.size == (image["width"], image["height"])
    ids = {image["id"] for image in labels["images"]}
    # Besides these the importer turns every key of an annotation into an attribute of the label.
    own = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "score"}
    for annotation in labels["annotations"]:
        assert annotation["image_id"] in ids
        assert annotation["category_id"] in classes
        assert set(annotation) - own <= {"kind", "support"}
        assert not {"label", "mask", "confidence"} & set(annotation)
