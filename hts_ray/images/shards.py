"""Images in shards: tar files (WebDataset) and Parquet files with the bytes in a column.

Listed are the shards. Looking at one reads it once, front to back, and gives a row for every image
in it that says where its bytes are; nothing is unpacked.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from hts_ray.config import PrepareConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.decode import ImageError, probe_image
from hts_ray.images.folder import EXTENSIONS
from hts_ray.images.inside import Cell, Span, read_column
from hts_ray.images.prepared import Candidate, Found, Rows, Seen, rejected
from hts_ray.images.retry import HEAD_BYTES
from hts_ray.store import storage

_IMAGES_OF_A_SHARD = 500  # a guess, before one is opened
_LISTING_THREADS = 32
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$")
# As the Hugging Face `datasets` library finds a split in the name of a file or folder.
_SPLIT = re.compile(
    r"(?:^|[-_. /])(train(?:ing)?|test(?:ing)?|valid(?:ation)?|val|dev|eval)(?=[-_. /\d]|$)"
)
_SPLITS = {"training": "train", "testing": "test", "eval": "test"} | dict.fromkeys(
    ("valid", "val", "dev"), "validation"
)


def read_shards(kind: str, root: str, config: PrepareConfig) -> Found:
    """Find the shards of images: tar files (`webdataset`) or Parquet files (`parquet`).

    `root` is a file, a folder whose shards are taken, or a pattern: `s3://b/train-{000..099}.tar`.
    A row's `image_id` is the shard's name and the sample's key or row; the split is that in the
    shard's name, else `prepare.split`. Raises DataError when there is no shard, or for tar files
    that are compressed.
    """
    shards = find_shards(root, ".tar" if kind == "webdataset" else ".parquet")
    rows = Rows()
    for name, (path, stamp) in zip(_names([*shards]), shards.items(), strict=True):
        rows.add(Candidate(name, path, split_of(path, config.split), stamp=stamp))
    look = partial(_look_at_shards, kind=kind, config=config)
    counts = Counter(shards=len(shards))
    return Found(rows.table(), counts, look, block=1, images=_IMAGES_OF_A_SHARD)


def find_shards(root: str, ending: str) -> dict[str, str | None]:
    """Return the shards that a pattern, a folder or a file means, by name, and their stamps.

    Raises DataError when nothing is there, ConfigError for a pattern that runs backwards.
    """
    if match := _RANGE.search(root):
        first, last = match[1], match[2]
        if int(last) < int(first):
            raise ConfigError(field="--root", value=root, remedy="write the smaller number first")
        numbers = range(int(first), int(last) + 1)
        starts = [
            f"{root[: match.start()]}{n:0{len(first)}d}{root[match.end() :]}" for n in numbers
        ]
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            parts = pool.map(partial(find_shards, ending=ending), starts)
            return {path: stamp for part in parts for path, stamp in part.items()}
    kind, stamp = storage.kind_and_stamp(root)
    if kind == "Directory":
        below = storage.walk_stamps(root)
        found = {_join(root, path): below[path] for path in sorted(below)}
    else:
        found = {storage.absolute(root): stamp}
    if ending == ".tar":
        _refuse_compressed([*found])
    if kind != "Directory":
        return found
    found = {path: found[path] for path in found if path.lower().endswith(ending)}
    if not found:
        raise DataError(f"{root} holds no {ending} file: check the path")
    return found


def _join(root: str, relative: str) -> str:
    # A key may hold what means something else in a URI: "#", "?", "%", spaces.
    inner = quote(relative) if storage.is_remote(root) else relative
    return storage.join(storage.absolute(root), inner)


def _refuse_compressed(paths: Sequence[str]) -> None:
    for path in paths:
        if match := _COMPRESSED.search(path):
            raise DataError(
                f"{path} is compressed (.{match[1]}), so that no image in it can be read alone:"
                " unpack it to a plain .tar; images hardly shrink"
            )


def split_of(path: str, default: str) -> str:
    """Return the split that a shard's name or the folder it is in names, else `default`."""
    for part in reversed(PurePosixPath(path).parts[-2:]):
        if match := _SPLIT.search(part.lower()):
            return _SPLITS.get(match[1], match[1])
    return default


def _names(paths: Sequence[str]) -> list[str]:
    """Return what tells the shards apart: their names, with folders where those repeat."""
    parts = [
        PurePosixPath(path.partition("://")[2] or path).with_suffix("").parts for path in paths
    ]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"a shard is named twice: {paths[0]} and others")


def _look_at_shards(
    listed: pa.Table, each: Callable[[int], None], *, kind: str, config: PrepareConfig
) -> Seen:
    """Return the images of some shards, looking into several at a time."""
    read = partial(_read_shard, _read_tar if kind == "webdataset" else _read_parquet, config=config)
    tables, counts = [], Counter[str]()
    with ThreadPoolExecutor(min(config.workers, len(listed))) as pool:
        for rows in pool.map(read, listed.to_pylist()):
            tables.append(rows.table())
            counts.update(rows.counts)
            each(len(tables[-1]) - tables[-1]["error_kind"].null_count)
    return Seen(pa.concat_tables(tables), counts)


def _read_shard(
    read: Callable[[Candidate, PrepareConfig, Rows], None],
    listed: dict[str, Any],
    *,
    config: PrepareConfig,
) -> Rows:
    """Return what is in one shard; a shard that is damaged gives the images before the damage."""
    shard, rows = Candidate(**listed), Rows()
    name, path = shard.image_id, shard.uri
    try:
        read(shard, config, rows)
    except DataError:
        raise
    except FileNotFoundError:
        rows.add(rejected(name, path, "missing", f"{path}: no such file"))
    except (tarfile.TarError, EOFError, pa.ArrowInvalid) as error:
        reason = f"the shard is damaged or cut short: {error}"
        rows.add(rejected(name, path, "truncated", reason))
    except OSError as error:
        rows.add(rejected(name, path, "unreadable", str(error)))
    return rows


def _with_size(image: Candidate, head: bytes | None, size: int) -> Candidate:
    """Return an image with its size; `head` is its beginning, None where nobody is to look."""
    if head is None:
        return image
    try:
        width, height = probe_image(head)
    except ImageError as error:
        return rejected(image.image_id, image.uri, error.kind, error.message)
    return replace(image, width=width, height=height, size=size)


def _read_tar(shard: Candidate, config: PrepareConfig, rows: Rows) -> None:
    name, path, seen = shard.image_id, shard.uri, set[str]()
    with _tar(path, streamed=config.headers and storage.is_remote(path)) as tar:
        for member in tar:
            file = PurePosixPath(member.name)
            if file.suffix.lower() not in EXTENSIONS or file.name.startswith("."):
                rows.counts["other_members"] += member.isfile()
                continue
            # WebDataset's key: what stands before the first dot of the file's name.
            key = str(file.with_name(file.name.split(".", 1)[0]))
            image_id = f"{name}/{key}"
            uri = Span(path, member.offset_data, member.size).uri
            if not member.isreg() or member.issparse():
                rows.add(rejected(image_id, uri, "unreadable", "not a plain file"))
            elif key in seen:
                reason = f"a second image with the key {key!r}: {member.name}"
                rows.add(rejected(f"{name}/{member.name}", uri, "unreadable", reason))
            else:
                seen.add(key)
                head = _head(tar, member) if config.headers else None
                rows.add(_with_size(Candidate(image_id, uri, shard.split), head, member.size))
            tar.members = []  # type: ignore[attr-defined]  # it would keep every member


def _head(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return an image's first bytes; all of them where those do not tell its size."""
    stream = tar.extractfile(member)
    assert stream is not None
    head = stream.read(HEAD_BYTES)
    try:
        probe_image(head)
    except ImageError:
        head += stream.read()
    if len(head) < min(member.size, HEAD_BYTES):
        raise EOFError("unexpected end of data")
    return head


@contextmanager
def _tar(path: str, *, streamed: bool) -> Iterator[tarfile.TarFile]:
    """Open a tar file; `streamed` reads all of it, 8 MiB a request, else only headers are read."""
    filesystem, inner = storage.resolve(path)
    opened = filesystem.open_input_stream if streamed else filesystem.open_input_file
    with opened(inner) as source:
        stream: IO[bytes] = io.BufferedReader(source, 1 << 23) if streamed else source
        with tarfile.open(fileobj=stream, mode="r|" if streamed else "r:") as tar:
            yield tar


def _read_parquet(shard: Candidate, config: PrepareConfig, rows: Rows) -> None:
    name, path = shard.image_id, shard.uri
    filesystem, inner = storage.resolve(path)
    with filesystem.open_input_file(inner) as stream:
        metadata = pq.ParquetFile(stream)
        column = image_column(metadata.schema_arrow, config.column, path)
        groups = [metadata.metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    number = 0
    for group, count in enumerate(groups):
        values = read_column(path, column, group) if config.headers else None
        for row in range(count):
            uri = Cell(path, column, group, row).uri
            image = Candidate(f"{name}/{number:08d}", uri, shard.split)
            data = None if values is None else values[row].as_py() or b""
            rows.add(_with_size(image, data, len(data or b"")))
            number += 1


def image_column(schema: pa.Schema, asked: str | None, path: str) -> str:
    """Return the column that holds images' bytes, as a path into structs: `image.bytes`.

    Without one `asked` for it is the only binary column, or the only struct with a binary field
    `bytes`, as Hugging Face's datasets have. Raises DataError naming the columns that there are.
    """
    found: dict[str, str] = {}
    for field in schema:
        if _is_binary(field.type):
            found[field.name] = field.name
        elif pa.types.is_struct(field.type):
            names = [inner.name for inner in field.type]
            if "bytes" in names and _is_binary(field.type.field("bytes").type):
                found[field.name] = f"{field.name}.bytes"
    if asked is not None and asked in {*found, *found.values()}:
        return found.get(asked, asked)
    if asked is None and len(found) == 1:
        return next(iter(found.values()))
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if asked is not None:
        raise DataError(f"{path}: prepare.column={asked} holds no bytes (found {listed})")
    if found:
        several = f"{len(found)} columns with images' bytes ({', '.join(found)})"
        raise DataError(f"{path} has {several}: name one with prepare.column")
    raise DataError(
        f"{path} has no column with images' bytes (found {listed}); a table of paths is read with"
        " `hts prepare list`"
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
