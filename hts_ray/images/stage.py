"""The prepare stage: images in, of whatever source, and a manifest out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import starmap

import pyarrow as pa

from hts_ray.config import PrepareConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.blocks import FOLDER, Blocks, Spread, remove_abandoned
from hts_ray.images.decode import HEIC_REMEDY
from hts_ray.images.folder import read_folder
from hts_ray.images.hico import read_hico
from hts_ray.images.listed import read_huggingface, read_list
from hts_ray.images.manifest import FILE, STAMPS_FILE, images_hash
from hts_ray.images.prepared import Found, inspect_images, sorted_out
from hts_ray.images.shards import read_shards
from hts_ray.store import storage
from hts_ray.store.aliases import ImagesDone
from hts_ray.store.parts import ContentHash, PartWriter
from hts_ray.store.run import StageFolder, content_hash, settings_hash
from hts_ray.store.tables import (
    MANIFEST_SCHEMA,
    QUARANTINE_SCHEMA,
    STAMPS_SCHEMA,
    read_table,
    write_table,
)

SOURCES = ("folder", "list", "webdataset", "parquet", "huggingface", "hico")


@dataclass(frozen=True)
class PreparePlan:
    """A prepare whose images, or shards of them, are listed and not looked at yet."""

    config: PrepareConfig
    source: str
    root: str
    found: Found

    @property
    def large(self) -> bool:
        """Whether there is more than one process should look at."""
        return len(self.found.listed) * self.found.images > self.config.local_images

    def write(
        self, run_dir: str, progress: ImagesDone | None = None, spread: Spread = starmap
    ) -> StageFolder:
        """Look at what is listed and write the manifest; returns its folder.

        The folder is named by the manifest's content, so it is known only when every image was
        looked at. `spread` calls what looks at a block of a large one. Raises DataError when no
        image is usable.
        """
        if self.large:
            blocks = self._blocks(run_dir)
            blocks.finish(spread, progress)
            stage, counts = self._of_blocks(run_dir, blocks)
        else:
            blocks = None
            stage, counts = self._here(run_dir, progress)
        if not counts["usable"]:
            if blocks is not None:
                blocks.remove()  # the next run is to look again
            told = ", ".join(f"{name} {value}" for name, value in counts.items() if value)
            if counts["images"]:
                first = read_table(stage.file("quarantine")).slice(0, 1).to_pylist()[0]
                told += f"; the first is {first['uri']}: "
                told += first["error"].removeprefix(f"{first['uri']}: ")
            remedy = f": {HEIC_REMEDY}" if counts.get("needs_heic") else ""
            if not counts["images"] and counts.get("other_files"):
                remedy += ": shards are read by `hts prepare webdataset` and `hts prepare parquet`"
            raise DataError(f"no usable image under {self.root}: {told or 'it is empty'}{remedy}")
        there = storage.kind(self.root) != "NotFound"
        # Published on every call: later stages take the latest manifest.
        stage.publish(
            {
                **counts,
                "rows_in": counts["images"],
                "rows_out": counts["usable"],
                "root": storage.absolute(self.root) if there else self.root,
            }
        )
        if blocks is not None:
            blocks.remove()
        remove_abandoned(run_dir)
        return stage

    def _here(
        self, run_dir: str, progress: ImagesDone | None
    ) -> tuple[StageFolder, dict[str, int]]:
        config, stamps = self.config, self.found.shard_stamps
        prepared = inspect_images(
            self.found, workers=config.workers, headers=config.headers, progress=progress
        )
        stamps = pa.concat_tables([stamps, prepared.stamps])
        key = images_hash(ContentHash(prepared.manifest), ContentHash(stamps))
        stage = StageFolder(run_dir, "manifest", key)
        if not stage.finished and prepared.counts["images"]:
            storage.remove_tree(stage.path)
            write_table(stage.file(FILE), prepared.manifest)
            write_table(stage.file(STAMPS_FILE), stamps)
            write_table(stage.file("quarantine", "part-0.parquet"), prepared.quarantine)
        return stage, prepared.counts

    def _blocks(self, run_dir: str) -> Blocks:
        config, found = self.config, self.found
        settings = [config.answer_settings(), self.source, storage.absolute(self.root)]
        work = settings_hash(*settings, content_hash(found.listed))
        folder = storage.join(storage.absolute(run_dir), f"{FOLDER}{work}")
        return Blocks.of(found, folder, workers=config.workers, headers=config.headers)

    def _of_blocks(self, run_dir: str, blocks: Blocks) -> tuple[StageFolder, dict[str, int]]:
        """Write what the blocks have seen, hashed first: the hash names the folder."""
        found = self.found
        counts = Counter(found.counts)
        manifest = ContentHash(MANIFEST_SCHEMA.empty_table())
        stamps = ContentHash(found.shard_stamps)
        for part in map(sorted_out, blocks.seen()):
            counts.update(part.counts)
            manifest.add(part.manifest)
            stamps.add(part.stamps)
        stage = StageFolder(run_dir, "manifest", images_hash(manifest, stamps))
        if not stage.finished:
            storage.remove_tree(stage.path)
            with (
                PartWriter(stage.file(FILE), MANIFEST_SCHEMA) as manifests,
                PartWriter(stage.file(STAMPS_FILE), STAMPS_SCHEMA) as stamp_parts,
                PartWriter(stage.file("quarantine"), QUARANTINE_SCHEMA) as quarantine,
            ):
                stamp_parts.write(found.shard_stamps)
                for part in map(sorted_out, blocks.seen()):
                    manifests.write(part.manifest)
                    stamp_parts.write(part.stamps)
                    quarantine.write(part.quarantine)
        return stage, dict(counts)


def plan_prepare(config: PrepareConfig, source: str, root: str) -> PreparePlan:
    """List the images at `root`, which is one of SOURCES.

    Raises ConfigError for another source, DataError when nothing can be listed.
    """
    if source not in SOURCES:
        raise ConfigError(field="source", value=source, remedy=f"choose {', '.join(SOURCES)}")
    if source == "hico":
        found = read_hico(root, config.splits)
    elif source == "list":
        found = read_list(root, config)
    elif source == "huggingface":
        found = read_huggingface(root, config)
    elif source == "folder":
        found = read_folder(root, config.split, follow_symlinks=config.follow_symlinks)
    else:
        found = read_shards(source, root, config)
    return PreparePlan(config, source, root, found)


def prepare_manifest(
    config: PrepareConfig,
    run_dir: str,
    source: str,
    root: str,
    progress: ImagesDone | None = None,
) -> StageFolder:
    """Plan and write a manifest in this process, see `plan_prepare` and `PreparePlan.write`."""
    return plan_prepare(config, source, root).write(run_dir, progress)
