"""A labeled image as a row of plain columns, which the table-like formats share."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from hts_ray.exports.records import Context, LabeledImage

LABEL_FIELDS = (
    pa.field("labels", pa.list_(pa.string())),
    pa.field("class_ids", pa.list_(pa.int16())),
    pa.field("probability", pa.list_(pa.float32())),
    pa.field("support", pa.list_(pa.int16())),
    pa.field("ignored", pa.list_(pa.string())),
    pa.field("negatives", pa.list_(pa.string())),
)
_MACHINE, _HUMAN = ("probability", "support"), ("negatives",)


def label_fields(context: Context) -> list[pa.Field]:
    """Return the label columns: of annotations without probabilities, of others without negatives.

    A list column that is empty throughout would only puzzle its readers.
    """
    absent = _HUMAN if context.origin.kind == "pseudo_labels" else _MACHINE
    return [field for field in LABEL_FIELDS if field.name not in absent]


def label_columns(image: LabeledImage, context: Context) -> dict[str, Any]:
    """Return the values of `label_fields` for one image."""
    values: dict[str, Any] = {
        "labels": context.names_of(image.positive_ids),
        "class_ids": list(image.positive_ids),
        "probability": list(image.probability),
        "support": list(image.support),
        "ignored": context.names_of(image.ignored_ids),
        "negatives": context.names_of(image.negative_ids or ()),
    }
    return {field.name: values[field.name] for field in label_fields(context)}
