"""Stage folders: their keys and the last step that makes them a result."""

import pyarrow as pa
import pytest

from hts_ray.errors import DataError
from hts_ray.store import tables
from hts_ray.store.run import StageFolder, content_hash, find_stage, require_stage, settings_hash

ROWS = [
    {"image_id": "a", "uri": "/a.jpg", "width": 4, "height": 3, "split": "train"},
    {"image_id": "b", "uri": "/b.jpg", "width": 4, "height": 3, "split": "test"},
]


def manifest(rows=ROWS):
    return pa.Table.from_pylist(rows, schema=tables.MANIFEST_SCHEMA)


def test_content_hash_sees_values_and_not_chunks():
    """Would catch a rerun for nothing, or an old answer for a changed input."""
    whole = manifest()
    chunked = pa.concat_tables([whole.slice(0, 1), whole.slice(1)])
    changed = manifest([{**ROWS[0], "uri": "/c.jpg"}, ROWS[1]])
    assert content_hash(whole) == content_hash(chunked)
    assert content_hash(whole) != content_hash(changed)


def test_settings_hash_depends_on_values_and_not_on_key_order():
    """Would catch hashes that differ between processes or miss a change."""
    one = settings_hash({"a": 1, "b": [1, 2]})
    assert one == settings_hash({"b": [1, 2], "a": 1})
    assert one != settings_hash({"a": 1, "b": [2, 1]})


def test_folder_counts_only_after_publish(tmp_path):
    """Would catch a half-written stage taken for a result."""
    stage = StageFolder(str(tmp_path), "pseudo_labels", "0123")
    tables.write_table(stage.file("part-0.parquet"), manifest())
    assert not stage.finished
    assert find_stage(str(tmp_path), "pseudo_labels") is None
    with pytest.raises(DataError, match="hts filter"):
        require_stage(str(tmp_path), "pseudo_labels", "filter")
    stage.publish({"rows_in": 2, "rows_out": 2, "quarantined": 0})
    assert find_stage(str(tmp_path), "pseudo_labels") == stage
    assert stage.stats["rows_in"] == 2


def test_latest_published_folder_wins(tmp_path):
    """Would catch a stage that goes on with an older result."""
    for key in ("b", "a"):
        StageFolder(str(tmp_path), "student", key).publish({"rows_in": 0})
    assert find_stage(str(tmp_path), "student").key == "a"
