"""The stages as commands, in their order."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from hts_ray.cli.app import cli
from hts_ray.cli.options import (
    Settings,
    argument,
    option,
    print_metrics,
    print_next_stage,
    readable,
    stage_command,
)
from hts_ray.engine.console import (
    busy,
    console,
    image_progress,
    percent,
    print_line,
    print_mapping,
    print_next,
    print_rows,
    print_stage,
    print_written,
    steps,
)
from hts_ray.errors import ConfigError

if TYPE_CHECKING:
    from hts_ray import pipeline


@cli.command()
@argument("source", type=click.Choice(["hico", "folder"]))
@option("--root", required=True, metavar="DIR", help="Folder of the download or images.")
@stage_command()
def prepare(settings: Settings, source: str, root: str) -> None:
    """List images in a manifest: a HICO download or any folder."""
    from hts_ray import pipeline
    from hts_ray.store import storage

    run = settings.open()
    if settings.dry_run:
        print_mapping(
            "plan", {"read": f"{source} {root}", "write": storage.join(run.run_dir, "manifest-*")}
        )
        if not storage.exists(root):
            raise ConfigError(field="--root", value=root, remedy="no such folder")
        return
    with image_progress("prepare") as progress:
        stage = pipeline.prepare(run, source, root, progress)
    settings.record(run)
    print_stage("prepare", stage)
    counts = {k: v for k, v in stage.stats.items() if isinstance(v, int) and "rows" not in k}
    print_mapping("counted", counts)
    print_next_stage("label", run)


@cli.command()
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
    from hts_ray import pipeline
    from hts_ray.engine.session import command_cluster

    if preview and not settings.dry_run:
        raise ConfigError(field="--preview", value=preview, remedy="give --dry-run with it")
    run = settings.open()
    path = pipeline.manifest_path(run, manifest)
    if settings.dry_run:
        _preview_label(_limited(run, limit), path, sample, preview)
        return
    settings.record(run, teacher_model=settings.config.label.teacher.model)
    # Behind `record`: what the run directory remembers must not be limited.
    run = _limited(run, limit)
    stage = pipeline.label_stage(run, path)
    cluster = command_cluster(settings.config, "label", manifest=path)
    with cluster, image_progress("label") as progress:
        pipeline.label(run, path, progress)
    print_stage("label", stage)
    stats = stage.stats
    if stats.get("bad_boxes"):
        console.print(f"{stats['bad_boxes']} boxes could not be used: see the quarantine table")
    if stats.get("agreement"):
        found = stats["agreement"]["top_1"]
        console.print(f"search=objects kept the best class of {percent(found)} % of the regions")
    print_next_stage("filter", run)


def _short(text: str) -> str:
    """Cut a table's cell, so that the columns before it keep their width."""
    return textwrap.shorten(text, 60, placeholder=" ...")


def _limited(run: pipeline.Run, limit: int | None) -> pipeline.Run:
    if limit is None:
        return run
    from hts_ray.config import override

    return replace(run, config=override(run.config, {"label": {"limit": limit}}))


def _preview_label(run: pipeline.Run, manifest: str, sample: int, preview: str | None) -> None:
    """Measure the teacher on a sample, and show what it says of it."""
    from hts_ray import pipeline
    from hts_ray.teacher.estimate import estimate

    stage = pipeline.label_stage(run, manifest)
    config = run.config
    measured = estimate(
        config.label, manifest, run.class_table, sample=sample, filtering=config.filter
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
    figures = readable(measured.figures())
    print_mapping("plan", {"read": manifest, "write": stage.path, **figures})
    if preview:
        from hts_ray.teacher.preview import write_preview

        write_preview(preview, measured)
        print_written("preview", preview)


@cli.command("filter")
@option("--region-scores", metavar="DIR", help="Teacher pass to use (default: the latest).")
@stage_command(from_sweep=True)
def filter_command(settings: Settings, region_scores: str | None, from_sweep: str | None) -> None:
    """Turn regional scores into positives, ignored and negatives."""
    from hts_ray import pipeline

    run = settings.open()
    source = pipeline.region_scores_stage(run, region_scores or _swept_scores(from_sweep))
    stage = pipeline.filter_stage(run, source)
    if settings.dry_run:
        rows = source.stats.get("rows_out")
        print_mapping("plan", {"read": source.path, "images": rows, "write": stage.path})
        return
    with busy("filter"):
        pipeline.filter_labels(run, source)
    settings.record(run)
    print_stage("filter", stage)
    names = ("positives", "positives_per_image", "images_without_positive",
             "classes_without_positive", "ignored_band", "below_support", "over_cap")  # fmt: skip
    corrections = ("corrected_images", "corrected_labels", "overrides_unused")
    counts = {name: stage.stats.get(name) for name in names}
    counts |= {name: stage.stats[name] for name in corrections if name in stage.stats}
    print_mapping("counted", counts)
    print_next_stage("train", run)


@cli.command()
@option("--pseudo-labels", metavar="DIR", help="Labels to learn (default: the latest).")
@option("--manifest", metavar="PATH", help="Manifest, for train.labels=annotations.")
@stage_command(from_sweep=True)
def train(
    settings: Settings, pseudo_labels: str | None, manifest: str | None, from_sweep: str | None
) -> None:
    """Fine-tune the student (train.labels: pseudo, annotations or none)."""
    from hts_ray import pipeline
    from hts_ray.engine.session import command_cluster

    run = settings.open()
    source = pipeline.given_stage(pseudo_labels, "pseudo_labels") if pseudo_labels else None
    if from_sweep and source is None and run.config.train.labels == "pseudo":
        # The run's latest labels may be those of other settings.
        scores = pipeline.region_scores_stage(run, _swept_scores(from_sweep))
        source = pipeline.filter_stage(run, scores)
        if settings.dry_run and not source.finished:
            print_mapping("plan", {"filter": scores.path, "write first": source.path})
            return
        pipeline.filter_labels(run, scores)
    labels = pipeline.training_labels(run, source, manifest)
    validation = pipeline.validation_rows(run, manifest)
    stage = pipeline.train_stage(run, labels)
    if settings.dry_run:
        from hts_ray.student.train import estimate

        figures = estimate(settings.config.train, settings.config.student, run.class_table, labels)
        print_mapping("plan", {"write": stage.path, **readable(figures)})
        return
    settings.record(run, student_model=settings.config.student.model)
    epochs = run.config.train.epochs
    with command_cluster(settings.config, "train", labels=labels), steps() as shown:
        pipeline.train(run, labels, shown.epochs("train", epochs), validation)
    print_stage("train", stage)
    print_next_stage("predict", run)


@cli.command("self-train")
@option("--region-scores", metavar="DIR", help="Teacher pass to use (default: the latest).")
@option("--manifest", metavar="PATH", help="Manifest, for train.validation_split.")
@stage_command()
def self_train(settings: Settings, region_scores: str | None, manifest: str | None) -> None:
    """Let the trained student help to filter, and train anew (self_training.rounds times)."""
    from hts_ray import pipeline
    from hts_ray.config import override
    from hts_ray.engine.session import command_cluster

    if settings.config.self_training.rounds == 0:  # asking for it by name is asking for a round
        settings.config = override(settings.config, {"self_training": {"rounds": 1}})
    pipeline.check_self_training(settings.config)
    run = settings.open()
    source = pipeline.region_scores_stage(run, region_scores)
    validation = pipeline.validation_rows(run, manifest)
    if settings.dry_run:
        rounds, regions = run.config.self_training.rounds, source.stats.get("regions")
        print_mapping("plan", {"read": source.path, "regions": regions, "rounds": rounds})
        return
    settings.record(run, student_model=settings.config.student.model)
    # Both return at once where they are finished, and the rounds go on from there.
    labels = pipeline.filter_labels(run, source)
    with command_cluster(settings.config, "self-train"), steps() as shown:
        student = pipeline.train(
            run,
            pipeline.training_labels(run, labels, None),
            shown.epochs("train", run.config.train.epochs),
            validation,
        )
        pipeline.self_train(
            run, source, student, validation=validation, on_stage=print_stage, watch=shown
        )
    print_next_stage("predict", run)


@cli.command()
@option("--student", metavar="DIR", help="Student to use (default: the run's latest).")
@option("--manifest", metavar="PATH", help="Images to score (default: the run's manifest).")
@option("--images", metavar="DIR", help="Score this folder of images instead.")
@option("--top-k", type=click.IntRange(1), help="Of PATHs: so many labels (default 5).")
@option("--threshold", type=float, help="Of PATHs: labels from this logit on.")
@option("--regions", is_flag=True, help="Of PATHs: score crops too, and locate the labels.")
@option("--draw", metavar="DIR", help="Of PATHs: write pictures with the labels drawn.")
@option("--json-lines", is_flag=True, help="Of PATHs: print JSON, a line an image.")
@stage_command(paths=True)
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
    from hts_ray import pipeline
    from hts_ray.engine.session import command_cluster
    from hts_ray.store import storage

    if paths:
        if manifest or images:
            given = "--manifest" if manifest else "--images"
            raise ConfigError(field=given, value=manifest or images, remedy="leave the PATHs out")
        from hts_ray.cli.label_commands import predict_paths

        source = student or storage.absolute(settings.config.run_dir)
        predict_paths(source, paths, dry_run=settings.dry_run, **shown)
        return
    for name, value in shown.items():
        if value not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(field=option, value=value, remedy="name images: hts predict PATH")
    run = settings.open()
    if manifest and images:
        raise ConfigError(field="--images", value=images, remedy="give --manifest or --images")
    source = pipeline.student_path(run, student)
    if images:
        manifest, run = _folder_manifest(settings, run, images)
    path = pipeline.manifest_path(run, manifest)
    stage = pipeline.predict_stage(run, source, path)
    if settings.dry_run:
        from hts_ray.student.predict import estimate

        figures = estimate(run.config.predict, source, path)
        print_mapping("plan", {"student": source, "write": stage.path, **readable(figures)})
        return
    cluster = command_cluster(settings.config, "predict", manifest=path, student=source)
    with cluster, image_progress("predict") as progress:
        pipeline.predict(run, source, path, progress)
    print_stage("predict", stage)
    split = run.config.predict.split or "test"
    if pipeline.is_annotated(path, split):
        more = ["--annotations", manifest] if manifest else []
        more += [] if split == "test" else ["--split", split]
        print_next_stage("evaluate", run, *more)
    else:
        print_next_stage("report", run)


@cli.command()
@option("--region-scores", metavar="DIR", help="Teacher pass to use (default: the latest).")
@stage_command()
def sweep(settings: Settings, region_scores: str | None) -> None:
    """Try many settings of filter and training over one teacher pass, and keep the best."""
    from hts_ray import pipeline
    from hts_ray.engine.session import command_cluster
    from hts_ray.sweep.stage import plan_sweep, run_sweep

    run = settings.open()
    plan = plan_sweep(run, pipeline.region_scores_stage(run, region_scores))
    if settings.dry_run:
        from hts_ray.sweep.estimate import estimate

        rows = [list(row) for row in plan.space.describe()]
        print_rows("settings", ["setting", "own", "tried"], rows, text_columns=3)
        figures = readable(estimate(plan))
        objective = {"objective": plan.objective, "write": plan.stage.path}
        print_mapping("plan", {"read": plan.region_scores.path, **objective, **figures})
        return
    from hts_ray.sweep.progress import features_progress, print_sweep, sweep_progress

    settings.record(run)
    with command_cluster(settings.config, "sweep"), sweep_progress(plan) as on_trial:
        stage = run_sweep(plan, on_trial=on_trial, on_features=features_progress(), tell=print_line)
    print_stage("sweep", stage)
    print_sweep(stage)
    print_next("hts", "train", "--run-dir", run.config.run_dir, "--from-sweep", stage.path)


@cli.command()
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
    from hts_ray import pipeline
    from hts_ray.store import storage
    from hts_ray.store.run import require_stage

    run = settings.open()
    source = predictions or require_stage(run.run_dir, "predictions", "predict").path
    truth = annotations or pipeline.manifest_path(run)
    if settings.dry_run:
        print_mapping("plan", {"predictions": source, "annotations": truth, "split": split})
        return
    with busy("evaluate"):
        result = pipeline.evaluate(run, source, truth, split)
    if json_file:
        storage.write_json(json_file, result)
    print_metrics(result)
    print_next_stage("report", run)


def _swept_scores(from_sweep: str | None) -> str | None:
    """Return the region scores that a sweep was over; None without a sweep."""
    if from_sweep is None:
        return None
    from hts_ray.sweep.stage import find_sweep

    return str(find_sweep(from_sweep).stats["region_scores"])


def _folder_manifest(
    settings: Settings, run: pipeline.Run, images: str
) -> tuple[str, pipeline.Run]:
    """Prepare a folder of images inside the run, and predict all of it."""
    from hts_ray import pipeline
    from hts_ray.store import storage

    values = settings.config.model_dump()
    values["predict"]["split"] = None
    from hts_ray.config import parse_config

    run = pipeline.Run(parse_config(values), run.class_table)
    inner = parse_config({**values, "run_dir": storage.join(run.run_dir, "images")})
    with image_progress("prepare") as progress:
        stage = pipeline.prepare(pipeline.Run(inner, run.class_table), "folder", images, progress)
    print_stage("prepare", stage)
    return stage.file("manifest.parquet"), run
