"""What a crash leaves behind of a stage that Ray Data writes block by block."""

from __future__ import annotations

import pytest

from hts_ray.engine.compaction import BLOCKS
from hts_ray.store import storage
from hts_ray.store.run import StageFolder


def keep_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stages leave their blocks as workers wrote them: none is too small to stay."""
    monkeypatch.setattr("hts_ray.engine.compaction.MERGED_BYTES", 1)


def crash_before_the_last_block(stage: StageFolder) -> dict[str, bytes]:
    """Undo the last block of a finished stage and its publication; returns the other blocks."""
    files = storage.list_names(stage.file(BLOCKS))
    assert len(files) >= 2, "a crash needs a block before and one behind it"
    *others, last = files
    filesystem, _ = storage.resolve(stage.path)
    done = storage.list_names(stage.file("checkpoint"))
    lost = next(name for name in done if last.startswith(name.removesuffix(".parquet")))
    filesystem.delete_file(stage.file("checkpoint", lost))
    filesystem.delete_file(stage.file(BLOCKS, last))
    filesystem.delete_file(stage.file("stats.json"))
    return {f"{BLOCKS}/{name}": storage.read_bytes(stage.file(BLOCKS, name)) for name in others}
