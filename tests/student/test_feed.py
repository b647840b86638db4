"""What feeds a training: the order of an epoch, what is kept in memory, and bad images."""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pyarrow as pa
import pytest

from hts_ray.config import RayConfig
from hts_ray.store.tables import read_table, write_table
from hts_ray.student import feed as feeding
from hts_ray.student.feed import Feed, choose_kept, load_bytes, object_store_bytes
from hts_ray.student.targets import row_file

SIZE = 256  # a unit of 64 rows


@pytest.fixture
def feed(tmp_path):
    """3,000 rows in two files, written, with an epoch that can be set."""
    counts, start = (1900, 1100), 0
    folder = str(tmp_path / "rows")
    for number, count in enumerate(counts):
        table = pa.table({"row": np.arange(start, start + count), "uri": ["x"] * count})
        write_table(row_file(folder, number), table)
        start += count
    return Feed(folder, counts, SIZE, str(tmp_path / "bad"), 7, str(tmp_path / "epoch.json"))


def rows_of(feed, epoch):
    """Return the rows of an epoch by stretch, as the workers read them."""
    with open(feed.epoch_file, "w") as file:
        json.dump(epoch, file)
    found = []
    for stretch in feed.stretches():
        (table,) = feeding._rows_of(row_file(feed.folder, stretch.file), stretch, feed.unit)
        assert len(table) == stretch.rows
        found.append(table["row"].to_pylist())
    return found


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(feed):
    """Catches a lost or doubled unit, an order that repeats, and one that a rerun changes."""
    epochs = [rows_of(feed, epoch) for epoch in range(3)]
    for stretches in epochs:
        assert sorted(chain(*stretches)) == list(range(3000))
        assert all(len(rows) <= 512 for rows in stretches)
    assert len({tuple(chain(*stretches)) for stretches in epochs}) == 3
    assert rows_of(feed, 1) == epochs[1]
    plain = Feed(feed.folder, feed.counts, SIZE, feed.bad_folder)
    natural = [stretch.units.tolist() for stretch in plain.stretches()]
    assert list(chain(*natural)) == [*range(30), *range(18)]


def test_rows_are_mixed_beyond_their_units(feed):
    """Catches batches that are a unit each, so that the same images meet in every epoch."""
    for epoch in range(2):
        for rows in rows_of(feed, epoch):
            first = rows[:64]  # what a worker gets at a time
            units = {row // 64 if row < 1900 else 100 + (row - 1900) // 64 for row in first}
            assert len(units) >= min(6, len(rows) // 64), units
            assert np.abs(np.diff(first)).mean() > 20


def test_kept_images_come_in_the_order_of_those_that_are_read(feed, monkeypatch):
    """Catches a student that depends on how much memory a cluster has."""
    import ray

    monkeypatch.setattr(ray, "get", lambda refs: refs)
    rows_of(feed, 4)
    for stretch in feed.stretches():
        table = read_table(row_file(feed.folder, stretch.file))
        kept = [table.slice(unit * feed.unit, feed.unit) for unit in stretch.units.tolist()]
        pieces = list(feeding._rows_kept(kept, stretch, feed.unit, drop_bad=False))
        assert all(len(piece) == feed.unit for piece in pieces[:-1])
        (expected,) = feeding._rows_of(row_file(feed.folder, stretch.file), stretch, feed.unit)
        assert pa.concat_tables(pieces)["row"].to_pylist() == expected["row"].to_pylist()


@pytest.mark.parametrize(("counts", "size"), [((38_000, 12_000), 804), ((60_000,) * 160, 280)])
def test_tasks_of_an_epoch_are_few_and_units_small(counts, size):
    """Catches a start that costs a moment for every few rows, and blocks that fill a node."""
    feed = Feed("", counts, size, "", 0)
    assert len(feed.stretches()) < 1500
    assert feed.unit * size * size * 3 <= 32 << 20


def test_what_is_kept_is_what_fits():
    """Catches pixels that are spilled to disk, and files that are measured for nothing."""

    def never():
        raise AssertionError

    gib = 2.0**30
    assert choose_kept("auto", 3 * gib, never, 9 * gib)[0] == "pixels"
    kept, reason = choose_kept("auto", 74 * gib, lambda: 4 * gib, 15 * gib)
    assert kept == "bytes"
    assert "74 GiB of pixels do not fit" in reason
    assert "4 GiB of files do" in reason
    assert choose_kept("auto", 74 * gib, lambda: 6 * gib, 15 * gib)[0] == "none"
    assert choose_kept("pixels", 74 * gib, never, 15 * gib)[0] == "pixels"


def test_the_store_of_a_cluster_to_come_is_known(monkeypatch):
    """Catches a dry run that tells of another store than the run will have."""
    monkeypatch.setattr(feeding, "on_ray", lambda: False)
    assert object_store_bytes(RayConfig(object_store_gib=2.0)) == 2 * 2**30
    monkeypatch.setattr(feeding, "hardware", lambda: {"memory_gib": 10.0})
    assert object_store_bytes(RayConfig()) == pytest.approx(3 * 2**30)


@pytest.mark.parametrize("loaded", [False, True])
def test_bad_images_leave_a_unit_and_are_listed(color_world, tmp_path, loaded):
    """Catches pixels of a neighbour, and a file that vanished between reading and decoding."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    uris = [*color_world["uri"].to_pylist()[:3], str(tmp_path / "broken.png"), "/nowhere.png", None]
    lists = pa.array([[i] for i in range(6)], pa.list_(pa.int32()))
    table = pa.table(
        {
            "image_id": [f"i{i}" for i in range(6)],
            "uri": pa.array(uris, pa.string()),
            "positive": lists,
            "ignored": lists,
            "row": np.arange(6),
        }
    )
    given = load_bytes(table) if loaded else table
    folder = str(tmp_path / "bad")
    good = feeding._decode(given, size=16, bad_folder=folder, drop_bad=True)
    assert good["row"].to_pylist() == [0, 1, 2]
    assert set(good.column_names) == {"row", "positive", "ignored", "pixels"}
    alone = feeding._decode(table.slice(1, 1), size=16, bad_folder=folder, drop_bad=True)
    assert alone["pixels"][0] == good["pixels"][1]
    bad = {row["row"]: row["error_kind"] for row in read_table(folder).to_pylist()}
    assert bad == {3: "not_an_image", 4: "missing", 5: "missing"}
    whole = feeding._decode(given, size=16, bad_folder=folder, drop_bad=False)
    assert whole["pixels"].is_valid().to_pylist() == [True] * 3 + [False] * 3
