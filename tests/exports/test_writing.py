"""Every format: complete or not there, never over something else, never empty."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hts_ray.config import override
from hts_ray.errors import ConfigError, DataError
from hts_ray.exports import writing
from hts_ray.exports.source import read_labels
from hts_ray.exports.writing import FORMATS, export_labels

NAMES = {form: f"out{entry.suffix}" for form, entry in FORMATS.items()}


def rows_of(run, *image_ids):
    """Return the run's labels of these images."""
    rows = read_labels(run)
    mask = [image_id in image_ids for image_id in rows.table["image_id"].to_pylist()]
    return replace(rows, table=rows.table.filter(mask))


@pytest.mark.parametrize("form", FORMATS)
def test_lost_images_are_counted_and_nothing_is_written_over(form, labeled, tmp_path):
    """Catches one lost file that ends an export, and a second export that eats the first."""
    rows, target = rows_of(labeled, "a/1", "a/2", "gone"), tmp_path / NAMES[form]
    done = export_labels(labeled, rows, form, str(target))
    assert (done.tally.images, done.tally.positives) == (2, 3)
    assert done.tally.classes_with_positive == 2
    assert done.tally.bad_images == {"missing": 1}
    assert done.tally.figures()["images left out"] == 1
    assert any("gone" in note for note in done.notes)
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[form]]
    with pytest.raises(ConfigError, match=r"something is there already.*--force"):
        export_labels(labeled, rows, form, str(target))
    again = export_labels(labeled, rows_of(labeled, "a/1"), form, str(target), force=True)
    assert again.tally.images == 1
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[form]]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("image_id", ["gone", "b/3"])
def test_no_image_or_no_label_is_an_error_that_leaves_nothing(form, image_id, labeled, tmp_path):
    """Catches success reported for an export without an image or without a label."""
    words = "no image is left.*missing 1" if image_id == "gone" else "not one positive label"
    with pytest.raises(DataError, match=words):
        export_labels(labeled, rows_of(labeled, image_id), form, str(tmp_path / NAMES[form]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", FORMATS)
def test_a_failed_replacement_keeps_the_old_export(form, labeled, tmp_path):
    """Catches --force that removes what was there before the new one is complete."""
    target = tmp_path / NAMES[form]
    export_labels(labeled, rows_of(labeled, "a/1"), form, str(target))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(DataError):
        export_labels(labeled, rows_of(labeled, "gone"), form, str(target), force=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_force_replaces_exports_only(labeled, tmp_path):
    """Catches --force --output ~ ."""
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(ConfigError, match="no earlier result"):
        export_labels(labeled, rows_of(labeled, "a/1"), "huggingface", str(tmp_path), force=True)
    target = tmp_path / "x.csv"
    target.mkdir()
    with pytest.raises(ConfigError, match="no earlier result"):
        export_labels(labeled, rows_of(labeled, "a/1"), "csv", str(target), force=True)
    assert (tmp_path / "photo.jpg").read_text() == "precious"


def test_names_must_promise_what_is_written(labeled, tmp_path):
    """Catches a Parquet file called .csv."""
    for form, name, words in (
        ("csv", "x.parquet", "end its name in .csv"),
        ("coco", "x", "end its name in .json"),
        ("webdataset", "x.json", "writes a folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_labels(labeled, rows_of(labeled, "a/1"), form, str(tmp_path / name))


def test_folders_say_what_they_are(labeled, tmp_path):
    """Catches a folder of labels that nobody can trace to its settings."""
    target = tmp_path / "out"
    rows = rows_of(labeled, "a/1")
    export_labels(labeled, rows, "webdataset", str(target))
    marker = json.loads((target / writing.MARKER).read_text())
    assert marker["format"] == "webdataset"
    assert marker["labels"] == rows.origin.name
    assert marker["teacher_revision"] == "0123abc"


def test_images_need_not_be_looked_at(labeled, tmp_path):
    """Catches a table of a million labels that waits for a million files."""
    config = override(labeled.config, {"export": {"check_images": False}})
    run = replace(labeled, config=config)
    for form in ("csv", "coco"):
        done = export_labels(run, rows_of(run, "a/1", "gone"), form, str(tmp_path / NAMES[form]))
        assert done.tally.images == 2
