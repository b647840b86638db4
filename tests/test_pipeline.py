"""The stages together, on a small built-in world, with the shipped models and on real Ray."""

import contextlib
import runpy
import sys
from pathlib import Path

import pyarrow.compute as pc
import pytest

from hts_ray import pipeline
from hts_ray.config import load_config, override
from hts_ray.demo.world import world_class_ids, write_world
from hts_ray.errors import ConfigError, DataError
from hts_ray.store import storage
from hts_ray.store.tables import ANNOTATION_COLUMNS, read_table, write_table

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
    return pipeline.open_run(override(config, settings))


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
    manifest = pipeline.prepare(run, "hico", str(world)).file("manifest.parquet")
    told, watch = [], Watch()
    metrics = pipeline.run_all(
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
    assert all(stage is not None for _, stage in pipeline.stage_overview(run.run_dir))
    assert metrics["num_images"] == 24
    assert metrics["num_classes"] > 5
    assert 0 < metrics["mAP"] < 1


def test_every_image_is_labeled_once(finished):
    """Would catch lost or doubled images between manifest and labels."""
    run, manifest, *_ = finished
    rows = pipeline.read_manifest(manifest)
    scored = read_table(pipeline.region_scores_stage(run).path, columns=["image_id"])
    assert sorted(scored["image_id"].to_pylist()) == sorted(rows["image_id"].to_pylist())
    labels = read_table(dict(pipeline.stage_overview(run.run_dir))["pseudo_labels"].path)
    assert len(labels) == 40


def test_a_second_run_reuses_everything(finished):
    """Would catch a teacher pass that is paid for twice."""
    run, manifest, metrics, *_ = finished
    before = {name: stage.stats["finished_at"] for name, stage in
              pipeline.stage_overview(run.run_dir) if name != "evaluation"}  # fmt: skip
    again = pipeline.run_all(run, manifest)
    after = {name: stage.stats["finished_at"] for name, stage in
             pipeline.stage_overview(run.run_dir) if name != "evaluation"}  # fmt: skip
    assert again == metrics
    assert before == after


def test_changed_settings_get_folders_of_their_own(finished):
    """Would catch an old answer served for new settings."""
    run, manifest, *_ = finished
    changed = pipeline.Run(
        override(run.config, {"label": {"regions": {"grid_scales": [], "grid_steps": []}}}),
        run.class_table,
    )
    scores = pipeline.region_scores_stage(run)
    assert pipeline.label_stage(changed, manifest) != scores
    stricter = pipeline.Run(override(run.config, {"filter": {"top_k": 4}}), run.class_table)
    assert pipeline.filter_stage(stricter, scores) != pipeline.filter_stage(run, scores)
    fewer = pipeline.Run(run.config, run.class_table.subset(run.class_table.ids[:5]))
    assert pipeline.label_stage(fewer, manifest) != scores


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
    assert pipeline.run_all(other, bare) == {}
    for name in ("region_scores", "pseudo_labels", "student"):
        with_truth = dict(pipeline.stage_overview(run.run_dir))[name]
        without = dict(pipeline.stage_overview(other.run_dir))[name]
        assert with_truth.key == without.key, name
    weights = [
        storage.read_bytes(storage.join(pipeline.student_path(r), "model.safetensors"))
        for r in (run, other)
    ]
    assert weights[0] == weights[1]


def test_supervised_and_zero_shot_come_from_the_same_command(finished):
    """Would catch baselines that train on pseudo-labels, or an upper bound without annotations."""
    run, manifest, *_ = finished
    supervised = pipeline.Run(
        override(run.config, {"train": {"labels": "annotations"}}), run.class_table
    )
    labels = pipeline.training_labels(supervised, None, manifest)
    truth = pipeline.read_manifest(manifest)
    train = truth.filter(pc.equal(truth["split"], "train"))
    assert labels["positive_ids"].to_pylist() == train["positive_ids"].to_pylist()
    assert labels["ignored_ids"].to_pylist() == train["ambiguous_ids"].to_pylist()
    zero = pipeline.Run(override(run.config, {"train": {"labels": "none"}}), run.class_table)
    assert pipeline.training_labels(zero, None, manifest) is None


def test_a_folder_of_another_table_is_refused(finished, tmp_path):
    """Would catch predictions read as region scores."""
    run, *_ = finished
    wrong = dict(pipeline.stage_overview(run.run_dir))["predictions"].path
    with pytest.raises(DataError, match="must start with region_scores-"):
        pipeline.region_scores_stage(run, wrong)
    with pytest.raises(DataError, match="not finished"):
        pipeline.region_scores_stage(run, str(tmp_path / "region_scores-k"))


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


def test_the_student_helps_to_filter_and_is_trained_anew(finished):
    """Would catch a round without effect, one over other regions, and weight 0 with an effect."""
    run, manifest, *_ = finished
    run = pipeline.Run(override(run.config, {"train": {"trainable": "head"}}), run.class_table)
    scores = pipeline.region_scores_stage(run)
    plain = pipeline.filter_labels(run, scores)
    student = pipeline.train(run, pipeline.training_labels(run, plain, manifest))

    def self_trained(weight, rounds=1):
        changes = {"self_training": {"rounds": rounds, "student_weight": weight}}
        changed = pipeline.Run(override(run.config, changes), run.class_table)
        told = []
        result = pipeline.self_train(
            changed, scores, student, on_stage=lambda name, stage: told.append((name, stage))
        )
        return result, told

    (labels, second), told = self_trained(0.5)
    assert [name for name, _ in told] == ["student scores", "filter", "train"]
    assert told[0][1].stats["rows_in"] == 40  # the training split alone
    assert {labels, second}.isdisjoint({plain, student})
    assert len(read_table(labels.path)) == 40
    # The teacher alone: other folder, same labels, hence the same student.
    (same, again), _ = self_trained(0.0)
    assert same != plain
    assert again == student
    (_, third), told = self_trained(0.5, rounds=2)
    assert [stage for name, stage in told if name == "train"] == [second, third]
    assert third != second


def test_self_training_is_refused_where_it_has_nothing_to_do(finished):
    """Would catch a setting that is quietly without effect, found out after a day of labeling."""
    run, manifest, *_ = finished
    changes = {"self_training": {"rounds": 1}, "train": {"labels": "annotations"}}
    supervised = pipeline.Run(override(run.config, changes), run.class_table)
    with pytest.raises(ConfigError, match=r"self_training.rounds = 1.*pseudo-labels only"):
        pipeline.run_all(supervised, manifest)
    with pytest.raises(ConfigError, match=r"self_training.rounds = 0: give 1"):
        pipeline.self_train(run, pipeline.region_scores_stage(run), None)
