"""Corrected labels as Label Studio, COCO tools and spreadsheets write them."""

from __future__ import annotations

import json

import pytest

from hts_ray.errors import DataError
from hts_ray.review.corrected_files import (
    read_coco,
    read_csv,
    read_label_studio,
    read_labels,
    read_review_page,
)


def ticked(control, *names):
    return {
        "from_name": control,
        "to_name": "image",
        "type": "choices",
        "value": {"choices": list(names)},
    }


def boxed(*names):
    value = {"x": 1, "y": 1, "width": 5, "height": 5, "rectanglelabels": list(names)}
    return {"from_name": "boxes", "to_name": "image", "type": "rectanglelabels", "value": value}


def task(image_id, *annotations):
    data = {"image": f"http://host/{image_id}.jpg", "image_id": image_id, "undecided": "x"}
    return {"id": 1, "data": data, "annotations": list(annotations)}


def test_ticks_count_and_left_over_boxes_do_not():
    """Catches a class that a person unticked and that its box brings back."""
    result = [
        ticked("labels", "ride bicycle"),
        boxed("wash car"),
        ticked("unsure", "sit on bicycle"),
    ]
    read = read_label_studio([task("a", {"result": result}), task("b", {"result": [boxed("x")]})])
    a, b = read.images
    assert (a.image_id, a.positive, a.ambiguous) == ("a", ("ride bicycle",), ("sit on bicycle",))
    assert b.positive == ()  # everything unticked, its box left over
    alone = read_label_studio([task("a", {"result": [boxed("x", "x"), boxed("y")]})])
    assert alone.images[0].positive == ("x", "y")


def test_the_last_word_counts_and_cancelled_or_missing_ones_do_not():
    """Catches a superseded opinion, a skipped task, or an unseen one taken for all negative."""
    old = {"result": [ticked("labels", "old")], "updated_at": "2026-01-01T00:00:00Z"}
    new = {"result": [ticked("labels", "new")], "updated_at": "2026-02-01T00:00:00Z"}
    skipped = {"result": [ticked("labels", "skipped")], "was_cancelled": True}
    truth = {**old, "ground_truth": True}
    read = read_label_studio(
        [task("a", new, old), task("b", skipped), task("c"), task("d", truth, new)]
    )
    assert {image.image_id: image.positive for image in read.images} == {
        "a": ("new",),
        "d": ("old",),
    }
    assert read.counts == {"not_reviewed": 2, "several_annotations": 2}


def test_coco_from_other_tools_is_read_by_names():
    """Catches category numbers, which tools hand out anew, taken for class ids."""
    document = {
        "categories": [{"id": 1, "name": "wash car"}, {"id": 2, "name": "ride bicycle"}],
        "images": [
            {"id": 7, "file_name": "a.jpg", "ignored_category_ids": [1, 2]},
            {"id": 8, "file_name": "b.jpg", "neg_category_ids": [1]},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 2},
            {"id": 2, "image_id": 7, "category_id": 2},
            {"id": 3, "image_id": 99, "category_id": 2},
            {"id": 4, "image_id": 8, "category_id": 5},
        ],
    }
    read = read_coco(document)
    a, b = read.images
    assert (a.reference, a.image_id, a.positive) == ("a.jpg", None, ("ride bicycle",))
    assert (a.ambiguous, a.negative) == (("wash car",), None)
    assert (b.positive, b.negative) == (("#5",), ("wash car",))
    assert read.counts == {"annotations_without_image": 1}
    with pytest.raises(DataError, match="not COCO JSON: KeyError 'name'"):
        read_coco({"categories": [{"id": 1}], "images": []})


def test_csv_from_a_spreadsheet():
    """Catches a mark at the start, spaces, empty cells, and short or long lines."""
    text = (
        "image_id, positive ,ignored,comment\n"
        "a,ride bicycle| wash car ,,x\n"
        "b,,sit on bicycle,\n"
        "c,ride bicycle\n"
        "d,ride bicycle,,x,wash car\n"
    )
    read = read_csv(text)
    assert [(i.image_id, i.positive, i.ambiguous, i.negative) for i in read.images] == [
        ("a", ("ride bicycle", "wash car"), (), None),
        ("b", (), ("sit on bicycle",), None),
    ]
    assert [(p.reference, p.kind) for p in read.problems] == [("c", "bad_line"), ("d", "bad_line")]
    assert read_csv("uri,positive,negative\n/x.jpg,a,\n").images[0].negative == ()
    with pytest.raises(DataError, match="line 2: field larger than field limit"):
        read_csv(f"image_id,positive\na,{'x' * 200_000}\n")
    with pytest.raises(DataError, match="columns image, label: it needs image_id"):
        read_csv("image,label\na,b\n")


def test_the_content_tells_the_format(tmp_path):
    """Catches a file that is judged by its suffix, and a traceback for any other file."""
    path = tmp_path / "export.txt"
    path.write_text("\ufeffimage_id,positive\na,x\n", encoding="utf-8")
    assert read_labels(str(path)).images[0].image_id == "a"
    path.write_text(json.dumps([task("a", {"result": []})]))
    assert read_labels(str(path)).images[0].positive == ()
    path.write_text(json.dumps({"categories": [], "images": [], "annotations": []}))
    assert read_labels(str(path)).images == ()
    for content, words in (
        (b"[1, 2]", "none of the known formats"),
        (b'{"a": 1}', "none of the known formats"),
        (b'[{"image": "x", "labels": "y"}]', "none of the known formats"),  # JSON-MIN
        (b"[{", "not complete JSON"),
        (b"\xff\xd8\xff", "not a text file"),
        (b"", "has the columns none"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_labels(str(path))
    with pytest.raises(DataError, match="no file"):
        read_labels(str(tmp_path / "none"))


def entry(image_id, part="random", done=True, **labels):
    return {"image_id": image_id, "part": part, "seen": 1, "done": done, **labels}


def saved_page(*entries):
    head = {"format": "hts-review", "version": 1, "run": "mine", "seed": 0}
    head |= {"pseudo_labels": "pseudo_labels-1", "classes": ["a", "b"]}
    return {**head, "saved_at": "2026-01-01T00:00:00Z", "images": list(entries)}


def test_a_saved_page_says_what_was_drawn_and_seen():
    """Catches open images that count as done, and drawn ones picked by hand that are a sample."""
    labels = {"right": ["a"], "wrong": ["b"], "missing": ["c"], "absent": ["d"], "unsure": ["e"]}
    read = read_review_page(
        saved_page(
            entry("r1", **labels),
            entry("u1", "uncertain", **labels),
            entry("r2"),
            entry("u2", "uncertain", done=False),
            entry("r3", done=False),
            entry("r4", right=["a"]),
        )
    )
    assert [image.image_id for image in read.images] == ["r1", "u1", "r2", "r4"]
    first, doubtful = read.images[:2]
    for image in (first, doubtful):
        assert (image.positive, image.negative, image.ambiguous) == (
            ("a", "c"),
            ("b", "d"),
            ("e",),
        )
    assert (first.full, doubtful.full) == (True, False)
    assert read.counts == {
        "not_reviewed": 2,
        "seen_and_left_open": 2,
        "labels_nobody_could_tell": 2,
    }
    assert read.sample.image_ids == ("r1", "r2")  # r4 comes after one that was left open
    assert (read.sample.drawn, read.sample.pseudo_labels) == (4, "pseudo_labels-1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "field version"),
        ({"classes": "a"}, "field classes"),
        ({"pseudo_labels": None}, "field pseudo_labels"),
        ({"images": [entry("a"), entry("b") | {"done": "yes"}]}, r"field images\[1\].done"),
        ({"images": [entry("a", "best")]}, r"field images\[0\].part"),
        ({"images": [{"image_id": "a"}]}, r"field images\[0\].part: .*missing|Field required"),
        ({"images": [entry("a", right="b")]}, r"field images\[0\].right"),
    ],
)
def test_a_damaged_page_is_told_by_its_field(tmp_path, change, words):
    """Catches a traceback, or labels that are quietly lost."""
    path = tmp_path / "saved.json"
    path.write_text(json.dumps({**saved_page(entry("a")), **change}))
    with pytest.raises(DataError, match=words) as raised:
        read_labels(str(path))
    assert "save the file from the page again" in str(raised.value)
