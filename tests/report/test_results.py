"""Metrics and training records of a run, and what methods gain over each other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from report_pages import make_data

from hts_ray.report.content import ClassRow
from hts_ray.report.results import (
    by_class,
    by_role,
    comparison_rows,
    gap_closed,
    gap_sentence,
    precision_recall,
    read_evaluations,
    read_training,
    row_gap,
    wins_sentence,
)
from hts_ray.store import storage

ROWS = make_data(images=0).comparison


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


def test_gap_is_measured_between_the_right_rows():
    """Catches a sentence about an ablation row, or a division by a gap that is not there."""
    assert gap_closed(0.2, 0.4, 0.6) == pytest.approx(0.5)
    assert gap_closed(0.6, 0.4, 0.6) is None
    assert gap_closed(None, 0.4, 0.6) is None
    assert gap_closed(0.2, math.nan, 0.6) is None
    sentence = gap_sentence(ROWS)
    assert sentence.startswith("HTS reaches 50.0 % mAP, 12.8 points above zero-shot CLIP: 67 %")
    worse = [ROWS[0], replace(ROWS[2], mean_ap=0.3), ROWS[3]]
    assert "7.2 points below" in gap_sentence(worse)
    assert "none of the gap" in gap_sentence(worse)
    assert gap_sentence(ROWS[1:]) == ""
    no_top = gap_sentence([ROWS[0], ROWS[2]])
    assert no_top == "HTS reaches 50.0 % mAP, 12.8 points above zero-shot CLIP."


def test_rows_that_span_the_gap_have_none():
    """Catches 0 % and 100 % written beside the rows that the gap is measured between."""
    assert [row_gap(row, ROWS) is None for row in ROWS] == [True, False, False, True]


def test_a_given_role_beats_a_name():
    """Catches an ablation whose name begins with HTS taken for the main row."""
    assert by_role(ROWS)["hts"].name == "HTS"
    unnamed = [replace(row, role="") for row in ROWS]
    assert by_role(unnamed)["hts"].name == "HTS whole image only"


def test_wins_are_counted_over_classes_that_both_have():
    """Catches a class without AP counted as a loss."""
    ap = [(0.1, 0.2), (0.3, 0.2), (0.2, 0.2), (None, 0.9), (math.nan, 0.9)]
    rows = [ClassRow(i, "c", ap={"a": a, "b": b}) for i, (a, b) in enumerate(ap)]
    assert "higher AP in 1 of 3 classes and a lower one in 1" in wins_sentence(rows, "a", "b")
    assert wins_sentence(rows[3:], "a", "b") == ""
