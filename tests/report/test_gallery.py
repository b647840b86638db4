"""The gallery: which images, how small, and what stands beside each."""

from __future__ import annotations

import base64
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from report_pages import make_item

from hts_ray import report
from hts_ray.report.gallery import gallery_classes, gallery_data


@pytest.mark.parametrize("shape", [(240, 320, 3), (10, 3000, 3), (50, 40), (1, 1, 3)])
def test_thumbnail_is_a_small_jpeg(shape):
    """Catches a data URI that is not the promised JPEG, or an image that is scaled up."""
    noise = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    uri = report.thumbnail_data_uri(noise, max_side=200, max_bytes=5_000)
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    data = base64.b64decode(body, validate=True)
    assert len(data) <= 5_000
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        assert max(image.size) <= min(200, max(shape[:2]))


def test_thumbnail_refuses_other_arrays():
    """Catches float pixels in [0, 1] that would be shown as black."""
    with pytest.raises(ValueError, match="uint8"):
        report.thumbnail_data_uri(np.zeros((4, 4, 3), np.float32))


def test_gallery_item_points_at_the_best_region():
    """Catches class ids used as columns, which differ as soon as a run keeps a part of HICO."""
    p_RC = np.array([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    item = report.gallery_item(
        image_id="a",
        image="data:image/jpeg;base64,",
        width=10,
        height=20,
        names={500: "x", 7: "y", 30: "z"},
        class_ids=[500, 7, 30],
        boxes=[[0, 0, 10, 20], [1, 2, 5, 6]],
        probabilities=p_RC,
        positive_ids=[500],
        ignored_ids=[30],
        annotation_ids=[7],
        kinds=["whole", "grid"],
    )
    found = {label.class_id: (label.verdict, label.region) for label in item.labels}
    assert found == {500: ("wrong", 1), 7: ("missed", 1), 30: ("ignored", 0)}
    assert item.labels[0].probability == pytest.approx(0.6)
    assert item.regions[0].best[0] == ("z", pytest.approx(0.7))
    assert item.regions[1].kind == "grid"


def test_many_ignored_classes_are_counted_not_listed():
    """Catches 500 grey labels under one image, or an annotated one lost among them."""
    names = {i: f"c{i}" for i in range(100)}
    item = report.gallery_item(
        image_id="a",
        image="data:,",
        width=9,
        height=9,
        names=names,
        class_ids=list(names),
        boxes=[[0, 0, 9, 9]],
        probabilities=np.linspace(0, 1, 100)[None],
        positive_ids=[],
        ignored_ids=list(names),
        annotation_ids=[0],
    )
    assert len(item.labels) == report.MAX_IGNORED_LABELS
    assert item.more_ignored == 100 - report.MAX_IGNORED_LABELS
    assert item.labels[0].class_id == 0


def test_chosen_images_cover_classes_and_verdicts():
    """Catches a gallery of the first images, all of one class and all right."""
    judged = {f"same{i}": [(0, "right")] for i in range(500)}
    judged |= {f"other{i}": [(i, "right")] for i in range(1, 6)}
    judged |= {"bad": [(0, "wrong")], "left": [(3, "ignored")], "gone": [(0, "missed")]}
    judged |= {"empty": []}
    chosen = report.choose_images(judged, 10)
    assert len(chosen) == len(set(chosen)) == 10
    assert {"bad", "left", "gone", *(f"other{i}" for i in range(1, 6))} <= set(chosen)
    assert "empty" not in chosen
    assert chosen == report.choose_images(judged, 10)


def test_every_choice_adds_most():
    """Catches a stale gain taken from the heap: what an image adds falls as others are chosen."""
    rng = np.random.default_rng(0)
    kinds = ("right", "wrong", "missed", "ignored")
    judged = {
        f"i{i}": [(int(c), kinds[rng.integers(4)]) for c in rng.choice(12, 3, replace=False)]
        for i in range(60)
    }
    tokens = {
        image_id: {kind for _, kind in labels} | {c for c, kind in labels if kind != "ignored"}
        for image_id, labels in judged.items()
    }
    shown: Counter[object] = Counter()
    left = set(judged)
    for image_id in report.choose_images(judged, 25):
        gains = {i: sum(1 / (1 + shown[token]) ** 2 for token in tokens[i]) for i in left}
        assert gains[image_id] == pytest.approx(max(gains.values()))
        shown.update(tokens[image_id])
        left.remove(image_id)


def test_texts_stand_once_in_the_pages_data():
    """Catches a page whose bulk is class names, or an index that points at another text."""
    items = [make_item(seed, image="data:,") for seed in range(4)]
    data = gallery_data(items)
    assert len(data["texts"]) == len(set(data["texts"]))
    for item, (width, height, regions) in zip(items, data["images"], strict=True):
        assert (width, height) == (item.width, item.height)
        for region, (kind, caption, box, best) in zip(item.regions, regions, strict=True):
            texts = data["texts"]
            assert (texts[kind], texts[caption]) == (region.kind, region.caption)
            assert [texts[number] for number, _ in best] == [name for name, _ in region.best]
            assert box[0] + box[2] == pytest.approx(region.box[2], abs=1.01)


def test_classes_are_counted_by_image():
    """Catches a class that has two labels on an image counted twice."""
    items = [make_item(seed, image="data:,") for seed in range(3)]
    assert {images for _, _, images in gallery_classes(items)} == {3}
    names = [name for _, name, _ in gallery_classes(items)]
    assert names == sorted(names, key=str.casefold)
