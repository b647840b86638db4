"""What a report says of a run directory."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from markupsafe import Markup
from report_pages import Page

from hts_ray import report
from hts_ray.cli.runs import report as command
from hts_ray.engine.compaction import BLOCKS, CHECKPOINT
from hts_ray.store import storage, tables
from hts_ray.store.run import StageFolder


def test_report_for_run_reads_every_stage(run_dir):
    """Catches wrong joins between tables, and class ids taken for positions."""
    data = report.report_for_run(run_dir)
    assert [row.name for row in data.comparison] == ["zero-shot", "HTS"]
    rows = {row.class_id: row for row in data.per_class}
    assert list(rows) == [5, 9, 400]
    assert (rows[5].annotated, rows[5].pseudo, rows[5].precision, rows[5].recall) == (4, 2, 1, 0.5)
    assert (rows[9].annotated, rows[9].pseudo, rows[9].precision) == (0, 5, 0.0)
    assert (rows[5].support, rows[9].support, rows[400].support) == (1.0, 3.0, None)
    assert (rows[5].few_shot, rows[9].few_shot) == (5, 1)
    assert rows[9].ap == {"zero-shot": None, "HTS": None}
    assert rows[400].ap["HTS"] == pytest.approx(0.1)
    counts = {step.name: step.count for step in data.funnel}
    assert counts["images"] == 6
    assert counts["regions"] == 10
    assert counts["candidate classes"] == 7 + 5
    assert counts["positives kept"] == 7
    assert [curve.name for curve in data.training] == ["HTS"]
    assert set(data.precision_recall["HTS"]) == {5, 400}
    assert [(b.low, b.labels, b.right) for b in data.reliability] == [(0.6, 2, 0), (0.9, 4, 2)]
    assert [row["image_id"] for row in data.quarantine] == ["im5"]
    path = f"{run_dir}/report.html"
    report.write_report(path, data)
    Page(storage.read_bytes(path).decode())


def test_precision_and_recall_count_annotated_images_only(run_dir):
    """Catches pseudo-labels of unannotated images counted as wrong."""
    data = report.report_for_run(run_dir, max_images=0)
    assert "33.3 % are right" in data.intro[1]
    assert "find 50.0 %" in data.intro[1]


def test_report_for_unfinished_runs(run_dir, tmp_path):
    """Catches a report that needs every stage."""
    empty = report.report_for_run(str(tmp_path / "no run"))
    assert empty.gallery == []
    Page(report.render_report(empty))
    for table in ("manifest-abc", "evaluation-a", "evaluation-b"):
        storage.remove_tree(f"{run_dir}/{table}")
    data = report.report_for_run(run_dir)
    assert data.per_class[0].precision is None
    assert data.per_class[0].annotated is None
    assert data.reliability == []
    assert {label.verdict for item in data.gallery for label in item.labels} == {
        "unjudged",
        "ignored",
    }
    Page(report.render_report(data))


def test_a_setting_of_an_older_version_costs_its_section_alone(run_dir):
    """Catches a report that shows default thresholds for a run with settings of its own."""
    path = f"{run_dir}/config.yaml"
    text = storage.read_bytes(path).decode().replace("label:\n", "label:\n  gone: 1\n")
    storage.write_bytes(path, text.encode())
    assert report.report_for_run(run_dir, max_images=0).facts["Filter"]["prior"] == "alpha 0"


def test_given_labels_beat_the_latest(run_dir):
    """Catches a demo whose report is about its last ablation."""
    other = StageFolder(run_dir, "pseudo_labels", "later")
    table = tables.read_table(f"{run_dir}/pseudo_labels-abc").slice(0, 1)
    tables.write_table(other.file("part-0.parquet"), table)
    other.publish({})
    assert {s.name: s.count for s in report.report_for_run(run_dir).funnel}["images filtered"] == 1
    main = StageFolder(run_dir, "pseudo_labels", "abc")
    data = report.report_for_run(run_dir, labels_stage=main)
    assert {s.name: s.count for s in data.funnel}["images filtered"] == 5


def test_the_command_has_the_same_default():
    """Catches `hts report` and the function drifting apart."""
    (option,) = (option for option in command.params if option.name == "images")
    assert option.default == report.DEFAULT_IMAGES


def test_the_documented_section_is_drawn():
    """Catches documentation of a way to add sections that the code has left behind."""
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(re.search(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)[1], names)
    page = Page(report.render_report(report.ReportData("x", sections=names["losses"]("run"))))
    assert [attrs["id"] for attrs in page.attributes("section")] == ["mine"]
    assert "var(--accent)" in page.text


def test_other_modules_add_sections(run_dir):
    """Catches sections that are taken and not shown."""
    section = report.Section("mine", "Mine", Markup('<section id="mine"></section>'))
    data = report.report_for_run(run_dir, max_images=0, sections=[section])
    page = Page(report.render_report(data))
    assert "mine" in [attrs.get("id") for attrs in page.attributes("section")]


def test_a_pass_that_runs_is_told_with_its_count(run_dir):
    """Catches a report of yesterday's labels that does not say that a pass is on its way."""
    assert not any("in progress" in line for line in report.report_for_run(run_dir).intro)
    rows = StageFolder(run_dir, "region_scores", "abc").read().slice(0, 2)
    running = StageFolder(run_dir, "region_scores", "new")
    tables.write_table(running.file(BLOCKS, "part-9.parquet"), rows)
    tables.write_table(running.file(BLOCKS, "dead-9.parquet"), rows)  # of a worker that was killed
    tables.write_table(running.file(CHECKPOINT, "part.parquet"), rows)
    told = report.report_for_run(run_dir).intro[0]
    assert re.match(r"hts label is in progress.*: 2 of \d images are written.* UTC", told)
    assert told.endswith("shows the stages that are finished.")


def test_a_first_pass_shows_its_labels_so_far(run_dir):
    """Catches hours without a look at the labels, and old labels that hide the new ones."""
    whole = [item.image_id for item in report.report_for_run(run_dir).gallery]
    storage.remove_tree(f"{run_dir}/pseudo_labels-abc")
    running = Path(run_dir, "region_scores-abc")
    (running / "stats.json").unlink()
    (running / BLOCKS).mkdir()
    for file in running.glob("*.parquet"):
        shutil.copy(file, running / BLOCKS / "dead-0.parquet")
        file.rename(running / BLOCKS / file.name)
        storage.write_bytes(
            str(running / CHECKPOINT / f"{file.stem.rpartition('-')[0]}.parquet"), b""
        )
    data = report.report_for_run(run_dir)
    assert data.intro[0].endswith("those so far; they may still change.")
    assert {item.image_id for item in data.gallery} == set(whole)
    assert {step.name: step.count for step in data.funnel}["images filtered"] == 5
    assert any(item.labels for item in data.gallery)
