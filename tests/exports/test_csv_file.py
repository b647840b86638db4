"""The CSV file, as a spreadsheet and our own import read it."""

from __future__ import annotations

import csv

import pytest
from labeled_run import POSITIVES

from hts_ray.classes import ClassTable, HoiClass
from hts_ray.errors import ConfigError
from hts_ray.exports.csv_file import write_csv
from hts_ray.exports.records import Context, LabeledImage, Origin
from hts_ray.exports.source import read_labels
from hts_ray.exports.writing import export_labels
from hts_ray.review.reading import read_labels as read_back


def test_it_reads_back(labeled, own_classes, tmp_path):
    """Catches names, marks or empty cells that do not survive the way there and back."""
    for run in (labeled, own_classes):
        path = tmp_path / f"{len(run.class_table.names[0])}.csv"
        export_labels(run, read_labels(run), "csv", str(path))
        with open(path, encoding="utf-8-sig", newline="") as stream:
            rows = {row["image_id"]: row for row in csv.DictReader(stream)}
        assert set(rows) == set(POSITIVES) - {"gone"}
        assert rows["a/2"]["probability"] == "0.9000|0.9000"
        names = dict(zip(run.class_table.positions, run.class_table.names, strict=True))
        for image in read_back(str(path)).images:
            assert image.positive == tuple(names[i] for i in POSITIVES[image.image_id])
            assert image.negative is None


def test_annotations_keep_their_negatives(labeled, tmp_path):
    """Catches absent classes that come back as unknown ones."""
    path = tmp_path / "truth.csv"
    export_labels(labeled, read_labels(labeled, manifest=""), "csv", str(path))
    assert read_back(str(path)).images[0].negative == ("sit on bicycle",)


def test_a_name_with_the_separator_is_refused(tmp_path):
    """Catches one class that would come back as two."""
    table = ClassTable((HoiClass(0, "a|b", None, None, ("a",)),))
    image = LabeledImage("x", "/x.jpg", "train", (0,))
    with pytest.raises(ConfigError, match="take parquet"):
        write_csv([image], Context(table, Origin("pseudo_labels")), tmp_path / "x.csv")
