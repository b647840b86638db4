"""The Arrow tables that join the stages: their schemas, and how they are read and written.

Every schema is declared here once and carries its name and version in the metadata.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from hts_ray.errors import DataError
from hts_ray.store import storage

SCHEMA_VERSION = "2"
STATS_FILE = "stats.json"
# Beginnings of names that stand beside a table's own files.
_NO_ROWS = [
    ".",
    "_",
    "checkpoint",
    STATS_FILE,
    "table.json",
    "quarantine",
    "overrides",
    "agreement",
]


def _schema(name: str, fields: list[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={"hts_table": name, "hts_version": SCHEMA_VERSION})


CLASS_IDS = pa.list_(pa.int16())
# Without it a flipped bit can give another label; files without checksums are read as they are.
_CHECKED_PARQUET = pads.ParquetFileFormat(
    default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)
)
BOX = pa.list_(pa.float32(), 4)

MANIFEST_SCHEMA = _schema(
    "manifest",
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("split", pa.string(), nullable=False),
        # Class ids by annotation; null where the image has none. What is in no list is unknown.
        pa.field("positive_ids", CLASS_IDS),
        pa.field("negative_ids", CLASS_IDS),
        pa.field("ambiguous_ids", CLASS_IDS),
    ],
)
ANNOTATION_COLUMNS = ("positive_ids", "negative_ids", "ambiguous_ids")

CORRECTIONS_SCHEMA = _schema(
    "corrections",
    [
        pa.field("image_id", pa.string(), nullable=False),
        # As in a manifest: what is in no list was not decided.
        pa.field("positive_ids", CLASS_IDS),
        pa.field("negative_ids", CLASS_IDS),
        pa.field("ambiguous_ids", CLASS_IDS),
    ],
)

REGION_SCORES_SCHEMA = _schema(
    "region_scores",
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("split", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("boxes", pa.list_(BOX)),  # R boxes, xyxy, pixels of the upright original
        # R kinds: whole, grid, person, union, given; and the context around each, share of a side
        pa.field("region_kinds", pa.list_(pa.string())),
        pa.field("margins", pa.list_(pa.float32())),
        pa.field("captions", pa.list_(pa.list_(pa.string()))),  # R lists, empty if not asked for
        # R x C log-likelihoods, row-major; -inf for a class that was left out
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("problems", pa.list_(pa.string())),  # boxes that could not be used, and why
        pa.field("status", pa.string(), nullable=False),  # ok or quarantined
        pa.field("error_kind", pa.string()),
        pa.field("error", pa.string()),
    ],
)

PSEUDO_LABELS_SCHEMA = _schema(
    "pseudo_labels",
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("split", pa.string()),
        pa.field("positive_ids", CLASS_IDS, nullable=False),
        pa.field("ignored_ids", CLASS_IDS, nullable=False),
        pa.field("probability", pa.list_(pa.float32()), nullable=False),  # per positive id
        pa.field("support", pa.list_(pa.int16()), nullable=False),  # agreeing regions, per positive
        pa.field("dropped", pa.map_(pa.string(), pa.int32()), nullable=False),  # reason: classes
    ],
)

QUARANTINE_SCHEMA = _schema(
    "quarantine",
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("error_kind", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ],
)


def predictions_schema(num_classes: int) -> pa.Schema:
    """Return the schema of `predictions` for C = `num_classes` scores an image."""
    return _schema(
        "predictions",
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("uri", pa.string()),
            pa.field("split", pa.string()),
            pa.field("scores", pa.list_(pa.float32(), num_classes)),  # null when quarantined
            pa.field("status", pa.string(), nullable=False),
            pa.field("error_kind", pa.string()),
            pa.field("error", pa.string()),
        ],
    )


def features_schema(dimension: int, flipped: bool) -> pa.Schema:
    """Return the schema of `features` for D = `dimension` numbers an image, not normalised.

    `flipped` adds those of the mirrored image. They are null when quarantined.
    """
    vector = pa.list_(pa.float32(), dimension)
    return _schema(
        "features",
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("uri", pa.string()),
            pa.field("split", pa.string()),
            pa.field("features", vector),
            *([pa.field("flipped", vector)] if flipped else []),
            pa.field("status", pa.string(), nullable=False),
            pa.field("error_kind", pa.string()),
            pa.field("error", pa.string()),
        ],
    )


STUDENT_SCORES_SCHEMA = _schema(
    "student_scores",
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("split", pa.string()),
        # R x C logits, row-major, the regions being those of region_scores in their order
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_kind", pa.string()),
        pa.field("error", pa.string()),
    ],
)


def trials_schema(settings: Mapping[str, pa.DataType], metrics: Iterable[str]) -> pa.Schema:
    """Return the schema of a sweep's `trials`: a column for every swept setting and every metric.

    The settings' types differ from sweep to sweep; metrics are means over the seeds that ran.
    """
    return _schema(
        "trials",
        [
            pa.field("trial", pa.int32(), nullable=False),  # 0 has the run's own settings
            pa.field("status", pa.string(), nullable=False),  # complete, stopped, ...
            pa.field("objective", pa.float64()),  # null where nothing could be compared
            pa.field("reports", pa.list_(pa.float64()), nullable=False),  # after each seed
            pa.field("seconds", pa.float64(), nullable=False),
            pa.field("message", pa.string(), nullable=False),
            *(pa.field(name, kind) for name, kind in settings.items()),
            *(pa.field(name, pa.float64()) for name in metrics),
        ],
    )


def write_table(path: str, table: pa.Table) -> None:
    """Write one Parquet file in one step, with checksums that `read_table` looks at."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.write_bytes(path, sink.getvalue())


def read_table(path: str, columns: Iterable[str] | None = None) -> pa.Table:
    """Read a Parquet file, or every Parquet file below a folder, with its schema's metadata.

    Raises DataError when there is nothing to read, or the files are damaged or not Parquet.
    """
    filesystem, inner = storage.resolve(path)
    if not storage.exists(path):
        raise DataError(f"no table at {path}: check the path, or run the stage that writes it")
    try:
        dataset = pads.dataset(
            inner,
            format=_CHECKED_PARQUET,
            filesystem=filesystem,
            exclude_invalid_files=False,
            ignore_prefixes=_NO_ROWS,
        )
        if not dataset.files:
            raise DataError(f"{path} holds no Parquet file: the stage that writes it has no rows")
        table = dataset.to_table(columns=list(columns) if columns is not None else None)
        table.validate(full=True)  # texts that are no UTF-8 would come up somewhere else
        return table
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def check_table(table: pa.Table, schema: pa.Schema, path: str) -> pa.Table:
    """Return `table` with exactly the columns of `schema`, in its order and types.

    Raises DataError naming the first missing column, the wrong type or the values that lack.
    """
    name = (schema.metadata or {}).get(b"hts_table", b"table").decode()
    missing = [field.name for field in schema if field.name not in table.column_names]
    if missing:
        raise DataError(
            f"{path} is not a {name} table: column {missing[0]!r} is missing"
            f" (found {', '.join(table.column_names)})"
        )
    try:
        columns = [table[field.name].cast(field.type) for field in schema]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path} is not a {name} table: {error}") from error
    for field, column in zip(schema, columns, strict=True):
        if not field.nullable and column.null_count:
            raise DataError(
                f"{path} is not a {name} table: {field.name} is missing in {column.null_count} of"
                f" {len(column)} rows"
            )
    return pa.table(columns, schema=schema.with_metadata(table.schema.metadata or schema.metadata))


def require_unique_ids(table: pa.Table, path: str) -> None:
    """Raise DataError when two rows share an `image_id`."""
    ids = table["image_id"]
    if ids.null_count or len(ids.unique()) != len(ids):
        counts = ids.value_counts().to_pylist()
        twice = next((c["values"] for c in counts if c["counts"] > 1), None)
        raise DataError(f"{path}: image_id must be unique, {twice!r} stands in several rows")
