"""The only reader of a manifest."""

import pyarrow as pa
import pytest

from hts_ray.errors import DataError
from hts_ray.images.manifest import open_manifest
from hts_ray.store.tables import MANIFEST_SCHEMA, write_table


def written(path, ids, splits, **more):
    write_table(str(path), pa.table({"image_id": ids, "uri": ids, "split": splits, **more}))
    return str(path)


def test_rows_follow_split_and_limit(tmp_path):
    """Catches a limit that comes before the split or takes the first, and a mistyped split."""
    path = written(tmp_path / "m.parquet", list("abcde"), ["x", "y", "x", "y", "x"])
    manifest = open_manifest(path)

    def ids(*arguments):
        return manifest.rows(*arguments)["image_id"].to_pylist()

    assert ids() == list("abcde")
    samples = {tuple(ids(["x"], 2, seed)) for seed in range(20)}
    assert samples == {("a", "c"), ("a", "e"), ("c", "e")}
    assert ids(["x"], 9) == ["a", "c", "e"]
    with pytest.raises(DataError, match="no image in split z: it has x, y"):
        ids(["z"])
    assert manifest.rows(["x"], 2).column_names == ["image_id", "uri", "split"]


def test_an_id_that_repeats_is_refused(tmp_path):
    """Catches two rows that would be labeled as one image."""
    with pytest.raises(DataError, match="unique"):
        open_manifest(written(tmp_path / "twice.parquet", ["a", "a"], ["x", "x"]))


def test_three_columns_are_enough(tmp_path):
    """Catches a manifest made by others that is refused for sizes nobody needs."""
    manifest = open_manifest(written(tmp_path / "m.parquet", ["a"], ["x"]))
    assert manifest.table.schema.names == MANIFEST_SCHEMA.names
    assert len(manifest.annotated()) == 0
    write_table(str(tmp_path / "bad.parquet"), pa.table({"image_id": ["a"], "uri": ["a"]}))
    with pytest.raises(DataError, match="column 'split' is missing"):
        open_manifest(str(tmp_path / "bad.parquet"))


def test_annotations_do_not_change_what_the_images_are(tmp_path):
    """Catches a teacher pass that is paid for again because somebody annotated an image."""
    bare = open_manifest(written(tmp_path / "a.parquet", ["a", "b"], ["x", "y"]))
    known = {"positive_ids": pa.array([[1], None], pa.list_(pa.int16()))}
    annotated = open_manifest(written(tmp_path / "b.parquet", ["a", "b"], ["x", "y"], **known))
    assert annotated.fingerprint == bare.fingerprint
    assert annotated.annotated("x")["image_id"].to_pylist() == ["a"]
    assert len(annotated.annotated("y")) == 0
    other = open_manifest(written(tmp_path / "c.parquet", ["a", "c"], ["x", "y"]))
    assert other.fingerprint != bare.fingerprint
