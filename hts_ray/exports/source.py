"""The labels that an export starts from: pseudo-labels of a run, or annotations of a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import FilterConfig
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.exports.records import Box, LabeledImage, Origin, SupportRegion
from hts_ray.images.manifest import open_manifest
from hts_ray.labels.evidence import (
    class_probabilities,
    iter_region_rows,
    kept_regions,
    read_info,
)
from hts_ray.labels.stage import plan_filter
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, find_stage, given_stage, require_stage
from hts_ray.store.tables import PSEUDO_LABELS_SCHEMA, check_table, read_table

_BATCH_ROWS = 1024
_COLUMNS = ("image_id", "uri", "split", "positive_ids", "ignored_ids", "probability", "support")


@dataclass(frozen=True)
class LabelRows:
    """Labels of N images in a table, of which `images` makes records batch by batch.

    `root` is the folder that the images were prepared from, where that is known; `notes` tell
    what the user asked for and does not get.
    """

    table: pa.Table
    class_ids: frozenset[int]
    origin: Origin
    regions: Mapping[str, tuple[SupportRegion, ...]] = field(default_factory=dict)
    root: str | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def images(self) -> Iterator[LabeledImage]:
        """Yield the images in the table's order, with the run's classes only."""
        for batch in self.table.to_batches(max_chunksize=_BATCH_ROWS):
            for row in batch.to_pylist():
                yield self._image(row)

    def _image(self, row: Mapping[str, Any]) -> LabeledImage:
        kept = [place for place, i in enumerate(row["positive_ids"]) if i in self.class_ids]
        negatives = row["negative_ids"]
        if negatives is None and self.origin.kind == "annotations":
            negatives = ()
        return LabeledImage(
            image_id=row["image_id"],
            uri=row["uri"],
            split=row["split"],
            positive_ids=tuple(row["positive_ids"][place] for place in kept),
            ignored_ids=self._known(row["ignored_ids"] or ()),
            negative_ids=None if negatives is None else self._known(negatives),
            probability=tuple(row["probability"][place] for place in kept if row["probability"]),
            support=tuple(row["support"][place] for place in kept if row["support"]),
            width=row["width"],
            height=row["height"],
            regions=self.regions.get(row["image_id"], ()),
        )

    def _known(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(i for i in ids if i in self.class_ids)


def read_labels(
    run: Run,
    labels: str | None = None,
    manifest: str | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    regions: bool = True,
) -> LabelRows:
    """Return the pseudo-labels at `labels` or the run's latest; with `manifest` its annotations.

    `manifest` may be "" for the run's own. `split` keeps one split, `limit` draws so many images
    at random, the same for the same `seed` of the run. Without `regions` the teacher's scores are
    not read. Raises ConfigError for both sources at once, DataError when no labeled image is left.
    """
    if manifest is not None:
        if labels is not None:
            raise ConfigError(field="--labels", value=labels, remedy="give --labels or --manifest")
        return _annotations(run, run.manifest(manifest or None).path, split, limit)
    if labels is None:
        stage = require_stage(run.run_dir, "pseudo_labels", "filter")
    else:
        stage = given_stage(labels, "pseudo_labels")
    return _pseudo_labels(run, stage, split, limit, regions)


def _annotations(run: Run, path: str, split: str | None, limit: int | None) -> LabelRows:
    table = open_manifest(path).table
    table = table.filter(table["positive_ids"].is_valid())
    if not len(table):
        raise DataError(f"{path} has no annotated image: export pseudo-labels instead")
    table = _chosen(table, path, split, limit, run.config.seed)
    table = table.rename_columns(
        ["ignored_ids" if name == "ambiguous_ids" else name for name in table.column_names]
    )
    for name in ("probability", "support"):
        table = table.append_column(name, pa.nulls(len(table)))
    origin = Origin("annotations", name=_name(path), details=_details(run))
    return LabelRows(table, frozenset(run.class_table.positions), origin, root=_root(path))


def _pseudo_labels(
    run: Run, stage: StageFolder, split: str | None, limit: int | None, with_regions: bool
) -> LabelRows:
    table = check_table(
        read_table(stage.path, columns=[*_COLUMNS, "dropped"]), PSEUDO_LABELS_SCHEMA, stage.path
    )
    table = _chosen(table.select(_COLUMNS), stage.path, split, limit, run.config.seed)
    manifest = find_stage(stage.run_dir, "manifest") or find_stage(run.run_dir, "manifest")
    path = None if manifest is None else manifest.file("manifest.parquet")
    for name, values in zip(("width", "height"), _sizes(path, table["image_id"]), strict=True):
        table = table.append_column(name, values)
    table = table.append_column("negative_ids", pa.nulls(len(table), pa.list_(pa.int16())))
    made = _made(stage)
    scores = _region_scores(run, stage, made)
    regions: Mapping[str, tuple[SupportRegion, ...]] = {}
    notes: tuple[str, ...] = ()
    if run.config.export.region_boxes and with_regions:
        if scores is None:
            notes = ("no region boxes: the teacher pass of these labels is not in the run",)
        else:
            regions = _regions_of(run, table, scores, made)
    return LabelRows(
        table,
        frozenset(run.class_table.positions),
        _origin(run, stage, scores, made, table),
        regions,
        None if path is None else _root(path),
        notes,
    )


def _chosen(
    table: pa.Table, path: str, split: str | None, limit: int | None, seed: int
) -> pa.Table:
    if split is not None:
        found = table["split"].unique().to_pylist()
        table = table.filter(pc.equal(table["split"], split))
        if not len(table):
            raise DataError(f"{path} has no image in split {split!r}: it has {', '.join(found)}")
    if limit is not None and limit < len(table):
        drawn = np.random.default_rng(seed).choice(len(table), limit, replace=False)
        table = table.take(pa.array(np.sort(drawn)))
    return table


def _sizes(manifest: str | None, image_ids: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Return widths and heights as a manifest has them, null where it has none."""
    if manifest is None:
        return pa.nulls(len(image_ids), pa.int32()), pa.nulls(len(image_ids), pa.int32())
    known = read_table(manifest, columns=["image_id", "width", "height"]).combine_chunks()
    rows = pc.index_in(image_ids, value_set=known["image_id"].combine_chunks())
    return known["width"].take(rows), known["height"].take(rows)


def _made(stage: StageFolder) -> Mapping[str, Any]:
    """Return what the filter recorded of itself; empty for folders of earlier versions."""
    path = stage.file("table.json")
    found = storage.read_json(path) if storage.exists(path) else {}
    return found if isinstance(found, dict) else {}


def _region_scores(run: Run, stage: StageFolder, made: Mapping[str, Any]) -> StageFolder | None:
    """Return the teacher pass that the labels were filtered from, where it is there."""
    name = str(made.get("region_scores", ""))
    if name:
        scores = StageFolder(stage.run_dir, "region_scores", name.removeprefix("region_scores-"))
        return scores if scores.finished else None
    latest = find_stage(stage.run_dir, "region_scores")
    same = latest is not None and plan_filter(run, latest).folder.key == stage.key
    return latest if same else None


def _regions_of(
    run: Run, table: pa.Table, scores: StageFolder, made: Mapping[str, Any]
) -> dict[str, tuple[SupportRegion, ...]]:
    recorded = made.get("filter")
    config = run.config.filter if recorded is None else FilterConfig.model_validate(recorded)
    ids = table["image_id"].to_pylist()
    positives = dict(zip(ids, table["positive_ids"].to_pylist(), strict=True))
    return supporting_regions(
        scores.path, config, positives, per_label=run.config.export.boxes_per_label
    )


def supporting_regions(
    path: str, config: FilterConfig, positives: Mapping[str, Sequence[int]], per_label: int
) -> dict[str, tuple[SupportRegion, ...]]:
    """Return the regions that agree on each positive class, the most probable first.

    `path` is a region_scores folder, `positives` the class ids by image. A region agrees from
    `support_threshold` on, as the filter counts it; at most `per_label` of them a class.
    """
    info = read_info(path)
    column = {int(i): place for place, i in enumerate(info["class_ids"])}
    found = {}
    for row in iter_region_rows(path):
        wanted = [i for i in positives.get(row["image_id"], ()) if i in column]
        keep = np.flatnonzero(kept_regions(row["region_kinds"], row["margins"] or None, config))
        if not wanted or not len(keep):
            continue
        p_RC = class_probabilities(row["scores"][keep], info, config)
        regions = []
        for class_id in wanted:
            p_R = p_RC[:, column[class_id]]
            order = np.argsort(-p_R, kind="stable")[:per_label]
            for region in order[p_R[order] >= config.support_threshold]:
                place = int(keep[region])
                box: Box = tuple(float(side) for side in row["boxes"][place])  # type: ignore[assignment]
                kind = row["region_kinds"][place]
                regions.append(SupportRegion(class_id, box, float(p_R[region]), kind))
        found[row["image_id"]] = tuple(regions)
    return found


def _origin(
    run: Run,
    stage: StageFolder,
    scores: StageFolder | None,
    made: Mapping[str, Any],
    table: pa.Table,
) -> Origin:
    info = read_info(scores.path) if scores is not None else {}
    teacher = str(info.get("model", ""))
    fingerprint = str(info.get("model_fingerprint", ""))
    settings = made.get("filter")
    if settings is None and scores is not None:
        settings = run.config.filter.answer_settings()
    return Origin(
        "pseudo_labels",
        name=f"{stage.table}-{stage.key}",
        # A path of the machine that labeled says nothing to others.
        teacher=teacher.rstrip("/").rsplit("/", 1)[-1] if _is_path(teacher) else teacher,
        teacher_revision=fingerprint.rpartition("@")[2],
        settings=settings or {},
        corrected=len(set(made.get("corrected_ids", ())) & set(table["image_id"].to_pylist())),
        details={"settings hash": stage.key, **_details(run)},
    )


def _is_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or storage.is_remote(model)


def _details(run: Run) -> dict[str, str]:
    """Return versions and commit as the run recorded them, and the hash of its classes."""
    path = storage.join(run.run_dir, "provenance.json")
    found = storage.read_json(path) if storage.exists(path) else {}
    versions = found.get("versions", {}) if isinstance(found, dict) else {}
    details = {"class list hash": run.class_table.fingerprint()[:12]}
    for name in ("hts_ray", "torch", "transformers", "ray"):
        if name in versions:
            details[name] = str(versions[name])
    if isinstance(found, dict) and found.get("git_commit"):
        details["commit"] = str(found["git_commit"])
    return details


def _root(manifest: str) -> str | None:
    """Return the folder that a manifest was prepared from, as its stage recorded it."""
    path = storage.join(manifest.rpartition("/")[0], "stats.json")
    found = storage.read_json(path).get("root") if storage.exists(path) else None
    return found if isinstance(found, str) else None


def _name(path: str) -> str:
    parts = path.rstrip("/").split("/")
    return parts[-2] if parts[-1] == "manifest.parquet" and len(parts) > 1 else parts[-1]
