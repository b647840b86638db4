"""The Arrow tables that join the stages: their schemas, and how they are read and written.

Every schema is declared here once and carries its name and version in the metadata.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from hts_ray.errors import DataError
from hts_ray.store import storage

SCHEMA_VERSION = "2"
STATS_FILE = "stats.json"
_FILES = 256  # read at a time
# Beginnings of the names of other files in a table's folder.
_NO_ROWS = [*"._", "checkpoint", STATS_FILE, "table.json", "quarantine", "overrides", "agreement"]


def _schema(name: str, *fields: pa.Field) -> pa.Schema:
    return pa.schema(fields, metadata={"hts_table": name, "hts_version": SCHEMA_VERSION})


CLASS_IDS = pa.list_(pa.int16())
BOX = pa.list_(pa.float32(), 4)
# Without it a flipped bit can give another label; files without checksums are read as they are.
# Scans keep no metadata (`cache_metadata`): a stage has thousands of files, with 28 KB each.
_CHECKED_PARQUET = pads.ParquetFileFormat(
    default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)
)


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


# Columns that several tables share.
_ID = _required("image_id", pa.string())
_URI = pa.field("uri", pa.string())
_SPLIT = pa.field("split", pa.string())
_IMAGE = [_ID, _URI, _SPLIT]
_SIZE = [pa.field("width", pa.int32()), pa.field("height", pa.int32())]
_OUTCOME = [
    _required("status", pa.string()),  # ok or quarantined
    pa.field("error_kind", pa.string()),
    pa.field("error", pa.string()),
]
ANNOTATION_COLUMNS = ("positive_ids", "negative_ids", "ambiguous_ids")
# Class ids by annotation; null where the image has none. What is in no list is unknown.
_ANNOTATIONS = [pa.field(name, CLASS_IDS) for name in ANNOTATION_COLUMNS]

MANIFEST_SCHEMA = _schema(
    "manifest", _ID, _URI.with_nullable(False), *_SIZE, _SPLIT.with_nullable(False), *_ANNOTATIONS
)
# Beside a manifest, for images whose files are known: text that changes when the file does.
# Of images in shards the shard's path stands there for all of them.
STAMPS_SCHEMA = _schema("stamps", _ID, _required("stamp", pa.string()))
# What `prepare` has listed or seen: an image a row, or with a reason what is none.
PREPARED_SCHEMA = _schema(
    "prepared",
    pa.field("image_id", pa.large_string()),
    pa.field("uri", pa.large_string()),
    *_SIZE,
    pa.field("size", pa.int64()),  # of the file, in bytes
    _SPLIT,
    *_ANNOTATIONS,
    pa.field("stamp", pa.string()),
    pa.field("error_kind", pa.string()),
    pa.field("error", pa.string()),
)
CORRECTIONS_SCHEMA = _schema("corrections", _ID, *_ANNOTATIONS)
REGION_SCORES_SCHEMA = _schema(
    "region_scores",
    *_IMAGE,
    *_SIZE,
    pa.field("boxes", pa.list_(BOX)),  # R boxes, xyxy, pixels of the upright original
    # R kinds: whole, grid, person, union, given; and the context around each, share of a side
    pa.field("region_kinds", pa.list_(pa.string())),
    pa.field("margins", pa.list_(pa.float32())),
    pa.field("captions", pa.list_(pa.list_(pa.string()))),  # R lists, empty if not asked for
    # R x C log-likelihoods, row-major; -inf for a class that was left out
    pa.field("scores", pa.list_(pa.float32())),
    # R x B log-likelihoods of the background sentences of table.json; may be missing
    pa.field("background", pa.list_(pa.float32())),
    pa.field("problems", pa.list_(pa.string())),  # boxes that could not be used, and why
    *_OUTCOME,
)
PSEUDO_LABELS_SCHEMA = _schema(
    "pseudo_labels",
    *_IMAGE,
    _required("positive_ids", CLASS_IDS),
    _required("ignored_ids", CLASS_IDS),
    _required("probability", pa.list_(pa.float32())),  # of each positive id
    _required("support", pa.list_(pa.int16())),  # agreeing regions, of each positive id
    _required("dropped", pa.map_(pa.string(), pa.int32())),  # reason: classes
)
QUARANTINE_SCHEMA = _schema(
    "quarantine",
    _ID,
    _required("stage", pa.string()),
    _URI,
    _required("error_kind", pa.string()),
    pa.field("error", pa.string()),
)
# labels.csv: a row a label, and one for an image without any; the box is a region, in pixels.
LABEL_ROWS_SCHEMA = _schema(
    "label_rows",
    _required("path", pa.string()),
    pa.field("class", pa.string()),
    *(pa.field(name, pa.float64()) for name in ("probability", "x0", "y0", "x1", "y1")),
)
STUDENT_SCORES_SCHEMA = _schema(
    "student_scores",
    *_IMAGE,
    # R x C logits, row-major, the regions being those of region_scores in their order
    pa.field("scores", pa.list_(pa.float32())),
    *_OUTCOME,
)


def predictions_schema(num_classes: int) -> pa.Schema:
    """Return the schema of `predictions` for C = `num_classes` scores an image.

    They are null when quarantined.
    """
    scores = pa.field("scores", pa.list_(pa.float32(), num_classes))
    return _schema("predictions", *_IMAGE, scores, *_OUTCOME)


def features_schema(dimension: int, flipped: bool) -> pa.Schema:
    """Return the schema of `features` for D = `dimension` numbers an image, not normalised.

    `flipped` adds those of the mirrored image. They are null when quarantined.
    """
    names = ["features", "flipped"] if flipped else ["features"]
    vectors = [pa.field(name, pa.list_(pa.float32(), dimension)) for name in names]
    return _schema("features", *_IMAGE, *vectors, *_OUTCOME)


def trials_schema(settings: Mapping[str, pa.DataType], metrics: Iterable[str]) -> pa.Schema:
    """Return the schema of a sweep's `trials`: a column for every swept setting and every metric.

    The settings' types differ from sweep to sweep; metrics are means over the seeds that ran.
    """
    return _schema(
        "trials",
        _required("trial", pa.int32()),  # 0 has the run's own settings
        _required("status", pa.string()),  # complete, stopped, ...
        pa.field("objective", pa.float64()),  # null where nothing could be compared
        _required("reports", pa.list_(pa.float64())),  # after each seed
        _required("seconds", pa.float64()),
        _required("message", pa.string()),
        *(pa.field(name, kind) for name, kind in settings.items()),
        *(pa.field(name, pa.float64()) for name in metrics),
    )


def write_table(path: str, table: pa.Table, row_group_size: int | None = None) -> None:
    """Write one Parquet file in one step, with checksums that `read_table` verifies."""
    sink = io.BytesIO()
    pq.write_table(
        table, sink, compression="zstd", write_page_checksum=True, row_group_size=row_group_size
    )
    storage.write_bytes(path, sink.getvalue())


def read_table(
    path: str, columns: Iterable[str] | None = None, rows: pads.Expression | None = None
) -> pa.Table:
    """Read a Parquet file, or every Parquet file below a folder, with its schema's metadata.

    `rows` leaves those out that it is not true for. Raises DataError when there is nothing to read,
    or the files are damaged or not Parquet.
    """
    with _readable(path):
        names = None if columns is None else list(columns)
        table = _dataset(path).to_table(columns=names, filter=rows, cache_metadata=False)
        table.validate(full=True)  # else text that is not UTF-8 fails later, far from here
        return table


def read_batches(path: str, columns: Iterable[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of `read_table` in their order, at most `rows` at a time."""
    for piece in stream(open_table(path), columns, rows):
        yield from piece.to_batches()


def open_table(path: str) -> pads.Dataset:
    """Return what `read_table` reads, unread; raises what it does."""
    with _readable(path):
        return _dataset(path)


def stream(rows: pads.Dataset, columns: Iterable[str], most: int = 1 << 16) -> Iterator[pa.Table]:
    """Yield pieces of at most so many rows, in order, in memory that their number does not change.

    Raises DataError for damaged files.
    """
    with _as_damage(next(iter(getattr(rows, "files", [])), "the table")):
        ahead: dict[str, int] = {"batch_readahead": 1, "fragment_readahead": 1}
        for batch in rows.to_batches(
            columns=list(columns), batch_size=most, cache_metadata=False, **ahead
        ):
            batch.validate(full=True)
            yield pa.Table.from_batches([batch])


def table_schema(path: str) -> pa.Schema:
    """Return the columns of what `read_table` reads."""
    with _readable(path):
        return _dataset(path).schema


@contextmanager
def _readable(path: str) -> Iterator[None]:
    if not storage.exists(path):
        raise DataError(f"no table at {path}: check the path, or run the stage that writes it")
    with _as_damage(path):
        yield


@contextmanager
def _as_damage(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _dataset(path: str) -> pads.Dataset:
    filesystem, inner = storage.resolve(path)
    dataset = pads.dataset(
        inner,
        format=_CHECKED_PARQUET,
        filesystem=filesystem,
        exclude_invalid_files=False,
        ignore_prefixes=_NO_ROWS,
    )
    if not dataset.files:
        raise DataError(f"{path} holds no Parquet file: the stage that writes it has no rows")
    return dataset


def count_rows(files: list[str]) -> int:
    """Return how many rows Parquet files of one store have, read from their footers in threads.

    Raises DataError when a file is damaged or not Parquet.
    """
    with _readable_files(files):
        return int(_dataset_of(files).count_rows(cache_metadata=False)) if files else 0


def read_files(files: list[str], columns: list[str]) -> pa.Table:
    """Return some columns of Parquet files of one store, in their order; text where there are none.

    Raises as `count_rows`.
    """
    empty = pa.schema([(name, pa.string()) for name in columns]).empty_table()
    return pa.concat_tables(read_pieces(files, columns)) if files else empty


def read_pieces(
    files: list[str], columns: Iterable[str], rows: pads.Expression | None = None
) -> Iterator[pa.Table]:
    """Yield what `read_files` returns, some hundred files at a time; `rows` as for `read_table`."""
    names = list(columns)
    for start in range(0, len(files), _FILES):
        some = files[start : start + _FILES]
        with _readable_files(some):
            piece = _dataset_of(some).to_table(columns=names, filter=rows, cache_metadata=False)
        yield piece


def _dataset_of(files: list[str]) -> pads.Dataset:
    filesystem, _ = storage.resolve(files[0])
    inner = [storage.resolve(file)[1] for file in files]
    return pads.dataset(inner, format=_CHECKED_PARQUET, filesystem=filesystem)


@contextmanager
def _readable_files(files: list[str]) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{files[0]} or a file beside it is no Parquet: {error}") from error


def check_table(table: pa.Table, schema: pa.Schema, path: str) -> pa.Table:
    """Return `table` with exactly the columns of `schema`, in its order and types.

    Raises DataError naming the first missing column, the wrong type or the missing values.
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
        raise DataError(f"{path}: image_id must be unique, {twice!r} is in several rows")
