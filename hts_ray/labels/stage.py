"""The filter stage: region_scores in, pseudo_labels out; no teacher, no annotation.

Few images are filtered in this process, many on Ray, by the same functions on the same blocks.

Shapes: N images, C classes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hts_ray.config import FilterConfig
from hts_ray.engine.blocks import Here, Kept, blocks_of
from hts_ray.engine.image_pass import committed_files
from hts_ray.engine.run import Run, Stage
from hts_ray.errors import NoLabelsError
from hts_ray.labels.blocks import (
    PART_IMAGES,
    Reading,
    count_bins,
    entries_of,
    entry_rows,
    label_rows,
    plan_blocks,
    read_block,
    total,
    write_part,
)
from hts_ray.labels.corrections import decisions, overrides_key, read_overrides, require_used
from hts_ray.labels.evidence import (
    Evidence,
    filter_info,
    refuse_nothing,
    region_files,
    score_sums,
    wants_sample_prior,
)
from hts_ray.labels.passes import TeacherPass, chosen_passes, together
from hts_ray.labels.select import REASONS, Bins, Counted, Selection, select, summary
from hts_ray.store import storage
from hts_ray.store.aliases import FloatArray
from hts_ray.store.run import StageFolder, settings_hash


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """What the filter makes of N images, in the evidence's order.

    What people decided is in `evidence` and `selection`: their positives have probability 1.
    """

    evidence: Evidence
    selection: Selection


def plan_filter(run: Run, region_scores: StageFolder | None = None) -> Stage:
    """Plan the filter: regional scores in, `pseudo_labels` out.

    It reads the passes that `filter.passes` names, else `region_scores`. Raises DataError for
    corrections that cannot be read, and as `chosen_passes`.
    """
    config, split = run.config.filter, run.config.train.split
    passes = chosen_passes(run.run_dir, config, region_scores)
    parts: list[Any] = [config.answer_settings(), split]
    if config.passes is None:
        parts += [passes[0].folder.key]
    else:
        parts += [[one.record() for one in passes], config.combine]
    parts += [run.class_table.fingerprint()]
    if config.overrides is not None:
        parts += ["overrides", overrides_key(config.overrides)]
    folder = run.stage("pseudo_labels", settings_hash(*parts))

    def work(_progress: object) -> object:
        many = len(passes) == 1 and passes[0].images > config.local_images
        with blocks_of(run.config, "filter", config.nodes, many=many) as blocks:
            return filter_regions(config, passes, split, folder, blocks)

    read = ", ".join(one.folder.path for one in passes)
    return Stage(folder, {"region_scores": read}, work)


def labels_so_far(one: TeacherPass, split: str | None) -> pa.Table:
    """Return the `pseudo_labels` rows of what an unfinished pass has written, without storing them.

    They are provisional: quantiles and a sample's prior move with every image that is added.
    Raises DataError when nothing of the split is there yet.
    """
    found, thresholds_C = gather([one], one.config, split, None, Here())
    class_ids = np.asarray(one.info["class_ids"], dtype=np.int16)
    kept = [table for part in found.parts for table in part]
    return label_rows(one.config, class_ids, thresholds_C, *kept)[0]


@dataclass(frozen=True, eq=False)
class Gathered:
    """What can matter of all images: the entries of blocks, by the file of labels they belong to.

    `first_CB` is what the first round of thresholds counted, `images` counts what is filtered,
    `corrected` are the ids that corrections decided about, `sample_prior` is that of a single pass,
    and `combined` counts several.
    """

    parts: list[list[Kept]]
    first_CB: npt.NDArray[np.int64]
    images: int
    corrected: list[str]
    combined: dict[str, int]
    sample_prior: list[float] | None = None


def gather(
    passes: Sequence[TeacherPass],
    config: FilterConfig,
    split: str | None,
    overrides: pa.Table | None,
    blocks: Here,
) -> tuple[Gathered, FloatArray]:
    """Look at every image once, and find the thresholds (C,); raises as `image_evidence`.

    Several passes are made one in this process, image by class; a single one stays in its blocks.
    """
    class_ids = np.asarray(passes[0].info["class_ids"], dtype=np.int16)
    bins = Bins.first(len(class_ids), config, np.dtype(np.float32))
    if len(passes) == 1:
        found = _blocks_of_one(passes[0], config, split, bins, overrides, blocks)
    else:
        evidence, combined = together(passes, config, split)
        table, used = entry_rows(evidence, config, class_ids, overrides)
        starts = range(0, len(table), PART_IMAGES)
        parts, blocks = [[table.slice(start, PART_IMAGES)] for start in starts], Here()
        first_CB = bins.total([bins.count(entries_of(table))])
        found = Gathered(parts, first_CB, len(table), used, combined)

    def count(now: Bins) -> Iterable[Counted]:
        return blocks.map(count_bins, found.parts, now)

    return found, bins.thresholds(found.first_CB, count, found.images, config)


def _blocks_of_one(
    one: TeacherPass,
    config: FilterConfig,
    split: str | None,
    bins: Bins,
    overrides: pa.Table | None,
    blocks: Here,
) -> Gathered:
    """Return what is kept of a pass's blocks."""
    path, sums, files = one.folder.path, None, region_files(one.folder.path)
    if not one.folder.finished:  # what a worker that died has written is written again
        files = {file: files[file] for file in committed_files(one.folder) if file in files}
    every = 0 if config.negative_threshold else len(one.info["class_ids"])
    plan = plan_blocks(files, one.images, every)
    flat = [(part, files) for part, of_part in enumerate(plan) for files in of_part]
    calls = [(files,) for _, files in flat]
    if wants_sample_prior(one.info, config):
        sums = itertools.chain.from_iterable(blocks.map(score_sums, calls, path, split))
    info = filter_info(path, config, split, sums)
    reading = Reading(path, info, config, split, bins, overrides)
    parts: list[list[Kept]] = [[] for _ in plan]
    images, kinds, used = 0, set[str](), list[str]()

    def counted() -> Iterator[Counted]:
        nonlocal images
        looked = blocks.keep(read_block, calls, reading)
        for (part, _), (kept, counts) in zip(flat, looked, strict=True):
            kinds.update(counts["kinds"])
            if counts["images"]:
                parts[part].append(kept)
                images += counts["images"]
                used.extend(counts["corrected"])
                yield counts["bins"]

    first_CB = bins.total(counted())
    if not images:
        refuse_nothing(path, config, split, kinds)
    prior = info.get("sample_prior")
    return Gathered([part for part in parts if part], first_CB, images, used, {}, prior)


def filter_regions(
    config: FilterConfig,
    passes: Sequence[TeacherPass],
    split: str | None,
    stage: StageFolder,
    blocks: Here | None = None,
) -> dict[str, Any]:
    """Write `pseudo_labels` for the images of `split` (None: all) and return the stage's counts.

    The counts hold how many candidates were dropped for each reason. Raises NoLabelsError when no
    image keeps a positive class. `blocks` calls what looks at blocks, this process if not given.
    """
    if stage.finished:
        return stage.stats
    started = time.perf_counter()
    blocks = Here() if blocks is None else blocks
    class_ids = np.asarray(passes[0].info["class_ids"], dtype=np.int16)
    overrides = None if config.overrides is None else read_overrides(config.overrides)
    found, thresholds_C = gather(passes, config, split, overrides, blocks)
    if overrides is not None:
        require_used(overrides, len(found.corrected), found.images)
    storage.remove_tree(stage.path)  # what a run that was cut off left
    calls = [(stage.file(f"part-{n:05d}.parquet"), *part) for n, part in enumerate(found.parts)]
    counts = total(blocks.map(write_part, calls, config, class_ids, thresholds_C))
    figures = summary(counts)
    if figures["positives"] == 0:
        storage.remove_tree(stage.path)
        dropped = ", ".join(f"{name} {counts[name]}" for name in REASONS)
        raise NoLabelsError(
            f"no pseudo-label is left ({dropped}): look at the teacher's scores with"
            " `hts label --dry-run`, lower filter.positive_threshold or filter.min_support, or set"
            " filter.background=false if every image shows one of the classes"
        )
    _write_info(stage, config, passes, split, found)
    corrections = {
        "corrected_images": len(found.corrected),
        "corrected_labels": counts["changed"],
        "overrides_unused": len(overrides or ()) - len(found.corrected),
    }
    positives = zip(map(str, class_ids.tolist()), counts["positives_C"].tolist(), strict=True)
    seconds = time.perf_counter() - started
    stage.publish(
        {
            **figures,
            **found.combined,
            **({} if overrides is None else corrections),
            "rows_in": found.images,
            "rows_out": found.images,
            "quarantined": 0,
            "seconds": round(seconds, 3),
            "rows_per_second": round(found.images / max(seconds, 1e-9), 1),
            "positives_per_class": dict(positives),
        }
    )
    return stage.stats


def _write_info(
    stage: StageFolder,
    config: FilterConfig,
    passes: Sequence[TeacherPass],
    split: str | None,
    found: Gathered,
) -> None:
    """Write `table.json`: what the labels were made from, as `made_from` reads it."""
    info = {
        "class_ids": passes[0].info["class_ids"],
        "filter": config.answer_settings(),
        "region_scores": passes[0].name,
        "sample_prior": found.sample_prior,
        "combine": config.combine if found.combined else None,
        "split": split,
        "corrected_ids": sorted(found.corrected),
    }
    if found.combined:
        info["passes"] = [one.record() for one in passes]
    storage.write_json(stage.file("table.json"), info)


def choose_labels(
    evidence: Evidence,
    config: FilterConfig,
    class_ids: npt.NDArray[np.int16],
    overrides: pa.Table | None = None,
) -> PseudoLabels:
    """Select the labels of N images at once, and put what people decided in place of them.

    `class_ids` (C,) are those of the evidence's columns, `overrides` rows of corrections.
    """
    p_NC, decided_NC = evidence.probabilities_NC, None
    if overrides is not None:
        ids = evidence.images["image_id"].combine_chunks()
        decided_NC, _ = decisions(overrides, ids, class_ids)
    selection = select(p_NC, evidence.support_NC, config, decided_NC)
    if decided_NC is not None:
        p_NC = np.where(decided_NC == 1, np.float32(1), p_NC)
    return PseudoLabels(replace(evidence, probabilities_NC=p_NC), selection)
