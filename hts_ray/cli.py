"""The `hts` command: one subcommand a stage.

Exit codes: 0 done, 1 failed, 2 bad usage or bad configuration.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from hts_ray import pipeline, storage
from hts_ray.config import HtsConfig, load_config, override
from hts_ray.console import (
    console,
    duration,
    errors,
    image_progress,
    percent,
    print_mapping,
    print_rows,
    print_stage,
)
from hts_ray.errors import ConfigError, UserError
from hts_ray.tables import find_stage
from hts_ray.telemetry import log_as, run_tag

if TYPE_CHECKING:
    import pyarrow as pa

_CONFIG_FILE = "config.yaml"


class Settings:
    """The common options of every stage command, resolved.

    Without --config and --preset a run directory that has a `config.yaml` continues with it.
    """

    def __init__(
        self,
        config_file: str | None,
        preset: str | None,
        run_dir: str | None,
        overrides: Sequence[str],
        dry_run: bool,
    ) -> None:
        self.dry_run = dry_run
        self.remembered = None
        if config_file is None and preset is None and run_dir:
            path = storage.join(run_dir, _CONFIG_FILE)
            self.remembered = path if storage.exists(path) else None
        self.config = load_config(
            preset=preset,
            file=config_file or self.remembered,
            overrides=overrides,
            extra={"run_dir": run_dir} if run_dir else {},
        )

    def open(self) -> pipeline.Run:
        """Load the classes; say so when the settings come from the run directory."""
        if self.remembered:
            console.print(f"settings: {self.remembered}")
        return pipeline.open_run(self.config)

    def record(self, run: pipeline.Run, **more: Any) -> None:
        """Write config.yaml, classes.csv and provenance.json."""
        from hts_ray.provenance import write_provenance

        write_provenance(self.config, run.class_table, **more)


def stage_command(
    default_preset: str | None = None,
    *,
    from_sweep: bool = False,
    paths: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that all stages share, and hand it their `Settings`.

    `from_sweep` adds that option, whose settings go below those of the command line. With `paths`
    arguments that are no settings are handed over as `paths`.
    """
    arguments = "[PATH]... [section.name=value]..." if paths else "[section.name=value]..."

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @click.option("--config", "config_file", metavar="FILE", help="YAML file of settings.")
        @click.option("--preset", metavar="NAME", help="Start from a packaged preset.")
        @click.option("--run-dir", metavar="DIR", help="Where the run lives.")
        @click.option("--print-config", is_flag=True, help="Print the resolved settings and stop.")
        @click.option("--dry-run", is_flag=True, help="Check everything, show the plan, and stop.")
        @click.argument("overrides", nargs=-1, metavar=arguments)
        @functools.wraps(function)
        def command(
            config_file: str | None,
            preset: str | None,
            run_dir: str | None,
            print_config: bool,
            dry_run: bool,
            overrides: tuple[str, ...],
            **options: Any,
        ) -> None:
            if config_file is None and preset is None:
                preset = default_preset
            if paths:
                options["paths"] = tuple(entry for entry in overrides if not is_setting(entry))
                overrides = tuple(entry for entry in overrides if is_setting(entry))
            best = _sweep_overrides(options.get("from_sweep"))
            settings = Settings(config_file, preset, run_dir, [*best, *overrides], dry_run)
            if print_config:
                click.echo(settings.config.to_yaml(), nl=False)
                return
            stage = click.get_current_context().info_name or ""
            log_as(settings.config.ray.log_format, run_tag(settings.config.run_dir), stage)
            function(settings, **options)

        if not from_sweep:
            return command
        text = "Take the best settings of this sweep, or of a run's latest."
        return click.option("--from-sweep", metavar="DIR", help=text)(command)

    return decorate


def is_setting(argument: str) -> bool:
    """Tell `section.name=value` from a path, which may hold an equals sign too."""
    name, equals, _ = argument.partition("=")
    named = re.fullmatch(r"\w+(\.\w+)*", name) is not None
    return bool(equals) and named and not storage.exists(argument)


def _sweep_overrides(path: str | None) -> list[str]:
    if path is None:
        return []
    from hts_ray.sweep.stage import best_overrides, find_sweep

    return best_overrides(find_sweep(path))


@click.group(invoke_without_command=True)
@click.version_option(package_name="hts-ray")
@click.option("--run-dir", default="runs/default", metavar="DIR", help="Run to show the state of.")
@click.pass_context
def cli(context: click.Context, run_dir: str) -> None:
    """Turn unlabeled images and a class list into a multi-label classifier.

    Without a subcommand: the stages, and where the run in --run-dir stands.
    """
    if context.invoked_subcommand is not None:
        return
    rows = []
    for table, stage in pipeline.stage_overview(run_dir):
        command = _COMMAND_OF[table]
        state = f"{stage.stats.get('rows_out', 0)} rows in {stage.path}" if stage else "not yet"
        rows.append([f"hts {command}", table, state])
    print_rows(f"run {run_dir}", ["stage", "table", "state"], rows, text_columns=3)
    click.echo("`hts COMMAND --help` tells a command's options; `hts demo` needs no data.")


_COMMAND_OF = {
    "manifest": "prepare",
    "region_scores": "label",
    "pseudo_labels": "filter",
    "student": "train",
    "predictions": "predict",
    "evaluation": "evaluate",
}


@cli.command()
@click.argument("source", type=click.Choice(["hico", "folder"]))
@click.option("--root", required=True, metavar="DIR", help="Folder of the download or images.")
@stage_command()
def prepare(settings: Settings, source: str, root: str) -> None:
    """List images in a manifest: a HICO download or any folder."""
    run = settings.open()
    if settings.dry_run:
        print_mapping(
            "plan", {"read": f"{source} {root}", "write": storage.join(run.run_dir, "manifest-*")}
        )
        if not storage.exists(root):
            raise ConfigError(field="--root", value=root, remedy="no such folder")
        return
    stage = pipeline.prepare(run, source, root)
    settings.record(run)
    print_stage("prepare", stage)
    counts = {k: v for k, v in stage.stats.items() if isinstance(v, int) and "rows" not in k}
    print_mapping("counted", counts)
    _next("label", run)


@cli.command()
@click.option("--manifest", metavar="PATH", help="Manifest to label (default: the run's).")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Label a seeded sample only.")
@click.option("--sample", default=4, type=click.IntRange(1), metavar="N",
              help="Images that --dry-run measures (default 4).")  # fmt: skip
@click.option("--preview", metavar="FILE", help="With --dry-run: an HTML page of the sample.")
@stage_command()
def label(
    settings: Settings, manifest: str | None, limit: int | None, sample: int, preview: str | None
) -> None:
    """Score every class prompt on every region of every image (the teacher)."""
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
    cluster = _ray(settings.config, "label", manifest=path)
    with cluster, image_progress("label") as progress:
        pipeline.label(run, path, progress)
    print_stage("label", stage)
    stats = stage.stats
    if stats.get("bad_boxes"):
        console.print(f"{stats['bad_boxes']} boxes could not be used: see the quarantine table")
    if stats.get("agreement"):
        found = stats["agreement"]["top_1"]
        console.print(f"search=objects kept the best class of {percent(found)} % of the regions")
    _next("filter", run)


def _short(text: str) -> str:
    """Cut a table's cell, so that the columns before it keep their width."""
    return textwrap.shorten(text, 60, placeholder=" ...")


def _limited(run: pipeline.Run, limit: int | None) -> pipeline.Run:
    if limit is None:
        return run
    return replace(run, config=override(run.config, {"label": {"limit": limit}}))


def _preview_label(run: pipeline.Run, manifest: str, sample: int, preview: str | None) -> None:
    """Measure the teacher on a sample, and show what it says of it."""
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
    figures = _readable(measured.figures())
    print_mapping("plan", {"read": manifest, "write": stage.path, **figures})
    if preview:
        from hts_ray.teacher.preview import write_preview

        write_preview(preview, measured)
        console.print(f"[bold]preview[/bold] -> {preview}")


@cli.command("filter")
@click.option("--region-scores", metavar="DIR", help="Teacher pass to use (default: the latest).")
@stage_command(from_sweep=True)
def filter_command(settings: Settings, region_scores: str | None, from_sweep: str | None) -> None:
    """Turn regional scores into positives, ignored and negatives."""
    run = settings.open()
    source = pipeline.region_scores_stage(run, region_scores or _swept_scores(from_sweep))
    stage = pipeline.filter_stage(run, source)
    if settings.dry_run:
        rows = source.stats.get("rows_out")
        print_mapping("plan", {"read": source.path, "images": rows, "write": stage.path})
        return
    pipeline.filter_labels(run, source)
    settings.record(run)
    print_stage("filter", stage)
    names = ("positives", "positives_per_image", "images_without_positive",
             "classes_without_positive", "ignored_band", "below_support", "over_cap")  # fmt: skip
    corrections = ("corrected_images", "corrected_labels", "overrides_unused")
    counts = {name: stage.stats.get(name) for name in names}
    counts |= {name: stage.stats[name] for name in corrections if name in stage.stats}
    print_mapping("counted", counts)
    _next("train", run)


@cli.command()
@click.option("--pseudo-labels", metavar="DIR", help="Labels to learn (default: the latest).")
@click.option("--manifest", metavar="PATH", help="Manifest, for train.labels=annotations.")
@stage_command(from_sweep=True)
def train(
    settings: Settings, pseudo_labels: str | None, manifest: str | None, from_sweep: str | None
) -> None:
    """Fine-tune the student (train.labels: pseudo, annotations or none)."""
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
        from hts_ray.student.training import estimate

        figures = estimate(settings.config.train, settings.config.student, run.class_table, labels)
        print_mapping("plan", {"write": stage.path, **_readable(figures)})
        return
    settings.record(run, student_model=settings.config.student.model)
    with _ray(settings.config, "train", labels=labels):
        pipeline.train(run, labels, _print_epoch, validation)
    print_stage("train", stage)
    _next("predict", run)


@cli.command("self-train")
@click.option("--region-scores", metavar="DIR", help="Teacher pass to use (default: the latest).")
@click.option("--manifest", metavar="PATH", help="Manifest, for train.validation_split.")
@stage_command()
def self_train(settings: Settings, region_scores: str | None, manifest: str | None) -> None:
    """Let the trained student help to filter, and train anew (self_training.rounds times)."""
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
    with _ray(settings.config, "self-train"), image_progress("student") as progress:
        student = pipeline.train(
            run, pipeline.training_labels(run, labels, None), _print_epoch, validation
        )
        pipeline.self_train(
            run,
            source,
            student,
            validation=validation,
            on_stage=print_stage,
            progress=progress,
            train_progress=_print_epoch,
        )
    _next("predict", run)


@cli.command()
@click.option("--student", metavar="DIR", help="Student to use (default: the run's latest).")
@click.option("--manifest", metavar="PATH", help="Images to score (default: the run's manifest).")
@click.option("--images", metavar="DIR", help="Score this folder of images instead.")
@click.option("--top-k", type=click.IntRange(1), help="Of PATHs: so many labels (default 5).")
@click.option("--threshold", type=float, help="Of PATHs: labels from this logit on.")
@click.option("--regions", is_flag=True, help="Of PATHs: score crops too, and locate the labels.")
@click.option("--draw", metavar="DIR", help="Of PATHs: write pictures with the labels drawn.")
@click.option("--json-lines", is_flag=True, help="Of PATHs: print JSON, a line an image.")
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
    if paths:
        if manifest or images:
            given = "--manifest" if manifest else "--images"
            raise ConfigError(field=given, value=manifest or images, remedy="leave the PATHs out")
        from hts_ray.label_commands import predict_paths

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
        from hts_ray.student.prediction import estimate

        figures = estimate(run.config.predict, source, path)
        print_mapping("plan", {"student": source, "write": stage.path, **_readable(figures)})
        return
    cluster = _ray(settings.config, "predict", manifest=path, student=source)
    with cluster, image_progress("predict") as progress:
        pipeline.predict(run, source, path, progress)
    print_stage("predict", stage)
    if not images:
        _next("evaluate", run)


@cli.command()
@click.option("--region-scores", metavar="DIR", help="Teacher pass to use (default: the latest).")
@stage_command()
def sweep(settings: Settings, region_scores: str | None) -> None:
    """Try many settings of filter and training over one teacher pass, and keep the best."""
    from hts_ray.sweep.stage import plan_sweep, run_sweep

    run = settings.open()
    plan = plan_sweep(run, pipeline.region_scores_stage(run, region_scores))
    if settings.dry_run:
        from hts_ray.sweep.estimate import estimate

        rows = [list(row) for row in plan.space.describe()]
        print_rows("settings", ["setting", "own", "tried"], rows, text_columns=3)
        figures = _readable(estimate(plan))
        objective = {"objective": plan.objective, "write": plan.stage.path}
        print_mapping("plan", {"read": plan.region_scores.path, **objective, **figures})
        return
    from hts_ray.sweep.progress import print_sweep, sweep_progress

    settings.record(run)
    with _ray(settings.config, "sweep"), sweep_progress(plan) as on_trial:
        stage = run_sweep(plan, on_trial=on_trial, tell=console.print)
    print_stage("sweep", stage)
    print_sweep(stage)
    line = f"hts train --run-dir {run.config.run_dir} --from-sweep {stage.path}"
    console.print(f"next: [bold]{line}[/bold]")


@cli.command()
@click.option("--predictions", metavar="DIR", help="Predictions (default: the run's latest).")
@click.option("--annotations", metavar="PATH", help="anno.mat or manifest (default: the run's).")
@click.option("--split", default="test", help="Annotated split to compare with.")
@click.option("--json", "json_file", metavar="FILE", help="Also write the metrics here.")
@stage_command()
def evaluate(
    settings: Settings,
    predictions: str | None,
    annotations: str | None,
    split: str,
    json_file: str | None,
) -> None:
    """Compare predictions with annotations by HICO's official protocol."""
    from hts_ray.tables import require_stage

    run = settings.open()
    source = predictions or require_stage(run.run_dir, "predictions", "predict").path
    truth = annotations or pipeline.manifest_path(run)
    if settings.dry_run:
        print_mapping("plan", {"predictions": source, "annotations": truth, "split": split})
        return
    result = pipeline.evaluate(run, source, truth, split)
    if json_file:
        storage.write_json(json_file, result)
    _print_metrics(result)


@cli.command()
@click.argument("run_dir", metavar="RUN")
@click.option("--output", metavar="FILE", help="Where to write (default RUN/report.html).")
@click.option(
    "--images",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Images of the gallery, at most.",
)
def report(run_dir: str, output: str | None, images: int) -> None:
    """Write one self-contained HTML page about a run."""
    from hts_ray.report import report_for_run, write_report

    path = output or storage.join(run_dir, "report.html")
    write_report(path, report_for_run(run_dir, images))
    console.print(f"[bold]report[/bold] -> {path}")


@cli.command("pipeline")
@click.option("--manifest", metavar="PATH", help="Manifest to start from (default: the run's).")
@stage_command()
def pipeline_command(settings: Settings, manifest: str | None) -> None:
    """Run label, filter, train, predict and (with annotations) evaluate."""
    run = settings.open()
    path = pipeline.manifest_path(run, manifest)
    if settings.dry_run:
        scores = pipeline.label_stage(run, path)
        rows = len(pipeline.read_manifest(path))
        print_mapping("plan", {"read": path, "images": rows, "write first": scores.path})
        return
    settings.record(run)
    cluster = _ray(settings.config, "pipeline", manifest=path)
    with cluster, image_progress("images") as progress:
        result = pipeline.run_all(
            run, path, on_stage=print_stage, progress=progress, train_progress=_print_epoch
        )
    if result:
        _print_metrics(result)
    else:
        console.print("no annotated image in the predicted split: nothing to evaluate")
    _next("report", run)


@cli.command()
@click.option("--seed", default=0, show_default=True, help="Seed of the rendered world.")
@click.option("--pretrain", "pretrain_to", metavar="DIR", help="Reproduce the shipped models here.")
@stage_command("demo")
def demo(settings: Settings, seed: int, pretrain_to: str | None) -> None:
    """Run everything on the built-in synthetic world; nothing is downloaded."""
    if pretrain_to:
        from hts_ray.pretraining import pretrain

        pretrain(pretrain_to)
        console.print(f"[bold]pretrained[/bold] -> {pretrain_to}")
        return
    from hts_ray.demo import demo_config, run_demo

    config = demo_config(settings.config, seed)
    if settings.dry_run:
        print_mapping("plan", {"write": config.run_dir, "seed": seed})
        return
    with _ray(config, "demo"):
        run_demo(config)


def _swept_scores(from_sweep: str | None) -> str | None:
    """Return the region scores that a sweep was over; None without a sweep."""
    if from_sweep is None:
        return None
    from hts_ray.sweep.stage import find_sweep

    return str(find_sweep(from_sweep).stats["region_scores"])


@contextmanager
def _ray(
    config: HtsConfig,
    command: str,
    *,
    manifest: str = "",
    student: str = "",
    labels: pa.Table | None = None,
) -> Iterator[None]:
    """Join or start Ray for a command, and refuse a cluster that could never run it."""
    from hts_ray.preflight import check_joined
    from hts_ray.runtime import ray_cluster

    pools = [config.label.pool, config.predict.pool]
    pools += [config.train.features.pool, config.self_training.pool]
    paths = [("--student", student)] if student else []
    with ray_cluster(config.ray, pools):
        for note in check_joined(config, command, paths, manifest=manifest, labels=labels):
            console.print(f"note: {note}", markup=False)
        yield


def _folder_manifest(
    settings: Settings, run: pipeline.Run, images: str
) -> tuple[str, pipeline.Run]:
    """Prepare a folder of images inside the run, and predict all of it."""
    values = settings.config.model_dump()
    values["predict"]["split"] = None
    from hts_ray.config import parse_config

    run = pipeline.Run(parse_config(values), run.class_table)
    inner = parse_config({**values, "run_dir": storage.join(run.run_dir, "images")})
    stage = pipeline.prepare(pipeline.Run(inner, run.class_table), "folder", images)
    print_stage("prepare", stage)
    return stage.file("manifest.parquet"), run


def _print_epoch(record: Any) -> None:
    loss, epoch = record.get("loss"), record.get("epoch")
    rate = record.get("images_per_second")
    speed = f", {rate:.0f} images/s" if rate else ""
    measured = record.get("validation_mAP")
    quality = "" if measured is None else f", validation mAP {percent(measured)}"
    if loss is not None:
        console.print(f"train: epoch {epoch + 1}, loss {loss:.4f}{speed}{quality}")


def _print_metrics(result: dict[str, Any]) -> None:
    rows = [
        ["mAP", percent(result["mAP"]), percent(result["mAP_known_object"])],
        *(
            [name, percent(result[name]), percent(result.get(f"{name}_known_object"))]
            for name in ("few@1", "few@5", "few@10")
            if name in result
        ),
    ]
    title = f"{result['num_images']} images, {result['num_classes']} classes with a positive"
    print_rows(title, ["%", "default", "known object"], rows)


def _readable(figures: dict[str, Any]) -> dict[str, str]:
    return {name: _figure(name, value) for name, value in figures.items()}


def _figure(name: str, value: Any) -> str:
    if value is None:
        return "not measured"
    if name.endswith("seconds"):
        return duration(float(value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@cli.command("import-checkpoint")
@click.argument("file", metavar="FILE")
@click.option("--output", required=True, metavar="DIR", help="Student folder to write.")
@click.option("--classes", metavar="FILE", help="Class list (default: HICO's 600, if 600 fit).")
def import_command(file: str, output: str, classes: str | None) -> None:
    """Turn a checkpoint of the paper's own code into a student."""
    from hts_ray.student.official import import_checkpoint

    print_mapping("read", import_checkpoint(file, output, classes))
    console.print(f"[bold]student[/bold] -> {output}")
    console.print(f"next: [bold]hts predict --student {output} --images DIR[/bold]")


@cli.command("export")
@click.option("--format", "form", required=True,
              help="Of a student: safetensors, open_clip, onnx, hts. Of labels: coco, fiftyone,"
              " huggingface, webdataset, anno-mat, csv, parquet, label-studio.")  # fmt: skip
@click.option("--output", required=True, metavar="PATH", help="File or folder to write.")
@click.option("--student", metavar="DIR", help="Run or student folder (default: the run's).")
@click.option("--labels", metavar="DIR", help="Pseudo-labels to write (default: the latest).")
@click.option("--manifest", metavar="PATH", help="Write the annotations of this manifest instead.")
@click.option("--split", metavar="NAME", help="Images of this split only.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="A seeded sample only.")
@click.option("--force", is_flag=True, help="Replace an earlier export of labels.")
@stage_command()
def export_command(
    settings: Settings, form: str, output: str, student: str | None, **chosen: Any
) -> None:
    """Write labels in the format of another tool, or a student in another form."""
    from hts_ray.exports.writing import FORMATS

    if form in FORMATS:
        if student is not None:
            remedy = f"leave it out: --format {form} writes labels"
            raise ConfigError(field="--student", value=student, remedy=remedy)
        from hts_ray.label_commands import export_command as write_labels

        write_labels(settings.open(), form, output, dry_run=settings.dry_run, **chosen)
        return
    _export_student(settings, form, output, student, chosen)


def _export_student(
    settings: Settings, form: str, output: str, student: str | None, chosen: dict[str, Any]
) -> None:
    """Write a student and say what was compared, and how to use it."""
    from hts_ray.exports.writing import FORMATS as LABEL_FORMATS
    from hts_ray.student.export import FORMATS, export_student

    if form not in FORMATS:
        remedy = f"choose {', '.join(FORMATS)} (a student) or {', '.join(LABEL_FORMATS)} (labels)"
        raise ConfigError(field="--format", value=form, remedy=remedy)
    for name, value in chosen.items():
        if value not in (None, False):
            remedy = f"leave it out: --format {form} writes a student"
            raise ConfigError(field=f"--{name}", value=value, remedy=remedy)
    source = student or settings.config.run_dir
    if settings.dry_run:
        print_mapping("plan", {"student": source, "format": form, "write": output})
        return
    done = export_student(source, form, output)
    console.print(f"[bold]export[/bold] -> {done.path}")
    console.print(f"largest difference of {done.compared} when read again: {done.difference:.2g}")
    for note in done.notes:
        console.print(note, markup=False)


@cli.command("import-labels")
@click.argument("file", metavar="FILE")
@click.option("--output", required=True, metavar="DIR", help="Folder to write.")
@click.option("--manifest", metavar="PATH", help="The images meant (default: the run's manifest).")
@click.option("--labels", metavar="DIR", help="Pseudo-labels to compare with (default: latest).")
@click.option("--unmarked", type=click.Choice(["negative", "unknown"]), default="negative",
              show_default=True, help="What a class is that the file does not list.")  # fmt: skip
@click.option("--split", default="validation", show_default=True, help="Split of the manifest.")
@click.option("--validation-share", type=float, metavar="S",
              help="Part the images: this share to validate, the rest to override.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an earlier import.")
@stage_command()
def import_labels_command(settings: Settings, file: str, output: str, **chosen: Any) -> None:
    """Read labels that people corrected: Label Studio JSON, COCO JSON or CSV."""
    from hts_ray.label_commands import import_command as read_labels

    read_labels(settings.open(), file, output, dry_run=settings.dry_run, **chosen)


@cli.command()
@click.argument("corrections", metavar="DIR")
@click.option("--labels", metavar="DIR", help="Pseudo-labels to compare (default: the latest).")
@click.option("--json", "json_file", metavar="FILE", help="Also write the figures here.")
@stage_command()
def review(settings: Settings, corrections: str, **chosen: str | None) -> None:
    """Compare pseudo-labels with corrections that `hts import-labels` wrote to DIR."""
    from hts_ray.label_commands import review_command

    review_command(settings.open(), corrections, dry_run=settings.dry_run, **chosen)


@cli.command(context_settings={"allow_interspersed_args": False})
@click.option("--address", metavar="URL", help="Dashboard of the cluster (RAY_API_SERVER_ADDRESS).")
@click.option("--no-wait", is_flag=True, help="Return when the job has been submitted.")
@click.option("--attach", metavar="JOB", help="Follow a job that was submitted before.")
@click.option("--env", multiple=True, metavar="KEY[=VALUE]", help="Variable of the job's workers.")
@click.option("--uv", metavar="FILE", help="requirements.txt that uv adds on the nodes.")
@click.option("--pip", metavar="FILE", help="requirements.txt that pip adds on the nodes.")
@click.option("--working-dir", default=".", metavar="DIR", help="What is shipped (default: here).")
@click.option("--max-upload", type=float, metavar="MIB", help="Refuse more (default 64).")
@click.option("--python", default="python", show_default=True, help="Interpreter on the head node.")
@click.option("--submission-id", metavar="ID", help="Name of the job, once a cluster.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...")
def submit(arguments: tuple[str, ...], **options: Any) -> None:
    """Run a command as a job of a cluster: hts submit -- label --run-dir s3://...

    The exit code is the job's own; 3 when it was stopped, 130 when this client detached from it.
    """
    from hts_ray.submit import submit_command

    sys.exit(submit_command(arguments, **options))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@stage_command()
def doctor(settings: Settings, as_json: bool) -> None:
    """Check this machine, or all nodes of a cluster, and say what to change."""
    from hts_ray.doctor import examine, print_findings

    sys.exit(print_findings(examine(settings.config), as_json=as_json))


def _next(command: str, run: pipeline.Run) -> None:
    target = run.config.run_dir
    line = f"hts report {target}" if command == "report" else f"hts {command} --run-dir {target}"
    if command == "label" and find_stage(run.run_dir, "manifest") is None:
        return
    console.print(f"next: [bold]{line}[/bold]")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with its message and exit code 1 or 2."""
    try:
        cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        errors.print("stopped")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except UserError as error:
        errors.print(f"[bold red]error[/bold red]: {_escape(str(error))}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("stopped")
        sys.exit(130)
    except Exception as error:
        if os.environ.get("HTS_DEBUG"):
            raise
        errors.print(
            f"[bold red]error[/bold red]: {_escape(f'{type(error).__name__}: {error}')}\n"
            "This is a fault of hts_ray or of the cluster; HTS_DEBUG=1 shows where."
        )
        sys.exit(1)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
