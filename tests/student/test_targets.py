"""From labels to targets: class positions, order, repeats of rare classes, weights."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hts_ray.config import TrainConfig
from hts_ray.errors import DataError
from hts_ray.store.tables import read_table
from hts_ray.student import targets
from hts_ray.student.targets import (
    class_weights,
    dense_targets,
    dense_weights,
    positive_counts,
    repeats,
    training_set,
    write_rows,
)

CONFIG = TrainConfig()


def repeat_indices(targets, least):
    """Return the images of an epoch, each as often as it occurs."""
    owners, classes = np.nonzero(targets == 1)
    counts = (targets == 1).sum(axis=0)
    times, after = repeats(owners, classes, len(targets), counts, least)
    chosen = np.repeat(np.arange(len(targets)), times)
    assert np.array_equal(after, (targets[chosen] == 1).sum(axis=0))
    return chosen


def test_repeats_reach_the_minimum_and_keep_every_image():
    """Catches a rare class that stays rare, a lost image, and repeats of the wrong image."""
    targets = -np.ones((6, 4), np.int8)
    targets[:, 0] = 1
    targets[1, 1] = targets[2, 1] = targets[2, 2] = 1
    targets[3, 2] = 0  # ignored is not positive
    chosen = repeat_indices(targets, 5)
    assert set(chosen) == set(range(6))
    counts = (targets[chosen] == 1).sum(axis=0)
    assert list(counts[1:]) == [6, 5, 0]  # image 2 counts for both of its rare classes
    assert (np.bincount(chosen)[[0, 3, 4, 5]] == 1).all()
    assert np.array_equal(repeat_indices(targets, 0), np.arange(6))
    assert np.array_equal(repeat_indices(targets, 1), np.arange(6))


def test_repeats_hold_for_random_labels():
    """Catches counts that are not updated for the other classes of a repeated image."""
    random = np.random.default_rng(0)
    for _ in range(20):
        targets = random.choice([-1, 0, 1], p=[0.9, 0.05, 0.05], size=(30, 8)).astype(np.int8)
        counts = (targets[repeat_indices(targets, 7)] == 1).sum(axis=0)
        present = (targets == 1).any(axis=0)
        assert (counts[present] >= 7).all()
        assert (counts[~present] == 0).all()


def written(labels, classes, config, seed, folder):
    """Return what a training reads of labels, and the rows of each file."""
    data = training_set(labels, classes, config)
    counts = write_rows(data, classes, config, seed, str(folder))
    return read_table(str(folder)), counts


def test_label_set_maps_ids_counts_unknown_ones_and_is_seeded(color_table, tmp_path):
    """Catches class ids used as positions, unknown ids that wrap around, and unseeded order."""
    lists = pa.list_(pa.int16())
    labels = pa.table(
        {
            "image_id": ["a", "b", None, "c"],
            "uri": ["a", "b", "d", "c"],
            "positive_ids": pa.array([[11, 99], [7], [7], []], lists),
            "ignored_ids": pa.array([[3], None, [], [-1]], lists),
        }
    )
    table, counts = written(labels, color_table, CONFIG, 0, tmp_path / "0")
    rows = {row["image_id"]: row for row in table.to_pylist()}
    assert (rows["a"]["positive"], rows["a"]["ignored"]) == ([2], [1])
    assert (rows["b"]["positive"], rows["b"]["ignored"]) == ([0], [])
    data = training_set(labels, color_table, CONFIG)
    assert (data.dropped_ids, data.classes_with_positives, data.images) == (2, 2, 3)
    assert (table["row"].to_pylist(), counts) == ([0, 1, 2], [3])
    orders = set()
    for seed in range(9):
        table, _ = written(labels, color_table, CONFIG, seed, tmp_path / f"order{seed}")
        orders.add(tuple(table["uri"].to_pylist()))
    assert len(orders) > 2
    empty = labels.set_column(2, "positive_ids", pa.array([[], [99], [], []], lists))
    with pytest.raises(DataError, match=r"no image of 3 .*1 are of other classes.*lower"):
        training_set(empty, color_table, CONFIG)


def test_rows_are_spread_over_files_each_as_often_as_it_should(color_table, tmp_path, monkeypatch):
    """Catches repeats counted by piece, rows lost between files, and an order by input file."""
    monkeypatch.setattr(targets, "_FILE_ROWS", 50)
    lists, count = pa.list_(pa.int16()), 200
    positive = [[3]] * 3 + [[7]] * (count - 4) + [[11, 7]]  # two rare classes, at both ends
    labels = pa.table(
        {
            "image_id": [f"i{i:03d}" for i in range(count)],
            "uri": [""] * count,
            "positive_ids": pa.array(positive, lists),
            "ignored_ids": pa.array([[]] * count, lists),
        }
    )
    pieces = pa.concat_tables([labels.slice(0, 7), labels.slice(7)])
    config = TrainConfig(min_positives_per_class=10)
    data = training_set(pieces, color_table, config)
    assert data.rows == count + 7 + 9
    assert data.counts_C.tolist() == [197 + 9, 10, 10]  # by position: 7, 3, 11
    table, counts = written(pieces, color_table, config, 1, tmp_path / "rows")
    assert (len(counts), sum(counts)) == (5, data.rows)
    assert table["row"].to_pylist() == list(range(data.rows))
    times = {c["values"]: c["counts"] for c in table["image_id"].value_counts().to_pylist()}
    assert times.pop("i199") == 10
    assert sorted(times.values())[-3:] == [3, 3, 4]
    first = table["image_id"].slice(0, counts[0]).to_pylist()
    assert len({int(name[1:]) // 50 for name in first}) == 4  # from everywhere
    again, _ = written(labels, color_table, config, 1, tmp_path / "again")
    assert again.equals(table)


def test_targets_are_positive_ignored_negative():
    """Catches ignored classes that count as negative, and rows that slip by one."""
    lists = pa.list_(pa.int32())
    targets = dense_targets(
        pa.array([[], [2], [0, 1]], lists), pa.array([[0], [2, 1], []], lists), 3
    )
    assert targets.tolist() == [[0, -1, -1], [-1, 0, 1], [1, 1, -1]]


def test_weights_stand_beside_the_positives():
    """Catches weights that slip to another class or row, or that reach negatives."""
    lists, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    weights = dense_weights(
        pa.array([[], [2], [1, 0]], lists), pa.array([[], [0.5], [0.25, 0.75]], floats), 3
    )
    assert weights.tolist() == [[1, 1, 1], [1, 1, 0.5], [0.75, 0.25, 1]]


def test_class_weights_follow_the_positives(color_table):
    """Catches weights by class id, a mean other than 1, and the largest for an empty class."""
    positive = pa.chunked_array([[[0, 2], [0]], [[0], [0, 2], []]], pa.list_(pa.int32()))
    counts = positive_counts(positive, 4)
    assert counts.tolist() == [4, 0, 2, 0]
    assert class_weights(counts, 0.0) is None
    half = class_weights(counts, 0.5)
    assert np.mean(half) == pytest.approx(1)
    assert np.array(half) / half[0] == pytest.approx([1, 1, 2**0.5, 1])
    full = class_weights(counts, 1.0)
    assert np.array(full) / full[0] == pytest.approx([1, 1, 2, 1])
