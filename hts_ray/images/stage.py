"""The prepare stage: a HICO download or a folder of images in, a manifest out."""

from __future__ import annotations

from hts_ray.config import PrepareConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.folder import read_folder
from hts_ray.images.hico import read_hico
from hts_ray.images.manifest import FILE
from hts_ray.images.prepared import inspect_images
from hts_ray.store import storage
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.run import StageFolder, content_hash
from hts_ray.store.tables import write_table


def prepare_manifest(
    config: PrepareConfig,
    run_dir: str,
    source: str,
    root: str,
    progress: ImagesDone | None = None,
) -> StageFolder:
    """Write the manifest of a HICO download (`hico`) or a plain folder (`folder`) at `root`.

    The folder is named by the manifest's content, so it is known only when every image was looked
    at. Raises DataError when no image is usable, ConfigError for another source.
    """
    if source == "hico":
        found = read_hico(root, config.splits)
    elif source == "folder":
        found = read_folder(root, config.split, follow_symlinks=config.follow_symlinks)
    else:
        raise ConfigError(field="source", value=source, remedy="choose hico or folder")
    prepared = inspect_images(found, workers=config.workers, progress=progress)
    stage = StageFolder(run_dir, "manifest", content_hash(prepared.manifest))
    if not stage.finished:
        write_table(stage.file(FILE), prepared.manifest)
        write_table(stage.file("quarantine", "part-0.parquet"), prepared.quarantine)
    if not len(prepared.manifest):
        counts = ", ".join(f"{name} {value}" for name, value in prepared.counts.items())
        raise DataError(f"no usable image under {root}: {counts}")
    # Published on every call: later stages take the latest manifest.
    stage.publish(
        {
            **prepared.counts,
            "rows_in": len(prepared.manifest) + len(prepared.quarantine),
            "rows_out": len(prepared.manifest),
            "quarantined": len(prepared.quarantine),
            "root": storage.absolute(root),
        }
    )
    return stage
