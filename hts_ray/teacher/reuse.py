"""Answers of a run's earlier teacher passes, taken over where nothing that made them has changed.

Every pass writes down what it asks, and of which manifest. One that asks the same takes the rows
of images that have the same path and stamp in both manifests. They are committed as Ray Data
commits rows, so Ray goes on with the other images.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc

from hts_ray.engine.compaction import BLOCKS, CHECKPOINT
from hts_ray.engine.image_pass import OK, committed_files
from hts_ray.errors import DataError
from hts_ray.images.manifest import IMAGE_COLUMNS, Manifest, open_manifest
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, settings_hash, stage_folders
from hts_ray.store.tables import read_files, read_table, write_table
from hts_ray.teacher.assignment import TABLE_INFO, Assignment, asked_words, region_sources

TAKEN = "taken-"  # how the names of commits begin that come from another pass
_ASKED = "_asked.json"  # who reads a table passes over names that begin with an underscore
_SAMPLING = {"splits", "limit", "limit_seed"}  # say which images are asked about, not what


def take_over(
    stage: StageFolder, assignment: Assignment, manifest: Manifest, ids: pa.Array
) -> None:
    """Commit to a pass the good answers that earlier passes of the run have for its images.

    `ids` are its images. What it asks is written down for later passes.
    """
    asked = {
        "asked": _question(assignment),
        "manifest": manifest.path,
        "images": manifest.fingerprint,
    }
    storage.write_json(stage.file(_ASKED), asked)
    wanted: pa.Table | None = None
    for source, images in _earlier(stage, asked["asked"], manifest):
        if wanted is None:
            wanted = _stamped(manifest).filter(pc.field("image_id").isin(ids))
            wanted = _without(wanted, read_files(committed_files(stage), ["image_id"]))
        same = wanted.filter(pc.is_in(_keys(wanted), _keys(images)))
        for file in committed_files(source) if len(same) else ():
            rows = read_table(file)
            chosen = pc.and_(
                pc.equal(rows["status"], OK), pc.is_in(rows["image_id"], same["image_id"])
            )
            if len(rows := rows.filter(chosen)):
                _commit(stage, rows)
                same, wanted = _without(same, rows), _without(wanted, rows)
                if not storage.exists(stage.file(TABLE_INFO)):
                    info = storage.read_json(source.file(TABLE_INFO))
                    storage.write_json(stage.file(TABLE_INFO), info)


def _question(assignment: Assignment) -> str:
    """Return a hash of all that makes an image's answer, besides the image."""
    config, prior = assignment.config, assignment.prior_rows
    settings = {k: v for k, v in config.answer_settings().items() if k not in _SAMPLING}
    return settings_hash(
        settings,
        assignment.class_table.fingerprint(),
        assignment.fingerprint,
        region_sources(config.regions),
        assignment.background,
        asked_words(config.teacher),
        assignment.limit,
        None if prior is None else prior.to_pydict(),
    )


def _earlier(
    stage: StageFolder, question: str, manifest: Manifest
) -> Iterator[tuple[StageFolder, pa.Table]]:
    """Yield the run's other passes that ask the same, finished or not, with their images.

    `manifest` is that of the pass which asks; most other passes have the same one.
    """
    for other in stage_folders(stage.run_dir, stage.table):
        asked = {} if other == stage else storage.read_object(other.file(_ASKED))
        if asked.get("asked") != question:
            continue
        with suppress(DataError):  # its manifest is gone
            same = asked["manifest"] == manifest.path
            theirs = manifest if same else open_manifest(asked["manifest"])
            if theirs.fingerprint == asked["images"]:
                yield other, _stamped(theirs)


def _stamped(manifest: Manifest) -> pa.Table:
    """Return id, URI, split and stamp of the images whose stamp is known."""
    images = manifest.images.select(IMAGE_COLUMNS)
    return images.join(manifest.stamps, "image_id", join_type="inner")


def _keys(images: pa.Table) -> pa.ChunkedArray:
    """Return what names each image together with its content."""
    return pc.binary_join_element_wise(*(images[name] for name in images.column_names), "\0")


def _without(images: pa.Table, others: pa.Table) -> pa.Table:
    return images.filter(pc.invert(pc.is_in(images["image_id"], others["image_id"])))


def _commit(stage: StageFolder, rows: pa.Table) -> None:
    """Add rows to a pass: the data first, then the ids, which make them count."""
    name = f"{TAKEN}{uuid.uuid4().hex}"
    write_table(stage.file(BLOCKS, f"{name}-0.parquet"), rows)
    ids = rows.select(["image_id"]).replace_schema_metadata(None)
    write_table(stage.file(CHECKPOINT, f"{name}.parquet"), ids)
