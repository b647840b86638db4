"""What the report reads of a run directory: settings, classes, tables and measurements.

Tables stay in Arrow; only annotated rows become Python objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from hts_ray.classes import ClassTable, read_class_csv
from hts_ray.config import HtsConfig, of_this_version, parse_config
from hts_ray.engine.image_pass import OK, committed_files
from hts_ray.errors import ConfigError, DataError
from hts_ray.labels.passes import TeacherPass, made_from
from hts_ray.labels.stage import labels_so_far
from hts_ray.report.label_quality import LabelQuality, measure
from hts_ray.report.results import read_evaluations
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, find_stage, stage_folders
from hts_ray.store.tables import ANNOTATION_COLUMNS, read_files

Row = dict[str, Any]

ROWS_AT_ONCE = 2048  # that become Python objects
_LABEL_COLUMNS = ("positive_ids", "ignored_ids", "probability", "support", "dropped")


@dataclass(frozen=True)
class RunTables:
    """What was read from a run directory; None or empty where a stage has not run."""

    classes: ClassTable | None
    config_text: str
    config: HtsConfig
    manifest: pa.Table | None
    regions: StageFolder | None
    passes: list[TeacherPass]
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
        """The pseudo-labels measured by the annotations."""
        return measure(self._annotated_labels(), tuple(self.classes or ()))

    def _annotated_labels(self) -> Iterator[tuple[Row, Row]]:
        if self.labels is None or not self.annotations:
            return
        ids = pa.array(list(self.annotations))
        chosen = self.labels.filter(pc.is_in(self.labels["image_id"], ids))
        for batch in chosen.to_batches(max_chunksize=ROWS_AT_ONCE):
            for row in batch.drop_columns(["support", "dropped"]).to_pylist():
                yield row, self.annotations[row["image_id"]]


def read_run(run_dir: str, labels: StageFolder | None = None) -> RunTables:
    """Read what the report needs; `labels` is the latest pseudo_labels folder if not given.

    A teacher pass that is not finished and has more images than those is read in its place, and
    its labels so far are made here.

    Raises DataError when a table that is there cannot be read.
    """
    file, classes = (storage.join(run_dir, name) for name in ("config.yaml", "classes.csv"))
    text = storage.read_bytes(file).decode("utf-8", "replace") if storage.exists(file) else ""
    given, labels = labels, labels or find_stage(run_dir, "pseudo_labels")
    manifest = find_stage(run_dir, "manifest")
    config, regions = _run_config(text), find_stage(run_dir, "region_scores")
    passes = made_from(run_dir, storage.read_object(labels.file("table.json"))) if labels else []
    if not passes and regions is not None:
        passes = [TeacherPass(regions, config.filter)]
    table = None if labels is None else labels.read(["image_id", *_LABEL_COLUMNS])
    if given is None and (newest := _so_far(run_dir, config, 0 if table is None else len(table))):
        passes, table = newest
    return RunTables(
        classes=read_class_csv(classes) if storage.exists(classes) else None,
        config_text=text,
        config=config,
        manifest=manifest and manifest.read(["image_id", "split", *ANNOTATION_COLUMNS]),
        regions=regions,
        passes=passes,
        labels=table,
        metrics=read_evaluations(run_dir),
    )


def rows_so_far(folder: StageFolder) -> tuple[int, int]:
    """Return the rows that an unfinished stage has committed, and how many are quarantined."""
    try:
        status = read_files(committed_files(folder), ["status"])["status"]
    except DataError:  # the blocks are merged just now
        return 0, 0
    return len(status), len(status) - (pc.sum(pc.equal(status, OK)).as_py() or 0)


def _so_far(
    run_dir: str, config: HtsConfig, known: int
) -> tuple[list[TeacherPass], pa.Table] | None:
    """Return an unfinished teacher pass and its labels so far, where they are more than `known`."""
    for folder in stage_folders(run_dir, "region_scores"):
        if folder.finished or rows_so_far(folder)[0] <= known:
            continue
        one = TeacherPass(folder, config.filter)
        with suppress(DataError, ConfigError):  # nothing that can be filtered yet
            return [one], labels_so_far(one, config.train.split).select(
                ["image_id", *_LABEL_COLUMNS]
            )
    return None


def _run_config(text: str) -> HtsConfig:
    """Return the run's settings; a section that this version cannot read has its defaults."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    known = {}
    for name, section in of_this_version(values if isinstance(values, dict) else {})[0].items():
        try:
            parse_config({name: section})
            known[name] = section
        except ConfigError:  # an older version wrote it in another form
            continue
    return parse_config(known)
