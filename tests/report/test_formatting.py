"""Numbers as readers see them."""

from __future__ import annotations

import math

import pytest

from hts_ray.report import formatting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "12.3"),
        (-0.0001, "0.0"),
        (1.0, "100.0"),
        (None, formatting.NOTHING),
        (math.nan, formatting.NOTHING),
    ],
)
def test_percent(value, text):
    """Catches "nan", "-0.0" and fractions in place of percents."""
    assert formatting.percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")],
)
def test_figure(value, text):
    """Catches noise digits on large numbers and small ones rounded to nothing."""
    assert formatting.figure(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.94, "9.9 s"), (9.96, "10 s"), (179.6, "3 min 0 s"), (5999.6, "1 h 40 min")],
)
def test_seconds(value, text):
    """Catches "60 s" and "60 min", which come of rounding after the unit is chosen."""
    assert formatting.seconds(value) == text


def test_shares_never_round_to_nothing_or_all():
    """Catches "0.0 %" for a few of many, and "100.0 %" where some are missing."""
    assert formatting.share(0.0001) == "under 0.1 %"
    assert formatting.share(0.99999) == "over 99.9 %"
    assert (formatting.share(0.0), formatting.share(1.0)) == ("0.0 %", "100.0 %")


def test_flat_names_nested_values():
    """Catches a mapping printed with its braces, or a missing value as None."""
    values = {"a": {"b": 1, "c": None}, "d": ["x", "y"], "e": []}
    assert list(formatting.flat(values)) == [
        ("a.b", "1"),
        ("a.c", formatting.NOTHING),
        ("d", "x, y"),
        ("e", formatting.NOTHING),
    ]
