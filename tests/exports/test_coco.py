"""COCO JSON, as pycocotools reads it, and the folder that FiftyOne opens.

FiftyOne's importer (300 MB with its database) is not installed here. The folder is checked against
the documented layout of `COCODetectionDataset` and what `fiftyone/utils/coco.py` reads of it.
"""

from __future__ import annotations

import json

import pytest
from labeled_run import IGNORED, POSITIVES
from PIL import Image

from hts_ray.exports.source import read_labels
from hts_ray.exports.writing import export_labels
from hts_ray.review.corrected_files import read_labels as read_back


@pytest.fixture(scope="module")
def path(labeled, tmp_path_factory):
    target = tmp_path_factory.mktemp("coco") / "labels.json"
    export_labels(labeled, read_labels(labeled), "coco", str(target))
    return target


def test_pycocotools_finds_every_label_and_box(path, capsys):
    """Catches ids, boxes or areas that the format's own reader takes for something else."""
    from pycocotools.coco import COCO

    coco = COCO(str(path))
    capsys.readouterr()
    names = {image["hts_image_id"]: key for key, image in coco.imgs.items()}
    assert set(names) == set(POSITIVES) - {"gone"}  # whose file is lost
    for image_id, key in names.items():
        found = coco.loadAnns(coco.getAnnIds(imgIds=key))
        whole = [a for a in found if a["kind"] == "image"]
        assert sorted(a["category_id"] for a in whole) == POSITIVES[image_id]
        assert all(a["bbox"] == [0, 0, 60, 40] and a["area"] == 2400 for a in whole)
        assert coco.imgs[key]["ignored_category_ids"] == IGNORED.get(image_id, [])
    (two,) = coco.loadImgs(names["a/2"])
    regions = coco.loadAnns(coco.getAnnIds(imgIds=two["id"], catIds=[19], areaRng=[0, 1300]))
    assert [(a["bbox"], a["kind"], a["score"]) for a in regions] == [([0, 0, 30, 40], "grid", 0.9)]
    assert {c["id"]: c["name"] for c in coco.dataset["categories"]} == {
        18: "ride bicycle", 19: "sit on bicycle", 74: "wash car",
    }  # fmt: skip
    assert coco.getCatIds(supNms=["bicycle"]) == [18, 19]


def test_what_made_the_labels_is_in_the_file(path, labeled):
    """Catches labels that are passed on without the teacher and settings that made them."""
    info = json.loads(path.read_text())["info"]
    assert info["teacher"] == "Some/captioner"
    assert info["teacher_revision"] == "0123abc"
    assert info["settings hash"] in read_labels(labeled).origin.name


def test_our_own_reader_gets_the_labels_back(path):
    """Catches an import that loses the undecided classes of an export."""
    read = {image.image_id: image for image in read_back(str(path)).images}
    assert read["a/2"].positive == ("ride bicycle", "sit on bicycle")
    assert read["b/2"].ambiguous == ("ride bicycle",)
    assert read["b/3"].positive == ()
    assert read["a/1"].negative is None


def test_annotations_list_what_is_absent(labeled, tmp_path):
    """Catches unknown classes that a reader must take for absent ones."""
    target = tmp_path / "truth.json"
    export_labels(labeled, read_labels(labeled, manifest=""), "coco", str(target))
    images = json.loads(target.read_text())["images"]
    assert [image["neg_category_ids"] for image in images] == [[19]] * 4
    assert "score" not in json.loads(target.read_text())["annotations"][0]


def test_fiftyones_documented_layout(labeled, tmp_path):
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
