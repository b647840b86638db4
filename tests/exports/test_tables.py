"""CSV as a spreadsheet and our own import read it, Parquet, and the columns they share."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labeled_run import POSITIVES

from hts_ray.classes import ClassTable, HoiClass, hico_classes
from hts_ray.errors import ConfigError
from hts_ray.exports.records import Context, LabeledImage, Origin
from hts_ray.exports.source import read_labels
from hts_ray.exports.tables import (
    label_columns,
    label_fields,
    label_rows,
    label_rows_csv,
    write_csv,
    write_parquet,
)
from hts_ray.exports.writing import export_labels
from hts_ray.review.corrected_files import read_labels as read_back


def test_csv_reads_back(labeled, own_classes, tmp_path):
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


def test_rows_of_labels(labeled):
    """Catches a label with the box of another class, and an image without labels that is lost."""
    rows = read_labels(labeled)
    table = label_rows(rows.images(), labeled.class_table)
    names = dict(zip(labeled.class_table.positions, labeled.class_table.names, strict=True))
    found = {(Path(row["path"]).name, row["class"]): row for row in table.to_pylist()}
    assert len(found) == len(table) == sum(max(len(ids), 1) for ids in POSITIVES.values())
    assert found["3.jpg", None]["probability"] is found["3.jpg", None]["x0"] is None
    both = [found["2.png", names[class_id]] for class_id in (18, 19)]
    assert [[row[side] for side in ("x0", "y0", "x1", "y1")] for row in both] == [
        [0, 0, 60, 40]
    ] * 2
    assert both[0]["probability"] == 0.9
    lines = label_rows_csv(table).decode().splitlines()
    assert lines[0] == "path,class,probability,x0,y0,x1,y1"
    assert f"{found['3.jpg', None]['path']},,,,,," in lines
    assert any(line.endswith(f"{names[18]},0.9,0.0,0.0,60.0,40.0") for line in lines)


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


def test_parquet_reads_back_with_its_origin(labeled, tmp_path):
    """Catches lost rows, and a file that no longer says what made it."""
    path = tmp_path / "labels.parquet"
    export_labels(labeled, read_labels(labeled), "parquet", str(path))
    table = pq.read_table(path)
    rows = {row["image_id"]: row for row in table.to_pylist()}
    assert {i: sorted(row["class_ids"]) for i, row in rows.items()} == {
        i: ids for i, ids in POSITIVES.items() if i != "gone"
    }
    assert rows["a/2"]["support"] == [2, 2]
    origin = json.loads(table.schema.metadata[b"hts_origin"])
    assert origin["teacher"] == "Some/captioner"
    assert origin["settings"]["min_support"] == 1


def test_more_rows_than_a_group_are_all_written(labeled, tmp_path):
    """Catches the rest of a group that is never flushed."""
    images = (LabeledImage(f"i{n}", "/x.jpg", "train", (18,)) for n in range(2500))
    context = Context(labeled.class_table, Origin("pseudo_labels"))
    write_parquet(images, context, tmp_path / "x.parquet")
    ids = pq.read_table(tmp_path / "x.parquet")["image_id"].to_pylist()
    assert ids == [f"i{n}" for n in range(2500)]


def test_values_fit_their_fields():
    """Catches a column that is announced and never filled, or filled with another type."""
    image = LabeledImage(
        "a", "/a", "train", (18,), (19,), probability=(0.5,), support=(2,), negative_ids=(19,)
    )
    for kind, more in (
        ("pseudo_labels", {"probability", "support"}),
        ("annotations", {"negatives"}),
    ):
        context = Context(hico_classes().subset([18, 19]), Origin(kind))
        columns = label_columns(image, context)
        assert set(columns) == {"labels", "class_ids", "ignored", *more}
        (row,) = pa.Table.from_pylist([columns], pa.schema(label_fields(context))).to_pylist()
        assert row["labels"] == ["ride bicycle"]
        assert row["ignored"] == ["sit on bicycle"]
