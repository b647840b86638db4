"""The filter over blocks of images: what can matter is kept of each, then labels are written.

Pure functions that run in one process or as tasks of a cluster; `labels.stage` calls them. The
first look at a block keeps its sparse `Entries`, as rows of an Arrow table; thresholds are found
over all blocks; the second look, at the rows of a file of labels, needs nothing else.

Shapes: N images, C classes, E entries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import FilterConfig
from hts_ray.labels.corrections import decisions
from hts_ray.labels.evidence import Evidence, aggregate_regions, read_regions
from hts_ray.labels.select import REASONS, Bins, Counted, Entries, choose, corrected, find_entries
from hts_ray.store.aliases import FloatArray
from hts_ray.store.tables import PSEUDO_LABELS_SCHEMA, write_table

# What one call reads at most, about: bytes of stored scores, and images where they are small.
_BLOCK_BYTES, _BLOCK_IMAGES = 128 << 20, 1 << 15
PART_IMAGES = 1 << 18  # about what one file of labels holds: tens of MB
_PART_ENTRIES = 1 << 24  # of which a call holds some copies: at most 1 GB
_ENTRY = ("column", "probability", "support", "decided")
Counts = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Reading:
    """How the blocks of a pass are read; `info` is `filter_info` of its folder.

    `bins` are those of the first round, `overrides` the corrections or None.
    """

    path: str
    info: dict[str, Any]
    config: FilterConfig
    split: str | None
    bins: Bins
    overrides: pa.Table | None

    @property
    def class_ids(self) -> npt.NDArray[np.int16]:
        """The ids (C,) of the classes."""
        return np.asarray(self.info["class_ids"], dtype=np.int16)


def plan_blocks(
    files: Mapping[str, int],
    images: int,
    entries: int = 0,
    *,
    block_bytes: int = _BLOCK_BYTES,
    part_images: int = PART_IMAGES,
) -> list[list[list[str]]]:
    """Return the `region_files` of a pass as parts of some blocks; each becomes a file of labels.

    A part has the score files of about `part_images` of its `images`, or of fewer where an image
    has so many `entries` (0: few), a block those of `block_bytes`. What a part holds does not
    depend on the size of the blocks.
    """
    part_images = min(part_images, _PART_ENTRIES // entries) if entries else part_images
    per_image = sum(files.values()) / images if images else np.inf
    part_bytes, at_most = per_image * part_images, min(block_bytes, per_image * _BLOCK_IMAGES)
    parts: list[list[list[str]]] = []
    before = 0
    for file, size in files.items():
        number = int(before // part_bytes)
        if len(parts) <= number or not parts:
            parts += [[[]]]
            filled = 0
        elif filled >= at_most:
            parts[-1].append([])
            filled = 0
        parts[-1][-1].append(file)
        filled, before = filled + size, before + size
    return parts


def read_block(reading: Reading, files: Sequence[str]) -> tuple[pa.Table, Counts]:
    """Return the entries of a block's images, and counts of them.

    Counts: `images`, `kinds` of regions that are stored, `corrected` ids, and in `bins` what the
    first round of thresholds counts.
    """
    tables, kinds, used = [], set[str](), list[str]()
    for regions in read_regions(reading.path, reading.split, files=files, info=reading.info):
        kinds.update(np.unique(regions.kinds_G).tolist())
        evidence = aggregate_regions(regions, reading.config).seen()
        table, ids = entry_rows(evidence, reading.config, reading.class_ids, reading.overrides)
        tables.append(table)
        used += ids
    whole = pa.concat_tables(tables).combine_chunks() if tables else None
    counts = {"images": 0, "kinds": kinds, "corrected": used, "bins": None}
    if whole is not None:
        counts |= {"images": len(whole), "bins": reading.bins.count(entries_of(whole))}
    return whole, counts


def entry_rows(
    evidence: Evidence,
    config: FilterConfig,
    class_ids: npt.NDArray[np.int16],
    overrides: pa.Table | None,
) -> tuple[pa.Table, list[str]]:
    """Return image_id, uri, split and `entries` of images, and which of them were corrected."""
    decided_NC, used = None, list[str]()
    if overrides is not None:
        ids = evidence.images["image_id"].combine_chunks()
        decided_NC, used = decisions(overrides, ids, class_ids)
    found = find_entries(evidence.probabilities_NC, evidence.support_NC, config, decided_NC)
    columns = (found.column_E.astype(np.int16), found.probability_E, found.support_E)
    values = pa.StructArray.from_arrays(
        [pa.array(values_E) for values_E in (*columns, found.decided_E)], _ENTRY
    )
    return evidence.images.append_column("entries", _lists(found, slice(None), values)), used


def entries_of(table: pa.Table) -> Entries:
    """Return the entries of `entry_rows`."""
    lists = table["entries"].combine_chunks()
    values = lists.flatten()
    return Entries(
        len(table),
        pc.list_parent_indices(lists).to_numpy(),
        *(values.field(name).to_numpy() for name in _ENTRY),
    )


def count_bins(bins: Bins, *tables: pa.Table) -> Counted:
    """Return what a round of the search for thresholds counts in the entries of blocks."""
    return bins.count(entries_of(pa.concat_tables(tables)))


def label_rows(
    config: FilterConfig,
    class_ids: npt.NDArray[np.int16],
    thresholds_C: FloatArray,
    *tables: pa.Table,
) -> tuple[pa.Table, Counts]:
    """Return the `pseudo_labels` rows of images by id, and counts; positives fall in probability.

    Counts: `images`, `bare` (without a positive), `positives_C`, `ignored`, `changed` by people,
    and candidates that were dropped by reason, before corrections.
    """
    table = pa.concat_tables(tables).sort_by("image_id").combine_chunks()
    found = entries_of(table)
    machine_E, reasons_N = choose(found, thresholds_C, config)
    target_E = corrected(found, machine_E)
    # What people call positive is certain.
    probability_E = np.where(found.decided_E == 1, np.float32(1), found.probability_E)
    positives = np.flatnonzero(target_E == 1)
    order = np.lexsort((-probability_E[positives], found.row_E[positives]))  # is stable
    positives = positives[order]
    ignored = np.flatnonzero(target_E == 0)
    ids_E = class_ids[found.column_E]
    reasons = np.stack([reasons_N[name] for name in REASONS], axis=1).ravel()
    names = pa.array([*REASONS] * len(table))
    starts = pa.array(np.arange(len(table) + 1, dtype=np.int32) * len(REASONS))
    columns = {
        "positive_ids": _lists(found, positives, ids_E[positives]),
        "ignored_ids": _lists(found, ignored, ids_E[ignored]),
        "probability": _lists(found, positives, probability_E[positives]),
        "support": _lists(found, positives, found.support_E[positives]),
        "dropped": pa.MapArray.from_arrays(starts, names, pa.array(reasons)),
    }
    columns = {n: table[n] for n in ("image_id", "uri", "split")} | columns
    of_row = np.bincount(found.row_E[positives], minlength=len(table))
    counts = {
        "images": len(table),
        "bare": int((of_row == 0).sum()),
        "positives_C": np.bincount(found.column_E[positives], minlength=len(class_ids)),
        "ignored": len(ignored),
        "changed": int((target_E != machine_E).sum()),
        **{name: int(reasons_N[name].sum()) for name in REASONS},
    }
    return pa.table(columns, schema=PSEUDO_LABELS_SCHEMA), counts


def write_part(
    config: FilterConfig,
    class_ids: npt.NDArray[np.int16],
    thresholds_C: FloatArray,
    path: str,
    *tables: pa.Table,
) -> Counts:
    """Write `label_rows` as one file, and return their counts."""
    rows, counts = label_rows(config, class_ids, thresholds_C, *tables)
    write_table(path, rows)
    return counts


def total(counts: Iterable[Mapping[str, Any]]) -> Counts:
    """Add up counts of the same names."""
    summed: Counts = defaultdict(int)
    for of_block in counts:
        for name, value in of_block.items():
            summed[name] = summed[name] + value
    return summed


def _lists(found: Entries, chosen: Any, values: Any) -> pa.ListArray:
    """Return values of some entries, which are in the order of their images, as a list an image."""
    lengths_N = np.bincount(found.row_E[chosen], minlength=found.images)
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
    values = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
