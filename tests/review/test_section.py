"""What the report says of a review."""

from __future__ import annotations

from dataclasses import replace

import pytest
from labeled_run import save_run

from hts_ray import report
from hts_ray.config import override
from hts_ray.engine.run import open_run
from hts_ray.labels.stage import plan_filter
from hts_ray.review.agreement import MAX_IMAGES, disagreed_images, review, review_sections
from hts_ray.review.corrected_files import Read, ReadImage
from hts_ray.review.importing import import_labels, write_import
from hts_ray.store import storage
from hts_ray.store.run import require_stage

TRUTH = {
    "a/1": ("ride bicycle",),
    "a/2": ("ride bicycle",),  # the machine adds sit on bicycle
    "b/1": ("wash car", "sit on bicycle"),  # and misses it here
    "b/2": ("wash car", "ride bicycle"),  # and is undecided here
    "gone": (),  # its file does not exist, and the machine adds ride bicycle
}


@pytest.fixture
def run(tmp_path):
    return open_run(save_run(tmp_path))


def reviewed(run, folder, truth=TRUTH):
    read = Read(tuple(ReadImage("", image_id, names) for image_id, names in truth.items()))
    manifest = run.manifest().table
    write_import(import_labels(read, manifest, run.class_table), str(folder))
    review(run, str(folder), require_stage(run.run_dir, "pseudo_labels", "filter"))
    return str(folder)


def section(run):
    (found,) = review_sections(run.run_dir)
    assert found.anchor == "review"
    return " ".join(found.html.split())


def test_a_run_without_a_review_has_no_section(run):
    """Catches a page that fails, or tells of a review that nobody made."""
    storage.write_json(f"{run.run_dir}/review-tasks/stats.json", {"finished_at": 1.0})
    assert review_sections(run.run_dir) == []


def test_the_page_tells_agreement_overall_by_class_and_by_image(run, tmp_path):
    """Catches a page that mixes up wrong and missed, or leaves images out that are gone."""
    reviewed(run, tmp_path / "corrected")
    html = section(run)
    assert "looked at 5 of the labeled images and changed nothing in 1." in html
    assert "66.7 % are right" in html  # 4 of 6
    assert "66.7 % is labeled" in html  # 4 of 6
    rows = html.split("<tbody")[1].split("</tbody>")[0].split("<tr ")[1:]
    assert [row.split("rowheader\">")[1].split("<")[0] for row in rows] == [
        "all classes", "sit on bicycle", "ride bicycle", "wash car",
    ]  # fmt: skip
    sitting = [cell.split("<")[0] for cell in rows[1].split('">')[-5:]]
    assert sitting[-4:] == ["0", "1", "1", "0"]  # right, wrong, missed, undecided
    photos = html.split('class="photo"')[1:]
    assert [photo.split('class="name">')[1].split("<")[0] for photo in photos] == [
        "a/2", "gone", "b/1", "b/2",
    ]  # fmt: skip
    assert "cannot be read any more" in photos[1]
    assert "data:image/jpeg;base64," in photos[0]
    assert '<li class="label wrong">sit on bicycle 90 %</li>' in photos[0]
    assert '<li class="label missed">sit on bicycle</li>' in photos[2]
    assert '<li class="label ignored">ride bicycle</li>' in photos[3]
    data = report.report_for_run(run.run_dir, sections=review_sections(run.run_dir))
    page = report.render_report(data)
    assert 'href="#review"' in page


def test_the_page_tells_when_labels_were_corrected_or_are_newer(run, tmp_path):
    """Catches labels praised for agreeing with what they were made from, and stale figures."""
    path = reviewed(run, tmp_path / "corrected")
    assert "Every review of this run" not in section(run)
    own = replace(run, config=override(run.config, {"filter": {"overrides": path}}))
    labels = plan_filter(own, require_stage(run.run_dir, "region_scores", "label")).run()
    assert f"the run has pseudo_labels-{labels.key} now" in section(run)
    review(own, path, labels)
    html = section(own)
    assert "made from these corrections, so that they agree says nothing" in html
    assert "now: run" not in html
    history = html.split("Every review of this run")[1].split("</tbody>")[0]
    assert history.count("<tr ") == 3  # the head and two reviews
    assert history.index("66.7") < history.index("100.0")


def test_names_of_users_are_escaped(tmp_path):
    """Catches a class name that becomes markup."""
    (tmp_path / "classes.csv").write_text("class_id,name\n18,<b>bold</b>\n19,b\n74,c\n")
    config = save_run(tmp_path, {"classes": {"source": str(tmp_path / "classes.csv")}})
    run = open_run(config)
    reviewed(run, tmp_path / "corrected", {"a/1": ("b",)})
    html = section(run)
    assert "&lt;b&gt;bold" in html
    assert "<b>bold" not in html


def test_images_with_mistakes_come_before_undecided_ones():
    """Catches a gallery filled with images that the machine was only unsure of."""
    entries = [
        {"image_id": "open", "uri": "", "name": "x", "machine": "ignored", "probability": None},
        {"image_id": "open", "uri": "", "name": "y", "machine": "ignored", "probability": None},
        {"image_id": "unsure", "uri": "", "name": "x", "machine": "positive", "probability": 0.6},
        {"image_id": "sure", "uri": "", "name": "x", "machine": "positive", "probability": 0.9},
        {"image_id": "two", "uri": None, "name": "x", "machine": "negative", "probability": None},
        {"image_id": "two", "uri": None, "name": "y", "machine": "negative", "probability": None},
    ]
    found = [labels[0]["image_id"] for labels in disagreed_images(entries)]
    assert found == ["two", "sure", "unsure", "open"]
    assert MAX_IMAGES > 1
