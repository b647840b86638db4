"""The prepare stage: images in, of whatever source, and a manifest out."""

from __future__ import annotations

from hts_ray.config import PrepareConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.decode import HEIC_REMEDY
from hts_ray.images.folder import read_folder
from hts_ray.images.hico import read_hico
from hts_ray.images.listed import read_huggingface, read_list
from hts_ray.images.manifest import FILE, STAMPS_FILE, images_hash
from hts_ray.images.prepared import Found, inspect_images
from hts_ray.images.shards import read_shards
from hts_ray.store import storage
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import write_table

SOURCES = ("folder", "list", "webdataset", "parquet", "huggingface", "hico")


def _find(config: PrepareConfig, source: str, root: str, progress: ImagesDone | None) -> Found:
    if source == "hico":
        return read_hico(root, config.splits)
    if source == "list":
        return read_list(root, config)
    if source == "huggingface":
        return read_huggingface(root, config, progress)
    if source in {"webdataset", "parquet"}:
        return read_shards(source, root, config, progress)
    return read_folder(root, config.split, follow_symlinks=config.follow_symlinks)


def prepare_manifest(
    config: PrepareConfig,
    run_dir: str,
    source: str,
    root: str,
    progress: ImagesDone | None = None,
) -> StageFolder:
    """Write the manifest of the images at `root`, which is one of SOURCES.

    The folder is named by the manifest's content, so it is known only when every image was looked
    at. Raises DataError when no image is usable, ConfigError for another source.
    """
    if source not in SOURCES:
        raise ConfigError(field="source", value=source, remedy=f"choose {', '.join(SOURCES)}")
    found = _find(config, source, root, progress)
    prepared = inspect_images(
        found, workers=config.workers, headers=config.headers, progress=progress
    )
    key = images_hash(prepared.manifest, prepared.stamps)
    stage = StageFolder(run_dir, "manifest", key)
    if not stage.finished and prepared.counts["images"]:
        write_table(stage.file(FILE), prepared.manifest)
        write_table(stage.file(STAMPS_FILE), prepared.stamps)
        write_table(stage.file("quarantine", "part-0.parquet"), prepared.quarantine)
    if not len(prepared.manifest):
        counts = ", ".join(f"{name} {value}" for name, value in prepared.counts.items() if value)
        remedy = f": {HEIC_REMEDY}" if prepared.counts.get("needs_heic") else ""
        raise DataError(f"no usable image under {root}: {counts or 'it is empty'}{remedy}")
    # Published on every call: later stages take the latest manifest.
    stage.publish(
        {
            **prepared.counts,
            "rows_in": len(prepared.manifest) + len(prepared.quarantine),
            "rows_out": len(prepared.manifest),
            "quarantined": len(prepared.quarantine),
            "root": storage.absolute(root) if storage.kind(root) != "NotFound" else root,
        }
    )
    return stage
