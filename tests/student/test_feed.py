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


def rows_of(feed, epoch, least=1, most=8, kept=None):
    """Return the rows of an epoch by task and unit, as the workers read them."""
    with open(feed.epoch_file, "w") as file:
        json.dump(epoch, file)
    found = []
    for number, places in feed.tasks(least, most):
        source = row_file(feed.folder, number) if kept is None else kept[number]
        units = list(feeding._units_of(source, places, feed.unit, lambda table: table))
        found.append([table["row"].to_pylist() for table in units])
    return found


def flat(tasks):
    """Return the rows of tasks in order."""
    return list(chain(*chain(*tasks)))


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(feed):
    """Catches a lost or doubled unit, an order that repeats, and one that a rerun changes."""
    epochs = [flat(rows_of(feed, epoch)) for epoch in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(3000))
    assert len(set(map(tuple, epochs))) == 3
    assert flat(rows_of(feed, 1)) == epochs[1]
    plain = Feed(feed.folder, feed.counts, SIZE, feed.bad_folder)
    assert [len(places) for _, places in plain.tasks(1, 1)] == [64] * 29 + [44] + [64] * 17 + [12]
    natural = [places.tolist() for _, places in plain.tasks(1, 1)]
    assert list(chain(*natural)) == [*range(1900), *range(1100)]


def test_rows_are_mixed_beyond_their_units(feed):
    """Catches batches that are a unit each, so that the same images meet in every epoch."""
    for epoch in range(2):
        for mixed in rows_of(feed, epoch, feed.rows, feed.rows):
            rows = mixed[0]  # what a worker gets at a time
            units = {row // 64 if row < 1900 else 100 + (row - 1900) // 64 for row in rows}
            assert len(units) >= min(6, len(mixed)), units
            assert np.abs(np.diff(rows)).mean() > 20


def test_kept_images_come_in_the_order_of_those_that_are_read(feed, monkeypatch):
    """Catches a student that depends on how much memory a cluster has."""
    import ray

    monkeypatch.setattr(ray, "get", lambda refs: refs)
    kept = []
    for number, count in enumerate(feed.counts):
        table = read_table(row_file(feed.folder, number))
        kept.append({u: table.slice(u * 64, 64) for u in range(-(-count // 64))})
    read = flat(rows_of(feed, 4))
    assert flat(rows_of(feed, 4, kept=kept)) == read
    whole = rows_of(feed, 4, feed.rows, feed.rows, kept)
    assert flat(whole) == read
    assert sorted(map(len, whole)) == [2, 6, 8, 8, 8, 8, 8]  # a unit travels to one task


@pytest.mark.parametrize(("counts", "size"), [((38_000, 12_000), 804), ((60_000,) * 160, 280)])
def test_tasks_of_an_epoch_are_few_and_units_small(counts, size):
    """Catches a start that costs a moment for every few rows, and blocks that fill a node."""
    feed = Feed("", counts, size, "", 0)
    assert len(feed.tasks(feed.rows, feed.rows)) < 1500
    assert len(feed.tasks(1, feed.task_units)) < 6000
    assert feed.unit * size * size * 3 <= 32 << 20


def test_the_first_batches_are_decoded_side_by_side():
    """Catches eight workers that wait for one task to make their first units in turn."""
    sizes = [len(places) for _, places in Feed("", (38_000,), 804, "").tasks(1, 8)]
    assert sizes[:8] == [17] * 8
    assert max(sizes) == 8 * 17
    assert len(sizes) < 400


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
