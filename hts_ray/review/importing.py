"""`hts import-labels`: corrected labels in, a labeled manifest and overrides for the filter out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from hts_ray.classes import ClassTable
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.manifest import FILE as MANIFEST
from hts_ray.labels.corrections import OVERRIDES
from hts_ray.review.corrected_files import Problem, Read, ReadImage
from hts_ray.review.lookup import (
    CONTRADICTION,
    REPEATED,
    UNKNOWN_CLASS,
    ClassNames,
    ImageIndex,
)
from hts_ray.store import storage
from hts_ray.store.outputs import new_output, refuse_existing
from hts_ray.store.tables import (
    CORRECTIONS_SCHEMA,
    MANIFEST_SCHEMA,
    QUARANTINE_SCHEMA,
    STATS_FILE,
    write_table,
)

Unmarked = Literal["negative", "unknown"]
STAGE = "import-labels"


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
    - `unmarked` is what a class is that the file does not list; where it lists negatives, the rest
      is unknown.
    - `validation_share` in (0, 1) divides the images at random (by `seed`) between the manifest and
      the overrides; without it both hold all.

    Raises ConfigError for a share out of range, DataError when no entry can be used.
    """
    if validation_share is not None and not 0 < validation_share < 1:
        raise ConfigError(
            field="--validation-share", value=validation_share, remedy="give a number in (0, 1)"
        )
    labels, problems = _looked_up(read, manifest, class_table, unmarked)
    if not labels:
        raise DataError(_nothing(read, problems))
    labeled = _labeled(manifest, labels, split)
    corrections = labeled.select(CORRECTIONS_SCHEMA.names).replace_schema_metadata(
        CORRECTIONS_SCHEMA.metadata
    )
    validating = applied = np.ones(len(labeled), dtype=bool)
    if validation_share is not None:
        count = min(max(1, round(validation_share * len(labeled))), len(labeled) - 1)
        drawn = np.random.default_rng(seed).permutation(len(labeled))[:count]
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
) -> tuple[dict[int, dict[str, list[int]]], list[Problem]]:
    """Return labels by row of the manifest, and the entries that cannot be used."""
    images = ImageIndex(manifest["image_id"].to_pylist(), manifest["uri"].to_pylist())
    names = ClassNames(class_table)
    labels: dict[int, dict[str, list[int]]] = {}
    problems = list(read.problems)
    for entry in read.images:
        row = images.find(entry)
        found = row if isinstance(row, Problem) else _labels(entry, names, class_table, unmarked)
        if isinstance(found, Problem):
            problems.append(found)
        elif row in labels:
            reason = "the file has this image more than once: its first entry counts"
            problems.append(Problem(entry.called, REPEATED, reason))
        else:
            assert isinstance(row, int)
            labels[row] = found
    return labels, problems


def write_import(
    imported: Imported,
    output: str,
    extra: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
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
    positive, unknown = names.find(entry.positive)
    ambiguous, more = names.find(entry.ambiguous)
    negative, even_more = names.find(entry.negative or ())
    unknown += [*more, *even_more]
    if unknown:
        return Problem(entry.called, UNKNOWN_CLASS, "; ".join(unknown))
    both = set(positive) & {*ambiguous, *negative} | set(ambiguous) & set(negative)
    if both:
        name = class_table[class_table.index_of(min(both))].name
        return Problem(entry.called, CONTRADICTION, f"{name!r} is listed in two ways")
    if entry.negative is None and unmarked == "negative":
        taken = {*positive, *ambiguous}
        negative = [i for i in class_table.positions if i not in taken]
    return {
        "positive_ids": sorted(positive),
        "negative_ids": sorted(negative),
        "ambiguous_ids": sorted(ambiguous),
    }


def _labeled(
    manifest: pa.Table, labels: Mapping[int, Mapping[str, list[int]]], split: str
) -> pa.Table:
    """Return the manifest's rows with these labels, in the manifest's order."""
    rows = sorted(labels)
    chosen = manifest.take(pa.array(rows))
    columns = {name: chosen[name] for name in ("image_id", "uri", "width", "height")}
    columns["split"] = pa.array([split] * len(rows))
    for name in ("positive_ids", "negative_ids", "ambiguous_ids"):
        columns[name] = pa.array([labels[row][name] for row in rows], pa.list_(pa.int16()))
    arrays = [columns[field.name].cast(field.type) for field in MANIFEST_SCHEMA]
    return pa.table(arrays, schema=MANIFEST_SCHEMA)


def _quarantine(problems: Sequence[Problem]) -> pa.Table:
    rows = [
        {
            "image_id": problem.reference,
            "stage": STAGE,
            "uri": problem.reference,
            "error_kind": problem.kind,
            "error": problem.error,
        }
        for problem in problems
    ]
    return pa.Table.from_pylist(rows, QUARANTINE_SCHEMA)


def _nothing(read: Read, problems: Sequence[Problem]) -> str:
    if not problems:
        waiting = read.counts.get("not_reviewed", 0)
        tasks = f"{waiting} tasks are there, and none was reviewed"
        return f"no corrected label: {tasks if waiting else 'the file lists no image'}"
    kinds = Counter(problem.kind for problem in problems)
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    first = problems[0]
    return f"no entry can be used ({counts}): the first is {first.reference!r}, {first.error}"
