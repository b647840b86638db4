"""The parts that every stage over images shares."""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path

import pyarrow as pa
import pytest

from hts_ray.engine.compaction import BLOCKS, complete
from hts_ray.engine.image_pass import committed_files, committed_rows, finish
from hts_ray.engine.ray_data import data_context, image_dataset
from hts_ray.errors import DataError
from hts_ray.images.manifest import open_manifest
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import QUARANTINE_SCHEMA, read_table, write_table


@pytest.fixture
def stage(tmp_path):
    return StageFolder(str(tmp_path), "predictions", "k")


def rows(ids, bad=()):
    status = ["quarantined" if i in bad else "ok" for i in ids]
    kinds = pa.array(["missing" if i in bad else None for i in ids], pa.string())
    columns = {"image_id": ids, "uri": [f"/{i}" for i in ids], "status": status}
    return pa.table({**columns, "error_kind": kinds, "error": kinds})


def write_manifest(path, ids, splits):
    write_table(str(path), pa.table({"image_id": ids, "uri": ids, "split": splits}))
    return str(path)


def test_finish_publishes_and_lists_the_bad(stage):
    """Catches counts that include bad rows, and a quarantine that other readers cannot read."""
    write_table(stage.file("part-0.parquet"), rows(["a", "b", "c"], bad=["b"]))
    expected = pa.array(["c", "b", "a"])
    stats = finish(stage, expected, name="label", seconds=2.0, table_info={"class_ids": [1]})
    assert (stats["rows_in"], stats["rows_out"], stats["quarantined"]) == (3, 2, 1)
    assert stats["quarantined_by_kind"] == {"missing": 1}
    assert stats["rows_per_second"] == pytest.approx(1.5)
    assert storage.read_json(stage.file("table.json")) == {"class_ids": [1]}
    quarantine = read_table(stage.file("quarantine", "part-0.parquet"))
    assert quarantine.schema.equals(QUARANTINE_SCHEMA)
    assert quarantine["stage"].to_pylist() == ["label"]
    assert len(read_table(stage.path)) == 3  # the quarantine is not read as rows


@pytest.mark.parametrize(
    ("ids", "text"),
    [(["a"], "1 missing"), (["a", "b", "b"], "1 repeated"), (["a", "b", "z"], "1 of another")],
)
def test_finish_refuses_anything_but_every_image_once(stage, ids, text):
    """Catches lost and doubled rows after a resumed run, which no later stage would notice."""
    write_table(stage.file("one.parquet"), rows(ids))
    with pytest.raises(DataError, match=text):
        finish(stage, pa.array(["a", "b"]), name="label", seconds=1.0, table_info={})
    assert not stage.finished


def test_limit_does_not_move_on_resumption(ray_session, tmp_path, stage):
    """Catches a resumed run with a limit that takes the next images instead of the same."""
    ids = [f"{i:02d}" for i in range(20)]
    path = write_manifest(tmp_path / "m.parquet", ids, ["x", "y"] * 10)

    expected = open_manifest(path).rows(["x"], 6)["image_id"].combine_chunks()

    def run():
        with data_context(stage.file("checkpoint")):
            data = image_dataset(path, ["x"], expected).repartition(target_num_rows_per_block=2)
            data.write_parquet(stage.file(BLOCKS))
        return sorted(read_table(stage.path)["image_id"].to_pylist())

    assert len(expected) == 6
    assert run() == expected.to_pylist()
    assert run() == expected.to_pylist()
    from ray.data import DataContext

    assert DataContext.get_current().checkpoint_config is None


def test_resuming_lists_no_more_than_the_checkpoint(stage, monkeypatch):
    """Catches a listing for every committed file: quadratic, 11 s at 2,000 files."""
    for number in range(30):
        block = rows([f"{number}a", f"{number}b"])
        write_table(stage.file(BLOCKS, f"w{number}-0.parquet"), block)
        if number:  # the first write was not committed
            write_table(stage.file("checkpoint", f"w{number}.parquet"), block.select(["image_id"]))
    listed = []
    names = storage.list_names
    monkeypatch.setattr(storage, "list_names", lambda path: listed.append(path) or names(path))
    monkeypatch.setattr(storage, "walk", pytest.fail)
    assert committed_rows(stage) == 58
    assert committed_rows(stage, "w1") == 22
    assert listed == [stage.file("checkpoint")] * 2
    monkeypatch.undo()
    assert len(committed_files(stage)) == 29


def test_a_damaged_file_is_named(stage):
    """Catches a traceback of Arrow's where a committed file was cut."""
    Path(stage.file(BLOCKS)).mkdir(parents=True)
    Path(stage.file(BLOCKS, "w-0.parquet")).write_bytes(b"PAR1 cut")
    write_table(stage.file("checkpoint", "w.parquet"), rows(["a"]))
    with pytest.raises(DataError, match=r"w-0\.parquet"):
        finish(stage, pa.array(["a"]), name="label", seconds=1.0)


class Killed(BaseException):
    """What no code catches, as no code catches SIGKILL."""


def write_blocks(stage: StageFolder, blocks: int = 6) -> pa.Array:
    """Write committed blocks of two rows, and one that was not committed."""
    ids = [f"{number}{letter}" for number in range(blocks) for letter in "ab"]
    for number in range(blocks):
        block = rows(ids[2 * number : 2 * number + 2], bad=["3a"])
        write_table(stage.file(BLOCKS, f"w{number}-0.parquet"), block)
        write_table(stage.file("checkpoint", f"w{number}.parquet"), block.select(["image_id"]))
    write_table(stage.file(BLOCKS, "late-0.parquet"), rows(["0a"]))
    return pa.array(ids)


def end(stage: StageFolder, expected: pa.Array) -> None:
    """Do what a stage does when it is run again with nothing left to score."""
    if not stage.finished and not complete(stage):
        assert committed_rows(stage) == len(expected)
        finish(stage, expected, name="label", seconds=2.0, more_stats={"regions": 7})


STEPS = ("write_bytes", "write_json", "remove_tree", "move", "delete_file")


def test_a_crash_at_any_step_of_merging_loses_nothing(stage, monkeypatch):
    """Catches rows that are lost, doubled or scored again when a stage is cut off at its end."""
    monkeypatch.setattr("hts_ray.engine.compaction.MERGED_BYTES", 3000)
    plain = {name: getattr(storage, name) for name in STEPS}
    left = 0  # steps until the kill

    def counted(name, *arguments):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed(name)
        return plain[name](*arguments)

    for name in STEPS:
        monkeypatch.setattr(storage, name, partial(counted, name))
    for kill_at in count(1):
        left = 0
        storage.remove_tree(stage.path)
        expected = write_blocks(stage)
        left, killed = kill_at, False
        try:
            end(stage, expected)
        except Killed:
            killed = True
        unique_rows(stage)
        end(stage, expected)
        assert read_table(stage.path)["image_id"].to_pylist() == expected.to_pylist()
        assert (stage.stats["quarantined"], stage.stats["regions"]) == (1, 7)
        assert len(committed_files(stage)) > 1
        names = storage.list_names(stage.path)
        assert 1 < sum(name.startswith("part-") for name in names) < 6
        assert not {BLOCKS, "checkpoint"} & {*names}
        if not killed:
            break
    assert kill_at > 10


def unique_rows(stage: StageFolder) -> None:
    """Check that readers find no row twice, but for what was never committed."""
    names = storage.walk(stage.path)
    if any(n.endswith(".parquet") and n.startswith((BLOCKS, "part-")) for n in names):
        seen = read_table(stage.path, ["image_id"])["image_id"].to_pylist()
        late = stage.file(BLOCKS, "late-0.parquet")
        assert len(seen) == len(set(seen)) + storage.exists(late)


def test_files_that_are_large_stay_as_they_are(stage, monkeypatch):
    """Catches a copy of everything that gains nothing."""
    monkeypatch.setattr("hts_ray.engine.compaction.MERGED_BYTES", 10)
    end(stage, write_blocks(stage))
    assert len(committed_files(stage)) == 6
    assert len(read_table(stage.path)) == 12
