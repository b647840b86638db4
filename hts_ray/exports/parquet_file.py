"""One Parquet file, a row an image: what pandas, DuckDB and Arrow read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hts_ray.exports.records import Context, LabeledImage
from hts_ray.exports.rows import label_columns, label_fields

ORIGIN = "hts_origin"  # key of the schema's metadata: how the labels were made, as JSON
_ROWS = 1000


def label_schema(context: Context) -> pa.Schema:
    """Return the columns of the file; their metadata tell where the labels come from."""
    fields = [
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("split", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        *label_fields(context),
    ]
    return pa.schema(fields, metadata={ORIGIN: json.dumps(asdict(context.origin))})


def write_parquet(images: Iterable[LabeledImage], context: Context, target: Path) -> None:
    """Write one row an image, in groups as they come."""
    schema = label_schema(context)
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for image in images:
            rows.append(_row(image, context))
            if len(rows) >= _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _row(image: LabeledImage, context: Context) -> dict[str, Any]:
    return {
        "image_id": image.image_id,
        "uri": image.uri,
        "split": image.split,
        "width": image.width,
        "height": image.height,
        **label_columns(image, context),
    }
