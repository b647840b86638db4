"""The columns that table-like formats share."""

from __future__ import annotations

import pyarrow as pa

from hts_ray.classes import hico_classes
from hts_ray.exports.records import Context, LabeledImage, Origin
from hts_ray.exports.rows import label_columns, label_fields

TABLE = hico_classes().subset([18, 19])


def test_values_fit_their_fields():
    """Catches a column that is announced and never filled, or filled with another type."""
    image = LabeledImage(
        "a", "/a", "train", (18,), (19,), probability=(0.5,), support=(2,), negative_ids=(19,)
    )
    for kind, more in (
        ("pseudo_labels", {"probability", "support"}),
        ("annotations", {"negatives"}),
    ):
        context = Context(TABLE, Origin(kind))
        columns = label_columns(image, context)
        assert set(columns) == {"labels", "class_ids", "ignored", *more}
        (row,) = pa.Table.from_pylist([columns], pa.schema(label_fields(context))).to_pylist()
        assert row["labels"] == ["ride bicycle"]
        assert row["ignored"] == ["sit on bicycle"]
