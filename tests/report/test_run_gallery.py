"""The images of a run's gallery."""

from __future__ import annotations

import pyarrow as pa
import pytest

from hts_ray import report
from hts_ray.report.found import read_found
from hts_ray.report.run_gallery import run_gallery
from hts_ray.report.stages import FinishedStages
from hts_ray.store import tables
from hts_ray.store.run import StageFolder


def gallery_of(run_dir, max_images=10):
    return run_gallery(read_found(run_dir, FinishedStages.of(run_dir)), max_images)


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
    monkeypatch.setattr("hts_ray.report.run_gallery.GALLERY_CANDIDATES", 1)
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
    later.publish({})
    assert {item.image_id for item in gallery_of(run_dir)} == {"im0", "im1"}
    report.render_report(report.report_for_run(run_dir))
