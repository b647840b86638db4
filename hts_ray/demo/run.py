"""The demo: every stage on the built-in world, and an honest table of what each part gains.

The rows share one world and one teacher pass by Ray Data. The main row, HTS with regions, trains
on a Ray Train worker; the rows it is compared with run the same loop in Ray Train's local mode,
inside this process. All are scored here by what `hts predict` maps over images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from hts_ray import report, stages
from hts_ray.config import HtsConfig, override
from hts_ray.demo.world import world_class_ids, write_world
from hts_ray.engine.console import (
    Steps,
    console,
    percent,
    print_rows,
    print_stage,
    print_written,
    steps,
)
from hts_ray.engine.run import Run, open_run
from hts_ray.evaluate import evaluate_scores, publish_metrics, read_annotations
from hts_ray.images.stage import prepare_manifest
from hts_ray.labels.evidence import image_evidence
from hts_ray.labels.stage import plan_filter
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.student.predict import score_images
from hts_ray.student.targets import training_labels
from hts_ray.student.train import plan_train
from hts_ray.teacher.stage import plan_label

NUM_TRAIN = 1200
NUM_TEST = 500
FEW = 10  # the few-shot column: classes with at most so many training positives


@dataclass(frozen=True)
class Variant:
    """One row of the table: what differs from the demo's settings.

    One with settings of `label` has a teacher pass of its own.
    """

    name: str
    note: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One measured row; metrics in [0, 1], seconds of the steps that are this row's own."""

    name: str
    note: str
    seconds: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    student: StageFolder | None = None
    labels: StageFolder | None = None
    scores: StageFolder | None = None


ZERO_SHOT = Variant("zero-shot CLIP", "class prompts only", {"train": {"labels": "none"}})
HTS = Variant("HTS with regions", "pseudo-labels, ASL")
# The student's own start as the teacher, no captioner: what is left of HTS is what that adds.
# Its filter was chosen by the labels of validation world 110, as HTS's own on such worlds.
CLIP_LABELS = Variant(
    "CLIP's own labels",
    "no captioner: zero-shot CLIP labels whole images",
    {
        "label": {
            "splits": ["train"],
            "regions": {"grid_scales": [], "grid_steps": []},
            "teacher": {"model": "open_clip:student", "prompt_templates": 5, "prior": "none"},
            "pool": {"min_size": 1, "max_size": 1},
        },
        "filter": {"positive_threshold": 0.3, "top_k": 1, "null_score": None},
    },
)
SUPERVISED = Variant(
    "supervised", "the train split's annotations", {"train": {"labels": "annotations"}}
)
VARIANTS = (
    ZERO_SHOT,
    CLIP_LABELS,
    Variant(
        "HTS whole image only",
        "no regional evidence",
        {"filter": {"region_kinds": ["whole"], "top_k": 1, "null_score": None}},
    ),
    HTS,
    Variant(
        "HTS with LSE-Sign",
        "same labels, the paper's loss",
        # The best of benchmarks/losses.py's search on validation worlds.
        {
            "train": {
                "loss": "lse_sign",
                "loss_temperature": 1.0,
                "asl_gamma_neg": 4.0,
                "soft_labels": False,
                "optim": {"grad_clip": 0.19},
            }
        },
    ),
    SUPERVISED,
)
TEACHER_NAME = "teacher alone"
IN_PROCESS = {"train": {"num_workers": 0}}  # train here, without a worker of Ray Train


def demo_config(config: HtsConfig, seed: int) -> HtsConfig:
    """Return the settings of one demo world: its classes, seed and run directory."""
    ids = config.classes.ids or tuple(world_class_ids())
    run_dir = storage.join(config.run_dir, f"seed-{seed}")
    return override(config, {"classes": {"ids": ids}, "seed": seed, "run_dir": run_dir})


def run_demo(config: HtsConfig) -> list[Row]:
    """Run the whole demo and print its table; the report lies in the run directory."""
    started = time.perf_counter()
    run = open_run(config)
    manifest = make_world(run)
    with steps() as shown:
        rows = run_variants(run, manifest, VARIANTS, shown)
    print_table(rows)
    closed, own = (_share(gap_closed(rows, name)) for name in (HTS.name, CLIP_LABELS.name))
    console.print(
        f"gap closed: {closed} = (HTS - zero-shot) / (supervised - zero-shot);"
        " on HICO the paper has 0.69"
    )
    console.print(f"without a captioner, by CLIP's own labels: {own}")
    _leave_main_as_latest(rows)
    path = write_demo_report(run, rows)
    print_written("report", path)
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    return rows


def _leave_main_as_latest(rows: Sequence[Row]) -> None:
    """Publish the main row's folders once more: the run's next command takes the latest."""
    main = next(row for row in rows if row.name == HTS.name)
    for stage in (main.scores, main.labels, main.student):
        assert stage is not None
        stage.publish(stage.stats)


def make_world(run: Run) -> str:
    """Render the seed's world in HICO's layout, read it as HICO is read; return its manifest."""
    num_train, num_test = NUM_TRAIN, NUM_TEST
    root = storage.join(run.run_dir, f"world-{num_train}-{num_test}")
    if not storage.exists(root):
        started = time.perf_counter()
        write_world(root, run.config.seed, num_train, num_test)
        seconds = time.perf_counter() - started
        console.print(
            f"[bold]world[/bold]: {num_train} train and {num_test} test scenes of"
            f" {len(run.class_table)} classes, rendered in {seconds:.0f} s"
        )
    stage = prepare_manifest(run.config.prepare, run.run_dir, "hico", root)
    print_stage("prepare", stage)
    run.record()
    return stage.file("manifest.parquet")


def run_variants(
    run: Run, manifest: str, variants: Sequence[Variant], watch: Steps | None = None
) -> list[Row]:
    """Label once, then filter, train, predict and evaluate every variant, in the order given.

    The main row trains on a Ray Train worker while the rows it is compared with train here.
    """
    scores = plan_label(run, run.manifest(manifest)).run(watch.images("label") if watch else None)
    print_stage("label", scores)
    rows = {TEACHER_NAME: teacher_row(run, manifest, scores)}
    here = run.changed(IN_PROCESS)
    first, *others = variants
    rows[first.name] = run_variant(here, manifest, scores, first, watch)
    with ThreadPoolExecutor(1) as pool:
        main = pool.submit(run_variant, run, manifest, scores, HTS, watch)
        for variant in others:
            if variant is not HTS:
                rows[variant.name] = run_variant(here, manifest, scores, variant, watch)
        rows[HTS.name] = main.result()
    names = [first.name, TEACHER_NAME, *(variant.name for variant in others)]
    return [rows[name] for name in names]


def run_variant(
    run: Run, manifest: str, scores: StageFolder, variant: Variant, watch: Steps | None = None
) -> Row:
    """Filter and train a variant, then score the test images in this process and evaluate."""
    started = time.perf_counter()
    own = run.changed(variant.settings)
    pseudo = own.config.train.labels == "pseudo"
    if "label" in variant.settings:
        scores = plan_label(own, run.manifest(manifest)).run()
    labels = plan_filter(own, scores).run() if pseudo else None
    epochs = watch.epochs(variant.name, own.config.train.epochs) if watch else None
    student = plan_train(own, training_labels(own, labels, manifest)).run(epochs)
    table = run.manifest(manifest).table
    images = table.filter(pc.equal(table["split"], "test"))
    ids, scores_NC = score_images(student.path, images, own.config.predict)
    row = Row(
        variant.name,
        variant.note,
        time.perf_counter() - started,
        student=student,
        labels=labels,
        scores=scores,
    )
    return _measured(row, own, manifest, student.path, ids, scores_NC)


def teacher_row(run: Run, manifest: str, scores: StageFolder) -> Row:
    """Evaluate the teacher's aggregated probabilities as if they were predictions."""
    evidence = image_evidence(scores.path, run.config.filter, "test")
    row = Row(TEACHER_NAME, "regions, no student", float(scores.stats["seconds"]))
    found = evidence.image_ids, evidence.probabilities_NC
    return _measured(row, run, manifest, scores.path, *found)


def _measured(
    row: Row, run: Run, manifest: str, source: str, image_ids: list[str], scores_NC: np.ndarray
) -> Row:
    """Compare scores of test images with the annotations; print and publish a row's metrics."""
    truth = read_annotations(run.manifest(manifest), run.class_table)
    metrics = evaluate_scores(image_ids, scores_NC, truth).to_dict()
    metrics.update(note=row.note, seconds=row.seconds)
    publish_metrics(run, metrics, source, manifest, "test", row.name)
    console.print(f"[bold]{row.name}[/bold]: mAP {percent(metrics['mAP'])}, {row.seconds:.0f} s")
    return replace(row, metrics=metrics)


def gap_closed(rows: Sequence[Row], name: str = HTS.name) -> float | None:
    """Return (row - zero-shot) / (supervised - zero-shot) in mAP; None when there is no gap."""
    value = {row.name: row.metrics["mAP"] for row in rows}
    return report.gap_closed(value[ZERO_SHOT.name], value[name], value[SUPERVISED.name])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def print_table(rows: Sequence[Row]) -> None:
    """Print the demo's table."""
    cells = [
        [
            row.name,
            percent(row.metrics["mAP"]),
            percent(row.metrics["mAP_known_object"]),
            percent(row.metrics.get(f"few@{FEW}")),
            f"{row.seconds:.0f}",
        ]
        for row in rows
    ]
    classes = rows[0].metrics["num_classes"]
    title = f"test mAP in %, {rows[0].metrics['num_images']} images, {classes} classes"
    print_rows(title, ["", "default", "known object", f"few@{FEW}", "seconds"], cells)


def write_demo_report(run: Run, rows: Sequence[Row]) -> str:
    """Write `report.html` of a demo world and return its path.

    The gallery and the funnel are those of the main row's pseudo-labels.
    """
    main = next(row for row in rows if row.name == HTS.name)
    found = report.report_for_run(
        run.run_dir, labels_stage=main.labels, sections=stages.page_sections(run.run_dir)
    )
    about = (
        "The images are drawn by a program: a synthetic world in the layout of HICO. The"
        " captioner and the CLIP model were trained by us on other drawn scenes. The figures"
        " show that the method and the code work, and say nothing about photographs."
    )
    title = f"HTS demo, world {run.config.seed}"
    path = storage.join(run.run_dir, "report.html")
    report.write_report(path, replace(found, title=title, intro=[about, *found.intro]))
    return path
