"""Files by path or URI: one small layer over pyarrow's file systems.

Every path of a run may be local or remote (`s3://`, `gs://`, ...). Small files become
visible in one step: a local file by rename, a remote one because object stores show an
object only when it is complete.
"""

from __future__ import annotations

import json
import os
import uuid
from typing import Any

from pyarrow import fs as pafs

from hts_ray.errors import DataError


def is_remote(path: str) -> bool:
    """Return whether `path` is a URI of a remote file system."""
    return "://" in path and not path.startswith("file://")


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system and the path inside it; local paths become absolute."""
    if "://" not in path:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    try:
        filesystem, inner = pafs.FileSystem.from_uri(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot open the storage of {path!r}: {error}") from error
    return filesystem, str(inner)


def absolute(path: str) -> str:
    """Return `path` as workers in other directories can open it."""
    return path if "://" in path else resolve(path)[1]


def join(path: str, *parts: str) -> str:
    """Join parts onto a path or URI."""
    return "/".join([path.rstrip("/"), *parts])


def exists(path: str) -> bool:
    """Return whether a file or folder is there."""
    filesystem, inner = resolve(path)
    return bool(filesystem.get_file_info(inner).type != pafs.FileType.NotFound)


def read_bytes(path: str) -> bytes:
    """Return a file's bytes; FileNotFoundError or OSError when it cannot be read."""
    filesystem, inner = resolve(path)
    with filesystem.open_input_stream(inner) as stream:
        return bytes(stream.read())


def write_bytes(path: str, data: bytes) -> None:
    """Write a file so that no reader ever sees a part of it."""
    filesystem, inner = resolve(path)
    parent = os.path.dirname(inner)
    filesystem.create_dir(parent, recursive=True)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    target = os.path.join(parent, f".{uuid.uuid4().hex}.tmp") if local else inner
    with filesystem.open_output_stream(target) as stream:
        stream.write(data)
    if local:
        os.replace(target, inner)


def read_json(path: str) -> Any:
    """Return the parsed JSON of a file."""
    return json.loads(read_bytes(path))


def write_json(path: str, value: Any) -> None:
    """Write `value` as indented JSON, in one step."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def list_names(path: str) -> list[str]:
    """Return the sorted names inside a folder; none when it is not there or is a file."""
    filesystem, inner = resolve(path)
    if filesystem.get_file_info(inner).type == pafs.FileType.File:
        return []
    selector = pafs.FileSelector(inner, allow_not_found=True)
    return sorted(info.base_name for info in filesystem.get_file_info(selector))


def remove_tree(path: str) -> None:
    """Remove a folder and what is in it; nothing happens when it is not there."""
    filesystem, inner = resolve(path)
    if filesystem.get_file_info(inner).type == pafs.FileType.Directory:
        filesystem.delete_dir(inner)
