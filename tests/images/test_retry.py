"""Reading image files: what is wrong with a file, what with its storage, and headers alone."""

from __future__ import annotations

import errno
import os

import pytest
from PIL import Image

from hts_ray.errors import DataError
from hts_ray.images import retry
from hts_ray.images.decode import ImageError
from hts_ray.images.retry import probe_uri, read_image_bytes, read_patiently
from hts_ray.store import storage


def test_reading(tmp_path):
    """A pipe waited on for ever; a folder or missing file as a bare OSError."""
    path = tmp_path / "50% off #1.png"
    Image.new("RGB", (51, 40)).save(path)
    assert read_image_bytes(str(path)) == path.read_bytes()
    assert read_image_bytes(path.as_uri()) == path.read_bytes()
    assert probe_uri(str(path)) == (51, 40, path.stat().st_size)
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    for uri, kind in (
        (tmp_path / "none.jpg", "missing"),
        (path / "below.jpg", "missing"),
        (tmp_path, "unreadable"),
        (pipe, "unreadable"),
        ("bad\0name", "unreadable"),
        ("nosuchscheme://x/y.jpg", "unreadable"),
    ):
        with pytest.raises(ImageError) as caught:
            read_image_bytes(str(uri))
        assert caught.value.kind == kind


class Busy:
    """A file's reads, of which the first so many meet an error."""

    def __init__(self, monkeypatch, failures, error):
        monkeypatch.setattr(storage, "_PAUSE_SECONDS", 0.001)
        self.failures, self.error, self.asked, self.retried = failures, error, 0, 0

    def read(self):
        """Fail as often as there are failures."""
        self.asked += 1
        if self.asked > self.failures:
            return b"pixels"
        raise ImageError("unreadable", "no") from self.error

    def retry(self):
        """Count what is told."""
        self.retried += 1


def test_storage_that_fails_for_once_is_asked_again(monkeypatch):
    """A throttled request that costs an image, or a disk that is asked for what it refuses."""
    busy = Busy(monkeypatch, 2, OSError("HTTP status 503"))
    assert read_patiently("s3://bucket/x.png", busy.read, 2, busy.retry) == b"pixels"
    assert (busy.asked, busy.retried) == (3, 2)
    busy = Busy(monkeypatch, 1, OSError(errno.ESTALE, "stale handle"))
    assert read_patiently("/nfs/x.png", busy.read) == b"pixels"
    for uri, error in (
        ("/disk/x.png", PermissionError(errno.EACCES, "denied")),
        ("/disk/x.png", OSError("whatever else")),
        ("s3://bucket/x.png", OSError("HTTP status 403: AccessDenied")),
        ("nosuchscheme://x/y.png", DataError("no such scheme")),
    ):
        busy = Busy(monkeypatch, 1, error)
        with pytest.raises(ImageError):
            read_patiently(uri, busy.read)
        assert busy.asked == 1, uri


def test_an_image_is_given_up_only_when_its_storage_answers(monkeypatch):
    """An outage that quarantines every image that was due, or an image that ends the run."""
    down = OSError("HTTP status 503")
    asked = []
    monkeypatch.setattr(storage, "require_answer", asked.append)
    busy = Busy(monkeypatch, 3, down)  # well again by the time that another file is there
    assert read_patiently("s3://bucket/x.png", busy.read, 2) == b"pixels"
    with pytest.raises(ImageError):  # this object alone
        read_patiently("s3://bucket/x.png", Busy(monkeypatch, 9, down).read, 2)
    assert asked == ["s3://bucket/x.png"] * 2
    with pytest.raises(ImageError):  # one of the web's hosts: the others' images go on
        read_patiently("https://host/x.png", Busy(monkeypatch, 9, down).read, 2)
    assert len(asked) == 2

    def dead(path):
        raise DataError(f"{path}: the storage fails")

    monkeypatch.setattr(storage, "require_answer", dead)
    with pytest.raises(DataError, match="the storage fails") as caught:
        read_patiently("s3://bucket/x.png", Busy(monkeypatch, 9, down).read, 2)
    assert not isinstance(caught.value, ImageError)


def test_permission_denied_is_unreadable(tmp_path, monkeypatch):
    """One file of another user must not stop the run."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x")

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ImageError, match="Permission denied") as caught:
        read_image_bytes(str(path))
    assert caught.value.kind == "unreadable"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "BMP", "GIF"])
def test_a_header_is_found_whether_or_not_it_stands_first(tmp_path, monkeypatch, kind):
    """Would catch large files called damaged because only their beginning was looked at."""
    path = tmp_path / "image"
    Image.effect_noise((300, 200), 90).convert("RGB").save(path, kind)
    size = path.stat().st_size
    monkeypatch.setattr(retry, "HEAD_BYTES", 2000)
    assert size > 2000
    assert probe_uri(str(path)) == (300, 200, size)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ImageError):
        probe_uri(str(path))


def test_a_header_costs_no_more_than_the_beginning_of_a_file(tmp_path):
    """Would catch `hts prepare` reading every photograph in full."""
    path = tmp_path / "large.jpg"
    Image.effect_noise((2000, 1000), 90).save(path, quality=95)
    with path.open("r+b") as file:  # of a file this large only the first bytes are there
        file.truncate(1 << 40)
    assert probe_uri(str(path)) == (2000, 1000, 1 << 40)
