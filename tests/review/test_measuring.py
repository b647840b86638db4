"""Corrections against a run's pseudo-labels, before and after they are applied."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from labeled_run import save_run

from hts_ray.config import override
from hts_ray.engine.run import open_run
from hts_ray.exports.source import read_labels
from hts_ray.labels.stage import plan_filter
from hts_ray.review.importing import import_labels, write_import
from hts_ray.review.measuring import corrections_of, review
from hts_ray.review.reading import Read, ReadImage
from hts_ray.store.run import require_stage
from hts_ray.store.tables import read_table

TRUTH = {
    "a/1": ("ride bicycle",),
    "a/2": ("ride bicycle",),  # the machine adds sit on bicycle
    "b/1": ("wash car", "sit on bicycle"),  # and misses it here
    "b/2": ("wash car", "ride bicycle"),  # and is undecided here
    "b/3": (),
}


@pytest.fixture
def run(tmp_path):
    return open_run(save_run(tmp_path))


def imported(run, output, **options):
    read = Read(tuple(ReadImage("", image_id, names) for image_id, names in TRUTH.items()))
    manifest = run.manifest().table
    write_import(import_labels(read, manifest, run.class_table, **options), output)
    return output


def test_the_filter_takes_the_corrections(run, tmp_path):
    """Catches corrections that are read and not applied, or a folder that hides them."""
    path = imported(run, str(tmp_path / "corrected"))
    before = require_stage(run.run_dir, "pseudo_labels", "filter")
    first, content = review(run, path, before)
    assert not content["applied"]
    assert (first.overall.confirmed, first.overall.wrong) == (4, 1)
    assert (first.overall.missed, first.overall.undecided) == (1, 1)
    config = override(run.config, {"filter": {"overrides": path}})
    own = replace(run, config=config)
    scores = require_stage(run.run_dir, "region_scores", "label")
    labels = plan_filter(own, scores).run()
    assert labels.key != before.key
    rows = {row["image_id"]: row for row in read_table(labels.path).to_pylist()}
    assert rows["a/2"]["positive_ids"] == [18]
    assert rows["b/1"]["positive_ids"] == [19, 74]
    assert rows["b/1"]["probability"] == [1.0, 1.0]
    assert rows["b/2"]["ignored_ids"] == []
    assert rows["gone"]["positive_ids"] == [18]  # nobody looked at it
    assert rows["gone"]["probability"] == pytest.approx([0.9])
    assert labels.stats["corrected_images"] == 5
    assert labels.stats["corrected_labels"] == 3
    again, content = review(own, path, labels)
    assert again.overall.precision == 1.0
    assert read_labels(own, labels.path).origin.corrected == 5
    assert read_labels(own, labels.path, limit=1).origin.corrected <= 1
    assert content["applied"]
    # The same corrections elsewhere are the same labels; other ones are not.
    moved = imported(run, str(tmp_path / "copy"))
    elsewhere = replace(run, config=override(config, {"filter": {"overrides": moved}}))
    assert plan_filter(elsewhere, scores).folder.key == labels.key


def test_figures_are_stored_for_the_report(run, tmp_path):
    """Catches figures that are printed once and lost."""
    path = imported(run, str(tmp_path / "corrected"), validation_share=0.5)
    assert len(corrections_of(path)) == 5
    labels = require_stage(run.run_dir, "pseudo_labels", "filter")
    found, _ = review(run, path, labels)
    stage = require_stage(run.run_dir, "review", "review")
    content = json.loads(Path(stage.file("agreement.json")).read_text())
    assert content["overall"]["wrong"] == found.overall.wrong == 1
    assert content["pseudo_labels"] == f"pseudo_labels-{labels.key}"
    assert len(content["disagreements"]) == 3
    assert stage.stats["precision"] == content["overall"]["precision"]


def test_images_whose_corrections_were_applied_are_not_judged(run, tmp_path):
    """Catches a precision that rises because the judged images were put right by hand."""
    path = imported(run, str(tmp_path / "corrected"), validation_share=0.4, seed=1)
    held_out = set(read_table(f"{path}/manifest.parquet")["image_id"].to_pylist())
    own = replace(run, config=override(run.config, {"filter": {"overrides": path}}))
    labels = plan_filter(own, require_stage(run.run_dir, "region_scores", "label")).run()
    found, content = review(own, path, labels)
    assert found.images == len(held_out) == 2
    assert content["left_out_as_applied"] == 3
    assert {entry.image_id for entry in found.disagreements} <= held_out
