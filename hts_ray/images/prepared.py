"""What `prepare` finds: images that are listed, looked at, and sorted into manifest and quarantine.

A reader lists images, or shards of them, as Arrow rows: a million take 0.1 GB, and as Python
objects 1 GB. `Found.look` then opens what some of these rows name. Few images are looked at in this
process; `hts_ray.images.blocks` does many, a block of rows at a time.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.images.decode import ImageError
from hts_ray.images.retry import probe_uri, read_image_bytes
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.tables import (
    MANIFEST_SCHEMA,
    PREPARED_SCHEMA,
    QUARANTINE_SCHEMA,
    STAMPS_SCHEMA,
)

STAGE = "prepare"
BLOCK_IMAGES = 4096  # looked at between two writes of a large prepare
_BATCH = 4096


@dataclass(frozen=True)
class Candidate:
    """A row of PREPARED_SCHEMA: an image, or with `error_kind` and `error` what is none.

    The three lists of class ids are None without annotations. `stamp` changes with the file: its
    size and the time of its last change, where they are known.
    """

    image_id: str
    uri: str
    split: str | None = None
    positive_ids: Iterable[int] | None = None
    negative_ids: Iterable[int] | None = None
    ambiguous_ids: Iterable[int] | None = None
    stamp: str | None = None
    width: int | None = None
    height: int | None = None
    size: int | None = None
    error_kind: str | None = None
    error: str | None = None


def rejected(image_id: str, uri: str, error_kind: str, error: str) -> Candidate:
    """Return an image or folder that cannot be used, with one of ERROR_KINDS and the reason.

    Bytes of file names that are not UTF-8 are spelt out: Arrow cannot store them.
    """
    texts = (
        text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        for text in (image_id, uri, error)
    )
    image_id, uri, error = texts
    return Candidate(image_id, uri, error_kind=error_kind, error=error)


class Rows:
    """Collects candidates as Arrow, and counts what else was met."""

    def __init__(self, images: Iterable[Candidate] = ()) -> None:
        self.counts: Counter[str] = Counter()
        self._new: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []
        for image in images:
            self.add(image)

    def add(self, image: Candidate) -> None:
        """Take in a row."""
        self._new.append(vars(image))
        if len(self._new) == _BATCH:
            self._pack()

    def table(self) -> pa.Table:
        """Return all rows, PREPARED_SCHEMA."""
        self._pack()
        return pa.Table.from_batches(self._batches, PREPARED_SCHEMA)

    def _pack(self) -> None:
        if self._new:
            self._batches.append(pa.RecordBatch.from_pylist(self._new, PREPARED_SCHEMA))
            self._new = []


class Seen(NamedTuple):
    """What looking at some listed rows gave: images by PREPARED_SCHEMA, and other counts."""

    rows: pa.Table
    counts: Counter[str]


# Takes listed rows, and a callback that gets the number of bad images after each of them.
Look = Callable[[pa.Table, Callable[[int], None]], Seen]


@dataclass(frozen=True)
class Found:
    """What a reader listed, and how it is looked at.

    `listed` has PREPARED_SCHEMA. A row is an image or, with a `look` of the reader's own, a shard.
    `block` rows are looked at between two writes, and a row stands for about `images` images.
    """

    listed: pa.Table
    counts: Counter[str] = field(default_factory=Counter)
    look: Look | None = None
    block: int = BLOCK_IMAGES
    images: int = 1

    @property
    def shard_stamps(self) -> pa.Table:
        """The stamps of shards, by their path: an image's place in a shard says nothing of it."""
        shards = self.listed if self.look is not None else self.listed.slice(0, 0)
        return _stamps(shards.set_column(0, "image_id", shards["uri"]))


@dataclass(frozen=True)
class Prepared:
    """Images that a run can use, those it cannot, and how many of each.

    `manifest` has MANIFEST_SCHEMA, `stamps` STAMPS_SCHEMA, `quarantine` QUARANTINE_SCHEMA. `counts`
    holds `images` (found or listed), `usable`, `quarantined`, one count for each kind of error,
    `duplicates` (usable images whose content another one had before; they are kept), `annotated`,
    and what the reader counted.
    """

    manifest: pa.Table
    stamps: pa.Table
    quarantine: pa.Table
    counts: dict[str, int]


def sorted_out(seen: Seen) -> Prepared:
    """Sort the good images of some rows from the bad, in their order; duplicates stay uncounted."""
    bad = seen.rows["error_kind"].is_valid()
    good, rows = seen.rows.filter(pc.invert(bad)), seen.rows.filter(bad)
    kinds = Counter({"missing": 0, "unreadable": 0, **Counter(rows["error_kind"].to_pylist())})
    counts = {
        "images": len(seen.rows),
        "usable": len(good),
        "quarantined": len(rows),
        **kinds,
        "annotated": len(good) - good["positive_ids"].null_count,
        **seen.counts,
    }
    stage = pa.array([STAGE] * len(rows), pa.string())
    quarantine = _cast(rows.append_column("stage", stage), QUARANTINE_SCHEMA)
    return Prepared(_cast(good, MANIFEST_SCHEMA), _stamps(good), quarantine, counts)


def _stamps(rows: pa.Table) -> pa.Table:
    return _cast(rows.filter(rows["stamp"].is_valid()), STAMPS_SCHEMA)


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    return pa.table([table[field.name].cast(field.type) for field in schema], schema=schema)


def inspect_images(
    found: Found, *, workers: int = 16, headers: bool = True, progress: ImagesDone | None = None
) -> Prepared:
    """Look at all that was found in `workers` threads, and sort the good from the bad.

    Rows keep their order. `progress(done, total, quarantined)` is called after every image or
    shard. Without `headers` no image is opened: sizes stay unknown.
    """
    done = bad = 0

    def each(wrong: int) -> None:
        nonlocal done, bad
        done, bad = done + 1, bad + wrong
        if progress is not None:
            progress(done, len(found.listed), bad)

    look = found.look or partial(look_at_images, workers=workers, headers=headers)
    rows, counts = look(found.listed, each)
    counts.update(found.counts)
    result = sorted_out(Seen(rows, counts))
    result.counts["duplicates"] = _count_duplicates(rows, workers)
    return result


def look_at_images(
    listed: pa.Table, each: Callable[[int], None], *, workers: int, headers: bool
) -> Seen:
    """Read the header of every listed image, in threads."""
    if not headers:
        return Seen(listed, Counter())
    rows = []
    with ThreadPoolExecutor(workers) as pool:
        for row in pool.map(_with_header, listed.to_pylist()):
            rows.append(row)
            each(int(row["error_kind"] is not None))
    return Seen(pa.Table.from_pylist(rows, PREPARED_SCHEMA), Counter())


def _with_header(row: dict[str, Any]) -> dict[str, Any]:
    if row["error_kind"] is not None:
        return row
    try:
        return row | probe_uri(row["uri"])._asdict()
    except ImageError as error:
        return row | {"error_kind": error.kind, "error": error.message}


def manifest_table(images: Iterable[Candidate]) -> pa.Table:
    """Return images as a manifest."""
    return _cast(Rows(images).table(), MANIFEST_SCHEMA)


def _count_duplicates(rows: pa.Table, workers: int) -> int:
    # Files of unequal size differ, so only a few are ever read in full.
    good = rows.filter(pc.and_(rows["size"].is_valid(), rows["error_kind"].is_null()))
    same_size: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    sizes = zip(*(good[name].to_pylist() for name in ("width", "height", "size")), strict=True)
    for row, size in enumerate(sizes):
        same_size[size].append(row)
    suspects = [row for same in same_size.values() if len(same) > 1 for row in same]
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(_digest, good["uri"].take(pa.array(suspects, pa.int64())).to_pylist())
        digests = Counter(digest for digest in found if digest)
    return sum(count - 1 for count in digests.values())


def _digest(uri: str) -> bytes:
    try:
        return hashlib.sha256(read_image_bytes(uri)).digest()
    except ImageError:  # the label stage will report it
        return b""
