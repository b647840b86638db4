"""A finished stage's many small files made into few, in one step that a crash cannot split.

A crash of a pass costs at most a block, so a pass writes a file a block: a million images are
16,000 files. Before the stage is published they are merged, in their order:

1. the rows are written anew to `_parts`, a name that readers of tables pass over;
2. `_parts.json` is written, with what the stage will publish: from now on `_parts` holds the rows;
3. the blocks and their checkpoint are removed, the parts move into the folder, and the stage is
   published.

A run that is cut off in step 1 begins it anew. One that is cut off in step 3 is completed by
`complete`, whatever is left of the blocks. No reader ever finds a row twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hts_ray.engine.blocks import Here, OnRay
from hts_ray.engine.telemetry import on_ray
from hts_ray.store import storage
from hts_ray.store.parts import PART_BYTES, PartWriter, ahead
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import read_table, table_schema

BLOCKS = "blocks"  # the folder in a stage that its workers write to
CHECKPOINT = "checkpoint"  # the one where Ray keeps the ids of written rows
MERGED_BYTES = PART_BYTES  # of a merged file; larger ones stay as they are
_PARTS = "_parts"
_MARKER = "_parts.json"
_WHOLE_GROUP = 1 << 40  # bytes that no group has


def publish(stage: StageFolder, files: Sequence[str], stats: Mapping[str, Any]) -> None:
    """Publish a stage whose rows are in `files`, which are merged first if they are small."""
    groups = _groups(stage, files)
    if len(groups) == len(files):
        stage.publish(stats)
        return
    storage.remove_tree(stage.file(_PARTS))
    blocks = OnRay() if on_ray() else Here()
    for _ in blocks.map(_merge, enumerate(groups), stage.file(_PARTS)):
        pass
    storage.write_json(stage.file(_MARKER), dict(stats))
    complete(stage)


def _merge(folder: str, number: int, files: Sequence[str]) -> None:
    """Write the rows of a group of files to one."""
    schema = table_schema(files[0])
    with PartWriter(folder, schema, first=number, size=_WHOLE_GROUP) as writer:
        for table in ahead(read_table, files):
            writer.write(table)


def complete(stage: StageFolder) -> bool:
    """Publish a stage whose rows were merged when it was cut off; returns whether that was so."""
    if stage.finished or not storage.exists(stage.file(_MARKER)):
        return False
    stats = storage.read_json(stage.file(_MARKER))
    storage.remove_tree(stage.file(BLOCKS))
    storage.remove_tree(stage.file(CHECKPOINT))
    for name in storage.list_names(stage.file(_PARTS)):
        storage.move(stage.file(_PARTS, name), stage.file(name))
    stage.publish(stats)
    storage.remove_tree(stage.file(_PARTS))
    storage.delete_file(stage.file(_MARKER))
    return True


def _groups(stage: StageFolder, files: Sequence[str]) -> list[list[str]]:
    """Return files that lie side by side, so many that a group has the size of a part."""
    sizes = storage.walk_sizes(stage.path)
    groups: list[list[str]] = []
    size = MERGED_BYTES
    for file in files:
        if size >= MERGED_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += sizes[file[len(stage.path) :].strip("/")]
    return groups
