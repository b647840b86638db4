"""The labels that an export starts from: pseudo-labels of a run, or annotations of a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.config import FilterConfig
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.exports.records import Box, LabeledImage, Origin, SupportRegion
from hts_ray.images.manifest import Manifest, latest_manifest
from hts_ray.labels.evidence import class_probabilities, iter_region_rows, kept_regions
from hts_ray.labels.passes import TeacherPass, made_from
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, find_stage, given_stage, require_stage
from hts_ray.store.tables import PSEUDO_LABELS_SCHEMA, STATS_FILE, check_table

Regions = Mapping[str, tuple[SupportRegion, ...]]

_BATCH_ROWS = 1024
_IMAGE_COLUMNS = ("image_id", "uri", "split", "width", "height")


@dataclass(frozen=True)
class LabelRows:
    """Labels of N images: rows of `pseudo_labels` with sizes, or annotated rows of a manifest.

    - `class_ids` are the run's; labels of other classes are left out;
    - `root` is the folder that the images were prepared from, where that is known;
    - `notes` say what the user asked for and does not get.
    """

    table: pa.Table
    class_ids: frozenset[int]
    origin: Origin
    regions: Regions = field(default_factory=dict)
    root: str | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def are_local(self) -> bool:
        """Whether the images are local paths, which a browser does not load."""
        return not storage.is_remote(self.table["uri"][0].as_py())

    def images(self) -> Iterator[LabeledImage]:
        """Yield the images in the table's order, batch by batch."""
        for batch in self.table.to_batches(max_chunksize=_BATCH_ROWS):
            for row in batch.to_pylist():
                yield self._image(row)

    def _image(self, row: Mapping[str, Any]) -> LabeledImage:
        def ours(name: str) -> tuple[int, ...]:
            return tuple(i for i in row[name] or () if i in self.class_ids)

        values: dict[str, Any] = {name: row[name] for name in _IMAGE_COLUMNS}
        if self.origin.kind == "annotations":
            values |= {"ignored_ids": ours("ambiguous_ids"), "negative_ids": ours("negative_ids")}
        else:
            values["ignored_ids"] = ours("ignored_ids")
            kept = [i in self.class_ids for i in row["positive_ids"]]
            for name in ("probability", "support"):
                values[name] = tuple(compress(row[name], kept))
        regions = self.regions.get(row["image_id"], ())
        return LabeledImage(positive_ids=ours("positive_ids"), regions=regions, **values)


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
        images = run.manifest(manifest or None)
        annotated = images.annotated()
        if not len(annotated):
            raise DataError(f"{images.path} has no annotated image: export pseudo-labels instead")
        origin = Origin("annotations", name=_name(images.path), details=_details(run))
        return LabelRows(
            _chosen(annotated, images.path, split, limit, run.config.seed),
            frozenset(run.class_table.positions),
            origin,
            root=_root(images),
        )
    if labels is None:
        stage = require_stage(run.run_dir, "pseudo_labels", "filter")
    else:
        stage = given_stage(labels, "pseudo_labels")
    table = check_table(stage.read(), PSEUDO_LABELS_SCHEMA, stage.path).drop_columns(["dropped"])
    table = _chosen(table, stage.path, split, limit, run.config.seed)
    return _pseudo_labels(run, stage, table, regions and run.config.export.region_boxes)


def _pseudo_labels(run: Run, stage: StageFolder, table: pa.Table, with_regions: bool) -> LabelRows:
    images = _images_of(run, stage)
    for name, values in zip(("width", "height"), _sizes(images, table["image_id"]), strict=True):
        table = table.append_column(name, values)
    made = storage.read_object(stage.file("table.json"))
    passes, regions = made_from(stage.run_dir, made), {}
    ids = table["image_id"].to_pylist()
    if passes and with_regions:
        positives = dict(zip(ids, table["positive_ids"].to_pylist(), strict=True))
        per_label = run.config.export.boxes_per_label
        regions = supporting_regions(passes, positives, per_label, made.get("split"))
    revisions = [str(one.info.get("model_fingerprint", "")).rpartition("@")[2] for one in passes]
    origin = Origin(
        "pseudo_labels",
        name=f"{stage.table}-{stage.key}",
        teacher=" + ".join(_teacher_name(one) for one in passes),
        teacher_revision=" + ".join(revisions),
        settings=made.get("filter") or {},
        corrected=len({*made.get("corrected_ids", ())} & {*ids}),
        details={"settings hash": stage.key, **_details(run)},
    )
    classes = frozenset(run.class_table.positions)
    missing = "no region boxes: the teacher pass of these labels is not in the run"
    notes = (missing,) if with_regions and not passes else ()
    return LabelRows(table, classes, origin, regions, _root(images) if images else None, notes)


def _images_of(run: Run, stage: StageFolder) -> Manifest | None:
    """Return the latest manifest beside the labels, or else of the run; None without one."""
    for run_dir in (stage.run_dir, run.run_dir):
        if find_stage(run_dir, "manifest") is not None:
            return run.manifest(latest_manifest(run_dir))
    return None


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


def _sizes(manifest: Manifest | None, image_ids: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Return widths and heights as a manifest has them, null where it has none."""
    if manifest is None:
        return pa.nulls(len(image_ids), pa.int32()), pa.nulls(len(image_ids), pa.int32())
    known = manifest.table.combine_chunks()
    rows = pc.index_in(image_ids, value_set=known["image_id"].combine_chunks())
    return known["width"].take(rows), known["height"].take(rows)


def _teacher_name(one: TeacherPass) -> str:
    """Return the model's name; a path on the machine that labeled means nothing to others."""
    name = str(one.info.get("model", ""))
    local = name.startswith(("/", ".", "~")) or storage.is_remote(name)
    return name.rstrip("/").rsplit("/", 1)[-1] if local else name


def supporting_regions(
    passes: Sequence[TeacherPass],
    positives: Mapping[str, Sequence[int]],
    per_label: int,
    split: str | None,
) -> dict[str, tuple[SupportRegion, ...]]:
    """Return the regions that agree on each positive class, the most probable first.

    `positives` are the class ids by image, `split` what was filtered. A region agrees from its
    pass's `support_threshold` on, as the filter counts it; at most `per_label` of them a class.
    """
    found: dict[str, dict[int, list[SupportRegion]]] = {}
    for one in passes:
        info = one.reading(split)
        for row in iter_region_rows(one.folder.path):
            wanted = positives.get(row["image_id"])
            if wanted:
                of_image = found.setdefault(row["image_id"], {i: [] for i in wanted})
                for region in _agreeing(row, info, one.config, wanted):
                    of_image[region.class_id].append(region)
    return {
        image_id: tuple(
            region
            for regions in by_class.values()
            for region in sorted(regions, key=lambda region: -region.probability)[:per_label]
        )
        for image_id, by_class in found.items()
    }


def _agreeing(
    row: Mapping[str, Any], info: dict[str, Any], config: FilterConfig, wanted: Sequence[int]
) -> Iterator[SupportRegion]:
    """Yield the regions of one image that agree on a class that is wanted."""
    column = {int(i): place for place, i in enumerate(info["class_ids"])}
    keep = np.flatnonzero(kept_regions(row["region_kinds"], row["margins"] or None, config))
    if not len(keep):
        return
    p_RC = class_probabilities(row["scores"][keep], info, config)
    for class_id in column.keys() & set(wanted):
        p_R = p_RC[:, column[class_id]]
        for region in np.flatnonzero(p_R >= config.support_threshold):
            place = int(keep[region])
            box: Box = tuple(float(side) for side in row["boxes"][place])  # type: ignore[assignment]
            yield SupportRegion(class_id, box, float(p_R[region]), row["region_kinds"][place])


def _details(run: Run) -> dict[str, str]:
    """Return versions and commit as the run recorded them, and the hash of its classes."""
    found = storage.read_object(storage.join(run.run_dir, "provenance.json"))
    versions = found.get("versions", {})
    names = [name for name in ("hts_ray", "torch", "transformers", "ray") if name in versions]
    commit = found.get("git_commit")
    return {
        "class list hash": run.class_table.fingerprint()[:12],
        **{name: str(versions[name]) for name in names},
        **({"commit": str(commit)} if commit else {}),
    }


def _root(manifest: Manifest) -> str | None:
    """Return the folder that a manifest was prepared from, as its stage recorded it."""
    folder = manifest.path.rpartition("/")[0]
    root = storage.read_object(storage.join(folder, STATS_FILE)).get("root")
    return root if isinstance(root, str) else None


def _name(path: str) -> str:
    parts = path.rstrip("/").split("/")
    return parts[-2] if parts[-1] == "manifest.parquet" and len(parts) > 1 else parts[-1]
