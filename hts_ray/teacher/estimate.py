"""What a teacher pass will take and what it will say, measured on a few images beforehand.

Runs in the driver's process, without Ray, and writes nothing. Shape legend: R regions, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hts_ray.classes import ClassTable
from hts_ray.config import FilterConfig, LabelConfig
from hts_ray.engine.decoding import decode_batch
from hts_ray.images.decode import DecodedImage
from hts_ray.images.manifest import Manifest
from hts_ray.images.regions import Region
from hts_ray.labels.evidence import class_probabilities, with_sample_prior
from hts_ray.teacher.actor import image_task, region_scorer, table_info
from hts_ray.teacher.assignment import Assignment
from hts_ray.teacher.models.chat import ChatTeacher, cost_of
from hts_ray.teacher.models.loading import load_on_device
from hts_ray.teacher.scorers import ImageTask, RegionScorer, ScoredImage

_TOP = 3


@dataclass(frozen=True)
class RegionExample:
    """A region of a sampled image: its caption, and its likeliest classes with probabilities."""

    region: Region
    caption: str
    top_classes: list[tuple[str, float]]


@dataclass(frozen=True, eq=False)
class ImageExample:
    """A sampled image with everything the teacher says of it."""

    image_id: str
    uri: str
    image: DecodedImage
    regions: list[RegionExample]


@dataclass(frozen=True, eq=False)
class Estimate:
    """Figures of a teacher pass by their names, and the sample they were measured on.

    Times in seconds; those of the run, "seconds in all" and "GPU-hours", hold for pool.max_size
    actors and are None when no sampled image could be scored.
    """

    figures: dict[str, Any]
    examples: list[ImageExample]


def estimate(
    config: LabelConfig,
    manifest: Manifest,
    class_table: ClassTable,
    *,
    sample: int = 4,
    filtering: FilterConfig | None = None,
) -> Estimate:
    """Measure the teacher on `sample` images spread over the manifest, and extrapolate.

    The first scored image is scored twice: once to warm up. A teacher that takes images side by
    side gets them all at once, and what they cost is extrapolated too. Where this node has no GPU,
    the CPU is measured. Class probabilities are those that `filtering` would make of the scores.
    Raises as a run would for settings it refuses.
    """
    selection = manifest.rows(config.splits, config.limit, config.limit_seed)
    assignment = Assignment.plan(config, class_table, selection)
    started = time.monotonic()
    captioner, device = load_on_device(assignment.config, or_cpu=True)
    scorer = region_scorer(captioner, assignment, device)
    load_seconds = time.monotonic() - started
    sample = min(sample, selection.num_rows)
    scored, measured = _measured(scorer, _sampled(selection, sample, config))
    used = dict(captioner.usage) if isinstance(captioner, ChatTeacher) else {}
    info = table_info(captioner, assignment)
    count, pool = selection.num_rows, config.pool
    regions = per_image = seconds = None
    if scored:
        per_image = measured / len(scored)
        seconds = per_image * count / pool.max_size
        regions = sum(len(result.regions) for _, result in scored) / len(scored)
    figures = {
        "images": count,
        "regions": None if regions is None else round(regions * count),
        "prompts": 0 if config.teacher.mode == "captions" else sum(map(len, info["prompts"])),
        "background sentences": len(assignment.background),
        "tokens a region": sum(sum(of_class) for of_class in info["token_counts"]),
        "sample": len(scored),
        "sample quarantined": sample - len(scored),
        "device": config.teacher.endpoint or device,
        "seconds to load": load_seconds,
        "seconds an image": per_image,
        "regions an image": regions,
        "seconds in all": None if seconds is None else load_seconds + seconds,
        "GPU-hours": None if seconds is None else seconds * pool.max_size * pool.gpus / 3600,
    }
    if scored and used:
        in_all = {name: round(value * count / len(scored)) for name, value in used.items()}
        figures |= in_all | cost_of(in_all, config.teacher.requests)
    chosen = filtering or FilterConfig()
    return Estimate(figures, _examples(scored, scorer, info, assignment, chosen))


def _sampled(selection: pa.Table, sample: int, config: LabelConfig) -> list[ImageTask]:
    """Return the readable ones of `sample` images spread over the selected ones."""
    rows = np.linspace(0, selection.num_rows - 1, sample).astype(int)
    decoded = decode_batch(selection.take(rows), config.images)
    good = np.flatnonzero(decoded["error_kind"].is_null().to_numpy()).tolist()
    return [image_task(decoded, row) for row in good]


def _measured(
    scorer: RegionScorer, tasks: Sequence[ImageTask]
) -> tuple[list[tuple[ImageTask, ScoredImage]], float]:
    """Score images; returns those that could be, and the seconds that they took together."""
    scored: list[tuple[ImageTask, ScoredImage]] = []
    seconds, batches = 0.0, [tasks]
    if tasks and not isinstance(scorer.captioner, ChatTeacher):
        scorer(tasks[:1])
        batches = [[task] for task in tasks]
    for batch in batches:
        started = time.monotonic()
        results = zip(batch, scorer(batch), strict=True)
        good = [(task, result) for task, result in results if isinstance(result, ScoredImage)]
        if good:
            scored += good
            seconds += time.monotonic() - started
    return scored, seconds


def _examples(
    scored: Sequence[tuple[ImageTask, ScoredImage]],
    scorer: RegionScorer,
    info: dict[str, Any],
    assignment: Assignment,
    filtering: FilterConfig,
) -> list[ImageExample]:
    names, settings = assignment.class_table.names, assignment.config.teacher.caption
    info = with_sample_prior(info, [(1, result.scores) for _, result in scored])
    examples = []
    for task, result in scored:
        captions = result.captions
        if not any(captions):
            captions = scorer.captions_of(task, result.regions, settings)
        probabilities_RC = class_probabilities(result.scores, info, filtering)
        regions = []
        for region, said, of_region in zip(result.regions, captions, probabilities_RC, strict=True):
            best = np.argsort(-of_region, kind="stable")[:_TOP].tolist()
            top = [(names[c], float(of_region[c])) for c in best if of_region[c] > 0]
            regions.append(RegionExample(region, " / ".join(said), top))
        examples.append(ImageExample(task.image_id, task.uri, task.image, regions))
    return examples
