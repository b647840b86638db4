"""The Parquet file."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
from labeled_run import POSITIVES

from hts_ray.exports.parquet_file import write_parquet
from hts_ray.exports.records import Context, LabeledImage, Origin
from hts_ray.exports.source import read_labels
from hts_ray.exports.writing import export_labels


def test_it_reads_back_with_its_origin(labeled, tmp_path):
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
