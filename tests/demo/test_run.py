"""The demo on a small world: every row is measured, and the page tells the same."""

from pathlib import Path

import pytest
from markupsafe import escape

from hts_ray.config import load_config
from hts_ray.demo import run as demo
from hts_ray.store.run import find_stage


@pytest.fixture(scope="module")
def shown(tmp_path_factory, ray_session):
    """The rows of a demo of 48 training and 32 test scenes, and its run directory."""
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "NUM_TRAIN", 48)
    patch.setattr(demo, "NUM_TEST", 32)
    config = load_config(
        preset="demo",
        overrides=["train.epochs=1", "train.num_workers=0", "label.pool.min_size=1"],
        extra={"run_dir": str(tmp_path_factory.mktemp("demo"))},
    )
    config = demo.demo_config(config, 557)
    with demo.console.capture() as captured:
        rows = demo.run_demo(config)
    patch.undo()
    return rows, config.run_dir, captured.get()


def test_all_rows_are_measured_on_the_same_images(shown):
    """Would catch a row that is skipped, copied, or evaluated on other images."""
    rows, run_dir, _ = shown
    names = [row.name for row in rows]
    assert names == [
        "zero-shot CLIP",
        "teacher alone",
        "CLIP's own labels",
        "HTS whole image only",
        "HTS with regions",
        "HTS with LSE-Sign",
        "supervised",
    ]
    assert {row.metrics["num_images"] for row in rows} == {32}
    assert len({row.metrics["num_classes"] for row in rows}) == 1
    assert len({row.metrics["mAP"] for row in rows}) >= 5
    scores = find_stage(run_dir, "region_scores")  # the main row's, published last
    assert rows[1].seconds == scores.stats["seconds"]
    for row in rows:
        if row.student:  # not what only reading a finished folder takes
            assert row.seconds > row.student.stats["seconds"] > 0


def test_rows_differ_in_what_they_claim_to_differ_in(shown):
    """Would catch an ablation that runs the main settings under another name."""
    rows, _, _ = shown
    students = {row.name: row.student.key for row in rows if row.student}
    assert len(set(students.values())) == len(students) == 6
    labels = {row.name: row.labels.key for row in rows if row.labels}
    assert labels["HTS with LSE-Sign"] == labels["HTS with regions"]
    assert labels["HTS whole image only"] != labels["HTS with regions"]
    passes = {row.name: row.scores.key for row in rows if row.labels}
    assert len(set(passes.values())) == 2
    assert passes["CLIP's own labels"] != passes["HTS with regions"] == passes["HTS with LSE-Sign"]


def test_table_and_page_tell_the_measured_numbers(shown):
    """Would catch a table that rounds, swaps or invents a figure."""
    rows, run_dir, printed = shown
    page = Path(run_dir, "report.html").read_text(encoding="utf-8")
    for row in rows:
        line = next(
            line for line in printed.splitlines() if line.strip().startswith(row.name + " ")
        )
        assert f"{100 * row.metrics['mAP']:.1f}" in line
        assert escape(row.name) in page
    assert "gap closed" in printed
    assert "synthetic" in page


def test_the_run_goes_on_with_the_main_student(shown):
    """Would catch `hts predict` on the demo's run taking the supervised student."""
    rows, run_dir, _ = shown
    main = next(row for row in rows if row.name == "HTS with regions")
    assert find_stage(run_dir, "student").key == main.student.key
    assert find_stage(run_dir, "pseudo_labels").key == main.labels.key
    assert find_stage(run_dir, "region_scores").key == main.scores.key


def test_gap_closed_is_the_share_of_the_way(shown):
    """Would catch a gap measured between the wrong rows."""
    rows, _, _ = shown
    value = {row.name: row.metrics["mAP"] for row in rows}
    room = value["supervised"] - value["zero-shot CLIP"]
    expected = (value["HTS with regions"] - value["zero-shot CLIP"]) / room
    measured = demo.gap_closed(rows)
    assert measured == pytest.approx(expected) if room > 0 else measured is None
