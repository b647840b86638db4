"""What methods gain over each other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from report_pages import make_data

from hts_ray import report
from hts_ray.report.comparison import by_role, method_of, row_gap, wins_sentence

ROWS = make_data(images=0).comparison


def test_gap_is_measured_between_the_right_rows():
    """Catches a sentence about an ablation row, or a division by a gap that is not there."""
    assert report.gap_closed(0.2, 0.4, 0.6) == pytest.approx(0.5)
    assert report.gap_closed(0.6, 0.4, 0.6) is None
    assert report.gap_closed(None, 0.4, 0.6) is None
    assert report.gap_closed(0.2, math.nan, 0.6) is None
    sentence = report.gap_sentence(ROWS)
    assert sentence.startswith("HTS reaches 50.0 % mAP, 12.8 points above zero-shot CLIP: 67 %")
    worse = [ROWS[0], replace(ROWS[2], mean_ap=0.3), ROWS[3]]
    assert "7.2 points below" in report.gap_sentence(worse)
    assert "none of the gap" in report.gap_sentence(worse)
    assert report.gap_sentence(ROWS[1:]) == ""
    no_top = report.gap_sentence([ROWS[0], ROWS[2]])
    assert no_top == "HTS reaches 50.0 % mAP, 12.8 points above zero-shot CLIP."


def test_rows_that_span_the_gap_have_none():
    """Catches 0 % and 100 % written beside the rows that the gap is measured between."""
    assert [row_gap(row, ROWS) is None for row in ROWS] == [True, False, False, True]


def test_a_given_role_beats_a_name():
    """Catches an ablation whose name begins with HTS taken for the main row."""
    assert by_role(ROWS)["hts"].name == "HTS"
    unnamed = [replace(row, role="") for row in ROWS]
    assert by_role(unnamed)["hts"].name == "HTS whole image only"
    assert method_of("hts", ["HTS whole image only", "HTS"], ROWS) == "HTS"
    assert method_of("supervised", ["HTS"], ROWS) is None


def test_wins_are_counted_over_classes_that_both_have():
    """Catches a class without AP counted as a loss."""
    ap = [(0.1, 0.2), (0.3, 0.2), (0.2, 0.2), (None, 0.9), (math.nan, 0.9)]
    rows = [report.ClassRow(i, "c", ap={"a": a, "b": b}) for i, (a, b) in enumerate(ap)]
    assert "higher AP in 1 of 3 classes and a lower one in 1" in wins_sentence(rows, "a", "b")
    assert wins_sentence(rows[3:], "a", "b") == ""
