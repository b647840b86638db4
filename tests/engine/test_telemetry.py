"""Metrics and logs: what Prometheus gets, that nothing fails without it, and what a line holds."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
import urllib.request
from collections.abc import Iterator

import pyarrow as pa
import pytest

from hts_ray.config import RayConfig
from hts_ray.engine.telemetry import (
    PROMETHEUS_NAMES,
    HeldGpus,
    JsonLines,
    Meter,
    configured,
    log_as,
    run_tag,
)
from hts_ray.store.run import StageFolder

FOLDER = StageFolder("/data/runs/hico/", "region_scores", "0123456789ab")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Take our handler away again: logging belongs to the process."""
    logger = logging.getLogger("hts_ray")
    level = logger.level
    yield
    log_as("text", "", "")
    logger.setLevel(level)


def exported(run: str) -> dict[str, float]:
    """Return this node's metrics of a run, as Prometheus would read them."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        match = re.fullmatch(r"(\w*hts_\w+)\{(.*)\} (\S+)", line)
        if match and f'run="{run}"' in match[2] and 'stage="label"' in match[2]:
            found[match[1]] = found.get(match[1], 0.0) + float(match[3])
    return found


def test_prometheus_reads_the_names_and_sums_of_workers(ray_session):
    """Would catch names that Ray changes, lost tags, and workers that overwrite each other."""
    import ray

    meter = Meter("label", "telemetry-test", gpu_hour_price=2.0)

    def work(meter):
        meter.count(
            images=3, regions=12, quarantined=1, retries=2, busy_seconds=0.5, gpu_hours=0.25
        )

    task = ray.remote(num_cpus=1)(work)
    ray.get([task.remote(meter), task.remote(meter)])
    meter.count(images=1)  # the driver's own
    expected = {
        "ray_hts_images_total": 7,
        "ray_hts_regions_total": 24,
        "ray_hts_quarantined_total": 2,
        "ray_hts_retries_total": 4,
        "ray_hts_stage_busy_seconds_total": 1.0,
        "ray_hts_gpu_hours_total": 0.5,
        "ray_hts_spend_estimate_total": 1.0,
    }
    assert expected.keys() == PROMETHEUS_NAMES
    deadline = time.monotonic() + 90
    while (found := exported("telemetry-test")) != expected and time.monotonic() < deadline:
        time.sleep(1.0)
    assert found == expected


def test_nothing_is_counted_without_ray(monkeypatch):
    """Would catch scoring without a cluster that imports Ray, or fails for want of it."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    meter = Meter("predict", "here")
    with meter.busy():
        meter.count(images=1, gpu_hours=1.0)
    assert "ray" not in sys.modules


def test_metrics_that_fail_do_not_fail_the_run(monkeypatch):
    """Would catch an agent's trouble, or a value that Ray refuses, ending a run."""

    def broken(name):
        raise RuntimeError("no agent")

    monkeypatch.setattr("hts_ray.engine.telemetry.on_ray", lambda: True)
    monkeypatch.setattr("hts_ray.engine.telemetry._counter", broken)
    Meter("label", "run").count(images=1)


class _Recorder(Meter):
    """A meter that keeps what it is told."""

    def count(self, **values):
        kept.append(values)


kept: list[dict[str, float]] = []


@pytest.fixture
def recorder() -> _Recorder:
    kept.clear()
    return _Recorder("label", "run", gpu_hour_price=3.0)


def test_rows_are_counted_by_their_status(recorder):
    """Would catch quarantined rows that count as finished images."""
    recorder.count_rows(pa.table({"status": ["ok", "quarantined", "ok"]}), regions=7)
    recorder.count_rows(pa.table({"status": pa.array([], pa.string())}))
    assert kept == [
        {"images": 2, "quarantined": 1, "regions": 7},
        {"images": 0, "quarantined": 0, "regions": 0},
    ]


def test_gpus_are_paid_for_while_they_wait(recorder, monkeypatch):
    """Would catch idle time that is left out, or counted twice."""
    clock = [100.0]
    monkeypatch.setattr("hts_ray.engine.telemetry.time.monotonic", lambda: clock[0])
    held = HeldGpus(recorder, 0.5)
    clock[0] += 3600
    held.tick()
    held.tick()
    clock[0] += 1800
    held.tick()
    assert [values["gpu_hours"] for values in kept] == [0.5, 0.0, 0.25]


def test_work_that_fails_was_work(recorder, monkeypatch):
    """Would catch a failing batch that hides its time, or an error that is swallowed."""
    clock = [100.0]
    monkeypatch.setattr("hts_ray.engine.telemetry.time.monotonic", lambda: clock[0])

    def work():
        with recorder.busy():
            clock[0] += 2.5
            raise ValueError("bad batch")

    with pytest.raises(ValueError, match="bad batch"):
        work()
    assert kept == [{"busy_seconds": 2.5}]


def test_price_and_format_reach_the_meters_of_a_run():
    """Would catch settings that stay on the driver, or outlive the run."""
    settings = RayConfig.model_validate({"gpu_hour_price": 1.5, "log_format": "json"})
    with configured(settings):
        assert Meter.of(FOLDER, "label") == Meter("label", "hico", 1.5, "json")
    assert Meter.of(FOLDER, "label") == Meter("label", "hico", None, "text")


@pytest.mark.parametrize(
    ("run_dir", "tag"), [("runs/hico", "hico"), ("s3://bucket/a/b/", "b"), ("/", "run")]
)
def test_a_run_is_called_by_its_folder(run_dir, tag):
    """Would catch an empty tag, which Prometheus drops."""
    assert run_tag(run_dir) == tag


def logged(action) -> list[dict[str, str]]:
    """Return the JSON lines that an action logs."""
    logger, stream = logging.getLogger("hts_ray"), io.StringIO()
    (ours,) = [h for h in logger.handlers if isinstance(h.formatter, JsonLines)]
    ours.setStream(stream)
    action(logging.getLogger("hts_ray.anything"))
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_log_lines_tell_run_and_stage():
    """Would catch a line that is no JSON, twice there, or of the stage before."""

    def speak(logger):
        logger.info('a "quoted"\nmessage of %d lines', 2)
        with Meter("train", "hico", log_format="json").busy():
            logger.warning("slow")
        try:
            raise ValueError("broken")
        except ValueError:
            logger.exception("failed")

    log_as("json", "hico", "label")
    log_as("json", "hico", "label")
    first, second, third = logged(speak)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "hts_ray.anything",
        "message": 'a "quoted"\nmessage of 2 lines',
        "run": "hico",
        "stage": "label",
    }
    assert (second["stage"], second["level"]) == ("train", "WARNING")
    assert "ValueError: broken" in third["error"]


def test_text_logs_are_left_to_python(caplog):
    """Would catch a handler of ours where nobody asked for it, or one that stays."""
    logger = logging.getLogger("hts_ray")
    log_as("text", "hico", "label")
    assert not logger.handlers
    log_as("json", "hico", "label")
    log_as("text", "hico", "label")
    assert not logger.handlers
    logging.getLogger("hts_ray.anything").warning("plain")
    assert caplog.messages == ["plain"]
