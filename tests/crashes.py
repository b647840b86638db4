"""What a crash leaves behind of a stage that Ray Data writes block by block."""

from __future__ import annotations

from hts_ray.store import storage
from hts_ray.store.run import StageFolder


def crash_before_the_last_block(stage: StageFolder) -> dict[str, bytes]:
    """Undo the last block of a finished stage and its publication; returns the other files."""
    files = [name for name in storage.list_names(stage.path) if name.endswith(".parquet")]
    assert len(files) >= 2, "a crash needs a block before and one behind it"
    *others, last = files
    filesystem, _ = storage.resolve(stage.path)
    done = storage.list_names(stage.file("checkpoint"))
    lost = next(name for name in done if last.startswith(name.removesuffix(".parquet")))
    filesystem.delete_file(stage.file("checkpoint", lost))
    filesystem.delete_file(stage.file(last))
    filesystem.delete_file(stage.file("stats.json"))
    return {name: storage.read_bytes(stage.file(name)) for name in others}
