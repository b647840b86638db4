"""The Grafana dashboard: its queries are queries, over metrics that somebody sends."""

import itertools
import json
import re
from pathlib import Path

import check
import promql_parser
import pytest
import ray.dashboard.modules.metrics.dashboards as ray_dashboards

from hts_ray.engine.telemetry import PROMETHEUS_NAMES as OURS
from hts_ray.engine.telemetry import TAGS

DASHBOARD = json.loads((check.FOLDER / "grafana-dashboard.json").read_text())
PANELS = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def selectors(query):
    """Return (metric, labels) of every selector in a query with Grafana's variables filled in."""
    filled = query.replace("$__rate_interval", "1m").replace("$__range", "3h")
    filled = filled.replace("$run", ".*").replace("$stage", ".*")
    promql_parser.parse(filled)
    found = re.findall(r"\b((?:ray|autoscaler)_\w+)(?:\{([^}]*)\})?", filled)
    return [(metric, set(re.findall(r"(\w+)=", labels))) for metric, labels in found]


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_asks_for_a_metric_that_is_sent(query):
    """Would catch a query that is none, or a panel that stays empty because of a name."""
    panels = "".join(
        path.read_text() for path in Path(ray_dashboards.__file__).parent.glob("*_panels.py")
    )
    assert selectors(query), "no metric in it"
    for metric, labels in selectors(query):
        if metric.startswith("ray_hts_"):
            assert metric in OURS
            assert labels == set(TAGS), "run and stage are chosen above the panels"
        else:
            assert metric in panels, f"{metric} is none of Ray's own panels"


def test_every_metric_is_shown():
    """Would catch a metric that is sent for nobody."""
    assert {metric for query in QUERIES for metric, _ in selectors(query)} >= OURS


@pytest.mark.parametrize(
    "query", ["sum(rate(ray_hts_images_total[1m])", "rate()", "sum by run (x)"]
)
def test_a_query_that_is_none_is_noticed(query):
    """Would catch a parser that takes anything."""
    with pytest.raises(ValueError):  # noqa: PT011 - its messages vary
        selectors(query)


def test_counters_are_read_as_rates_or_sums():
    """Would catch a counter drawn over time as it is, a line that only rises."""
    for panel in PANELS:
        for target in panel["targets"]:
            if panel["type"] == "timeseries" and "ray_hts_" in target["expr"]:
                assert "rate(" in target["expr"], panel["title"]


def test_totals_count_what_removed_nodes_did():
    """Would catch a total that falls when an autoscaled node, and its counters, go away."""
    for panel in PANELS:
        for target in panel["targets"]:
            if panel["type"] == "stat":
                bare = re.sub(
                    r"max_over_time\(ray_hts_\w+\{[^}]*\}\[\$__range\]\)", "", target["expr"]
                )
                assert "ray_hts_" not in bare, panel["title"]


def test_the_panels_are_told_apart_and_do_not_overlap():
    """Would catch a copied panel: Grafana shows one of two with the same id or place."""
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in itertools.combinations([panel["gridPos"] for panel in PANELS], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


def test_the_variables_of_the_queries_are_defined():
    """Would catch a query that filters by a variable that nobody can choose."""
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS))) - {"__rate_interval", "__range"}
    assert used == defined == {"datasource", "run", "stage"}
