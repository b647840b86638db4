"""Files by path or URI: one small layer over pyarrow's file systems.

Every path of a run may be local or remote (`s3://`, `gs://`, `hf://`, and whatever else pyarrow
or fsspec reads). Small files become visible in one step: a local file by rename, a remote one
because object stores show an object only when it is complete.

Endpoints, regions and anonymous access come from environment variables, so that settings and
code are the same everywhere; ENVIRONMENT lists them. Credentials come from where the store's own
tools look for them. Failures of remote storage are DataErrors that say what to change; a missing
file stays a FileNotFoundError, and a local failure an OSError.

pyarrow is imported inside functions, because it loads slowly and `hts --help` needs none of it.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from hts_ray.errors import DataError

if TYPE_CHECKING:
    from pyarrow import fs as pafs

Result = TypeVar("Result")

ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_NO_SIGN_REQUEST",
    "STORAGE_EMULATOR_HOST",
    "GS_NO_SIGN_REQUEST",
)
RETRIES, _PAUSE_SECONDS = 3, 0.5  # the pauses double
_CONNECT_SECONDS = 10.0
_SILENCE_SECONDS = 60.0  # until a request counts as lost; the client's own 3 are too few for load
_GCS_RETRY_SECONDS = 60  # the client's own limit is 15 minutes
_COPY_BYTES = 1 << 22
# An object of these appears when its upload is complete; elsewhere a file is renamed into place.
_BUCKETS = {"s3", "gs", "gcs"}
_OBJECT_STORES = _BUCKETS | {"abfs", "abfss", "az", "hf", "oss"}
# Schemes that mean one store; http(s) means any number of hosts.
_ONE_STORE = _OBJECT_STORES | {"hdfs", "viewfs"}
_NATIVE = _BUCKETS | {"file", "abfs", "abfss", "hdfs", "viewfs", "mock"}
_DEFAULT_REGION = "us-east-1"  # what stores with an endpoint of their own expect

# Words in the messages of pyarrow's file systems, and the reason with its remedy.
_REFUSED = {
    r"NO_SUCH_BUCKET|Bucket '[^']*' not found|bucket does not exist|NoSuchBucket": (
        "the bucket does not exist: check its name, or create it"
    ),
    r"REQUEST_TIME_TOO_SKEWED|RequestTimeTooSkewed": (
        "this machine's clock is wrong: set the clock (NTP)"
    ),
    r"PERMANENT_?REDIRECT|HTTP status 301|AuthorizationHeaderMalformed": (
        "the bucket is in another region: set AWS_REGION to the bucket's region"
    ),
    r"INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN|EXPIRED_TOKEN"
    r"|ExpiredToken|UNRECOGNIZED_CLIENT|HTTP status 401|UNAUTHENTICATED": (
        "the credentials are not valid: renew them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
        " a role, or GOOGLE_APPLICATION_CREDENTIALS)"
    ),
    r"ACCESS_DENIED|AccessDenied|HTTP status 403|PERMISSION_DENIED|Forbidden": (
        "access is denied: give the role or key of every node the right to list, read, write and"
        " delete there; for public data set AWS_NO_SIGN_REQUEST=yes or GS_NO_SIGN_REQUEST=yes"
    ),
}
_FAILED = {
    r"SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|HTTP status 5\d\d|UNAVAILABLE|throttl": (
        "the storage fails or is throttling: run the same command again later, it goes on where"
        " it was"
    ),
    r"NETWORK_CONNECTION|curlCode|Could ?n[o']t (?:resolve|connect)|timed? ?out|Timeout": (
        "the storage cannot be reached: check the network and AWS_ENDPOINT_URL"
    ),
}


def is_remote(path: str) -> bool:
    """Return whether `path` is a URI of a remote file system."""
    return "://" in path and not path.startswith("file://")


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system and the path inside it; local paths become absolute.

    Raises DataError for a scheme that nothing here reads, a missing package, or a bucket that
    cannot be looked up.
    """
    from pyarrow import fs as pafs

    if "://" not in path:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    parts = urlsplit(path)
    try:
        if parts.scheme in _BUCKETS and not (parts.query or "@" in parts.netloc):
            environment = tuple(map(os.environ.get, ENVIRONMENT))
            scheme, bucket = parts.scheme, parts.netloc
            filesystem = patiently(path, lambda: _bucket(scheme, bucket, environment))
            # A slash at the end is not part of the key, and %20 means a space.
            return filesystem, unquote(bucket + parts.path).rstrip("/")
        if parts.scheme in _NATIVE:
            filesystem, inner = pafs.FileSystem.from_uri(path)
            return filesystem, str(inner)
        import fsspec

        other, inner = fsspec.core.url_to_fs(path)
        return pafs.PyFileSystem(pafs.FSSpecHandler(other)), str(inner)
    except ImportError as error:
        raise DataError(
            f"{parts.scheme}:// needs a package that is not installed: {error}; install it here"
            " and on every node"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot open the storage of {path!r}: {error}; known are local paths, s3://, gs://,"
            " hf://, abfs://, hdfs:// and the protocols of fsspec"
        ) from error


@lru_cache(maxsize=64)
def _bucket(scheme: str, bucket: str, _environment: tuple[str | None, ...]) -> pafs.FileSystem:
    """Return the file system of a bucket; made once, because its region is looked up.

    `_environment` makes a change of the variables count.
    """
    from pyarrow import fs as pafs

    if scheme != "s3":
        return _gcs()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = _DEFAULT_REGION if endpoint else pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        region=region,
        endpoint_override=endpoint or None,
        anonymous=_is_set("AWS_NO_SIGN_REQUEST"),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_SILENCE_SECONDS,
        # A small file is then one request instead of the three of a multipart upload.
        allow_delayed_open=True,
    )


def _gcs() -> pafs.FileSystem:
    from pyarrow import fs as pafs

    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    scheme, _, host = emulator.rpartition("://")
    return pafs.GcsFileSystem(
        anonymous=bool(emulator) or _is_set("GS_NO_SIGN_REQUEST"),
        scheme=(scheme or "http") if emulator else None,
        endpoint_override=host or None,
        retry_time_limit=timedelta(seconds=_GCS_RETRY_SECONDS),
    )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in {"1", "true", "yes", "on"}


def retry(
    action: Callable[[], Result],
    may_pass: Callable[[Exception], bool],
    retries: int = RETRIES,
    retried: Callable[[], None] | None = None,
) -> Result:
    """Return what `action` returns; try again after growing pauses while its error `may_pass`.

    There are at most `retries` calls after the first, and `retried` is called before each of
    them. Raises the error of the last call, or one that will not pass.
    """
    for attempt in range(retries):
        try:
            return action()
        except Exception as error:
            if not may_pass(error):
                raise
        if retried is not None:
            retried()
        # Spread, so that a thousand workers do not come back in step.
        time.sleep(_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311
    return action()


def patiently(path: str, action: Callable[[], Result]) -> Result:
    """Do something with a path's storage, again where remote storage may answer later.

    The clients' own retries are not enough: Arrow reads a busy store's answer into the buffer of
    the few bytes that it asked for, and gives up at once when that overflows. Raises DataError for
    remote storage that keeps failing or refuses; FileNotFoundError and local errors pass.
    """
    if not is_remote(path):
        return action()
    try:
        return retry(action, _may_pass)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not is_refusal(error):
            raise
        raise DataError(explain(path, error)) from error


def _may_pass(error: Exception) -> bool:
    lasting = isinstance(error, FileNotFoundError) or is_refusal(error)
    return isinstance(error, OSError) and not lasting


def explain(path: str, error: BaseException) -> str:
    """Return in one line what a remote storage's error means and what helps."""
    text = " ".join(str(error).split())
    for pattern, advice in {**_REFUSED, **_FAILED}.items():
        if re.search(pattern, text):
            return f"{path}: {advice} ({text[:300]})"
    return f"{path}: {text[:500]}"


def is_refusal(error: BaseException | None) -> bool:
    """Return whether asking again would get the same answer: denied, no bucket, a wrong key."""
    return error is not None and any(re.search(pattern, str(error)) for pattern in _REFUSED)


def is_one_store(path: str) -> bool:
    """Return whether all URIs of the path's scheme and host depend on one remote store."""
    return urlsplit(path).scheme in _ONE_STORE


def require_answer(path: str) -> None:
    """Wait until a path's storage answers a question about the path's folder, even with a refusal.

    Raises DataError when it keeps failing.
    """
    filesystem, inner = resolve(path)

    def ask() -> None:
        try:
            filesystem.get_file_info(os.path.dirname(inner))
        except OSError as error:
            if _may_pass(error):
                raise

    patiently(path, ask)


def absolute(path: str) -> str:
    """Return `path` as workers in other directories can open it."""
    return path if "://" in path else resolve(path)[1]


def join(path: str, *parts: str) -> str:
    """Join parts onto a path or URI."""
    return "/".join([path.rstrip("/"), *parts])


def kind(path: str) -> str:
    """Return what is at a path: "File", "Directory", "NotFound" or, for a device, "Unknown"."""
    filesystem, inner = resolve(path)
    return patiently(path, lambda: str(filesystem.get_file_info(inner).type.name))


def exists(path: str) -> bool:
    """Return whether a file or folder is there."""
    return kind(path) != "NotFound"


def read_bytes(path: str) -> bytes:
    """Return a file's bytes.

    Raises FileNotFoundError, OSError when a local file cannot be read, DataError for a remote one.
    """
    filesystem, inner = resolve(path)

    def read() -> bytes:
        with filesystem.open_input_stream(inner) as stream:
            return bytes(stream.read())

    return patiently(path, read)


def write_bytes(path: str, data: bytes) -> None:
    """Write a file so that no reader ever sees a part of it; folders are made as needed."""
    _write(path, lambda: io.BytesIO(data))


def copy_in(source: Path, path: str) -> None:
    """Copy a local file of any size as `write_bytes` writes one."""
    _write(path, partial(io.FileIO, source))


def _write(path: str, opened: Callable[[], IO[bytes]]) -> None:
    filesystem, inner = resolve(path)
    parent, in_place = os.path.dirname(inner), urlsplit(path).scheme in _OBJECT_STORES
    target = inner if in_place else os.path.join(parent, f".{uuid.uuid4().hex}.tmp")

    def write() -> None:
        if not in_place:
            filesystem.create_dir(parent, recursive=True)
        with opened() as source, filesystem.open_output_stream(target) as sink:
            shutil.copyfileobj(source, sink, _COPY_BYTES)
        if not in_place:
            filesystem.move(target, inner)

    patiently(path, write)


def read_json(path: str) -> Any:
    """Return the parsed JSON of a file."""
    return json.loads(read_bytes(path))


def read_object(path: str) -> dict[str, Any]:
    """Return a JSON object; empty when the file is missing or holds something else."""
    value = read_json(path) if exists(path) else {}
    return value if isinstance(value, dict) else {}


def write_json(path: str, value: Any) -> None:
    """Write `value` as indented JSON, in one step."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def list_names(path: str) -> list[str]:
    """Return the sorted names inside a folder; none when it is not there or is a file."""
    from pyarrow import fs as pafs

    filesystem, inner = resolve(path)
    if kind(path) == "File":
        return []
    selector = pafs.FileSelector(inner, allow_not_found=True)
    return sorted(i.base_name for i in patiently(path, lambda: filesystem.get_file_info(selector)))


def walk(path: str) -> list[str]:
    """Return the sorted paths of the files in a folder and below it, relative to it."""
    return [*_files_below(path)]


def walk_sizes(path: str) -> dict[str, int]:
    """Return the files in a folder and below it by their sorted relative paths, with their bytes.

    One listing, whatever their number.
    """
    return {name: int(info.size) for name, info in _files_below(path).items()}


def walk_stamps(path: str, *, allow_missing: bool = True) -> dict[str, str | None]:
    """Return the files in a folder and below it by their sorted relative paths, with their stamps.

    FileNotFoundError without the folder, unless `allow_missing`.
    """
    return {name: _stamp(info) for name, info in _files_below(path, allow_missing).items()}


def _files_below(path: str, allow_missing: bool = True) -> dict[str, pafs.FileInfo]:
    from pyarrow import fs as pafs

    filesystem, inner = resolve(path)
    selector = pafs.FileSelector(inner, allow_not_found=allow_missing, recursive=True)
    infos = patiently(path, lambda: filesystem.get_file_info(selector))
    files = (info for info in infos if info.type == pafs.FileType.File)
    return {i.path[len(inner) :].strip("/"): i for i in sorted(files, key=lambda i: i.path)}


def changed(path: str) -> float:
    """Return when a file in a folder or below it was last written, in seconds since 1970."""
    return max((info.mtime_ns or 0 for info in _files_below(path).values()), default=0) / 1e9


def kind_and_stamp(path: str) -> tuple[str, str | None]:
    """Return what `kind` says of a path, and its stamp."""
    filesystem, inner = resolve(path)
    info = patiently(path, lambda: filesystem.get_file_info(inner))
    return str(info.type.name), _stamp(info)


def _stamp(info: pafs.FileInfo) -> str | None:
    """Return text that changes when a file does: its size, and the time of its last change."""
    return None if info.mtime_ns is None else f"{info.size}-{info.mtime_ns}"


def delete_file(path: str) -> None:
    """Remove a file; FileNotFoundError when it is not there."""
    filesystem, inner = resolve(path)
    patiently(path, lambda: filesystem.delete_file(inner))


def move(path: str, target: str) -> None:
    """Move a file within its store, over what is there."""
    filesystem, inner = resolve(path)
    patiently(path, lambda: filesystem.move(inner, resolve(target)[1]))


def remove_tree(path: str) -> None:
    """Remove a folder and what is in it; nothing happens when it is not there."""
    filesystem, inner = resolve(path)
    if kind(path) == "Directory":
        patiently(path, lambda: filesystem.delete_dir(inner))
