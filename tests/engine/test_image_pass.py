"""The parts that every stage over images shares."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from hts_ray.engine.image_pass import committed_rows, data_context, finish, image_dataset
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
    write_table(stage.file("one.parquet"), rows(["a", "b"], bad=["b"]))
    write_table(stage.file("two.parquet"), rows(["c"]))
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
            data.write_parquet(stage.path)
        return sorted(read_table(stage.path)["image_id"].to_pylist())

    assert len(expected) == 6
    assert run() == expected.to_pylist()
    assert run() == expected.to_pylist()
    from ray.data import DataContext

    assert DataContext.get_current().checkpoint_config is None


def test_resuming_lists_the_folder_once(stage, monkeypatch):
    """Catches a listing for every committed file: quadratic, 11 s at 2,000 files."""
    for number in range(30):
        write_table(stage.file(f"w{number}-0.parquet"), rows([f"{number}a", f"{number}b"]))
        if number:  # the first write was not committed
            (Path(stage.path) / "checkpoint").mkdir(exist_ok=True)
            write_table(stage.file("checkpoint", f"w{number}.parquet"), rows([]))
    listed = []
    names = storage.list_names
    monkeypatch.setattr(storage, "list_names", lambda path: listed.append(path) or names(path))
    assert committed_rows(stage) == 58
    assert sorted(listed) == [stage.path, stage.file("checkpoint")]


def test_a_damaged_file_is_named_on_resumption(stage):
    """Catches a traceback of Arrow's where a committed file was cut."""
    (Path(stage.path) / "checkpoint").mkdir(parents=True)
    Path(stage.file("w-0.parquet")).write_bytes(b"PAR1 cut")
    write_table(stage.file("checkpoint", "w.parquet"), rows([]))
    with pytest.raises(DataError, match=r"w-0\.parquet"):
        committed_rows(stage)
