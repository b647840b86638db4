"""What every reader of images returns: a manifest, a quarantine and counts."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from hts_ray.images.decode import ImageError
from hts_ray.images.retry import ImageHeader, probe_uri, read_image_bytes
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.tables import MANIFEST_SCHEMA, QUARANTINE_SCHEMA, STAMPS_SCHEMA

STAGE = "prepare"


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


@dataclass(frozen=True)
class Candidate:
    """An image to be looked at; the three lists of class ids are None without annotations.

    `stamp` changes with the file: its size and the time of its last change, where they are known.
    """

    image_id: str
    uri: str
    split: str
    positive_ids: Sequence[int] | None = None
    negative_ids: Sequence[int] | None = None
    ambiguous_ids: Sequence[int] | None = None
    stamp: str | None = None


@dataclass(frozen=True)
class Rejected:
    """An image or folder that cannot be used, with one of ERROR_KINDS and the reason."""

    image_id: str
    uri: str
    error_kind: str
    error: str


@dataclass
class Found:
    """What a reader found: images to be looked at, those that were bad before, more counts.

    `known` has, by image id, what the reader saw of an image already: its header, what is wrong
    with it, or None where nobody is to look.
    """

    images: list[Candidate] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    known: dict[str, ImageHeader | ImageError | None] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def inspect_images(
    found: Found, *, workers: int = 16, headers: bool = True, progress: ImagesDone | None = None
) -> Prepared:
    """Read every image's header in `workers` threads and sort the good from the bad.

    Rows keep their order. `progress(done, total, quarantined)` is called after every image.
    Without `headers` no image is opened: sizes stay unknown unless the reader saw them.
    """
    bad = list(found.rejected)
    total = len(found.images) + len(bad)
    kept: list[tuple[Candidate, ImageHeader | None]] = []

    def look(image: Candidate) -> ImageHeader | ImageError | None:
        if image.image_id in found.known:
            return found.known[image.image_id]
        return _header_or_error(image) if headers else None

    with ThreadPoolExecutor(max_workers=workers) as pool:
        seen = pool.map(look, found.images)
        for image, header in zip(found.images, seen, strict=True):
            if isinstance(header, ImageError):
                bad.append(Rejected(image.image_id, image.uri, header.kind, header.message))
            else:
                kept.append((image, header))
            if progress is not None:
                progress(len(kept) + len(bad), total, len(bad))
        duplicates = _count_duplicates(kept, pool)
    counts = {
        "images": total,
        "usable": len(kept),
        "quarantined": len(bad),
        "missing": 0,
        "unreadable": 0,
        **Counter(row.error_kind for row in bad),
        "duplicates": duplicates,
        "annotated": sum(image.positive_ids is not None for image, _ in kept),
        **found.counts,
    }
    rows = [{**_in_utf8(row), "stage": STAGE} for row in bad]
    quarantine = pa.Table.from_pylist(rows, QUARANTINE_SCHEMA)
    stamps = {image.image_id: image.stamp for image, _ in kept if image.stamp is not None}
    known = pa.table([[*stamps], [*stamps.values()]], schema=STAMPS_SCHEMA)
    return Prepared(manifest_table(kept), known, quarantine, counts)


def manifest_table(rows: Sequence[tuple[Candidate, ImageHeader | None]]) -> pa.Table:
    """Return a manifest; width and height are null where there is no header."""
    return pa.Table.from_pylist(
        [{**vars(image), **(header._asdict() if header else {})} for image, header in rows],
        MANIFEST_SCHEMA,
    )


def _in_utf8(row: Rejected) -> dict[str, str]:
    """Spell out the bytes of file names that are not UTF-8, which Arrow cannot store."""
    return {
        name: text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        for name, text in vars(row).items()
    }


def _header_or_error(candidate: Candidate) -> ImageHeader | ImageError:
    try:
        return probe_uri(candidate.uri)
    except ImageError as error:
        return error


def _count_duplicates(
    kept: Sequence[tuple[Candidate, ImageHeader | None]], pool: ThreadPoolExecutor
) -> int:
    # Files of unequal size differ, so only a few are ever read in full.
    same_size: defaultdict[tuple[int, int, int], list[str]] = defaultdict(list)
    for candidate, header in kept:
        if header is not None:
            same_size[header].append(candidate.uri)
    suspects = [uri for uris in same_size.values() if len(uris) > 1 for uri in uris]
    digests = Counter(digest for digest in pool.map(_digest, suspects) if digest)
    return sum(count - 1 for count in digests.values())


def _digest(uri: str) -> bytes:
    try:
        return hashlib.sha256(read_image_bytes(uri)).digest()
    except ImageError:  # the label stage will report it
        return b""
