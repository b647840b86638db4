"""What the report reads of a run directory: settings, classes, tables and measurements.

Tables stay in Arrow; only annotated rows become Python objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from hts_ray.classes import ClassTable, read_class_csv
from hts_ray.config import HtsConfig, parse_config
from hts_ray.errors import ConfigError
from hts_ray.report.data import Verdict
from hts_ray.report.evaluations import read_evaluations
from hts_ray.report.quality import LabeledImage, LabelQuality, judge, measure
from hts_ray.report.stages import FinishedStages
from hts_ray.store import storage, tables
from hts_ray.store.run import StageFolder

Row = dict[str, Any]

ROWS_AT_ONCE = 2048  # that become Python objects


@dataclass(frozen=True)
class Found:
    """What was read from a run directory; None or empty where a stage has not run."""

    classes: ClassTable | None
    config_text: str
    config: HtsConfig
    manifest: pa.Table | None
    regions: StageFolder | None
    labels: pa.Table | None
    metrics: Mapping[str, Mapping[str, Any]]

    @cached_property
    def names(self) -> dict[int, str]:
        """Class names by id."""
        return {entry.class_id: entry.name for entry in self.classes or ()}

    @cached_property
    def annotations(self) -> dict[str, Row]:
        """The manifest's annotated rows by image id."""
        if self.manifest is None:
            return {}
        annotated = self.manifest.filter(self.manifest["positive_ids"].is_valid())
        return {row["image_id"]: row for row in annotated.to_pylist()}

    @cached_property
    def quality(self) -> LabelQuality:
        """What annotations say of the pseudo-labels."""
        return measure(self._labeled(), tuple(self.classes or ()))

    def _labeled(self) -> Iterator[LabeledImage]:
        if self.labels is None or not self.annotations:
            return
        ids = pa.array(list(self.annotations))
        chosen = self.labels.filter(pc.is_in(self.labels["image_id"], ids))
        for batch in chosen.to_batches(max_chunksize=ROWS_AT_ONCE):
            for row in batch.drop_columns(["support", "dropped"]).to_pylist():
                truth = self.annotations[row["image_id"]]
                yield LabeledImage(
                    positive=row["positive_ids"],
                    probabilities=row["probability"],
                    ignored=row["ignored_ids"],
                    annotated=truth["positive_ids"],
                    ambiguous=truth["ambiguous_ids"] or (),
                )

    def judge(self, row: Row) -> list[tuple[int, Verdict]]:
        """Return the verdicts on a row of pseudo-labels."""
        truth = self.annotations.get(row["image_id"])
        return judge(
            row["positive_ids"],
            row["ignored_ids"],
            None if truth is None else truth["positive_ids"],
            () if truth is None else truth["ambiguous_ids"] or (),
        )


def read_found(run_dir: str, stages: FinishedStages, labels: StageFolder | None = None) -> Found:
    """Read what the report needs; `labels` is the latest pseudo_labels folder if not given.

    Raises DataError when a table that is there cannot be read.
    """
    text = _read_text(storage.join(run_dir, "config.yaml"))
    return Found(
        classes=_run_classes(run_dir),
        config_text=text,
        config=_run_config(text),
        manifest=read_columns(
            stages.latest("manifest"), ["image_id", "split", *tables.ANNOTATION_COLUMNS]
        ),
        regions=stages.latest("region_scores"),
        labels=read_columns(
            labels or stages.latest("pseudo_labels"),
            ["image_id", "positive_ids", "ignored_ids", "probability", "support", "dropped"],
        ),
        metrics=read_evaluations(run_dir),
    )


def read_columns(folder: StageFolder | None, columns: Sequence[str]) -> pa.Table | None:
    """Return some columns of a stage's table; None without a folder."""
    return None if folder is None else tables.read_table(folder.path, columns)


def _read_text(path: str) -> str:
    return storage.read_bytes(path).decode("utf-8", "replace") if storage.exists(path) else ""


def _run_classes(run_dir: str) -> ClassTable | None:
    path = storage.join(run_dir, "classes.csv")
    return read_class_csv(path) if storage.exists(path) else None


def _run_config(text: str) -> HtsConfig:
    """Return the run's settings; the defaults when an older version wrote them in another form."""
    try:
        values = yaml.safe_load(text)
        return parse_config(values if isinstance(values, dict) else {})
    except (yaml.YAMLError, ConfigError):
        return parse_config({})
