"""Everything that a run directory can show so far, as `ReportData`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.evaluate import few_shot_masks
from hts_ray.report.content import ClassRow, FunnelStep, ReportData, Section
from hts_ray.report.facts import read_quarantine, run_facts, stage_rows
from hts_ray.report.formatting import count, percent
from hts_ray.report.gallery import run_gallery
from hts_ray.report.label_quality import reliability
from hts_ray.report.read_run import ROWS_AT_ONCE, RunTables, read_run, rows_so_far
from hts_ray.report.results import (
    by_class,
    comparison_rows,
    last_part,
    precision_recall,
    read_training,
)
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, find_stage, stage_folders

DEFAULT_IMAGES = 200
DROP_REASONS = {
    "ignored_band": "below the class's threshold",
    "below_support": "too few regions agree",
    "over_cap": "over the cap of one image",
}
_TRAIN = "train"  # the split whose annotations decide what is few-shot, as in the evaluation


def report_for_run(
    run_dir: str,
    max_images: int = DEFAULT_IMAGES,
    *,
    labels_stage: StageFolder | None = None,
    sections: Sequence[Section] = (),
) -> ReportData:
    """Collect what a run directory holds so far; a stage that has not run is left out.

    - `max_images` bounds the gallery;
    - `labels_stage` is the pseudo_labels folder to show, the latest if not given;
    - `sections` are parts of the page that other modules made.

    Raises DataError when a table that is there cannot be read.
    """
    found = read_run(run_dir, labels_stage)
    student = find_stage(run_dir, "student")
    provenance = storage.read_object(storage.join(run_dir, "provenance.json"))
    curves = {
        name: precision_recall(values, list(found.names)) for name, values in found.metrics.items()
    }
    return ReportData(
        title=f"HTS report: {last_part(run_dir)}",
        intro=[*in_progress(run_dir, found), *_intro(found)],
        settings=found.config_text,
        provenance=provenance,
        facts=run_facts(run_dir, found.config, provenance),
        comparison=comparison_rows(found.metrics, "" if student is None else student.path),
        funnel=_funnel(found),
        stages=stage_rows(run_dir),
        per_class=_class_rows(found),
        precision_recall={name: curve for name, curve in curves.items() if curve},
        reliability=reliability(found.quality.judged),
        confusions=found.quality.confusions,
        training=read_training(run_dir, found.metrics),
        sections=sections,
        quarantine=read_quarantine(run_dir),
        gallery=run_gallery(found, max_images),
    )


def in_progress(run_dir: str, found: RunTables) -> list[str]:
    """Say how far the stages are that have a folder and are not finished: they run, or were cut."""
    label, predict = found.config.label, found.config.predict
    wanted = {
        "region_scores": ("label", label.splits, label.limit),
        "predictions": ("predict", predict.split and (predict.split,), None),
    }
    lines, moment = [], datetime.now(timezone.utc)
    shown = {one.folder.path for one in found.passes}
    for folder in [folder for table in wanted for folder in stage_folders(run_dir, table)]:
        if folder.finished:
            continue
        table = folder.table
        command, splits, limit = wanted[table]
        total = 0
        if found.manifest is not None:
            split = found.manifest["split"]
            total = len(split) if not splits else pc.sum(pc.is_in(split, pa.array(splits))).as_py()
        done, bad = rows_so_far(folder)
        if not done:
            continue
        left_out = f", {count(bad)} of them quarantined" if bad else ""
        lines.append(
            f"hts {command} is in progress, or was interrupted: {count(done)} of"
            f" {count(min(total, limit or total))} images are written{left_out}, as of"
            f" {moment:%Y-%m-%d %H:%M} UTC. "
            + (
                "The labels on this page are those so far; they may still change."
                if folder.path in shown
                else "This page shows the stages that are finished."
            )
        )
    return lines


def _intro(found: RunTables) -> list[str]:
    lines = []
    if found.manifest is not None:
        known = f", {count(len(found.annotations))} of them annotated" if found.annotations else ""
        of_classes = f", {count(len(found.names))} classes" if found.names else ""
        lines.append(f"{count(len(found.manifest))} images{known}{of_classes}.")
    right, wrong = found.quality.total("right"), found.quality.total("wrong")
    true_labels = found.quality.annotated.total()
    if right + wrong and true_labels:
        lines.append(
            f"Of the pseudo-labels on annotated images {percent(right / (right + wrong))} % are"
            f" right (precision); they find {percent(right / true_labels)} % of the"
            " annotated labels (recall). Annotations are used here to judge the pseudo-labels,"
            " never to make them."
        )
    return lines


def _funnel(found: RunTables) -> list[FunnelStep]:
    steps = []
    if found.manifest is not None:
        steps.append(FunnelStep("images", len(found.manifest)))
    if found.regions is not None:
        scored = found.regions.read(["status", "region_kinds"])
        usable = scored.filter(pc.equal(scored["status"], "ok"))
        regions = pc.sum(pc.list_value_length(usable["region_kinds"])).as_py() or 0
        steps.append(FunnelStep("images scored", len(usable), of="images"))
        steps.append(FunnelStep("regions", regions, of="images scored"))
    if found.labels is None:
        return steps
    dropped: Counter[str] = Counter()
    for batch in found.labels.select(["dropped"]).to_batches(max_chunksize=ROWS_AT_ONCE):
        for reasons in batch["dropped"].to_pylist():
            dropped.update(dict(reasons or ()))
    positive = pc.sum(pc.list_value_length(found.labels["positive_ids"])).as_py() or 0
    pairs, decided = "candidate classes", "images filtered"
    steps += [
        FunnelStep(decided, len(found.labels), of="images scored"),
        FunnelStep(
            pairs, positive + dropped.total(), of=decided, note="at or above the negative threshold"
        ),
        FunnelStep("positives kept", positive, of=pairs),
        FunnelStep("ignored", dropped.total(), of=pairs, note="left out of the loss"),
    ]
    return steps + [
        FunnelStep(f"ignored: {DROP_REASONS.get(reason, reason)}", number, of=pairs)
        for reason, number in dropped.most_common()
        if number
    ]


def _class_rows(found: RunTables) -> list[ClassRow]:
    """Return one row a class; precision and recall count annotated images only."""
    ap = {name: by_class(values, "ap", list(found.names)) for name, values in found.metrics.items()}
    if found.classes is None or (found.labels is None and not any(ap.values())):
        return []
    pseudo = _pseudo_labels(found.labels)
    few_shot = _few_shot(found)
    verdicts, annotated = found.quality.verdicts, found.quality.annotated
    rows = []
    for class_id, name in found.names.items():
        right, wrong = verdicts[class_id, "right"], verdicts[class_id, "wrong"]
        labeled, agreeing = pseudo.get(class_id, (0, 0))
        rows.append(
            ClassRow(
                class_id=class_id,
                name=name,
                annotated=annotated[class_id] if annotated else None,
                pseudo=labeled if found.labels is not None else None,
                precision=right / (right + wrong) if right + wrong else None,
                recall=right / annotated[class_id] if annotated[class_id] else None,
                ap={method: values.get(class_id) for method, values in ap.items() if values},
                support=agreeing / labeled if labeled else None,
                few_shot=few_shot.get(class_id),
            )
        )
    return rows


def _pseudo_labels(labels: pa.Table | None) -> dict[int, tuple[int, int]]:
    """Return by class id the pseudo-labels, and how many regions agree on them in all."""
    if labels is None:
        return {}
    columns = [pc.list_flatten(labels[name]) for name in ("positive_ids", "support")]
    found = pa.table(columns, ["class_id", "regions"]).group_by("class_id")
    counted = found.aggregate([("regions", "count"), ("regions", "sum")]).to_pylist()
    return {row["class_id"]: (row["regions_count"], row["regions_sum"]) for row in counted}


def _few_shot(found: RunTables) -> dict[int, int]:
    """Return the smallest n of Few@n of each class that is in one, counted as the metrics do."""
    if found.classes is None:
        return {}
    counts_C = None
    if found.manifest is not None:
        train = found.manifest.filter(pc.equal(found.manifest["split"], _TRAIN))
        train = train.filter(train["positive_ids"].is_valid())
        if len(train):
            counts = Counter(pc.list_flatten(train["positive_ids"]).to_pylist())
            counts_C = np.array([counts[int(class_id)] for class_id in found.classes.ids])
    masks = few_shot_masks(counts_C, found.classes)
    return {
        int(class_id): min(levels)
        for place, class_id in enumerate(found.classes.ids)
        if (levels := [level for level, mask_C in masks.items() if mask_C[place]])
    }
