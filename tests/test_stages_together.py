"""The stages together, on a small built-in world, with the shipped models and on real Ray."""

import contextlib
import runpy
import sys
from pathlib import Path

import pyarrow.compute as pc
import pytest

from hts_ray import stages
from hts_ray.config import load_config, override
from hts_ray.demo.world import world_class_ids, write_world
from hts_ray.engine.run import Run, open_run
from hts_ray.errors import DataError
from hts_ray.images import manifest as images_manifest
from hts_ray.images.manifest import IMAGE_COLUMNS, open_manifest
from hts_ray.images.stage import prepare_manifest
from hts_ray.labels.stage import plan_filter
from hts_ray.store import storage
from hts_ray.store.run import finished_stages, require_stage
from hts_ray.store.tables import ANNOTATION_COLUMNS, read_table, write_table
from hts_ray.student import model as student_model
from hts_ray.student.targets import training_labels
from hts_ray.teacher import stage as teacher_stage
from hts_ray.teacher.stage import plan_label

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A HICO folder of 40 training and 24 test scenes."""
    root = tmp_path_factory.mktemp("world") / "hico"
    write_world(str(root), 555, 40, 24)
    return root


def small_run(run_dir, **settings):
    config = load_config(
        preset="demo",
        overrides=["train.epochs=1", "train.num_workers=0", "label.pool.min_size=1"],
        extra={"run_dir": str(run_dir), "classes": {"ids": list(world_class_ids())}},
    )
    return open_run(override(config, settings))


class Watch:
    """Keeps the last that it was told of each stage."""

    def __init__(self):
        self.last = {}

    def images(self, title):
        """Return a callback that keeps its arguments."""
        self.last[title] = None
        return lambda *told: self.last.update({title: told})

    def epochs(self, title, epochs):
        """Return a callback that keeps its arguments."""
        assert epochs == 1
        return self.images(title)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory, ray_session):
    """A run that went through every stage."""
    run = small_run(tmp_path_factory.mktemp("run"))
    manifest = prepare_manifest(run.config.prepare, run.run_dir, "hico", str(world)).file(
        "manifest.parquet"
    )
    told, watch = [], Watch()
    metrics = stages.run_all(
        run, manifest, on_stage=lambda name, stage: told.append(name), watch=watch
    )
    return run, manifest, metrics, told, watch


def test_every_stage_publishes_and_the_metrics_are_measured(finished):
    """Would catch a stage that is skipped, or a metric over nothing."""
    run, _, metrics, told, watch = finished
    assert told == ["label", "filter", "train", "predict"]
    assert list(watch.last) == ["label", "train", "predict"]
    assert watch.last["label"] == (64, 64, 0)
    assert watch.last["train"][0]["epoch"] == 0
    assert watch.last["predict"] == (24, 24, 0)
    assert all(stage is not None for _, stage in stages.overview(run.run_dir))
    assert metrics["num_images"] == 24
    assert metrics["num_classes"] > 5
    assert 0 < metrics["mAP"] < 1


def test_every_image_is_labeled_once(finished):
    """Would catch lost or doubled images between manifest and labels."""
    run, manifest, *_ = finished
    rows = open_manifest(manifest).table
    scored = read_table(
        require_stage(run.run_dir, "region_scores", "label").path, columns=["image_id"]
    )
    assert sorted(scored["image_id"].to_pylist()) == sorted(rows["image_id"].to_pylist())
    labels = read_table(dict(stages.overview(run.run_dir))["pseudo_labels"].path)
    assert len(labels) == 40


def test_a_second_run_reuses_everything(finished):
    """Would catch a teacher pass that is paid for twice."""
    run, manifest, metrics, *_ = finished
    before = {name: stage.stats["finished_at"] for name, stage in
              stages.overview(run.run_dir) if name != "evaluation"}  # fmt: skip
    again = stages.run_all(run, manifest)
    after = {name: stage.stats["finished_at"] for name, stage in
             stages.overview(run.run_dir) if name != "evaluation"}  # fmt: skip
    assert again == metrics
    assert before == after


def test_changed_settings_get_folders_of_their_own(finished):
    """Would catch an old answer served for new settings."""
    run, manifest, *_ = finished
    changed = Run(
        override(run.config, {"label": {"regions": {"grid_scales": [], "grid_steps": []}}}),
        run.class_table,
    )
    scores = require_stage(run.run_dir, "region_scores", "label")
    assert plan_label(changed, changed.manifest(manifest)).folder != scores
    stricter = run.changed({"filter": {"top_k": 4}})
    assert plan_filter(stricter, scores).folder != plan_filter(run, scores).folder
    fewer = Run(run.config, run.class_table.subset(run.class_table.ids[:5]))
    assert plan_label(fewer, fewer.manifest(manifest)).folder != scores


def test_training_on_pseudo_labels_never_sees_annotations(finished, tmp_path):
    """Would catch a leak of ground truth into the student: the bytes would differ without it."""
    run, manifest, *_ = finished
    table = read_table(manifest)
    for name in ANNOTATION_COLUMNS:
        place = table.column_names.index(name)
        empty = pc.if_else(pc.is_valid(table["image_id"]), None, table[name])
        table = table.set_column(place, table.schema.field(name), empty)
    assert table["positive_ids"].null_count == len(table)
    bare = str(tmp_path / "manifest.parquet")
    write_table(bare, table)
    other = small_run(tmp_path / "run")
    assert stages.run_all(other, bare) == {}
    for name in ("region_scores", "pseudo_labels", "student"):
        with_truth = dict(stages.overview(run.run_dir))[name]
        without = dict(stages.overview(other.run_dir))[name]
        assert with_truth.key == without.key, name
    weights = [
        storage.read_bytes(storage.join(stages.student_path(r), "model.safetensors"))
        for r in (run, other)
    ]
    assert weights[0] == weights[1]


def test_supervised_and_zero_shot_come_from_the_same_command(finished):
    """Would catch baselines that train on pseudo-labels, or an upper bound without annotations."""
    run, manifest, *_ = finished
    supervised = run.changed({"train": {"labels": "annotations"}})
    labels = training_labels(supervised, None, manifest)
    truth = open_manifest(manifest).table
    train = truth.filter(pc.equal(truth["split"], "train"))
    assert labels["positive_ids"].to_pylist() == train["positive_ids"].to_pylist()
    assert labels["ignored_ids"].to_pylist() == train["ambiguous_ids"].to_pylist()
    zero = run.changed({"train": {"labels": "none"}})
    assert training_labels(zero, None, manifest) is None


def test_a_folder_of_another_table_is_refused(finished, tmp_path):
    """Would catch predictions read as region scores."""
    run, *_ = finished
    wrong = dict(stages.overview(run.run_dir))["predictions"].path
    with pytest.raises(DataError, match="must start with region_scores-"):
        stages.found(run, wrong, "region_scores", "label")
    with pytest.raises(DataError, match="not finished"):
        stages.found(run, str(tmp_path / "region_scores-k"), "region_scores", "label")


def test_jobs_pipeline_runs_the_same(finished, world, monkeypatch, capsys):
    """Would catch a job entry point that ignores its arguments or the finished work."""
    run, _, metrics, *_ = finished
    monkeypatch.setattr(
        sys, "argv",
        ["pipeline.py", "--run-dir", run.run_dir, "--preset", "demo", "train.epochs=1",
         "train.num_workers=0", f"classes.ids={list(world_class_ids())}", "label.pool.min_size=1"],
    )  # fmt: skip
    with contextlib.suppress(SystemExit):  # the printed result below tells success
        runpy.run_path(str(REPOSITORY / "jobs" / "pipeline.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert f"{100 * metrics['mAP']:.1f}" in out


def test_a_command_reads_the_manifest_and_the_model_once(finished, monkeypatch):
    """Would catch a manifest of a million rows that is read five times, or weights hashed twice."""
    run, manifest, *_ = finished
    read, hashed = [], []
    real_read, real_label = images_manifest.read_batches, teacher_stage.model_fingerprint
    real_student = student_model.source_fingerprint
    monkeypatch.setattr(
        images_manifest,
        "read_batches",
        lambda path, columns, rows: read.append((path, *columns)) or real_read(path, columns, rows),
    )
    monkeypatch.setattr(
        teacher_stage, "model_fingerprint", lambda of: hashed.append(of) or real_label(of)
    )
    monkeypatch.setattr(
        student_model, "source_fingerprint", lambda of: hashed.append(of) or real_student(of)
    )
    annotated = {"train": {"labels": "annotations", "validation_split": "test"}}
    for command, settings in (
        (lambda config: stages.label(config, manifest), {"label": {"limit": 3}}),
        (lambda config: stages.train(config, manifest=manifest), annotated),
        (lambda config: stages.predict(config, manifest=manifest), {"predict": {"split": "train"}}),
    ):
        read.clear()
        hashed.clear()
        command(override(run.config, settings))
        # Ids, paths and splits once; the other columns are read when they are asked for.
        assert read.count((manifest, *IMAGE_COLUMNS)) == 1
        assert len(set(read)) == len(read)
        assert len(read) <= 2
        assert len(hashed) <= 1


def test_a_student_scores_the_regions_that_the_teacher_saw(finished):
    """Would catch scores of other regions or another split, and the arguments changed over."""
    run, *_ = finished
    passes = finished_stages(run.run_dir, "region_scores")
    whole = next(stage for stage in passes if stage.stats["rows_in"] == 64)
    scored = stages.score_regions(run, region_scores=whole)
    teacher = whole.read(["image_id", "boxes"])
    regions = {row["image_id"]: len(row["boxes"]) for row in teacher.to_pylist()}
    rows = scored.read(["image_id", "scores"]).to_pylist()
    assert len(rows) == 40  # the training split alone
    classes = len(run.class_table)
    assert all(len(row["scores"]) == classes * regions[row["image_id"]] for row in rows)
