"""The machine against people, and a run's pseudo-labels before and after corrections."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from labeled_run import save_run

from hts_ray.classes import hico_classes
from hts_ray.config import override
from hts_ray.engine.run import open_run
from hts_ray.errors import DataError
from hts_ray.exports.source import read_labels
from hts_ray.labels.stage import plan_filter
from hts_ray.review.agreement import Counts, corrections_of, measure_agreement, review
from hts_ray.review.corrected_files import Read, ReadImage
from hts_ray.review.importing import import_labels, write_import
from hts_ray.store.run import require_stage
from hts_ray.store.tables import CORRECTIONS_SCHEMA, PSEUDO_LABELS_SCHEMA, read_table

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


CLASSES = hico_classes().subset([18, 19, 74])


def machine(*rows):
    keys = ("image_id", "positive_ids", "ignored_ids", "probability")
    full = [
        {**dict(zip(keys, row, strict=True)), "uri": f"/{row[0]}", "support": [], "dropped": []}
        for row in rows
    ]
    return pa.Table.from_pylist(full, PSEUDO_LABELS_SCHEMA)


def people(*rows):
    names = CORRECTIONS_SCHEMA.names
    return pa.Table.from_pylist(
        [dict(zip(names, r, strict=True)) for r in rows], CORRECTIONS_SCHEMA
    )


def test_every_outcome_is_counted_once_and_only_where_people_decided():
    """Catches ambiguous or unjudged classes that count as mistakes, and ignored ones as found."""
    found = measure_agreement(
        machine(
            ("a", [18, 19], [], [0.9, 0.6]),  # 18 right, 19 wrong
            ("b", [18], [19], [0.8]),  # 18 right; 19 was undecided, 74 was missed
            ("c", [18, 19], [], [0.7, 0.5]),  # 18 ambiguous, 19 not judged
            ("d", [], [74], []),  # undecided and absent: no mistake
            ("not reviewed", [18], [], [0.9]),
        ),
        people(
            ("a", [18], [19, 74], []),
            ("b", [18, 19, 74], [], []),
            ("c", [], [], [18]),
            ("d", [], [18, 19, 74], []),
            ("no labels", [18], [], []),
        ),
        CLASSES,
    )
    assert (found["images"], found["images_equal"]) == (4, 2)
    assert found["images_without_machine_labels"] == 1
    # Absent for both: 74 in a, 18 and 19 in d, where the machine left 74 open.
    overall = Counts(confirmed=2, wrong=1, undecided=1, missed=1, absent=3)
    assert found["overall"] == overall.to_dict()
    assert found["overall"]["precision"] == pytest.approx(2 / 3)
    assert found["overall"]["recall"] == pytest.approx(1 / 2)
    by_class = {row["class_id"]: row for row in found["per_class"]}
    assert by_class[19].items() >= Counts(wrong=1, undecided=1, absent=1).to_dict().items()
    assert by_class[74].items() >= Counts(missed=1, absent=1).to_dict().items()
    keys = ("image_id", "class_id", "machine", "human")
    assert [tuple(entry[key] for key in keys) for entry in found["disagreements"]] == [
        ("a", 19, "positive", "negative"),
        ("b", 19, "ignored", "positive"),
        ("b", 74, "negative", "positive"),
    ]
    assert found["disagreements"][0]["probability"] == pytest.approx(0.6)
    assert found["per_class"][0]["name"] == "ride bicycle"
    assert found["overall"]["precision_interval"][0] < 2 / 3


def test_shares_of_nothing_are_unknown():
    """Catches a precision of 0 (or 1) where the machine said nothing."""
    missed = Counts(missed=1).to_dict()
    assert (missed["precision"], missed["recall"]) == (None, 0.0)
    assert Counts().to_dict()["recall_interval"] is None
    with pytest.raises(DataError, match="no image is among both"):
        measure_agreement(machine(("a", [18], [], [0.9])), people(("b", [18], [], [])), CLASSES)


def test_kappa_is_what_chance_does_not_explain():
    """Catches a kappa that praises absent classes, or fails where there is nothing to agree on."""
    # Worked by hand: 90 of 100 agree; by chance 0.1 * 0.1 + 0.9 * 0.9 = 0.82 would.
    counts = Counts(confirmed=5, wrong=5, missed=5, absent=85, undecided=7)
    assert counts.kappa == pytest.approx((0.90 - 0.82) / (1 - 0.82))
    assert Counts(confirmed=3, absent=3).kappa == 1.0
    assert Counts(wrong=3, missed=3).kappa == -1.0
    assert Counts(absent=9).kappa is None
    assert Counts(undecided=2).kappa is None


def test_the_filter_takes_the_corrections(run, tmp_path):
    """Catches corrections that are read and not applied, or a folder that hides them."""
    path = imported(run, str(tmp_path / "corrected"))
    before = require_stage(run.run_dir, "pseudo_labels", "filter")
    first = review(run, path, before)
    assert not first["applied"]
    assert (first["overall"]["confirmed"], first["overall"]["wrong"]) == (4, 1)
    assert (first["overall"]["missed"], first["overall"]["undecided"]) == (1, 1)
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
    again = review(own, path, labels)
    assert again["overall"]["precision"] == 1.0
    assert read_labels(own, labels.path).origin.corrected == 5
    assert read_labels(own, labels.path, limit=1).origin.corrected <= 1
    assert again["applied"]
    # The same corrections elsewhere are the same labels; other ones are not.
    moved = imported(run, str(tmp_path / "copy"))
    elsewhere = replace(run, config=override(config, {"filter": {"overrides": moved}}))
    assert plan_filter(elsewhere, scores).folder.key == labels.key


def test_figures_are_stored_for_the_report(run, tmp_path):
    """Catches figures that are printed once and lost."""
    path = imported(run, str(tmp_path / "corrected"), validation_share=0.5)
    assert len(corrections_of(path)) == 5
    labels = require_stage(run.run_dir, "pseudo_labels", "filter")
    found = review(run, path, labels)
    stage = require_stage(run.run_dir, "review", "review")
    content = json.loads(Path(stage.file("agreement.json")).read_text())
    assert content["overall"]["wrong"] == found["overall"]["wrong"] == 1
    assert content["pseudo_labels"] == f"pseudo_labels-{labels.key}"
    assert len(content["disagreements"]) == 3
    assert stage.stats["precision"] == content["overall"]["precision"]


def test_images_whose_corrections_were_applied_are_not_judged(run, tmp_path):
    """Catches a precision that rises because the judged images were put right by hand."""
    path = imported(run, str(tmp_path / "corrected"), validation_share=0.4, seed=1)
    held_out = set(read_table(f"{path}/manifest.parquet")["image_id"].to_pylist())
    own = replace(run, config=override(run.config, {"filter": {"overrides": path}}))
    labels = plan_filter(own, require_stage(run.run_dir, "region_scores", "label")).run()
    found = review(own, path, labels)
    assert found["images"] == len(held_out) == 2
    assert found["left_out_as_applied"] == 3
    assert {entry["image_id"] for entry in found["disagreements"]} <= held_out
