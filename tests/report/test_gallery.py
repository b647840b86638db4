"""The gallery: which images, how small, and what stands beside each."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from report_pages import make_item

from hts_ray import report
from hts_ray.report.gallery import (
    MAX_IGNORED_LABELS,
    choose_images,
    gallery_classes,
    gallery_data,
    gallery_item,
    run_gallery,
)
from hts_ray.report.read_run import read_run
from hts_ray.store import storage, tables
from hts_ray.store.run import StageFolder


def test_gallery_item_points_at_the_best_region():
    """Catches class ids used as columns, which differ as soon as a run keeps a part of HICO."""
    item = gallery_item(
        "data:image/jpeg;base64,",
        {
            "image_id": "a",
            "width": 10,
            "height": 20,
            "boxes": [[0, 0, 10, 20], [1, 2, 5, 6]],
            "region_kinds": ["whole", "grid"],
            "captions": None,
        },
        np.array([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]),
        [500, 7, 30],
        {500: "x", 7: "y", 30: "z"},
        {"positive_ids": [500], "probability": [0.6], "ignored_ids": [30]},
        {"positive_ids": [7], "ambiguous_ids": []},
    )
    found = {label.class_id: (label.verdict, label.region) for label in item.labels}
    assert found == {500: ("wrong", 1), 7: ("missed", 1), 30: ("ignored", 0)}
    assert item.labels[0].probability == pytest.approx(0.6)
    assert item.regions[0].best[0] == ("z", pytest.approx(0.7))
    assert item.regions[1].kind == "grid"


def test_many_ignored_classes_are_counted_not_listed():
    """Catches 500 grey labels under one image, or an annotated one lost among them."""
    ids = list(range(100))
    scored = {"image_id": "a", "width": 9, "height": 9, "boxes": [[0, 0, 9, 9]]}
    item = gallery_item(
        "data:,",
        {**scored, "region_kinds": None, "captions": None},
        np.linspace(0, 1, 100)[None],
        ids,
        {i: f"c{i}" for i in ids},
        {"positive_ids": [], "probability": [], "ignored_ids": ids},
        {"positive_ids": [0], "ambiguous_ids": None},
    )
    assert len(item.labels) == MAX_IGNORED_LABELS
    assert item.more_ignored == 100 - MAX_IGNORED_LABELS
    assert item.labels[0].class_id == 0


def test_chosen_images_cover_classes_and_verdicts():
    """Catches a gallery of the first images, all of one class and all right."""
    judged = {f"same{i}": [(0, "right")] for i in range(500)}
    judged |= {f"other{i}": [(i, "right")] for i in range(1, 6)}
    judged |= {"bad": [(0, "wrong")], "left": [(3, "ignored")], "gone": [(0, "missed")]}
    judged |= {"empty": []}
    chosen = choose_images(judged, 10)
    assert len(chosen) == len(set(chosen)) == 10
    assert {"bad", "left", "gone", *(f"other{i}" for i in range(1, 6))} <= set(chosen)
    assert "empty" not in chosen
    assert chosen == choose_images(judged, 10)
    assert choose_images(judged, 1000)[-1] == "empty"  # where there is room: misses hide there


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
    for image_id in choose_images(judged, 25):
        gains = {i: sum(1 / (1 + shown[token]) ** 2 for token in tokens[i]) for i in left}
        assert gains[image_id] == pytest.approx(max(gains.values()))
        shown.update(tokens[image_id])
        left.remove(image_id)


def test_the_page_stores_each_text_once():
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


def gallery_of(run_dir, max_images=10):
    return run_gallery(read_run(run_dir), max_images)


def test_items_join_labels_scores_and_annotations(run_dir):
    """Catches the regions of another image, and verdicts by another image's annotations."""
    gallery = gallery_of(run_dir)
    assert {item.image_id for item in gallery} == {f"im{i}" for i in range(5)}
    shown = next(item for item in gallery if item.image_id == "im3")
    verdicts = {label.class_id: label.verdict for label in shown.labels}
    assert verdicts == {9: "wrong", 5: "missed", 400: "ignored"}
    assert shown.regions[1].best[0][1] == pytest.approx(1.0, abs=1e-3)
    assert shown.regions[0].caption == "a man"
    assert (shown.width, shown.height) == (80, 60)


def test_gallery_of_a_run_is_bounded(run_dir):
    """Catches a page that embeds every image of the run."""
    assert len(gallery_of(run_dir, 2)) == 2
    assert gallery_of(run_dir, 0) == []


def test_images_that_are_gone_are_left_out(run_dir, tmp_path):
    """Catches a report that dies because an image was moved away."""
    (tmp_path / "im <2>.png").unlink()
    (tmp_path / "im <3>.png").write_text("no image")
    assert {item.image_id for item in gallery_of(run_dir)} == {"im0", "im1", "im4"}


def test_a_rare_class_is_among_the_candidates(run_dir, monkeypatch):
    """Catches a gallery drawn from every n-th row, which misses the classes that need a look."""
    monkeypatch.setattr("hts_ray.report.gallery.GALLERY_CANDIDATES", 1)
    rows = tables.read_table(f"{run_dir}/pseudo_labels-abc").to_pylist()
    rows[4]["positive_ids"] = [400]
    stage = StageFolder(run_dir, "pseudo_labels", "abc")
    table = pa.Table.from_pylist(rows, tables.PSEUDO_LABELS_SCHEMA)
    tables.write_table(stage.file("part-0.parquet"), table)
    assert {item.image_id for item in gallery_of(run_dir)} == {"im0", "im4"}


def test_region_scores_of_another_pass_are_no_reason_to_fail(run_dir):
    """Catches a crash where the latest teacher pass has not seen a labeled image."""
    rows = tables.read_table(f"{run_dir}/region_scores-abc").slice(0, 2)
    later = StageFolder(run_dir, "region_scores", "later")
    tables.write_table(later.file("part-0.parquet"), rows)
    storage.write_json(later.file("table.json"), {"class_ids": [5, 9, 400]})
    later.publish({})
    assert {item.image_id for item in gallery_of(run_dir)} == {"im0", "im1"}
    report.render_report(report.report_for_run(run_dir))
