"""What Prometheus and log collectors see of a run: Ray metrics, and logs as JSON lines.

Ray's agent on every node exports the metrics with the prefix `ray_`. Each has two tags: the stage
(label, predict, ...) and the run, which is the last part of the run directory's path. Log lines
have the same two. Metrics never fail a run: without Ray or its agent, or when Ray refuses a value,
nothing is recorded.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from typing import TYPE_CHECKING, Any

from hts_ray.config import RayConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from hts_ray.store.run import StageFolder

TAGS = ("stage", "run")
# All are counters. Ray forgets a gauge when the process that set it has ended, so the sum over
# processes would fall when an actor stops, as if spending had been paid back.
DESCRIPTIONS = {
    "hts_images_total": "images that a stage has finished",
    "hts_regions_total": "regions that the teacher has scored",
    "hts_quarantined_total": "images that could not be used",
    "hts_retries_total": "reads that were tried again, and images whose worker had died",
    "hts_stage_busy_seconds_total": "seconds of work on images, over all workers",
    "hts_gpu_hours_total": "hours that GPUs were held, busy or not",
    "hts_spend_estimate_total": "GPU-hours times ray.gpu_hour_price, in the user's currency",
}
PROMETHEUS_NAMES = frozenset(f"ray_{name}" for name in DESCRIPTIONS)

_LOGGER = "hts_ray"
_settings = RayConfig.model_validate({})


@contextmanager
def configured(config: RayConfig) -> Iterator[None]:
    """Let meters that are made in the block follow these settings.

    Like Ray's own context they belong to the process, so no stage has to pass them on.
    """
    global _settings  # noqa: PLW0603
    before, _settings = _settings, config
    try:
        yield
    finally:
        _settings = before


@dataclass(frozen=True)
class Meter:
    """Counts a stage's work in any process; made on the driver, and pickled.

    `gpu_hour_price` is in the user's currency; without it no spending is estimated.
    """

    stage: str
    run: str
    gpu_hour_price: float | None = None
    log_format: str = "text"

    @classmethod
    def of(cls, folder: StageFolder, stage: str) -> Meter:
        """Return the meter of a stage that writes to `folder`, under the process's settings."""
        price, log_format = _settings.gpu_hour_price, _settings.log_format
        return cls(stage, run_tag(folder.run_dir), price, log_format)

    def count(
        self,
        *,
        images: int = 0,
        regions: int = 0,
        quarantined: int = 0,
        retries: int = 0,
        busy_seconds: float = 0.0,
        gpu_hours: float = 0.0,
    ) -> None:
        """Add to the counters; what is 0 is left alone. Never raises."""
        spend = gpu_hours * (self.gpu_hour_price or 0.0)
        # In the order of DESCRIPTIONS.
        values = (images, regions, quarantined, retries, busy_seconds, gpu_hours, spend)
        try:
            for name, value in zip(DESCRIPTIONS, values, strict=True):
                if value > 0 and on_ray():
                    _counter(name).inc(value, tags={"stage": self.stage, "run": self.run})
        except Exception:  # whatever Ray throws, counting must not end a run
            logging.getLogger(__name__).debug("metrics could not be recorded", exc_info=True)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count the block's seconds as work, and name the stage in this process's log lines."""
        log_as(self.log_format, self.run, self.stage)
        started = time.monotonic()
        try:
            yield
        finally:
            self.count(busy_seconds=time.monotonic() - started)

    def count_rows(self, table: pa.Table, *, regions: int = 0) -> None:
        """Count the rows of a stage's output by their `status`."""
        import pyarrow.compute as pc

        good = pc.sum(pc.equal(table["status"], "ok")).as_py() or 0
        self.count(images=good, quarantined=len(table) - good, regions=regions)


class HeldGpus:
    """Counts the hours for which a worker holds GPUs, from its start to its last tick."""

    def __init__(self, meter: Meter, gpus: float) -> None:
        self._meter, self._gpus = meter, gpus
        self._since = time.monotonic()

    def tick(self) -> None:
        """Count the time since the last tick, idle time too."""
        now = time.monotonic()
        self._meter.count(gpu_hours=self._gpus * (now - self._since) / 3600)
        self._since = now


def run_tag(run_dir: str) -> str:
    """Return the name of a run in metrics and logs: the last part of its directory's path."""
    return run_dir.rstrip("/").rpartition("/")[2] or "run"


def on_ray() -> bool:
    """Return whether this process belongs to a cluster, without importing Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter

    return Counter(name, DESCRIPTIONS[name], TAGS)


class JsonLines(logging.Formatter):
    """Formats records as JSON objects, one a line: time (UTC), level, logger, message, run, stage.

    `error` holds the traceback of an exception.
    """

    def __init__(self, run: str, stage: str) -> None:
        super().__init__()
        self._where = {"run": run, "stage": stage}

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, whatever the message holds."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._where,
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_as(log_format: str, run: str, stage: str) -> None:
    """Write this process's `hts_ray` logs as JSON lines to standard error for `log_format` json.

    A further call changes run and stage. With `text` the logs are as Python writes them. On a
    cluster Ray keeps a worker's standard error among the node's logs.
    """
    logger = logging.getLogger(_LOGGER)
    ours = [handler for handler in logger.handlers if isinstance(handler.formatter, JsonLines)]
    if log_format != "json":
        for handler in ours:
            logger.removeHandler(handler)
            logger.propagate = True
        return
    handler = ours[0] if ours else logging.StreamHandler()
    handler.setFormatter(JsonLines(run, stage))
    if ours:
        return
    logger.addHandler(handler)
    logger.propagate = False  # or the root logger would write every line again
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
