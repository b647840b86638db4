"""Schemas, stage folders and their atomic last step."""

import pyarrow as pa
import pytest

from hts_ray.errors import DataError
from hts_ray.store import tables
from hts_ray.store.run import StageFolder

ROWS = [
    {"image_id": "a", "uri": "/a.jpg", "width": 4, "height": 3, "split": "train"},
    {"image_id": "b", "uri": "/b.jpg", "width": 4, "height": 3, "split": "test"},
]


def manifest(rows=ROWS):
    return pa.Table.from_pylist(rows, schema=tables.MANIFEST_SCHEMA)


def test_written_tables_keep_schema_and_version(tmp_path):
    """Would catch a table that can no longer be told by its metadata."""
    path = str(tmp_path / "m.parquet")
    tables.write_table(path, manifest())
    back = tables.read_table(path)
    assert back.schema.metadata[b"hts_table"] == b"manifest"
    assert back.equals(manifest())


def test_reading_skips_the_stage_s_own_bookkeeping(tmp_path):
    """Would catch quarantine or checkpoint rows counted as results."""
    stage = StageFolder(str(tmp_path), "region_scores", "k")
    tables.write_table(stage.file("part.parquet"), manifest())
    tables.write_table(stage.file("quarantine", "part-0.parquet"), manifest())
    tables.write_table(stage.file("checkpoint", "ids.parquet"), manifest())
    stage.publish({"rows_in": 2})
    assert len(tables.read_table(stage.path)) == 2


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1 and then nothing"])
def test_broken_parquet_is_a_clear_error(tmp_path, content):
    """Would catch a pyarrow traceback for a truncated upload."""
    path = tmp_path / "m.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"m\.parquet"):
        tables.read_table(str(path))
    with pytest.raises(DataError, match="no table at"):
        tables.read_table(str(tmp_path / "none"))


def test_wrong_columns_are_named():
    """Would catch a foreign table that fails somewhere deep in a stage."""
    with pytest.raises(DataError, match="'uri' is missing"):
        tables.check_table(manifest().drop_columns(["uri"]), tables.MANIFEST_SCHEMA, "x")
    words = manifest().set_column(2, "width", pa.array(["wide", "wider"]))
    with pytest.raises(DataError, match="not a manifest table"):
        tables.check_table(words, tables.MANIFEST_SCHEMA, "x")


def test_doubled_ids_are_refused():
    """Would catch an image that is trained on or counted twice."""
    tables.require_unique_ids(manifest(), "x")
    with pytest.raises(DataError, match="'a' is in several rows"):
        tables.require_unique_ids(manifest([ROWS[0], ROWS[0]]), "x")
