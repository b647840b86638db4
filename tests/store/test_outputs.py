"""Outputs: whole or not there."""

from __future__ import annotations

import pytest

from hts_ray.errors import ConfigError
from hts_ray.store.outputs import new_output, refuse_existing


def test_a_block_that_fails_leaves_nothing(tmp_path):
    """Catches half a folder under its final name, and temporary folders that stay behind."""

    def fail():
        with new_output(str(tmp_path / "a" / "out")) as target:
            target.mkdir()
            (target / "part").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list((tmp_path / "a").iterdir())


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    """Catches two runs of which the second eats the first one's result."""
    place = tmp_path / "out.csv"

    def race():
        with new_output(str(place)) as target:
            target.write_text("mine")
            place.write_text("theirs")

    with pytest.raises(ConfigError, match="already"):
        race()
    assert place.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_only_marked_folders_are_replaced(tmp_path):
    """Catches a folder of something else that --force removes."""
    place = tmp_path / "out"
    place.mkdir()
    (place / "old").write_text("x")
    with pytest.raises(ConfigError, match="no earlier result"):
        refuse_existing(str(place), replace=True, marker="mark")
    with pytest.raises(ConfigError, match="no earlier result"):
        refuse_existing(str(place), replace=True)  # a file is to be written there
    (place / "mark").write_text("")
    with new_output(str(place), replace=True, marker="mark") as target:
        target.mkdir()
        (target / "new").write_text("y")
    assert [path.name for path in place.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_remote_folders_get_their_marker_last(tmp_path, monkeypatch):
    """Catches a reader of object storage that takes half an upload for the whole."""
    from pyarrow import fs

    from hts_ray.store import outputs, storage

    written = []

    class Recording:
        """A remote store in a local folder that remembers the order in which files appear."""

        def __init__(self):
            self.inner = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())

        def move(self, path, target):
            written.append(target)
            self.inner.move(path, target)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    bucket = Recording()
    monkeypatch.setattr(storage, "resolve", lambda path: (bucket, path.removeprefix("mock://")))
    with outputs.new_output("mock://x/out", last="mark.json") as target:
        (target / "a").mkdir(parents=True)
        for name in ("z.txt", "mark.json", "a/b.txt"):
            (target / name).write_text(name)
    assert written == ["x/out/a/b.txt", "x/out/z.txt", "x/out/mark.json"]
    assert (tmp_path / "x/out/a/b.txt").read_text() == "a/b.txt"
