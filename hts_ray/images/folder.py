"""A plain folder of images, local or remote, as a manifest."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs as pafs

from hts_ray.errors import ConfigError, DataError
from hts_ray.images.prepared import Candidate, Prepared, Rejected, inspect_images
from hts_ray.store import storage
from hts_ray.store.aliases import ImagesDone

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".gif",
    ".webp",
    ".avif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".jp2",
)


def read_folder(
    root: str,
    split: str = "train",
    *,
    extensions: Iterable[str] = EXTENSIONS,
    follow_symlinks: bool = True,
    workers: int = 16,
    progress: ImagesDone | None = None,
) -> Prepared:
    """Read the images in a folder and the folders below it, without annotations.

    `image_id` is the path relative to `root`, `/` between its parts; rows are sorted by it.
    Names that begin with a dot are skipped, other extensions too (`hidden` and `other_files` in
    the counts). Links to files are read; links to folders with `follow_symlinks`, each folder
    once. What cannot be read becomes a quarantine row. `progress(done, total, quarantined)` is
    called after every image. Raises DataError when `root` is no readable folder, ConfigError for
    an extension without a dot.
    """
    wanted = frozenset(extension.lower() for extension in extensions)
    for extension in wanted:
        if not extension.startswith("."):
            raise ConfigError(field="extensions", value=extension, remedy=f"write '.{extension}'")
    if root.startswith("file://"):
        root = unquote(urlsplit(root).path)
    walk: _Walk
    if storage.is_remote(root):
        walk = _RemoteWalk(root, split, wanted)
    else:
        walk = _LocalWalk(root, split, wanted, follow_symlinks)
    walk.run()
    found = sorted(walk.found, key=lambda candidate: candidate.image_id)
    rejected = sorted(walk.rejected, key=lambda row: row.image_id)
    prepared = inspect_images(found, rejected, workers=workers, progress=progress)
    return Prepared(prepared.manifest, prepared.quarantine, {**prepared.counts, **walk.skipped})


class _Walk(ABC):
    def __init__(self, split: str, extensions: frozenset[str]) -> None:
        self.split = split
        self.extensions = extensions
        self.found: list[Candidate] = []
        self.rejected: list[Rejected] = []
        self.skipped = Counter({"hidden": 0, "other_files": 0})

    @abstractmethod
    def run(self) -> None:
        """Fill `found`, `rejected` and `skipped`."""

    def is_image(self, name: str) -> bool:
        return PurePosixPath(name).suffix.lower() in self.extensions


class _LocalWalk(_Walk):
    def __init__(
        self, root: str, split: str, extensions: frozenset[str], follow_symlinks: bool
    ) -> None:
        super().__init__(split, extensions)
        self.root = os.path.abspath(os.path.expanduser(root))
        self.follow_symlinks = follow_symlinks
        self.visited: set[tuple[int, int]] = set()
        # Linked folders wait until the real ones are read, so that an image goes by its own path.
        self.links: list[str] = []

    def run(self) -> None:
        try:
            status = os.stat(self.root)  # noqa: PTH116
            if not stat.S_ISDIR(status.st_mode):
                raise DataError(
                    f"{self.root} is not a folder: give the folder that holds the images"
                )
            with os.scandir(self.root):
                pass
        except FileNotFoundError as error:
            raise DataError(f"no folder {self.root}: check the path") from error
        except (OSError, ValueError) as error:
            raise DataError(f"folder {self.root!r} cannot be read: {error}") from error
        self._read("")
        while self.links:
            self._read(self.links.pop(0))

    def _path(self, relative: str) -> str:
        return os.path.join(self.root, relative) if relative else self.root

    def _reject(self, relative: str, kind: str, reason: str) -> None:
        self.rejected.append(Rejected(relative, self._path(relative), kind, reason))

    def _read(self, start: str) -> None:
        pending = [start]
        while pending:
            folder = pending.pop()
            path = self._path(folder)
            try:
                status = os.stat(path)  # noqa: PTH116
                if (status.st_dev, status.st_ino) in self.visited:
                    self._repeated(folder, path)
                    continue
                self.visited.add((status.st_dev, status.st_ino))
                with os.scandir(path) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                reason = f"folder cannot be read: {error.strerror or error}"
                self._reject(folder + "/", "unreadable", reason)
                continue
            for entry in entries:
                relative = f"{folder}/{entry.name}" if folder else entry.name
                if self._entry(entry, relative):
                    pending.append(relative)

    def _repeated(self, folder: str, path: str) -> None:
        target = os.path.realpath(path)
        inside = os.path.realpath(os.path.dirname(path))
        if os.path.commonpath([target, inside]) == target:
            self._reject(folder + "/", "unreadable", "a link to a folder that it lies in: cut")
        else:
            self.skipped["repeated_folders"] += 1

    def _entry(self, entry: os.DirEntry[str], relative: str) -> bool:
        """File an entry where it belongs; return whether it is a folder to read now."""
        if entry.name.startswith("."):
            self.skipped["hidden"] += 1
            return False
        try:
            status = entry.stat()
        except FileNotFoundError:
            self._reject(relative, "missing", "a link to something that is not there")
            return False
        except OSError as error:
            self._reject(relative, "unreadable", error.strerror or str(error))
            return False
        if stat.S_ISDIR(status.st_mode):
            if not entry.is_symlink():
                return True
            if self.follow_symlinks:
                self.links.append(relative)
            else:
                self.skipped["linked_folders"] += 1
        elif not self.is_image(entry.name):
            self.skipped["other_files"] += 1
        elif not stat.S_ISREG(status.st_mode):
            self._reject(relative, "unreadable", "not a file but a pipe, socket or device")
        elif not _is_utf8(self._path(relative)):
            self._reject(relative, "unreadable", "the path is not UTF-8: rename it")
        else:
            self.found.append(Candidate(relative, self._path(relative), self.split))
        return False


class _RemoteWalk(_Walk):
    def __init__(self, root: str, split: str, extensions: frozenset[str]) -> None:
        super().__init__(split, extensions)
        self.root = root.rstrip("/")

    def run(self) -> None:
        filesystem, base = storage.resolve(self.root)
        try:
            infos = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
        except FileNotFoundError as error:
            raise DataError(f"no folder {self.root}: check the path") from error
        except OSError as error:
            raise DataError(f"folder {self.root} cannot be listed: {error}") from error
        for info in infos:
            if info.type != pafs.FileType.File:
                continue
            relative = info.path[len(base) :].strip("/")
            if any(part.startswith(".") for part in relative.split("/")):
                self.skipped["hidden"] += 1
            elif not self.is_image(relative):
                self.skipped["other_files"] += 1
            else:
                # A key may hold what means something else in a URI: "#", "?", "%", spaces.
                uri = f"{self.root}/{quote(relative)}"
                self.found.append(Candidate(relative, uri, self.split))


def _is_utf8(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
