"""Charts: SVG that takes the page's colours, and its figures in words."""

from __future__ import annotations

import math
import re

import pytest
from markupsafe import Markup
from report_pages import HOSTILE, Page

from hts_ray import report
from hts_ray.report import charts, content
from hts_ray.report.page import environment


def page_of(chart):
    macro = environment().get_template("macros.html.j2").module.chart
    return Page(str(macro(chart)))


def one_curve(losses):
    return [content.TrainingCurve("HTS", losses)]


def test_drawings_take_the_pages_colours():
    """Catches a colour that matplotlib wrote in another way, which dark pages would not change."""

    def paint(drawing):
        axes = drawing.subplots()
        axes.plot([0, 1], [0, 1], color=charts.ACCENT, label="x")
        axes.bar([0], [1], color=charts.SERIES[2], edgecolor=charts.INK)
        axes.text(0, 0, "text", color=charts.SOFT)

    svg = report.draw(paint, "a line")
    assert isinstance(svg, Markup)
    colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
    assert colors == {"none", *(f"var(--{name})" for name in ("accent", "s2", "ink", "soft"))} | {
        "var(--line)",
        "var(--bar)",
    }
    assert "font-family" not in svg
    assert "#0" not in svg.replace('"#', "")


def test_drawings_can_stand_beside_each_other():
    """Catches ids that two drawings share, and style sheets that change the page around them."""
    one = report.draw(lambda drawing: drawing.subplots().plot([1, 2], marker="o"), "one")
    two = report.draw(lambda drawing: drawing.subplots().plot([1, 2], marker="o"), "two")
    page = Page(one + two)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 0
    assert not page.attributes("style")
    for attrs in page.attributes("use"):
        assert attrs["href"][1:] in ids
    assert "http" not in page.text
    assert one == report.draw(lambda drawing: drawing.subplots().plot([1, 2], marker="o"), "one")


def test_drawings_ignore_the_users_own_style():
    """Catches a page that fails or looks otherwise where matplotlib is set up for papers."""
    import matplotlib as mpl

    def paint(drawing):
        drawing.subplots().plot([1, 2])

    plain = report.draw(paint, "a line")
    with mpl.rc_context({"text.usetex": True, "axes.grid": False, "svg.fonttype": "path"}):
        assert report.draw(paint, "a line") == plain
        assert mpl.rcParams["text.usetex"]


def test_plot_box_is_where_the_axes_are():
    """Catches a box upside down: the page's script draws classes into it."""
    chart = charts.precision_recall_chart({"a": {1: [1.0] * 11}}, {"a": 0})
    (svg,) = Page(str(chart.svg)).attributes("svg")
    left, top, width, height = map(float, svg["data-plot"].split())
    line = re.search(r'data-mark="0">\s*<path d="([^"]+)"', chart.svg)[1]
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", line)]
    assert numbers[:2] == pytest.approx([left, top], abs=0.1)
    assert numbers[-2] == pytest.approx(left + width, abs=0.1)
    bottom = charts.precision_recall_chart({"a": {1: [0.0] * 11}}, {"a": 0})
    line = re.search(r'data-mark="0">\s*<path d="([^"]+)"', bottom.svg)[1]
    assert float(line.split()[2]) == pytest.approx(top + height, abs=0.1)


@pytest.mark.parametrize(
    "losses", [[1.0], [2.0, 2.0], [0.0, 0.0], [math.nan, 5.0], [1e-9, 1e9], [1.0] * 300]
)
def test_any_losses_draw(losses):
    """Catches a division by zero in the scale, and a table of a thousand rows."""
    (chart,) = charts.training_charts(one_curve(losses), {"HTS": 0})
    page = page_of(chart)
    assert page.attributes("path")
    assert len(chart.rows) <= 200
    assert "nan" not in page.text


def test_what_was_not_measured_is_not_drawn():
    """Catches an empty chart of validation mAP, and one of nothing but NaN."""
    assert charts.training_charts(one_curve([math.nan]), {"HTS": 0}) == []
    assert len(charts.training_charts(one_curve([1.0]), {"HTS": 0})) == 1
    measured = [content.TrainingCurve("HTS", [1.0, 0.5], [math.nan, 0.31])]
    _, quality = charts.training_charts(measured, {"HTS": 0})
    assert quality.rows == [["1", "\u2013"], ["2", "31.0"]]


def test_a_method_looks_the_same_in_every_chart():
    """Catches colours given by position, which differ where a chart lacks a method."""
    series = {"zero-shot": 0, "HTS": 1}
    curves = charts.precision_recall_chart({"HTS": {1: [1.0] * 11}}, series)
    (training,) = charts.training_charts(one_curve([1.0, 2.0]), series)
    assert curves.keys[0].series == training.keys[0].series == 1
    assert "var(--s1)" in curves.svg
    assert "var(--s1)" in training.svg


def test_no_two_series_look_alike():
    """Catches a seventh method with the colour and dashes of the first."""
    keys = [charts.Key(number, "x") for number in range(24)]
    assert len({(key.color, key.dashes) for key in keys}) == 24


def test_reliability_is_also_there_in_words():
    """Catches a chart that says nothing to those who cannot see it."""
    bins = [content.ReliabilityBin(0.3, 0.4, 40, 10, 0.35)]
    chart = charts.reliability_chart(bins)
    assert chart.rows == [["30 to 40", "40", "35.0", "25.0", "14.2 to 40.2"]]
    assert "at 35.0 % probability 25.0 % of 40 are right" in chart.svg


def test_hostile_names_stay_text():
    """Catches a method's name that ends the drawing, or one read as a formula."""
    name = f"{HOSTILE} $x^2$"
    chart = charts.precision_recall_chart({name: {1: [0.5] * 11}}, {name: 0})
    page = page_of(chart)
    assert not page.attributes("script")
    assert name in page.words
    assert name in page.attributes("svg")[0]["aria-label"]
