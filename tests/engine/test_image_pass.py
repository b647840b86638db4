"""The parts that every stage over images shares."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hts_ray.config import ImagesConfig
from hts_ray.engine.deaths import Deaths
from hts_ray.engine.image_pass import (
    ProgressPoller,
    WrittenRows,
    data_context,
    decode_batch,
    finish,
    image_dataset,
    squash,
    stack_pixels,
    user_error,
)
from hts_ray.errors import ConfigError, DataError
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


def test_decoding_keeps_bad_rows_with_their_reason(tmp_path):
    """Catches one bad file that ends the batch, and pixels that slip to another row."""
    Image.new("RGB", (60, 20), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    uris = [str(tmp_path / "bad.png"), str(tmp_path / "red.png"), None, "/nowhere"]
    table = pa.table({"image_id": list("abcd"), "uri": pa.array(uris, pa.string())})
    decoded = decode_batch(table, ImagesConfig())
    assert decoded["error_kind"].to_pylist() == ["not_an_image", None, "missing", "missing"]
    row = decoded.to_pylist()[1]
    assert (row["width"], row["height"]) == (60, 20)
    assert (row["pixel_width"], row["pixel_height"]) == (60, 20)
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(20, 60, 3)
    assert (pixels == (255, 0, 0)).all()
    square = decode_batch(table.slice(1, 1), ImagesConfig(), square=16)
    assert stack_pixels(square, 16).shape == (1, 16, 16, 3)
    assert decode_batch(table.slice(0, 0), ImagesConfig()).schema == decoded.schema


def test_squash_is_antialiased():
    """Catches point sampling, which turns fine texture into false shapes."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(squash(stripes, 8).astype(int) - 127).max() < 20
    assert squash(stripes, 64) is stripes


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


def test_written_rows_skip_files_in_the_making(stage):
    """Catches progress that ends a run because it met half a file."""
    written = WrittenRows(stage.path)
    assert written() == (0, 0)
    write_table(stage.file("one.parquet"), rows(["a", "b"], bad=["a"]))
    storage.write_bytes(stage.file("two.parquet"), b"PAR1")
    assert written() == (2, 1)
    write_table(stage.file("two.parquet"), rows(["c"]))
    assert written() == (3, 1)


def test_poller_looks_while_waiting_and_at_the_end():
    """Catches a last count that is never told, and an exception that ends the polling."""
    looked = threading.Event()
    counts = []

    def look():
        counts.append(1)
        if len(counts) == 2:
            looked.set()
        raise OSError("storage is away")

    with ProgressPoller(look, interval=0.01):
        assert looked.wait(5)
    assert len(counts) >= 3


def test_users_mistakes_lose_rays_wrapping():
    """Catches a worker's one-line message that reaches the user as a traceback."""
    from ray.exceptions import RayTaskError

    mistake = ConfigError("wrong")
    wrapped = RayTaskError("f", "Traceback ...", mistake).as_instanceof_cause()
    outer = RuntimeError("outer")
    outer.__cause__ = wrapped
    assert user_error(outer) is mistake
    assert user_error(RuntimeError("other")) is None


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


def test_a_mistake_that_ray_keeps_as_text_is_found():
    """Catches a teacher refused in its actor's start that reaches the user as a traceback."""
    text = "The actor died\n  File x\nhts_ray.errors.ConfigError: label.x = 1: do y\n"
    found = user_error(RuntimeError(text))
    assert isinstance(found, ConfigError)
    assert str(found) == "label.x = 1: do y"
    assert user_error(RuntimeError("hts_ray.errors.Other: z")) is None


class DeathBefore:
    """A log of attempts in which every batch has killed a worker once."""

    def __init__(self):
        self.ended = []

    def begin(self, ids, alone=False):
        """Tell of a death."""
        return [Deaths(together=1) for _ in ids]

    def end(self, ids):
        """Remember."""
        self.ended += ids


def test_a_batch_that_killed_its_worker_is_decoded_apart(tmp_path):
    """Catches rows that slip, or results that differ, when images are decoded one by one."""
    Image.new("RGB", (60, 20), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    uris = [str(tmp_path / "bad.png"), str(tmp_path / "red.png")]
    table = pa.table({"image_id": ["a", "b"], "uri": uris})
    log = DeathBefore()
    apart = decode_batch(table, ImagesConfig(), attempts=log)
    assert apart == decode_batch(table, ImagesConfig())
    assert log.ended == ["decode a", "decode b"]


def test_a_storage_that_is_down_ends_the_batch_and_no_image(monkeypatch):
    """Catches an outage of the storage whose images all come out as bad ones."""
    from hts_ray.images import retry as image_files

    asked = []

    def down(uri, retries, retried):
        asked.append(retries)
        retried()
        raise DataError("s3://bucket: the storage fails or is throttling")

    monkeypatch.setattr(image_files, "read_image_bytes", down)
    table = pa.table({"image_id": ["a"], "uri": ["s3://bucket/x.png"]})
    with pytest.raises(DataError, match="throttling"):
        decode_batch(table, ImagesConfig(), retries=7)
    with pytest.raises(DataError, match="throttling"):
        decode_batch(table, ImagesConfig())
    assert asked == [7, image_files.RETRIES]
