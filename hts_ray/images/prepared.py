"""What every reader of images returns: a manifest, a quarantine and counts."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from hts_ray.images.decode import ImageError
from hts_ray.images.retry import ImageHeader, probe_uri, read_image_bytes
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.tables import MANIFEST_SCHEMA, QUARANTINE_SCHEMA

STAGE = "prepare"


@dataclass(frozen=True)
class Prepared:
    """Images that a run can use, those it cannot, and how many of each.

    `manifest` has MANIFEST_SCHEMA, `quarantine` QUARANTINE_SCHEMA. `counts` holds `images`
    (found or listed), `usable`, `quarantined`, one count for each kind of error, `duplicates`
    (usable images whose content another one had before; they are kept) and `annotated`.
    """

    manifest: pa.Table
    quarantine: pa.Table
    counts: dict[str, int]


@dataclass(frozen=True)
class Candidate:
    """An image to be looked at; the three lists of class ids are None without annotations."""

    image_id: str
    uri: str
    split: str
    positive_ids: Sequence[int] | None = None
    negative_ids: Sequence[int] | None = None
    ambiguous_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Rejected:
    """An image or folder that cannot be used, with one of ERROR_KINDS and the reason."""

    image_id: str
    uri: str
    kind: str
    reason: str


def inspect_images(
    candidates: Sequence[Candidate],
    rejected: Iterable[Rejected] = (),
    *,
    workers: int = 16,
    progress: ImagesDone | None = None,
) -> Prepared:
    """Read every candidate's header in `workers` threads and sort the good from the bad.

    Rows keep the order of the candidates. `rejected` are those that were bad before.
    `progress(done, total, quarantined)` is called after every image.
    """
    bad = list(rejected)
    before = len(bad)
    kept: list[tuple[Candidate, ImageHeader]] = []
    with ThreadPoolExecutor(max_workers=workers) as pool:
        headers = pool.map(_header_or_error, candidates)
        for candidate, header in zip(candidates, headers, strict=True):
            if isinstance(header, ImageError):
                bad.append(Rejected(candidate.image_id, candidate.uri, header.kind, header.message))
            else:
                kept.append((candidate, header))
            if progress is not None:
                progress(len(kept) + len(bad), len(candidates) + before, len(bad))
        duplicates = _count_duplicates(kept, pool)
    counts = {
        "images": len(kept) + len(bad),
        "usable": len(kept),
        "quarantined": len(bad),
        "missing": 0,
        "unreadable": 0,
        **Counter(row.kind for row in bad),
        "duplicates": duplicates,
        "annotated": sum(candidate.positive_ids is not None for candidate, _ in kept),
    }
    return Prepared(manifest_table(kept), quarantine_table(bad), counts)


def manifest_table(rows: Sequence[tuple[Candidate, ImageHeader | None]]) -> pa.Table:
    """Return a manifest; width and height are null where there is no header."""
    return pa.table(
        {
            "image_id": [c.image_id for c, _ in rows],
            "uri": [c.uri for c, _ in rows],
            "width": [header.width if header else None for _, header in rows],
            "height": [header.height if header else None for _, header in rows],
            "split": [c.split for c, _ in rows],
            "positive_ids": [c.positive_ids for c, _ in rows],
            "negative_ids": [c.negative_ids for c, _ in rows],
            "ambiguous_ids": [c.ambiguous_ids for c, _ in rows],
        },
        schema=MANIFEST_SCHEMA,
    )


def quarantine_table(rows: Sequence[Rejected]) -> pa.Table:
    """Return the quarantine of the prepare stage."""
    return pa.table(
        {
            "image_id": [_utf8(row.image_id) for row in rows],
            "stage": [STAGE] * len(rows),
            "uri": [_utf8(row.uri) for row in rows],
            "error_kind": [row.kind for row in rows],
            "error": [_utf8(row.reason) for row in rows],
        },
        schema=QUARANTINE_SCHEMA,
    )


def _utf8(text: str) -> str:
    """Spell out the bytes of a file name that is not UTF-8, which Arrow cannot store."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _header_or_error(candidate: Candidate) -> ImageHeader | ImageError:
    try:
        return probe_uri(candidate.uri)
    except ImageError as error:
        return error


def _count_duplicates(
    kept: Sequence[tuple[Candidate, ImageHeader]], pool: ThreadPoolExecutor
) -> int:
    # Files of unequal size differ, so only a few are ever read in full.
    same_size: defaultdict[tuple[int, int, int], list[str]] = defaultdict(list)
    for candidate, header in kept:
        same_size[header].append(candidate.uri)
    suspects = [uri for uris in same_size.values() if len(uris) > 1 for uri in uris]
    digests = Counter(digest for digest in pool.map(_digest, suspects) if digest)
    return sum(count - 1 for count in digests.values())


def _digest(uri: str) -> bytes:
    try:
        return hashlib.sha256(read_image_bytes(uri)).digest()
    except ImageError:  # the label stage will report it
        return b""
