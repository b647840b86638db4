"""The stages as commands: what they print; what they do is in `hts_ray.stages`."""

from __future__ import annotations

import textwrap
from typing import Any

import click

from hts_ray import stages
from hts_ray.captions.matching import negated_names
from hts_ray.cli.completers import complete_path_or_setting
from hts_ray.cli.options import (
    Settings,
    argument,
    option,
    print_metrics,
    print_next_stage,
    readable,
    refuse_options,
    stage_command,
)
from hts_ray.cli.predict_paths import predict_paths
from hts_ray.engine.console import (
    busy,
    console,
    image_progress,
    percent,
    print_line,
    print_mapping,
    print_next,
    print_note,
    print_rows,
    print_stage,
    print_written,
)
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError
from hts_ray.images.decode import HEIC_REMEDY
from hts_ray.images.stage import SOURCES, prepare_manifest
from hts_ray.labels.stage import plan_filter
from hts_ray.report.preview import write_preview
from hts_ray.store import storage
from hts_ray.store.run import require_stage
from hts_ray.teacher.estimate import estimate as estimate_label
from hts_ray.teacher.stage import plan_label


@click.command()
@argument("source", type=click.Choice(SOURCES))
@option("--root", required=True, metavar="PATH",
        help="Folder, table, shards (a {000..099} pattern too) or hub id.")  # fmt: skip
@option("--no-headers", is_flag=True, help="Open no image: bad ones show later, sizes are unknown.")
@stage_command()
def prepare(settings: Settings, source: str, root: str, no_headers: bool) -> None:
    """List the images of a folder or of shards or of HICO in a manifest."""
    run = settings.open()
    if no_headers:
        run = run.changed({"prepare": {"headers": False}})
    if settings.dry_run:
        write = storage.join(run.run_dir, "manifest-*")
        print_mapping("plan", {"read": f"{source} {root}", "write": write})
        if "{" not in root and source != "huggingface" and not storage.exists(root):
            raise ConfigError(field="--root", value=root, remedy="no such file or folder")
        return
    stage = stages.prepare(run, source, root)
    print_stage("prepare", stage)
    counts = {k: v for k, v in stage.stats.items() if v and isinstance(v, int) and "rows" not in k}
    print_mapping("counted", counts)
    if source != "hico" and run.config.classes.source == "hico" and run.config.classes.ids is None:
        print_note("the classes are HICO's 600: name yours with classes.source=FILE")
    if counts.get("needs_heic"):
        print_line(f"{counts['needs_heic']} HEIC pictures were left out: {HEIC_REMEDY}")
    print_next_stage("label", run)


@click.command()
@option("--manifest", metavar="PATH", help="Manifest to label (default: the run's).")
@option("--limit", type=click.IntRange(1), metavar="N", help="Label a seeded sample only.")
@option("--sample", default=4, type=click.IntRange(1), metavar="N",
        help="Images that --dry-run measures (default 4).")  # fmt: skip
@option("--preview", metavar="FILE", help="With --dry-run: an HTML page of the sample.")
@stage_command()
def label(
    settings: Settings, manifest: str | None, limit: int | None, sample: int, preview: str | None
) -> None:
    """Score every class prompt on every region of every image (the teacher)."""
    if not settings.dry_run:
        refuse_options({"preview": preview}, "give --dry-run with it")
    run = settings.open()
    negated = ", ".join(negated_names(run.class_table))
    mode = run.config.label.teacher.mode
    if negated and mode != "captions":
        console.print(f"negated classes need label.teacher.mode=captions, not {mode}: {negated}")
    if settings.dry_run:
        with stages.placed(stages.limited(run, limit), "label") as (on_devices, _):
            _preview_label(on_devices, manifest, sample, preview)
        return
    stage = stages.label(run, manifest, limit=limit)
    print_stage("label", stage)
    if stage.stats.get("bad_boxes"):
        bad = stage.stats["bad_boxes"]
        console.print(f"{bad} boxes could not be used: see the quarantine table")
    print_next_stage("filter", run)


def _preview_label(run: Run, given: str | None, sample: int, preview: str | None) -> None:
    """Measure the teacher on a sample, and show what it says of it."""
    manifest, config = run.manifest(given), run.config
    plan = plan_label(run, manifest)
    measured = estimate_label(
        config.labeling, manifest, run.class_table, sample=sample, filtering=config.filter
    )
    for example in measured.examples:
        rows = [
            [
                f"{shown.region.kind} +{shown.region.margin:g}" if shown.region.margin
                else shown.region.kind,
                " ".join(f"{side:.0f}" for side in shown.region.box),
                _short(", ".join(f"{name} {percent(p)}" for name, p in shown.top_classes)),
                _short(shown.caption),
            ]
            for shown in example.regions
        ]  # fmt: skip
        title = f"{example.uri} ({example.image.width} x {example.image.height})"
        header = ["region", "box", "likeliest classes, %", "caption"]
        print_rows(title, header, rows, text_columns=4)
    figures = readable(measured.figures)
    print_mapping("plan", {"read": manifest.path, "write": plan.folder.path, **figures})
    if preview:
        write_preview(preview, measured)
        print_written("preview", preview)


def _short(text: str) -> str:
    """Cut a table's cell, so that the columns before it keep their width."""
    return textwrap.shorten(text, 60, placeholder=" ...")


@click.command("filter")
@option("--region-scores", metavar="DIR", help="Teacher pass to use (default: the latest).")
@stage_command(from_sweep=True)
def filter_command(settings: Settings, region_scores: str | None, from_sweep: str | None) -> None:
    """Turn regional scores into positives, ignored and negatives."""
    run = settings.open()
    given = region_scores or _swept_scores(from_sweep)
    if settings.dry_run:
        plan = stages.plan_filtering(run, given)
        print_mapping("plan", {"read": plan.inputs["region_scores"], "write": plan.folder.path})
        return
    stage = stages.filter_labels(run, given)
    print_stage("filter", stage)
    names = ("positives", "positives_per_image", "images_without_positive",
             "classes_without_positive", "ignored_band", "below_support", "over_cap")  # fmt: skip
    more = ("passes", "images_in_some_passes", "corrected_images", "corrected_labels",
            "overrides_unused")  # fmt: skip
    counts = {name: stage.stats.get(name) for name in names}
    counts |= {name: stage.stats[name] for name in more if name in stage.stats}
    print_mapping("counted", counts)
    print_next_stage("train", run)


@click.command()
@option("--pseudo-labels", metavar="DIR", help="Labels to learn (default: the latest).")
@option("--manifest", metavar="PATH", help="Manifest, for train.labels=annotations.")
@stage_command(from_sweep=True)
def train(
    settings: Settings, pseudo_labels: str | None, manifest: str | None, from_sweep: str | None
) -> None:
    """Fine-tune the student (train.labels: pseudo, annotations or none)."""
    run = settings.open()
    if from_sweep and pseudo_labels is None and run.config.train.labels == "pseudo":
        # The run's latest labels may be those of other settings.
        scores = stages.found(run, _swept_scores(from_sweep), "region_scores", "label")
        swept = plan_filter(run, scores)
        if settings.dry_run and not swept.folder.finished:
            print_mapping("plan", {"filter": scores.path, "write first": swept.folder.path})
            return
        pseudo_labels = swept.run().path
    if settings.dry_run:
        from hts_ray.student.train import estimate  # torch loads slowly

        with stages.placed(run, "train") as (on_devices, _):
            plan, labels = stages.plan_training(on_devices, pseudo_labels, manifest)
            figures = readable(estimate(on_devices, labels))
        print_mapping("plan", {"write": plan.folder.path, **figures})
        return
    stage = stages.train(run, pseudo_labels, manifest)
    print_stage("train", stage)
    print_next_stage("predict", run)


@click.command()
@option("--student", metavar="DIR", help="Student to use (default: the run's latest).")
@option("--manifest", metavar="PATH", help="Images to score (default: the run's manifest).")
@option("--images", metavar="DIR", help="Score this folder of images instead.")
@option("--top-k", type=click.IntRange(1), help="Of PATHs: so many labels (default 5).")
@option("--threshold", type=float, help="Of PATHs: labels from this logit on.")
@option("--regions", is_flag=True, help="Of PATHs: score crops too, and locate the labels.")
@option("--draw", metavar="DIR", help="Of PATHs: write pictures with the labels drawn.")
@option("--json-lines", is_flag=True, help="Of PATHs: print JSON, a line an image.")
@stage_command(paths="[PATH]...", complete=complete_path_or_setting)
def predict(
    settings: Settings,
    student: str | None,
    manifest: str | None,
    images: str | None,
    paths: tuple[str, ...],
    **shown: Any,
) -> None:
    """Label images at PATHs, or score a manifest, with a trained student.

    PATHs are images, folders or URIs of storage; they are labeled in this process and printed.
    Without them a table with the scores of all classes is written to the run.
    """
    if not paths:
        refuse_options(shown, "name images: hts predict PATH")
        _predict_table(settings, student, manifest, images)
        return
    refuse_options({"manifest": manifest, "images": images}, "leave the PATHs out")
    source = student or storage.absolute(settings.config.run_dir)
    predict_paths(source, paths, dry_run=settings.dry_run, **shown)


def _predict_table(
    settings: Settings, student: str | None, manifest: str | None, images: str | None
) -> None:
    """Score the images of a manifest or a folder, and write all scores to the run."""
    run = settings.open()
    if manifest:
        refuse_options({"images": images}, "give --manifest or --images")
    student = stages.student_path(run, student)
    if images:
        inner = storage.join(run.run_dir, "images")
        with image_progress("prepare") as progress:
            stage = prepare_manifest(run.config.prepare, inner, "folder", images, progress)
        print_stage("prepare", stage)
        manifest, run = stage.path, run.changed({"predict": {"split": None}})
    if settings.dry_run:
        from hts_ray.student.predict import estimate, plan_predict  # torch loads slowly

        found = run.manifest(manifest)
        with stages.placed(run, "predict") as (on_devices, _):
            write = plan_predict(on_devices, student, found).folder.path
            figures = readable(estimate(on_devices.config.predict, student, found))
        print_mapping("plan", {"student": student, "write": write, **figures})
        return
    stage = stages.predict(run, student, manifest)
    print_stage("predict", stage)
    split = run.config.predict.split or "test"
    if len(run.manifest(manifest).annotated(split)):
        more = ["--annotations", manifest] if manifest else []
        more += [] if split == "test" else ["--split", split]
        print_next_stage("evaluate", run, *more)
    else:
        print_next_stage("report", run)


@click.command()
@option("--region-scores", metavar="DIR", help="Teacher pass to use (default: the latest).")
@stage_command()
def sweep(settings: Settings, region_scores: str | None) -> None:
    """Try many settings of filter and training over one teacher pass, and keep the best."""
    from hts_ray.sweep.estimate import estimate  # torch loads slowly
    from hts_ray.sweep.plan import plan_sweep  # torch loads slowly
    from hts_ray.sweep.progress import print_sweep  # torch loads slowly

    run = settings.open()
    if settings.dry_run:
        plan = plan_sweep(run, stages.found(run, region_scores, "region_scores", "label"))
        rows = [list(row) for row in plan.space.describe()]
        print_rows("settings", ["setting", "own", "tried"], rows, text_columns=3)
        figures = readable(estimate(plan))
        objective = {"objective": plan.objective, "write": plan.stage.path}
        print_mapping("plan", {"read": plan.region_scores.path, **objective, **figures})
        return
    stage = stages.sweep(run, region_scores)
    print_stage("sweep", stage)
    print_sweep(stage)
    print_next("hts", "train", "--run-dir", run.config.run_dir, "--from-sweep", stage.path)


def _swept_scores(from_sweep: str | None) -> str | None:
    """Return the region scores that a sweep was over; None without a sweep."""
    if from_sweep is None:
        return None
    from hts_ray.sweep.stage import find_sweep  # torch loads slowly

    return str(find_sweep(from_sweep).stats["region_scores"])


@click.command()
@option("--predictions", metavar="DIR", help="Predictions (default: the run's latest).")
@option("--annotations", metavar="PATH", help="anno.mat or manifest (default: the run's).")
@option("--split", default="test", help="Annotated split to compare with.")
@option("--json", "json_file", metavar="FILE", help="Also write the metrics here.")
@stage_command()
def evaluate(
    settings: Settings,
    predictions: str | None,
    annotations: str | None,
    split: str,
    json_file: str | None,
) -> None:
    """Compare predictions with annotations by HICO's official protocol."""
    run = settings.open()
    if settings.dry_run:
        source = predictions or require_stage(run.run_dir, "predictions", "predict").path
        truth = annotations or run.manifest().path
        print_mapping("plan", {"predictions": source, "annotations": truth, "split": split})
        return
    with busy("evaluate"):
        result = stages.evaluate(run, predictions, annotations, split)
    if json_file:
        storage.write_json(json_file, result)
    print_metrics(result)
    print_next_stage("report", run)
