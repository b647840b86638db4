"""The stages of a run, in order: what the `hts` commands, notebooks and scripts call.

Each stage finds its input in the run directory unless it is given, records what makes it, joins or
starts Ray where it needs it, shows how far it is, and returns the folder it wrote. It returns at
once where that folder is finished. `read()` of a folder is its Arrow table, `stats` what was
counted.

    from hts_ray import stages

    config = stages.settings("own-images", run_dir="runs/mine", classes={"source": "classes.csv"})
    stages.prepare(config, "folder", "photos")
    stages.label(config)
    stages.filter_labels(config)
    stages.train(config)
    stages.predict(config).read().to_pandas()

A stage takes the settings, or a `Run` that was opened with them: `open_run(config)`. With one `Run`
for all, classes and manifest are read once. Ray is joined or started by every stage that needs it,
and once for all of them by `start`.
"""

from __future__ import annotations

import atexit
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import pyarrow.dataset as pads
import yaml

from hts_ray.config import HtsConfig, load_config, override
from hts_ray.engine.blocks import OnRay
from hts_ray.engine.console import Steps, busy, image_progress, print_line, print_note, steps
from hts_ray.engine.devices import choose_devices, cluster_offer
from hts_ray.engine.run import PROVENANCE, Run, Stage, open_run
from hts_ray.engine.session import command_cluster, joined
from hts_ray.errors import ConfigError
from hts_ray.evaluate import evaluate_predictions
from hts_ray.images.stage import plan_prepare
from hts_ray.labels.stage import plan_filter
from hts_ray.report import Section, report_for_run, write_report
from hts_ray.review.agreement import review_sections
from hts_ray.stages.checks import check_later
from hts_ray.store import storage
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.run import StageFolder, find_stage, given_stage, require_stage
from hts_ray.student.targets import center_rows, label_source, validation_rows
from hts_ray.teacher.models.catalog import weights_gib
from hts_ray.teacher.stage import plan_label

# The tables of a run, in the order in which its stages write them.
TABLES = ("manifest", "region_scores", "pseudo_labels", "student", "predictions", "evaluation")


def settings(preset: str | None = None, *, file: str | None = None, **values: Any) -> HtsConfig:
    """Return a configuration: a packaged preset, a YAML file, then settings, as nested mappings.

    `settings("demo", run_dir="runs/mine", train={"epochs": 3})`. Raises ConfigError naming the
    field, its value and the remedy.
    """
    return load_config(preset=preset, file=file, extra=values)


def changed(config: HtsConfig, **values: Any) -> HtsConfig:
    """Return a configuration with other settings: `changed(config, filter={"min_support": 2})`."""
    return override(config, values)


def class_names(config: HtsConfig) -> list[str]:
    """Return the names of the classes, in the order of every score."""
    return open_run(config).class_table.names


def start(config: HtsConfig) -> None:
    """Join or start Ray for the rest of this process, as `config.ray` says."""
    stack = ExitStack()
    stack.enter_context(command_cluster(config, "pipeline"))
    atexit.register(stack.close)


def prepare(config: HtsConfig | Run, source: str, root: str) -> StageFolder:
    """Write the manifest of the images at `root`.

    `source` is what they lie in: folder, list, webdataset, parquet, huggingface or hico. More than
    `prepare.local_images` are looked at on Ray, and a run of those that was cut off goes on after
    the last block that was written. Raises DataError when no image is usable.
    """
    run = _opened(config)
    check_later(run.config, "prepare")
    with busy(f"listing {root}"):
        plan = plan_prepare(run.config.prepare, source, root)
    cluster: AbstractContextManager[None] = nullcontext()
    if plan.large:
        cluster = command_cluster(run.config, "prepare", paths=[("--root", root)])
    with cluster, image_progress("prepare") as progress:
        stage = plan.write(run.run_dir, progress, OnRay(run.config.prepare.nodes).map)
    run.record()
    return stage


def label(
    config: HtsConfig | Run, manifest: StageFolder | str | None = None, *, limit: int | None = None
) -> StageFolder:
    """Let the teacher score every class on every region of the images; returns region_scores.

    `limit` takes a seeded sample of so many images, and is not remembered by the run.
    """
    run = _opened(config)
    images = run.manifest(_path(manifest))
    with placed(limited(run, limit), "label") as (on_devices, devices):
        plan = plan_label(on_devices, images)
        teacher = {"teacher_model": on_devices.config.labeling.teacher.model}
        run.record(devices, **teacher, teacher_fingerprint=plan.inputs["teacher"])
        if not plan.folder.finished:
            check_later(run.config, "label")
        cluster = command_cluster(on_devices.config, "label", manifest=images)
        hint = f"the newest labels, on a page: {shlex.join(['hts', 'report', run.run_dir])}"
        return _on_ray(plan, cluster, image_progress("label", hint))


@contextmanager
def placed(run: Run, command: str) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Give the run with the devices and precision that `auto` stands for, and what to record.

    A cluster that runs already is joined for the block. What was chosen is printed.
    """
    with joined(run.config.ray):
        offer = cluster_offer(run.config, command)
        known = storage.read_object(storage.join(run.run_dir, PROVENANCE))
        teacher = run.config.labeling.teacher
        begun = any(name.startswith("region_scores-") for name in storage.list_names(run.run_dir))
        begun = begun and known.get("teacher_model") == teacher.model
        choice = choose_devices(
            run.config,
            command,
            offer,
            earlier=known.get("devices", {}).get("label") if begun else None,
            weights_gib=partial(weights_gib, teacher),
        )
        for line in choice.lines:
            print_line(line)
        yield run.changed(choice.config.model_dump()), dict(choice.record)


def limited(run: Run, limit: int | None) -> Run:
    """Return the run with the teacher pass cut to a seeded sample; itself for None."""
    return run if limit is None else run.changed({"label": {"limit": limit}})


def filter_labels(
    config: HtsConfig | Run,
    region_scores: StageFolder | str | Sequence[StageFolder | str] | None = None,
) -> StageFolder:
    """Turn the teacher's scores into pseudo-labels.

    Several teacher passes, given here or by `filter.passes`, are combined.
    """
    run = _opened(config)
    stage = plan_filtering(run, region_scores).run()
    run.record()
    if not stage.stats["images_without_positive"]:
        print_note(
            "no image was left without a positive: if some show none of the classes, raise"
            " filter.positive_threshold, or filter with the background of"
            " label.teacher.background=general"
        )
    return stage


def plan_filtering(
    run: Run, region_scores: StageFolder | str | Sequence[StageFolder | str] | None = None
) -> Stage:
    """Plan `filter_labels`; ConfigError when passes are named here and by `filter.passes`."""
    named = run.config.filter.passes
    if named is not None and region_scores is not None:
        raise ConfigError(
            "region scores are given beside it",
            field="filter.passes",
            value=run.config.filter.model_dump(mode="json")["passes"],
            remedy="leave one of them out",
        )
    if isinstance(region_scores, Sequence) and not isinstance(region_scores, str):
        paths = [_path(one) for one in region_scores]
        return plan_filter(run.changed({"filter": {"passes": paths}}))
    if named is not None:
        return plan_filter(run)
    return plan_filter(run, found(run, region_scores, "region_scores", "label"))


def train(
    config: HtsConfig | Run,
    pseudo_labels: StageFolder | str | None = None,
    manifest: StageFolder | str | None = None,
) -> StageFolder:
    """Fine-tune the student on what `train.labels` says: pseudo, annotations or none (zero-shot).

    `manifest` is where annotations and the images of `train.validation_split` come from.
    """
    run = _opened(config)
    with placed(run, "train") as (on_devices, devices):
        plan, labels = plan_training(on_devices, pseudo_labels, manifest)
        run.record(devices, student_model=run.config.student.model)
        cluster = command_cluster(on_devices.config, "train", labels=labels)
        if plan.folder.finished:
            return plan.folder
        with cluster, steps() as shown:
            return plan.run(shown.epochs("train", run.config.train.epochs))


def plan_training(
    run: Run, pseudo_labels: StageFolder | str | None, manifest: StageFolder | str | None
) -> tuple[Stage, pads.Dataset | None]:
    """Plan `train`; returns the labels that it learns from too."""
    from hts_ray.student.train import plan_train  # torch loads slowly

    images, source = _path(manifest), None
    if pseudo_labels is not None:
        source = found(run, pseudo_labels, "pseudo_labels", "filter")
    labels = label_source(run, source, images)
    center = center_rows(run, images)
    return plan_train(run, labels, validation_rows(run, images), center), labels


def sweep(config: HtsConfig | Run, region_scores: StageFolder | str | None = None) -> StageFolder:
    """Try many settings of filter and training; `with_best` takes those that did best."""
    from hts_ray.sweep.plan import plan_sweep  # torch loads slowly
    from hts_ray.sweep.progress import trials_progress  # torch loads slowly
    from hts_ray.sweep.stage import run_sweep  # torch loads slowly

    run = _opened(config)
    with placed(run, "sweep") as (on_devices, devices):
        plan = plan_sweep(on_devices, found(run, region_scores, "region_scores", "label"))
        run.record(devices)
        with command_cluster(on_devices.config, "sweep"), steps() as shown:
            features, on_trial = shown.images("sweep: features"), trials_progress(plan, shown)
            return run_sweep(plan, on_trial=on_trial, on_features=features, tell=print_line)


def with_best(config: HtsConfig, sweep: StageFolder) -> HtsConfig:
    """Return the configuration with a sweep's best settings."""
    from hts_ray.sweep.stage import BEST_FILE  # torch loads slowly

    return override(config, yaml.safe_load(storage.read_bytes(sweep.file(BEST_FILE))) or {})


def predict(
    config: HtsConfig | Run,
    student: StageFolder | str | None = None,
    manifest: StageFolder | str | None = None,
) -> StageFolder:
    """Score the images of `predict.split` with a student, all classes each."""
    from hts_ray.student.predict import plan_predict  # torch loads slowly

    run = _opened(config)
    source, images = student_path(run, student), run.manifest(_path(manifest))
    with placed(run, "predict") as (on_devices, _):
        plan = plan_predict(on_devices, source, images)
        cluster = command_cluster(
            on_devices.config, "predict", manifest=images, paths=[("--student", source)]
        )
        return _on_ray(plan, cluster, image_progress("predict"))


def score_regions(
    config: HtsConfig | Run,
    student: StageFolder | str | None = None,
    region_scores: StageFolder | str | None = None,
) -> StageFolder:
    """Score the regions that the teacher saw with a student; returns student_scores."""
    from hts_ray.student.region_scoring import plan_score  # torch loads slowly

    run = _opened(config)
    scores = found(run, region_scores, "region_scores", "label")
    source = student_path(run, student)
    with placed(run, "score") as (on_devices, _):
        cluster = command_cluster(on_devices.config, "score", paths=[("--student", source)])
        plan = plan_score(on_devices, source, scores)
        return _on_ray(plan, cluster, image_progress("score regions"))


def student_path(run: Run, student: StageFolder | str | None = None) -> str:
    """Return a given student's folder, or that of the run's latest."""
    path = _path(student) or require_stage(run.run_dir, "student", "train").path
    return storage.absolute(path)


def evaluate(
    config: HtsConfig | Run,
    predictions: StageFolder | str | None = None,
    manifest: StageFolder | str | None = None,
    split: str = "test",
) -> dict[str, Any]:
    """Return HICO's metrics of predictions on the annotated images of a split.

    `manifest` may be an `anno.mat` too. The result has `mAP`, `mAP_known_object`, `few@10` and
    more, in [0, 1], and `ap` by class; it is stored in the run.
    """
    run, truth = _opened(config), _path(manifest)
    scored = _path(predictions) or require_stage(run.run_dir, "predictions", "predict").path
    annotations = truth if truth and truth.endswith(".mat") else run.manifest(truth)
    return evaluate_predictions(run, scored, annotations, split)


def pipeline(
    config: HtsConfig | Run,
    manifest: StageFolder | str | None = None,
    *,
    on_stage: Callable[[str, StageFolder], None] = lambda name, stage: None,
) -> dict[str, Any]:
    """Run label, filter, train, predict and, where there are annotations, evaluate.

    `on_stage` is called with the name and folder of every stage that is done. Returns the
    metrics, or an empty dict without annotations.
    """
    run = _opened(config)
    images = run.manifest(_path(manifest))
    with placed(run, "pipeline") as (on_devices, devices):
        run.record(devices)
        cluster = command_cluster(on_devices.config, "pipeline", manifest=images)
        with cluster, steps() as shown:
            return run_all(on_devices, images.path, on_stage=on_stage, watch=shown)


def run_all(
    run: Run,
    manifest: str,
    *,
    on_stage: Callable[[str, StageFolder], None] = lambda name, stage: None,
    watch: Steps | None = None,
) -> dict[str, Any]:
    """Do what `pipeline` does on a cluster that is up already."""
    from hts_ray.student.predict import plan_predict  # torch loads slowly

    images = run.manifest(manifest)
    scores = plan_label(run, images).run(watch and watch.images("label"))
    on_stage("label", scores)
    labels = plan_filter(run, scores).run()
    on_stage("filter", labels)
    plan, _ = plan_training(run, labels, manifest)
    student = plan.run(watch and watch.epochs("train", run.config.train.epochs))
    on_stage("train", student)
    plan = plan_predict(run, student.path, images)
    predictions = plan.run(watch and watch.images("predict"))
    on_stage("predict", predictions)
    split = run.config.predict.split or "test"
    if not len(images.annotated(split)):
        return {}
    return evaluate_predictions(run, predictions.path, images, split)


def report(config: HtsConfig, path: str | None = None, max_images: int = 200) -> str:
    """Write the page that `hts report` writes, and return its path."""
    return write_run_report(storage.absolute(config.run_dir), path, max_images)


def write_run_report(run_dir: str, path: str | None = None, max_images: int = 200) -> str:
    """Write one HTML page about a run directory, `report.html` in it by default."""
    path = path or storage.join(run_dir, "report.html")
    write_report(path, report_for_run(run_dir, max_images, sections=page_sections(run_dir)))
    return path


def page_sections(run_dir: str) -> list[Section]:
    """Return the parts of a run's report that its sweep and its review make."""
    from hts_ray.sweep.plots import sweep_section  # torch loads slowly

    sweep = sweep_section(run_dir)
    own = [Section("sweep", "Sweep", sweep)] if sweep else []
    return [*own, *review_sections(run_dir)]


def overview(run_dir: str) -> list[tuple[str, StageFolder | None]]:
    """Return the latest finished folder of every table of a run, in order."""
    return [(table, find_stage(run_dir, table)) for table in TABLES]


def found(run: Run, given: StageFolder | str | None, table: str, command: str) -> StageFolder:
    """Return a given stage folder, or the run's latest of a table.

    DataError when there is none, naming the `command` that writes it.
    """
    if given is None:
        return require_stage(run.run_dir, table, command)
    return given_stage(given, table) if isinstance(given, str) else given


def _opened(config: HtsConfig | Run) -> Run:
    return config if isinstance(config, Run) else open_run(config)


def _path(given: StageFolder | str | None) -> str | None:
    return given.path if isinstance(given, StageFolder) else given


def _on_ray(
    plan: Stage, cluster: AbstractContextManager[None], shown: AbstractContextManager[ImagesDone]
) -> StageFolder:
    """Do a stage's work on a cluster; a finished one needs none."""
    if plan.folder.finished:
        return plan.folder
    with cluster, shown as progress:
        return plan.run(progress)
