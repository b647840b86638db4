"""Image files from disks and object storage, read again when a storage fails only for a moment."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from hts_ray.errors import DataError
from hts_ray.images import inside
from hts_ray.images.decode import ImageError, probe_image
from hts_ray.store import storage

Result = TypeVar("Result")

HEAD_BYTES = 1 << 16  # where nearly every image has its size
# Errors of local and mounted disks that may go away, and those that will not.
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE}
_LASTING = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


class ImageHeader(NamedTuple):
    """What a header says: upright width and height in pixels, and the file's size in bytes."""

    width: int
    height: int
    size: int


def probe_uri(uri: str) -> ImageHeader:
    """Return the upright size of the image at a path or URI, as a rule from its first bytes.

    Raises ImageError, `missing` and `unreadable` among its kinds, and what `read_patiently` raises.
    """
    data, size = read_patiently(uri, lambda: _read(uri, HEAD_BYTES))
    try:
        return ImageHeader(*probe_image(data), size)
    except ImageError:
        if len(data) == size:
            raise
    return ImageHeader(*probe_image(read_image_bytes(uri)), size)


def read_image_bytes(
    uri: str, retries: int = storage.RETRIES, retried: Callable[[], None] | None = None
) -> bytes:
    """Return a file's bytes from a path or a URI that pyarrow can open, or an image inside a file.

    Raises ImageError: `missing` when nothing is there, `unreadable` for a folder, a pipe, a lack
    of permission or a storage that fails for this file; and what `read_patiently` raises.
    """
    return read_patiently(uri, lambda: _read(uri)[0], retries, retried)


def read_patiently(
    uri: str,
    read: Callable[[], Result],
    retries: int = storage.RETRIES,
    retried: Callable[[], None] | None = None,
) -> Result:
    """Read an image's file, and again after growing pauses while its storage fails.

    `retried` is called before each of the `retries`. Raises ImageError if something is wrong with
    this image. If its storage still fails, the storage is asked something else: when that fails
    too, it is an outage and not this image. DataError then ends the run, which can be continued
    later, so that no outage costs the images that were due.
    """
    try:
        return storage.retry(read, lambda error: _may_pass(error, uri), retries, retried)
    except ImageError as error:
        if not (_may_pass(error, uri) and storage.is_one_store(uri)):
            raise
    storage.require_answer(uri)
    return read()


def _may_pass(error: Exception, uri: str) -> bool:
    """Return whether a storage error may go away: throttling, a lost connection."""
    if not isinstance(error, ImageError) or error.kind != "unreadable":
        return False
    cause = error.__cause__
    if isinstance(cause, DataError):  # the storage could not be opened
        cause = cause.__cause__
        if not isinstance(cause, OSError):
            return False
    number = getattr(cause, "errno", None)
    if number in _LASTING or storage.is_refusal(cause):
        return False
    return storage.is_remote(uri) or number in _TRANSIENT


def read_neighbours(
    uris: Iterable[str],
    retries: int = storage.RETRIES,
    retried: Callable[[], None] | None = None,
) -> dict[str, bytes]:
    """Return the bytes of images that lie side by side in shards, by few requests and in order.

    Images that are not there are left out, as are those of a shard that cannot be read: read
    alone, each says why. Raises what `read_patiently` raises.
    """
    found: dict[str, bytes] = {}
    for stretch in inside.stretches(uris):
        file = stretch.spans[0].file

        def read(stretch: inside.Stretch = stretch, file: str = file) -> dict[str, bytes]:
            with _as_image_error(file):
                return stretch.read()

        with suppress(ImageError):
            found |= read_patiently(file, read, retries, retried)
    return found


def _read(uri: str, most: int | None = None) -> tuple[bytes, int]:
    """Return a file's bytes, `most` of them at the most, and its size."""
    with _as_image_error(uri):
        place = inside.place_of(uri)
        if isinstance(place, inside.Cell):
            data = place.read()
            return data[:most], len(data)
        if place is not None:
            return place.read(most), place.length
        if storage.is_remote(uri) and not uri.startswith("/"):
            filesystem, inner = storage.resolve(uri)
            with filesystem.open_input_file(inner) as remote:
                return bytes(remote.read(most)), int(remote.size())
        path = unquote(urlsplit(uri).path) if uri.startswith("file://") else uri
        status = os.stat(path)  # noqa: PTH116
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for ever.
            raise ImageError("unreadable", f"{uri} is not a file")
        with open(path, "rb") as local:
            return local.read(most), status.st_size


@contextmanager
def _as_image_error(uri: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError("missing" if missing else "unreadable", f"{uri}: {reason}") from error
