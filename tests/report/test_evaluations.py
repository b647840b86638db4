"""Metrics and training records of a run."""

from __future__ import annotations

import math

import pytest

from hts_ray.report.evaluations import (
    by_class,
    comparison_rows,
    precision_recall,
    read_evaluations,
    read_training,
)
from hts_ray.store import storage


def test_evaluations_are_named_and_ordered(run_dir):
    """Catches an evaluation lost because another has its name, and worst ones on top."""
    assert list(read_evaluations(run_dir)) == ["zero-shot", "HTS"]
    storage.write_json(f"{run_dir}/evaluation-c/metrics.json", {"mAP": 0.3, "name": "HTS"})
    assert list(read_evaluations(run_dir)) == ["zero-shot", "HTS (c)", "HTS"]


def test_an_unnamed_evaluation_is_named_by_its_students_labels(run_dir):
    """Catches a row called by a hash where the run knows what it is."""
    path = f"{run_dir}/evaluation-b/metrics.json"
    values = {key: value for key, value in storage.read_json(path).items() if key != "name"}
    storage.write_json(path, values)
    assert list(read_evaluations(run_dir)) == ["zero-shot", "HTS"]
    # Scored in place, without a table of predictions: the student itself is named.
    storage.write_json(path, {**values, "predictions": "/elsewhere/student-b"})
    found = read_evaluations(run_dir)
    assert found["HTS"]["student"] == f"{run_dir}/student-b"


def test_the_runs_student_is_the_main_row(run_dir):
    """Catches an ablation whose name begins with HTS taken for the main row."""
    metrics = read_evaluations(run_dir)
    rows = comparison_rows(metrics, f"{run_dir}/student-b")
    assert [row.role for row in rows] == ["", "hts"]
    assert [row.role for row in comparison_rows(metrics, "")] == ["", ""]


def test_lists_that_do_not_fit_the_classes_are_left_out(run_dir):
    """Catches AP shown beside another class's name."""
    values = read_evaluations(run_dir)["HTS"]
    assert by_class(values, "ap", []) == {5: 0.5, 9: None, 400: 0.1}
    assert by_class({"ap": [0.1, 0.2]}, "ap", [5, 9, 400]) == {}
    assert by_class({}, "ap", [5]) == {}
    curves = precision_recall(values, [])
    assert set(curves) == {5, 400}
    assert sum(curves[5]) / 11 == pytest.approx(6.5 / 11)


def test_training_is_named_as_its_evaluation(run_dir):
    """Catches curves under a hash, students without epochs, and a gap read as a number."""
    (curve,) = read_training(run_dir, read_evaluations(run_dir))
    assert (curve.name, curve.loss) == ("HTS", [2.0, 1.0])
    assert math.isnan(curve.validation_map[0])
    assert curve.validation_map[1] == 0.4
    (unnamed,) = read_training(run_dir, {})
    assert unnamed.name == "HTS"  # by the labels it learned from
