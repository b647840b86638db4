"""Plain folders: every image found once, everything else a row or a count."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from hts_ray.errors import ConfigError, DataError
from hts_ray.images.folder import read_folder
from hts_ray.images.prepared import inspect_images
from hts_ray.images.retry import read_image_bytes
from hts_ray.store.tables import MANIFEST_SCHEMA


def picture(path: Path, size: tuple[int, int] = (40, 30), color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def ids(prepared) -> list[str]:
    return prepared.manifest["image_id"].to_pylist()


def rejected(prepared) -> dict[str, str]:
    return {r["image_id"]: r["error_kind"] for r in prepared.quarantine.to_pylist()}


def test_nested_folders(tmp_path):
    """Ids that lose their folder collide; relative uris break on other machines."""
    for name in ("b.png", "a/b.png", "a/c/D.JPG", "a b/50% #1.webp", "été/ü.png"):
        picture(tmp_path / name)
    picture(tmp_path / ".hidden.png")
    picture(tmp_path / ".cache/x.png")
    (tmp_path / "notes.txt").write_text("x")
    told = []
    prepared = inspect_images(
        read_folder(str(tmp_path), "test"), progress=lambda *counts: told.append(counts)
    )
    assert told == [(done, 5, 0) for done in range(1, 6)]
    assert prepared.manifest.schema.equals(MANIFEST_SCHEMA)
    assert ids(prepared) == sorted(
        ["b.png", "a/b.png", "a/c/D.JPG", "a b/50% #1.webp", "été/ü.png"]
    )
    assert prepared.manifest["split"].unique().to_pylist() == ["test"]
    assert prepared.manifest["positive_ids"].null_count == 5
    for row in prepared.manifest.to_pylist():
        assert row["uri"] == str(tmp_path / row["image_id"])
        assert (row["width"], row["height"]) == (40, 30)
        assert read_image_bytes(row["uri"])
    assert prepared.counts["hidden"] == 2
    assert prepared.counts["other_files"] == 1
    assert prepared.counts["annotated"] == 0
    assert ids(inspect_images(read_folder(tmp_path.as_uri()))) == ids(prepared)


def test_relative_roots_become_absolute(tmp_path, monkeypatch):
    """A worker in another directory would find nothing."""
    picture(tmp_path / "in/a.png")
    monkeypatch.chdir(tmp_path)
    assert inspect_images(read_folder("in")).manifest["uri"].to_pylist() == [
        str(tmp_path / "in/a.png")
    ]


def test_bad_files_are_rows(tmp_path):
    """One bad file must not stop the other images; each has its reason."""
    good = picture(tmp_path / "good.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "head.jpg").write_bytes(good.read_bytes()[:30])
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nothing.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with open(os.fsencode(tmp_path) + b"/bad\xff.jpg", "wb") as stream:
        stream.write(good.read_bytes())
    # cut behind its header: only decoding finds it, in the label stage
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:-20])
    told = []
    prepared = inspect_images(
        read_folder(str(tmp_path)), progress=lambda *counts: told.append(counts)
    )
    assert told[-1] == (9, 9, 7)
    assert ids(prepared) == ["cut.jpg", "good.jpg"]
    assert rejected(prepared) == {
        "text.jpg": "not_an_image",
        "empty.png": "empty",
        "head.jpg": "truncated",
        "broken.jpg": "missing",
        "self.jpg": "unreadable",
        "pipe.jpg": "unreadable",
        "bad\\xff.jpg": "unreadable",
    }
    assert prepared.counts["images"] == 9
    assert prepared.counts["quarantined"] == 7
    assert all(row["error"] for row in prepared.quarantine.to_pylist())


def test_links_to_folders(tmp_path):
    """A loop that is followed never ends, or lists an image under forty names."""
    outside = tmp_path / "outside"
    picture(outside / "o.png")
    root = tmp_path / "root"
    picture(root / "a/x.png")
    (root / "a/up").symlink_to(root)
    (root / "0again").symlink_to(root / "a")
    (root / "linked").symlink_to(outside)
    (root / "file.png").symlink_to(outside / "o.png")
    prepared = inspect_images(read_folder(str(root)))
    assert ids(prepared) == ["a/x.png", "file.png", "linked/o.png"]
    assert rejected(prepared) == {"a/up/": "unreadable"}
    assert prepared.counts["repeated_folders"] == 1
    still = inspect_images(read_folder(str(root), follow_symlinks=False))
    assert ids(still) == ["a/x.png", "file.png"]
    assert still.counts["linked_folders"] == 3


def test_forbidden_folders_are_rows(tmp_path, monkeypatch):
    """A folder of another user must not end the walk."""
    picture(tmp_path / "open/a.png")
    picture(tmp_path / "shut/b.png")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", guarded)
    prepared = inspect_images(read_folder(str(tmp_path)))
    assert ids(prepared) == ["open/a.png"]
    assert rejected(prepared) == {"shut/": "unreadable"}


def test_duplicates_are_counted_and_kept(tmp_path):
    """Files of equal size that differ are no duplicates; equal ones all stay."""
    for name in ("a.bmp", "b.bmp", "c/d.bmp"):
        picture(tmp_path / name)
    picture(tmp_path / "other.bmp", color="blue")
    prepared = inspect_images(read_folder(str(tmp_path)))
    assert len({Path(u).stat().st_size for u in prepared.manifest["uri"].to_pylist()}) == 1
    assert prepared.counts["duplicates"] == 2
    assert len(prepared.manifest) == 4


def test_extensions(tmp_path):
    """Case, and a list that forgets the dot and so finds nothing."""
    picture(tmp_path / "a.JPG")
    picture(tmp_path / "b.png")
    assert ids(inspect_images(read_folder(str(tmp_path), extensions=[".jpg"]))) == ["a.JPG"]
    with pytest.raises(ConfigError, match=r"extensions = 'jpg'.*'\.jpg'"):
        read_folder(str(tmp_path), extensions=["jpg"])


def test_roots_that_are_no_folders(tmp_path):
    """A mistyped path must not look like an empty folder."""
    with pytest.raises(DataError, match="no folder"):
        read_folder(str(tmp_path / "none"))
    with pytest.raises(DataError, match="not a folder"):
        read_folder(str(picture(tmp_path / "a.png")))
    with pytest.raises(DataError, match="cannot open the storage"):
        read_folder("nosuchscheme://bucket/images")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert len(inspect_images(read_folder(str(empty))).manifest) == 0


def test_remote_folders(tmp_path, monkeypatch):
    """Keys with characters that mean something else in a URI must be found again."""
    from pyarrow import fs as pafs

    from hts_ray.store import storage

    bucket = tmp_path / "bucket"
    for name in ("data/a.png", "data/b c/50% #1?.png", "data/.hidden/x.png"):
        picture(bucket / name)
    (bucket / "data/broken.png").write_bytes(b"")
    (bucket / "data/notes.txt").write_text("x")
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(storage, "resolve", lambda uri: (remote, unquote(uri[5:])))
    prepared = inspect_images(read_folder("s3://bucket/data"))
    assert ids(prepared) == ["a.png", "b c/50% #1?.png"]
    assert prepared.manifest["uri"].to_pylist()[1] == "s3://bucket/data/b%20c/50%25%20%231%3F.png"
    assert rejected(prepared) == {"broken.png": "empty"}
    assert read_image_bytes(prepared.manifest["uri"].to_pylist()[1])
    with pytest.raises(DataError, match="no folder s3://bucket/none"):
        read_folder("s3://bucket/none")
