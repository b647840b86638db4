"""Results that users name: written beside their place and put there in one step.

Nothing is written over unless the caller says so, and a folder is replaced only where it is an
earlier result of the same kind.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs as pafs

from hts_ray.errors import ConfigError
from hts_ray.store import storage

_COPY_BYTES = 1 << 22


def refuse_existing(output: str, *, replace: bool = False, marker: str = "") -> None:
    """Raise ConfigError when something is at `output` that must not be written over.

    With `replace` a file may be, and a folder that holds the file `marker`.
    """
    kind = _kind(output)
    if kind == pafs.FileType.NotFound:
        return
    if not replace:
        remedy = "remove it or choose another place" + (", or give --force" if marker else "")
        raise ConfigError(
            "something is there already", field="--output", value=output, remedy=remedy
        )
    if kind != pafs.FileType.Directory:
        return
    if not marker or not storage.exists(storage.join(output, marker)):
        raise ConfigError(
            "a folder that is no earlier result of this kind",
            field="--output",
            value=output,
            remedy="--force does not touch it: choose another place",
        )


@contextmanager
def new_output(
    output: str, *, replace: bool = False, marker: str = "", last: str = ""
) -> Iterator[Path]:
    """Give a local path to write a file or folder at, which becomes `output` after the block.

    That is one rename; to remote storage it is copied, a folder's file `last` at the end. A block
    that fails leaves nothing. Raises ConfigError as `refuse_existing`, and when nothing can be
    written there.
    """
    refuse_existing(output, replace=replace, marker=marker)
    target = None if storage.is_remote(output) else Path(storage.resolve(output)[1])
    try:
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(
            prefix=".hts-", dir=None if target is None else target.parent
        )
    except OSError as error:
        raise ConfigError(field="--output", value=output, remedy=str(error)) from error
    with temporary as folder:
        made = Path(folder) / output.rstrip("/").rsplit("/", 1)[-1]
        yield made
        # It may have appeared meanwhile, and a rename would replace it.
        refuse_existing(output, replace=replace, marker=marker)
        if target is None:
            _upload(made, output, last)
            return
        before = Path(folder) / "replaced"  # goes with the temporary folder
        if target.exists():
            target.rename(before)
        try:
            made.rename(target)
        except OSError:
            if before.exists():
                before.rename(target)
            raise


def _kind(path: str) -> pafs.FileType:
    filesystem, inner = storage.resolve(path)
    return storage.patiently(path, lambda: filesystem.get_file_info(inner).type)


def _upload(made: Path, output: str, last: str) -> None:
    storage.remove_tree(output)
    if made.is_file():
        _copy(made, output)
        return
    files = [path for path in made.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == last, path)):
        _copy(path, storage.join(output, path.relative_to(made).as_posix()))


def _copy(source: Path, target: str) -> None:
    """Copy a file of any size, which `storage.write_bytes` would hold in memory."""
    filesystem, inner = storage.resolve(target)

    def copy() -> None:
        # Object stores have no folders, and a bucket may refuse to be made again.
        if not isinstance(filesystem, pafs.S3FileSystem | pafs.GcsFileSystem):
            filesystem.create_dir(os.path.dirname(inner), recursive=True)
        with open(source, "rb") as stream, filesystem.open_output_stream(inner) as sink:
            shutil.copyfileobj(stream, sink, _COPY_BYTES)

    storage.patiently(target, copy)
