"""A plain folder of images, local or remote, as a manifest."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterable
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from hts_ray.errors import ConfigError, DataError
from hts_ray.images.prepared import Candidate, Found, Rows, rejected
from hts_ray.store import storage

_ENDINGS = "jpg jpeg jpe jfif png gif webp avif bmp tif tiff ppm jp2 heic heif"
EXTENSIONS = tuple(f".{ending}" for ending in _ENDINGS.split())


def read_folder(
    root: str,
    split: str = "train",
    *,
    extensions: Iterable[str] = EXTENSIONS,
    follow_symlinks: bool = True,
) -> Found:
    """Find the images in a folder and the folders below it, without annotations.

    `image_id` is the path relative to `root`, `/` between its parts; rows are sorted by it.
    Names that begin with a dot are skipped, other extensions too (`hidden` and `other_files` in
    the counts). Links to files are read; links to folders with `follow_symlinks`, each folder
    once. Raises DataError when `root` is no readable folder, ConfigError for an extension without
    a dot.
    """
    wanted = frozenset(extension.lower() for extension in extensions)
    for extension in wanted:
        if not extension.startswith("."):
            raise ConfigError(field="extensions", value=extension, remedy=f"write '.{extension}'")
    if root.startswith("file://"):
        root = unquote(urlsplit(root).path)
    found = _Walk(split, wanted)
    if storage.is_remote(root):
        _read_remote(root.rstrip("/"), found)
    else:
        _read_local(os.path.abspath(os.path.expanduser(root)), follow_symlinks, found)
    return Found(found.table().sort_by("image_id"), found.counts)


class _Walk(Rows):
    """What a walk over folders has met so far; `counts` has what it left out."""

    def __init__(self, split: str, extensions: frozenset[str]) -> None:
        super().__init__()
        self._split, self._extensions = split, extensions
        self.counts.update(hidden=0, other_files=0)

    def is_wanted(self, relative: str) -> bool:
        """Return whether a file may be an image by its name, and count it if not."""
        if any(part.startswith(".") for part in relative.split("/")):
            self.counts["hidden"] += 1
        elif PurePosixPath(relative).suffix.lower() not in self._extensions:
            self.counts["other_files"] += 1
        else:
            return True
        return False

    def take(self, relative: str, uri: str, stamp: str | None) -> None:
        """Take in an image."""
        self.add(Candidate(relative, uri, self._split, stamp=stamp))

    def reject(self, relative: str, uri: str, kind: str, reason: str) -> None:
        """Take in what cannot be read."""
        self.add(rejected(relative, uri, kind, reason))


def _read_local(root: str, follow_symlinks: bool, found: _Walk) -> None:
    try:
        if not stat.S_ISDIR(os.stat(root).st_mode):  # noqa: PTH116
            raise DataError(f"{root} is not a folder: give the folder that holds the images")
        with os.scandir(root):
            pass
    except FileNotFoundError as error:
        raise DataError(f"no folder {root}: check the path") from error
    except (OSError, ValueError) as error:
        raise DataError(f"folder {root!r} cannot be read: {error}") from error
    visited: set[tuple[int, int]] = set()
    # Linked folders wait until the real ones are read, so that an image goes by its own path.
    pending, links = [""], deque[str]()
    while pending or links:
        folder = pending.pop() if pending else links.popleft()
        path = os.path.join(root, folder) if folder else root
        try:
            status = os.stat(path)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in visited:
                _note_repeated(folder, path, found)
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            reason = f"folder cannot be read: {error.strerror or error}"
            found.reject(f"{folder}/", path, "unreadable", reason)
            continue
        for entry in entries:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if not _is_folder(entry, relative, found):
                continue
            if not entry.is_symlink():
                pending.append(relative)
            elif follow_symlinks:
                links.append(relative)
            else:
                found.counts["linked_folders"] += 1


def _note_repeated(folder: str, path: str, found: _Walk) -> None:
    target = os.path.realpath(path)
    inside = os.path.realpath(os.path.dirname(path))
    if os.path.commonpath([target, inside]) == target:
        found.reject(f"{folder}/", path, "unreadable", "a link to a folder above it: not followed")
    else:
        found.counts["repeated_folders"] += 1


def _is_folder(entry: os.DirEntry[str], relative: str, found: _Walk) -> bool:
    """Return whether an entry is a folder to read; what else it is goes where it belongs."""
    if entry.name.startswith("."):
        found.counts["hidden"] += 1
        return False
    try:
        status = entry.stat()
    except FileNotFoundError:
        found.reject(relative, entry.path, "missing", "a link to something that is not there")
        return False
    except OSError as error:
        found.reject(relative, entry.path, "unreadable", error.strerror or str(error))
        return False
    if stat.S_ISDIR(status.st_mode):
        return True
    if found.is_wanted(relative):
        if not stat.S_ISREG(status.st_mode):
            reason = "not a file but a pipe, socket or device"
            found.reject(relative, entry.path, "unreadable", reason)
        elif os.fsencode(entry.path).decode(errors="replace") != entry.path:
            reason = "the path is not UTF-8: rename it"
            found.reject(relative, entry.path, "unreadable", reason)
        else:
            found.take(relative, entry.path, f"{status.st_size}-{status.st_mtime_ns}")
    return False


def _read_remote(root: str, found: _Walk) -> None:
    try:
        stamps = storage.walk_stamps(root, allow_missing=False)
    except FileNotFoundError as error:
        raise DataError(f"no folder {root}: check the path") from error
    except OSError as error:
        raise DataError(f"folder {root} cannot be listed: {error}") from error
    for relative, stamp in stamps.items():
        if found.is_wanted(relative):
            # A key may hold what means something else in a URI: "#", "?", "%", spaces.
            found.take(relative, f"{root}/{quote(relative)}", stamp)
