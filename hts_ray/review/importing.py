"""`hts import-labels`: corrected labels in, a labeled manifest and overrides for the filter out.

The names that a file uses are looked up here: which image and which class of the run they mean.
"""

from __future__ import annotations

import difflib
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa

from hts_ray.classes import ClassTable
from hts_ray.classes.prompts import phrase_key
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.manifest import FILE as MANIFEST
from hts_ray.labels.corrections import OVERRIDES
from hts_ray.review.corrected_files import Problem, Read, ReadImage, Sample
from hts_ray.store import storage
from hts_ray.store.outputs import new_output, refuse_existing
from hts_ray.store.run import StageFolder, finished_stages
from hts_ray.store.tables import (
    ANNOTATION_COLUMNS,
    CORRECTIONS_SCHEMA,
    MANIFEST_SCHEMA,
    QUARANTINE_SCHEMA,
    STATS_FILE,
    write_table,
)

Unmarked = Literal["negative", "unknown"]
_HINTS, _SEARCHED_IDS = 20, 20_000


@dataclass(frozen=True)
class Imported:
    """Corrections of N images of a run.

    - `corrections` has all of them;
    - `manifest` has their annotations in the split for validation, `overrides` is what the filter
      is to apply: both hold all N, unless the images were divided between them;
    - `quarantine` holds entries that could not be used, `counts` how many of each kind.
    """

    corrections: pa.Table
    manifest: pa.Table
    overrides: pa.Table
    quarantine: pa.Table
    counts: Mapping[str, int]


class ImageIndex:
    """Finds images by their id, by their uri, or by the end of a path or address."""

    def __init__(self, image_ids: Sequence[str], uris: Sequence[str]) -> None:
        self._hints_left = _HINTS
        self._ids = {image_id: row for row, image_id in enumerate(image_ids)}
        self._uris = {uri: row for row, uri in enumerate(uris)}
        self._by_file: defaultdict[str, list[tuple[list[str], int]]] = defaultdict(list)
        for row, names in enumerate(zip(image_ids, uris, strict=True)):
            for parts in filter(None, map(_parts, names)):
                self._by_file[parts[0]].append((parts, row))

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
        shared: dict[int, int] = {}
        for known, row in self._by_file.get(parts[0], ()) if parts else ():
            same = [a == b for a, b in zip(known, parts, strict=False)]
            shared[row] = max(shared.get(row, 0), [*same, False].index(False))
        if not shared:
            reason = f"the manifest has no such image{self._hint(image.called)}"
            return Problem(image.called, "unknown_image", reason)
        best = max(shared.values())
        rows = [row for row, length in shared.items() if length == best]
        if len(rows) > 1:
            reason = f"{len(rows)} images of the manifest go by this name: write image ids"
            return Problem(image.called, "ambiguous_image", reason)
        return rows[0]

    def _hint(self, name: str) -> str:
        """Suggest an image for the first few unknown names only: the search takes long."""
        self._hints_left -= 1
        some = list(islice(self._ids, _SEARCHED_IDS if self._hints_left >= 0 else 0))
        near = difflib.get_close_matches(name, some, n=1, cutoff=0.8)
        return f"; did you mean {near[0]!r}?" if near else ""


def _parts(reference: str) -> list[str]:
    """Return the parts of a path or address, the last one first.

    Of a query such as `/data/local-files/?d=photos/a.jpg` they are those of its last value.
    """
    split = urlsplit(reference)
    if len(split.scheme) > 1 or (reference.startswith("/data/") and "?d=" in reference):
        _, equals, value = split.query.rpartition("&")[2].partition("=")
        reference = unquote(value if equals else split.path)
    parts = reference.replace("\\", "/").split("/")
    return [part for part in reversed(parts) if part not in ("", ".")]


class ClassNames:
    """Finds class ids by display name; case, underscores and extra spaces do not count."""

    def __init__(self, class_table: ClassTable) -> None:
        self._classes = {phrase_key(of_class.name): of_class for of_class in class_table}

    def find(self, names: Sequence[str]) -> tuple[list[int], list[str]]:
        """Return the ids of the names that are known, and what to say of each that is not."""
        found = [(name, self._classes.get(phrase_key(name))) for name in names]
        unknown = [f"no class {name!r}{self._hint(name)}" for name, known in found if known is None]
        return [known.class_id for _, known in found if known is not None], unknown

    def _hint(self, name: str) -> str:
        near = difflib.get_close_matches(phrase_key(name), list(self._classes), n=1, cutoff=0.6)
        return f", did you mean {self._classes[near[0]].name!r}?" if near else ""


def labels_of_page(run: Run, sample: Sample, file: str) -> StageFolder:
    """Return the pseudo-labels that a review page showed.

    Raises DataError naming the field of `file` by which it belongs to another run or other classes.
    """
    stages = {f"{s.table}-{s.key}": s for s in finished_stages(run.run_dir, "pseudo_labels")}
    if sample.pseudo_labels not in stages:
        raise DataError(
            f"{file}, field pseudo_labels: the page showed {sample.pseudo_labels}, and"
            f" {run.run_dir} has {', '.join(stages) or 'none'}: give the page's run with --run-dir"
        )
    differing = sorted({*sample.classes} ^ {*run.class_table.names})
    if differing:
        whose = "the page" if differing[0] in sample.classes else "the run"
        raise DataError(
            f"{file}, field classes: {len(differing)} are not the run's: only {whose} has"
            f" {differing[0]!r}: give the settings of the page's run, or write the page anew"
        )
    return stages[sample.pseudo_labels]


def import_labels(
    read: Read,
    manifest: pa.Table,
    class_table: ClassTable,
    *,
    unmarked: Unmarked = "negative",
    split: str = "validation",
    validation_share: float | None = None,
    seed: int = 0,
) -> Imported:
    """Find the images and classes that a file means in a run.

    - An entry with an unknown image or class is quarantined as a whole: a label that is lost would
      turn into a negative.
    - `unmarked` is what a class is that the file does not list; where it lists negatives and the
      image was not looked at in full, the rest is unknown.
    - Of a review page only the images that were drawn at random go into the manifest: doubtful
      ones would make a validation set that is harder than the images are.
    - `validation_share` in (0, 1) divides the images at random (by `seed`) between the manifest and
      the overrides; without it both hold all.

    Raises ConfigError for a share out of range, DataError when no entry can be used.
    """
    if validation_share is not None and not 0 < validation_share < 1:
        raise ConfigError(
            field="--validation-share", value=validation_share, remedy="give a number in (0, 1)"
        )
    labels, in_full, problems = _looked_up(read, manifest, class_table, unmarked)
    if not labels:
        raise DataError(_nothing(read, problems))
    labeled = _labeled(manifest, labels, split)
    corrections = labeled.select(CORRECTIONS_SCHEMA.names).cast(CORRECTIONS_SCHEMA)
    applied = np.ones(len(labeled), dtype=bool)
    validating = applied if read.sample is None else np.isin(sorted(labels), [*in_full])
    if validation_share is not None:
        count = min(max(1, round(validation_share * len(labeled))), len(labeled) - 1)
        drawn = np.random.default_rng(seed).permutation(np.flatnonzero(validating))[:count]
        validating = np.isin(np.arange(len(labeled)), drawn)
        applied = ~validating
    counts = {
        "entries": len(read.images) + len(read.problems),
        "images": len(labeled),
        "validation_images": int(validating.sum()),
        "override_images": int(applied.sum()),
        "positive_labels": sum(len(ids["positive_ids"]) for ids in labels.values()),
        "quarantined": len(problems),
        **Counter(problem.kind for problem in problems),
        **{name: count for name, count in read.counts.items() if count},
    }
    return Imported(
        corrections,
        labeled.filter(pa.array(validating)),
        corrections.filter(pa.array(applied)),
        _quarantine(problems),
        counts,
    )


def _looked_up(
    read: Read, manifest: pa.Table, class_table: ClassTable, unmarked: Unmarked
) -> tuple[dict[int, dict[str, list[int]]], set[int], list[Problem]]:
    """Return labels by row of the manifest, which rows were looked at in full, and bad entries."""
    images = ImageIndex(manifest["image_id"].to_pylist(), manifest["uri"].to_pylist())
    names = ClassNames(class_table)
    labels: dict[int, dict[str, list[int]]] = {}
    in_full: set[int] = set()
    problems = list(read.problems)
    for entry in read.images:
        row = images.find(entry)
        found = row if isinstance(row, Problem) else _labels(entry, names, class_table, unmarked)
        if isinstance(found, Problem):
            problems.append(found)
        elif row in labels:
            reason = "the file has this image more than once: its first entry counts"
            problems.append(Problem(entry.called, "repeated_image", reason))
        else:
            assert isinstance(row, int)
            labels[row] = found
            if entry.full:
                in_full.add(row)
    return labels, in_full, problems


def write_import(
    imported: Imported, output: str, extra: Mapping[str, Any] | None = None, *, force: bool = False
) -> None:
    """Write the tables, the counts and further JSON files (by name) to a folder, in one step.

    Raises ConfigError when something else than an earlier import is at `output`.
    """
    refuse_existing(output, replace=force, marker=OVERRIDES)
    counts = imported.counts
    stats = {
        **counts,
        "table": "manifest",
        "rows_in": counts["entries"],
        "rows_out": counts["images"],
        "finished_at": time.time(),
    }
    with new_output(output, replace=force, marker=OVERRIDES, last=STATS_FILE) as target:
        folder = str(target)
        write_table(storage.join(folder, MANIFEST), imported.manifest)
        write_table(storage.join(folder, OVERRIDES), imported.overrides)
        write_table(storage.join(folder, "quarantine", "part-0.parquet"), imported.quarantine)
        for name, content in (extra or {}).items():
            storage.write_json(storage.join(folder, name), content)
        storage.write_json(storage.join(folder, STATS_FILE), stats)


def _labels(
    entry: ReadImage, names: ClassNames, class_table: ClassTable, unmarked: Unmarked
) -> dict[str, list[int]] | Problem:
    lists = (entry.positive, entry.negative or (), entry.ambiguous)
    (positive, negative, ambiguous), unknown = zip(*map(names.find, lists), strict=True)
    if any(unknown):
        return Problem(entry.called, "unknown_class", "; ".join(chain(*unknown)))
    both = set(positive) & {*ambiguous, *negative} | set(ambiguous) & set(negative)
    if both:
        name = class_table[class_table.index_of(min(both))].name
        return Problem(entry.called, "contradiction", f"{name!r} is listed in two ways")
    if unmarked == "negative" and (entry.negative is None or entry.full):
        taken = {*positive, *ambiguous}
        negative = [i for i in class_table.positions if i not in taken]
    ids = map(sorted, (positive, negative, ambiguous))
    return dict(zip(ANNOTATION_COLUMNS, ids, strict=True))


def _labeled(
    manifest: pa.Table, labels: Mapping[int, Mapping[str, list[int]]], split: str
) -> pa.Table:
    """Return the manifest's rows with these labels, in the manifest's order."""
    rows = sorted(labels)
    chosen = manifest.select(["image_id", "uri", "width", "height"]).take(pa.array(rows))
    decided = [{"split": split, **labels[row]} for row in rows]
    images = zip(chosen.to_pylist(), decided, strict=True)
    return pa.Table.from_pylist([image | labeled for image, labeled in images], MANIFEST_SCHEMA)


def _quarantine(problems: Sequence[Problem]) -> pa.Table:
    rows = [(p.reference, "import-labels", p.reference, p.kind, p.error) for p in problems]
    named = [dict(zip(QUARANTINE_SCHEMA.names, row, strict=True)) for row in rows]
    return pa.Table.from_pylist(named, QUARANTINE_SCHEMA)


def _nothing(read: Read, problems: Sequence[Problem]) -> str:
    if not problems:
        waiting = read.counts.get("not_reviewed", 0)
        tasks = f"{waiting} images are there, and none was reviewed: submit or finish them first"
        return f"no corrected label: {tasks if waiting else 'the file lists no image'}"
    kinds = Counter(problem.kind for problem in problems)
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    first = problems[0]
    return f"no entry can be used ({counts}): the first is {first.reference!r}, {first.error}"
