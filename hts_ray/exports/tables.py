"""Table-like formats, a row an image: CSV for spreadsheets, Parquet for pandas, DuckDB and Arrow.

In CSV the class names of an image share a cell with `|` between them, as prompts do in class lists;
`hts import-labels` reads that file again.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hts_ray.classes import ClassTable
from hts_ray.errors import ConfigError
from hts_ray.exports.records import Context, LabeledImage
from hts_ray.store.tables import LABEL_ROWS_SCHEMA

SEPARATOR = "|"
IMAGE_ID, URI, SPLIT = "image_id", "uri", "split"
POSITIVE, IGNORED, NEGATIVE = "positive", "ignored", "negative"
PROBABILITY, SUPPORT = "probability", "support"
ORIGIN = "hts_origin"  # key of the Parquet schema's metadata: how the labels were made, as JSON
LABEL_FIELDS = (
    pa.field("labels", pa.list_(pa.string())),
    pa.field("class_ids", pa.list_(pa.int16())),
    pa.field("probability", pa.list_(pa.float32())),
    pa.field("support", pa.list_(pa.int16())),
    pa.field("ignored", pa.list_(pa.string())),
    pa.field("negatives", pa.list_(pa.string())),
)
_MACHINE, _HUMAN = ("probability", "support"), ("negatives",)
_SIDES = ("x0", "y0", "x1", "y1")
_GROUP = 1000  # rows that are written at once


def label_fields(context: Context) -> list[pa.Field]:
    """Return the label columns: annotations have negatives, machine labels their probability.

    A column that is empty throughout would only confuse its readers.
    """
    absent = _HUMAN if context.is_machine else _MACHINE
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


def write_csv(images: Iterable[LabeledImage], context: Context, target: Path) -> None:
    """Write a header and one line an image, as UTF-8 with the byte-order mark spreadsheets want.

    Raises ConfigError for class names that hold the separator.
    """
    for name in context.class_table.names:
        if SEPARATOR in name:
            raise ConfigError(
                f"the class name {name!r} holds {SEPARATOR!r}, which separates names in a cell",
                field="--format",
                value="csv",
                remedy="take parquet",
            )
    more = (PROBABILITY, SUPPORT) if context.is_machine else (NEGATIVE,)
    header = (IMAGE_ID, URI, SPLIT, POSITIVE, IGNORED, *more)
    with open(target, "w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for image in images:
            lists = {
                POSITIVE: context.names_of(image.positive_ids),
                IGNORED: context.names_of(image.ignored_ids),
                NEGATIVE: context.names_of(image.negative_ids or ()),
                PROBABILITY: [f"{p:.4f}" for p in image.probability],
                SUPPORT: [str(count) for count in image.support],
            }
            row = {IMAGE_ID: image.image_id, URI: image.uri, SPLIT: image.split}
            writer.writerow(row | {name: SEPARATOR.join(texts) for name, texts in lists.items()})


def write_parquet(images: Iterable[LabeledImage], context: Context, target: Path) -> None:
    """Write one row an image; the schema's metadata says where the labels come from."""
    fields = [
        *(pa.field(name, pa.string()) for name in (IMAGE_ID, URI, SPLIT)),
        *(pa.field(name, pa.int32()) for name in ("width", "height")),
        *label_fields(context),
    ]
    schema = pa.schema(fields, metadata={ORIGIN: json.dumps(asdict(context.origin))})
    with RowWriter(target, schema, "zstd") as rows:
        for image in images:
            size = {"width": image.width, "height": image.height}
            place = {IMAGE_ID: image.image_id, URI: image.uri, SPLIT: image.split}
            rows.add({**place, **size, **label_columns(image, context)})


def label_rows(images: Iterable[LabeledImage], class_table: ClassTable) -> pa.Table:
    """Return rows of LABEL_ROWS_SCHEMA: one a label, and one for an image without any.

    The box is the first region that supports the label.
    """
    names = {entry.class_id: entry.name for entry in class_table}
    rows: list[dict[str, Any]] = []
    for image in images:
        boxes = {region.class_id: region.box for region in reversed(image.regions)}
        for class_id, p in zip(image.positive_ids, image.probability, strict=True):
            box = zip(_SIDES, (round(side, 1) for side in boxes.get(class_id, ())), strict=False)
            found = {"class": names[class_id], "probability": round(p, 4), **dict(box)}
            rows.append({"path": image.uri, **found})
        if not image.positive_ids:
            rows.append({"path": image.uri})
    return pa.Table.from_pylist(rows, LABEL_ROWS_SCHEMA)


def label_rows_csv(table: pa.Table) -> bytes:
    """Return such rows as a UTF-8 CSV file with a header; what is null is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    for batch in table.to_batches():
        writer.writerows(zip(*(column.to_pylist() for column in batch.columns), strict=True))
    return text.getvalue().encode()


class RowWriter:
    """Writes rows to a Parquet file in groups as they come."""

    def __init__(self, path: Path, schema: pa.Schema, compression: str = "snappy") -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression=compression)
        self._rows: list[Mapping[str, Any]] = []

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row for the next group."""
        self._rows.append(row)
        if len(self._rows) >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []
