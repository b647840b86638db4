"""Where the plots put things."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hts_ray.sweep.plots import Axis, render_sweep

RATE = Axis("train.optim.head_lr", 1e-4, 1e-2, True)
KINDS = Axis("filter.region_kinds", choices=(None, ["whole"], ["grid", "whole"]))


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0), st.booleans())
def test_places_keep_the_order_and_the_axis(first, second, log):
    """Would catch points outside of the plot, or an axis upside down."""
    axis = Axis("x", 1e-3, 0.5, log)
    a, b = axis.place(first), axis.place(second)
    assert 0 <= a <= 1
    assert (a <= b) == (min(max(first, 1e-3), 0.5) <= min(max(second, 1e-3), 0.5)) or a == b


def test_places():
    """Would catch a logarithmic axis drawn evenly, and choices on top of one another."""
    assert RATE.place(1e-3) == pytest.approx(0.5)
    assert RATE.place(None) is None
    assert [KINDS.place(value) for value in KINDS.choices] == pytest.approx([1 / 6, 0.5, 5 / 6])
    assert KINDS.place(["person"]) is None
    assert KINDS.ticks()[0][1] == "none"
    assert KINDS.ticks()[2][1] == "grid+whole"
    assert Axis("x", 2, 2).place(2) == 0.5


def test_the_section_holds_every_trial_with_a_value_and_escapes_text():
    """Would catch trials left out, markup from a message, and numbers that are not finite."""
    rows = [
        {"trial": n, "status": status, "objective": value, "train.optim.head_lr": rate,
         "filter.region_kinds": kinds}
        for n, status, value, rate, kinds in [
            (0, "complete", 0.4, None, None),
            (1, "complete", 0.5, 1e-3, ["whole"]),
            (2, "stopped", 0.1, 1e-4, ["grid", "whole"]),
            (3, "infeasible", None, 1e-2, ["whole"]),
        ]
    ]  # fmt: skip
    stats = {"verdict": "trial 1 beats <all>", "rows_in": 4, "objective": "unseen_ap",
             "statuses": {"complete": 2, "stopped": 1, "infeasible": 1},
             "best_trial": 1}  # fmt: skip
    finalists = [
        {
            "number": 0,
            "trial_value": 0.4,
            "value": 0.6,
            "message": "",
            "objective": "unseen_ap",
        },
        {"number": 1, "trial_value": 0.5, "value": None, "message": "<b>", "objective": "x"},
    ]
    html = render_sweep(rows, [RATE, KINDS], stats, finalists)
    assert html.count("<title>trial") == 3
    assert html.count("<circle") == 2 + 3  # the own rate is not set
    assert "trial 1 beats &lt;all&gt;" in html
    assert "&lt;b&gt;" in html
    assert "nan" not in html.lower()
    for point in html.split('points="')[1].split('"')[0].split():
        assert all(math.isfinite(float(number)) for number in point.split(","))
