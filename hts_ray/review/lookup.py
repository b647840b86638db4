"""Which image and which class of a run a file means by the names it uses."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from urllib.parse import unquote, urlsplit

from hts_ray.classes import ClassTable
from hts_ray.review.corrected_files import Problem, ReadImage

UNKNOWN_IMAGE, AMBIGUOUS_IMAGE, UNKNOWN_CLASS = "unknown_image", "ambiguous_image", "unknown_class"
CONTRADICTION, REPEATED = "contradiction", "repeated_image"
_HINTS, _SEARCHED_IDS = 20, 20_000


class ImageIndex:
    """Finds images by their id, by their uri, or by the end of a path or address."""

    def __init__(self, image_ids: Sequence[str], uris: Sequence[str]) -> None:
        self._hints_left = _HINTS
        self._ids = {image_id: row for row, image_id in enumerate(image_ids)}
        self._uris = {uri: row for row, uri in enumerate(uris)}
        self._tails: defaultdict[str, list[tuple[list[str], int]]] = defaultdict(list)
        for row, (image_id, uri) in enumerate(zip(image_ids, uris, strict=True)):
            for parts in {tuple(_parts(uri)), tuple(_parts(image_id))}:
                if parts:
                    self._tails[parts[-1]].append((list(parts), row))

    def find(self, image: ReadImage) -> int | Problem:
        """Return the image's row, or why there is none.

        Among several images with the file's name, the one that shares most of the folders is
        taken; if two share as many, neither is.
        """
        for name in (image.image_id, image.reference):
            if name and name in self._ids:
                return self._ids[name]
        if image.reference in self._uris:
            return self._uris[image.reference]
        parts = _parts(image.reference)
        candidates = self._tails.get(parts[-1], []) if parts else []
        if not candidates:
            hint = self._nearest(image.called)
            return Problem(image.called, UNKNOWN_IMAGE, f"the manifest has no such image{hint}")
        agreement = {row: 0 for _, row in candidates}
        for known, row in candidates:
            agreement[row] = max(agreement[row], _common_tail(known, parts))
        best = max(agreement.values())
        rows = [row for row, length in agreement.items() if length == best]
        if len(rows) > 1:
            reason = f"{len(rows)} images of the manifest go by this name: write image ids"
            return Problem(image.called, AMBIGUOUS_IMAGE, reason)
        return rows[0]

    def _nearest(self, name: str) -> str:
        """Suggest an image for the first few unknown names only: the search takes long."""
        if self._hints_left == 0:
            return ""
        self._hints_left -= 1
        some = list(islice(self._ids, _SEARCHED_IDS))
        near = difflib.get_close_matches(name, some, n=1, cutoff=0.8)
        return f"; did you mean {near[0]!r}?" if near else ""


def _parts(reference: str) -> list[str]:
    """Return the parts of a path or address; of a query such as `?d=photos/a.jpg` its path."""
    split = urlsplit(reference)
    if split.scheme and len(split.scheme) > 1:
        path = split.query.rpartition("=")[2] if "=" in split.query else split.path
        reference = unquote(path)
    elif reference.startswith("/data/") and "?d=" in reference:
        reference = unquote(reference.rpartition("?d=")[2])
    return [part for part in reference.replace("\\", "/").split("/") if part not in ("", ".")]


def _common_tail(one: Sequence[str], other: Sequence[str]) -> int:
    length = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        length += 1
    return length


class ClassNames:
    """Finds class ids by display name; case, underscores and extra spaces do not count."""

    def __init__(self, class_table: ClassTable) -> None:
        self._names = class_table.names
        self._ids = {_plain(of_class.name): of_class.class_id for of_class in class_table}

    def find(self, names: Sequence[str]) -> tuple[list[int], list[str]]:
        """Return the ids of the names that are known, and what to say of each that is not."""
        ids, unknown = [], []
        for name in names:
            class_id = self._ids.get(_plain(name))
            if class_id is None:
                unknown.append(self._unknown(name))
            else:
                ids.append(class_id)
        return ids, unknown

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(_plain(name), list(self._ids), n=1, cutoff=0.6)
        if not near:
            return f"no class {name!r}"
        meant = next(known for known in self._names if _plain(known) == near[0])
        return f"no class {name!r}, did you mean {meant!r}?"


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()
