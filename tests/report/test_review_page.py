"""The page to correct labels on: which images, which classes, and nothing that could run."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from report_pages import HOSTILE, Page
from review_run import IDS, save_review_run

from hts_ray.errors import DataError
from hts_ray.report import write_review_page
from hts_ray.report.review_page import listed_classes, render_review_page, review_order
from hts_ray.store import storage
from hts_ray.store.run import require_stage
from hts_ray.store.tables import PSEUDO_LABELS_SCHEMA


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return save_review_run(tmp_path_factory.mktemp("review"), 20)


def data_of(path):
    text = Path(path).read_text(encoding="utf-8")
    start = text.index('id="review-data">') + len('id="review-data">')
    return json.loads(text[start : text.index("</script>", start)])


def labels(probabilities, undecided=()):
    rows = [
        {"image_id": f"i{n}", "positive_ids": list(range(len(p))), "probability": p}
        | {"ignored_ids": [9] * dict(undecided).get(n, 0), "support": [1] * len(p), "dropped": []}
        for n, p in enumerate(probabilities)
    ]
    return pa.Table.from_pylist(rows, PSEUDO_LABELS_SCHEMA)


def test_every_second_image_is_drawn_and_the_others_are_the_doubtful_ones():
    """Catches a sample that favours doubtful images, or doubtful ones in another order."""
    rng = np.random.default_rng(1)
    table = labels([[0.99, float(p)] for p in rng.uniform(0.3, 0.9, 50)])
    order = review_order(table, (), 5, 20)
    assert [*order.values()] == [True, False] * 10
    drawn = [name for name, at_random in order.items() if at_random]
    assert drawn == [f"i{n}" for n in np.random.default_rng(5).permutation(50)[:10]]
    least = {f"i{n}": min(p) for n, p in enumerate(table["probability"].to_pylist())}
    doubtful = [name for name, at_random in order.items() if not at_random]
    others = sorted((name for name in least if name not in drawn), key=least.__getitem__)
    assert doubtful == others[:10]
    # A larger page of the same run goes on where this one ended.
    more = [name for name, at_random in review_order(table, (), 5, 40).items() if at_random]
    assert more[:10] == drawn
    assert [*review_order(table, (), 6, 20)] != [*order]


def test_small_runs_and_images_without_labels_have_their_places():
    """Catches images that are shown twice or never, or corrected ones that come again."""
    table = labels([[], [0.5], [], [0.4]], undecided={2: 3}.items())
    order = review_order(table, (), 0, 200)
    assert sorted(order) == ["i0", "i1", "i2", "i3"]
    assert sum(order.values()) == 2
    without = review_order(table, {"i1", "i3"}, 0, 200)
    assert sorted(without) == ["i0", "i2"]
    for seed in range(9):
        doubtful = [name for name, drawn in review_order(table, (), seed, 200).items() if not drawn]
        assert doubtful == [name for name in ("i3", "i1", "i2", "i0") if name in doubtful]
    assert review_order(table, {"i0", "i1", "i2", "i3"}, 0, 5) == {}
    assert [*review_order(table, (), 0, 3).values()] == [True, False, True]


def test_classes_come_with_what_the_machine_said_and_where_it_saw_them():
    """Catches probabilities and boxes of another class or region."""
    scored = {"region_kinds": ["whole", "grid"], "boxes": [[0, 0, 96, 72], [10, 20, 40, 50]]}
    p_RC = np.array([[0.2, 0.9, 0.03, 0.1], [0.7, 0.1, 0.02, 0.3]])
    columns = {18: 0, 19: 1, 74: 2, 80: 3}
    labeled = {"positive_ids": [19, 18], "probability": [0.95, 0.71], "ignored_ids": [80]}
    assert [*listed_classes(labeled, scored, p_RC, columns)] == [
        (19, 0.95, None, 0),
        (18, 0.71, [10, 20, 30, 30], 0),
        (80, 0.3, [10, 20, 30, 30], 1),
        (74, 0.03, None, 2),
    ]
    many = {"positive_ids": [18] * 8, "probability": [0.9] * 8, "ignored_ids": []}
    assert len([*listed_classes(many, scored, p_RC, columns)]) == 1 + 3  # at least three others


def test_the_page_holds_the_run(config, tmp_path):
    """Catches labels beside the wrong image, and pictures that do not open."""
    page = write_review_page(config.run_dir, str(tmp_path / "review.html"), 8)
    assert (page.images, page.random, page.unreadable) == (8, 4, 0)
    assert page.size == (tmp_path / "review.html").stat().st_size
    data = data_of(page.path)
    stage = require_stage(config.run_dir, "pseudo_labels", "filter")
    assert data["pseudo_labels"] == f"pseudo_labels-{stage.key}"
    rows = {row["image_id"]: row for row in stage.read().to_pylist()}
    assert len(data["classes"]) == len(IDS)
    parsed = Page(Path(page.path).read_text(encoding="utf-8"))
    for place, (name, _, width, height, listed) in enumerate(data["images"]):
        positives = [IDS[number] for number, *_, said in listed if said == 0]
        assert positives == rows[name]["positive_ids"]
        assert (width, height) == (96, 72)
        assert len(listed) == 9
        start = parsed.text.index(f'id="image-{place}">') + len(f'id="image-{place}">')
        picture = parsed.text[start : parsed.text.index("</script>", start)]
        pixel = Image.open(io.BytesIO(base64.b64decode(picture, validate=True))).getpixel((9, 9))
        assert abs(pixel[0] - int(name[2:6])) < 4  # the image tells its number


def test_nothing_of_a_run_can_run_on_the_page():
    """Catches a class or image whose name ends the script, and anything from outside."""
    rows = [[0, 0.5, None, 0]]
    data = {"run": HOSTILE, "pseudo_labels": f"p-{HOSTILE}", "classes": [f"</script>{HOSTILE}"]}
    data |= {"format": "f", "seed": 0, "images": [[HOSTILE, 1, 4, 4, rows]]}
    page = Page(render_review_page(data, ["AAAA"], f"runs/{HOSTILE}"))
    assert len(page.attributes("script")) == 3
    assert "<script>alert" not in page.text
    assert "http" not in page.text.replace("http://www.w3.org/2000/svg", "").replace(
        "http-equiv", ""
    )
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for reference in ("aria-labelledby", "aria-controls", "for"):
            assert attrs.get(reference, ids[0]) in ids


def test_a_run_that_cannot_be_shown_says_why(tmp_path):
    """Catches a page without images, or a traceback, where a stage or its files are gone."""
    with pytest.raises(DataError, match="run `hts filter` first"):
        write_review_page(str(tmp_path))
    config = save_review_run(tmp_path / "a", 4)
    (tmp_path / "a/images/im0001.jpg").unlink()
    assert write_review_page(config.run_dir, str(tmp_path / "x.html")).unreadable == 1
    stage = require_stage(config.run_dir, "pseudo_labels", "filter")
    made = storage.read_json(stage.file("table.json"))
    names = [f"im000{n}.jpg" for n in range(4)]
    storage.write_json(stage.file("table.json"), {**made, "corrected_ids": names})
    with pytest.raises(DataError, match="corrected before"):
        write_review_page(config.run_dir)
    storage.write_json(stage.file("table.json"), {**made, "region_scores": "region_scores-x"})
    with pytest.raises(DataError, match="lost its teacher pass"):
        write_review_page(config.run_dir)
