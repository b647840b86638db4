"""Paths and URIs behave alike."""

import pytest

from hts_ray import storage
from hts_ray.errors import DataError


def test_local_and_file_uri_are_the_same_file(tmp_path):
    """Would catch a URI that is read from another place than it was written to."""
    path = storage.join(str(tmp_path), "a", "b.json")
    storage.write_json(path, {"x": 1})
    assert storage.read_json(f"file://{path}") == {"x": 1}
    assert storage.list_names(str(tmp_path / "a")) == ["b.json"]
    assert storage.list_names(str(tmp_path / "none")) == []


def test_overwriting_never_leaves_a_temporary_file(tmp_path):
    """Would catch litter that a folder reader takes for data."""
    path = str(tmp_path / "x.bin")
    for data in (b"1", b"22"):
        storage.write_bytes(path, data)
    assert storage.read_bytes(path) == b"22"
    assert storage.list_names(str(tmp_path)) == ["x.bin"]


def test_unknown_scheme_is_a_clear_error():
    """Would catch a pyarrow traceback for a mistyped scheme."""
    with pytest.raises(DataError, match="sss://"):
        storage.exists("sss://bucket/x")


def test_remote_is_told_from_local(tmp_path):
    """Would catch a Windows-like or relative path taken for a URI."""
    assert storage.is_remote("s3://b/k")
    assert not storage.is_remote("file:///tmp/x")
    assert not storage.is_remote("runs/x")
    assert storage.absolute("s3://b/k") == "s3://b/k"
    assert storage.absolute("x").startswith("/")


def test_remove_tree_is_quiet_when_there_is_nothing(tmp_path):
    """Would catch a clean-up that fails on a second call."""
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "f").write_text("x")
    storage.remove_tree(str(folder))
    storage.remove_tree(str(folder))
    assert not folder.exists()
