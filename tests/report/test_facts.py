"""Settings, counts, times and bad images of a run's stage folders."""

from __future__ import annotations

import pytest

from hts_ray.config import parse_config
from hts_ray.report.facts import read_quarantine, run_facts, stage_rows
from hts_ray.store import storage
from hts_ray.store.run import StageFolder


def test_only_finished_folders_count_and_the_latest_is_taken(run_dir):
    """Catches half-written results, and another table whose name begins alike."""
    storage.write_json(f"{run_dir}/student-half/history.json", [])
    storage.write_json(f"{run_dir}/student_scores-x/stats.json", {"finished_at": 1e12})
    rows = {row.name: row for row in stage_rows(run_dir)}
    assert rows["student"].note == "the latest of 2"
    assert run_facts(run_dir, parse_config({}), {})["Student"]["settings hash"] == "b"
    assert "predictions" not in rows


def test_gpu_hours_are_time_by_gpus(run_dir):
    """Catches a pool's share of a GPU forgotten, workers without GPUs counted, and a wrong unit."""
    rows = {row.name: row for row in stage_rows(run_dir)}
    assert rows["region scores"].gpu_hours == pytest.approx(0.5 * 4 * 0.5)
    assert rows["student"].gpu_hours == pytest.approx(2 * 3 / 3600)
    assert rows["pseudo labels"].gpu_hours == 0
    assert rows["student"].note == "the latest of 2"
    assert rows["manifest"].gpu_hours == 0


def test_resumed_time_is_told(run_dir):
    """Catches a throughput that seems to belong to all rows where most came from an earlier run."""
    stage = StageFolder(run_dir, "region_scores", "abc")
    stage.publish({**stage.stats, "rows_resumed": 1234, "regions_per_second": 56.7})
    rows = {row.name: row for row in stage_rows(run_dir)}
    assert "57 regions/s" in rows["region scores"].note
    assert "without 1,234 images" in rows["region scores"].note


def test_quarantine_has_an_image_once_a_stage(run_dir):
    """Catches an image listed again by every run of a stage."""
    rows = read_quarantine(run_dir)
    assert [(row["image_id"], row["stage"], row["error_kind"]) for row in rows] == [
        ("im5", "label", "truncated")
    ]


def test_facts_tell_what_ran_not_what_is_set_now(run_dir):
    """Catches the revision of another model, and settings of a student that was not trained."""
    config = parse_config({"label": {"teacher": {"model": "you/other", "revision": "abc"}}})
    provenance = {"git_commit": "0123456789abcdef+changes", "versions": {"ray": "2.60"}}
    parts = run_facts(run_dir, config, provenance)
    assert parts["Teacher"]["model"] == "me/captioner"
    assert "revision" not in parts["Teacher"]
    assert parts["Teacher"]["regions"] == "the whole image, 3 x 3 crops of 0.5 of a side"
    assert parts["Data"]["data hash"] == "abc"
    assert parts["Student"]["loss"] == "bce"
    assert parts["Software"]["git commit"] == "0123456789ab+changes"
    same = parse_config({"label": {"teacher": {"model": "me/captioner", "revision": "abc"}}})
    teacher = run_facts(run_dir, same, {})["Teacher"]
    assert teacher["revision"] == "abc"


def test_the_zero_shot_student_has_no_training_facts(run_dir):
    """Catches a loss and a learning rate beside a student that never saw them."""
    path = f"{run_dir}/student-b/student.json"
    info = {"train": {"labels": "none", "loss": "bce", "optim": {"lr": 0.1}}, "epochs": 0}
    storage.write_json(path, {"info": info})
    parts = run_facts(run_dir, parse_config({}), {})
    assert parts["Student"]["labels"] == "Zero-shot"
    assert "loss" not in parts["Student"]
