"""The built-in world: scenes, annotations and files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from hts_ray.classes import hico_classes
from hts_ray.demo import world as synthetic
from hts_ray.demo.figures import sketch
from hts_ray.errors import ConfigError
from hts_ray.images.hico import read_hico
from hts_ray.images.prepared import inspect_images


def test_seed_and_split_change_the_scene() -> None:
    """Catches a split that repeats another's images: a leak from training into test."""
    keys = [(7, "train"), (8, "train"), (7, "test"), (7, "pretraining")]
    firsts = {
        synthetic.render_scene(synthetic.sample_scene(seed, split, index, 0.5)).tobytes()
        for seed, split in keys
        for index in range(25)
    }
    assert len(firsts) == 25 * len(keys)


def test_every_class_is_drawn_inside_the_canvas_with_its_boxes() -> None:
    """Catches a class whose figure leaves the picture or whose object is not the class's."""
    seen: Counter[int] = Counter()
    for index in range(500):
        spec = synthetic.sample_scene(3, "train", index, exponent=0.0)
        for figure in (figure for figure in spec.figures if figure.class_id >= 0):
            seen[figure.class_id] += 1
            for x0, y0, x1, y1 in (sketch(figure).box(part) for part in ("person", "object")):
                assert -3 <= x0 < x1 <= spec.width + 3
                assert -3 <= y0 < y1 <= spec.height + 3
                assert (x1 - x0) * (y1 - y0) > 8
        assert {hico_classes()[c].object for c in spec.class_ids} <= set(spec.objects)
    assert set(seen) == set(synthetic.world_class_ids())


def test_verbs_of_one_object_look_different() -> None:
    """Catches two verbs of an object that share a pose, so that no model could tell them apart."""
    by_object: dict[str | None, list[int]] = {}
    for class_id in synthetic.world_class_ids():
        by_object.setdefault(hico_classes()[class_id].object, []).append(class_id)
    for object_name, class_ids in by_object.items():
        assert len(class_ids) >= 2
        drawn = []
        for class_id in class_ids:
            figure = synthetic.Figure(class_id, str(object_name), 5, 60.0, 90.0, 45.0, False)
            spec = synthetic.SceneSpec(112, 112, 1, (figure,))
            drawn.append(synthetic.render_scene(spec).astype(int))
        for i, first in enumerate(drawn):
            for second in drawn[:i]:
                assert (np.abs(first - second).max(-1) > 40).sum() > 20


def test_annotations_agree_with_the_scene() -> None:
    """Catches labels of absent objects, lost positives and ambiguous marks on positives."""
    ambiguous = present = 0
    for index in range(200):
        spec = synthetic.sample_scene(5, "test", index, exponent=0.5)
        labels = synthetic.annotate(spec)
        assert labels.shape == (600,)
        assert set(np.flatnonzero(labels == 1)) == set(spec.class_ids)
        known = {hico_classes()[int(c)].object for c in np.flatnonzero(~np.isnan(labels))}
        assert known == set(spec.objects)
        ambiguous += int((labels == 0).sum())
        present += int((~np.isnan(labels)).sum())
    assert 0.02 < ambiguous / present < 0.06


def test_the_training_split_is_long_tailed() -> None:
    """Catches a flat world, which has no few-shot classes to report on."""
    counts: Counter[int] = Counter()
    for index in range(1000):
        counts.update(synthetic.sample_scene(1, "train", index).class_ids)
    few = [c for c in synthetic.world_class_ids() if counts[c] <= 5]
    assert len(few) >= 12
    assert max(counts.values()) > 200


def test_the_world_reads_back_as_hico(tmp_path: Path) -> None:
    """Catches a layout that our own HICO reader, and so the real data's path, does not accept."""
    root = synthetic.write_world(tmp_path / "world", 4, 30, 12)
    anno = scipy.io.loadmat(root / "anno.mat")
    assert anno["anno_train"].shape == (600, 30)
    assert anno["anno_test"].shape == (600, 12)
    assert anno["list_train"].shape == (30, 1)
    assert anno["list_action"].shape == (600, 1)
    assert anno["list_action"]["nname"][18, 0][0] == "bicycle"
    prepared = inspect_images(read_hico(str(root)))
    assert prepared.manifest.num_rows == 42
    spec = synthetic.sample_scene(4, "train", 2)
    row = prepared.manifest.slice(2, 1).to_pylist()[0]
    assert row["image_id"] == "HICO_train2015_00000003"
    assert row["positive_ids"] == list(spec.class_ids)
    assert (row["width"], row["height"]) == (spec.width, spec.height)


def test_a_world_is_the_same_when_it_is_written_again(tmp_path: Path) -> None:
    """Catches global random state and salted hashes."""
    one, two = (synthetic.write_world(tmp_path / name, 4, 30, 2) for name in ("one", "two"))
    names = sorted(p.relative_to(one) for p in one.rglob("*.jpg"))
    assert len(names) == 32
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    first, second = (scipy.io.loadmat(root / "anno.mat") for root in (one, two))
    assert np.array_equal(first["anno_train"], second["anno_train"], equal_nan=True)


def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a half-written world that a later run would take for a whole one."""

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "render_scene", fail)
    with pytest.raises(OSError, match="disk full"):
        synthetic.write_world(tmp_path / "world", 4, 3, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_and_an_empty_split_are_refused(tmp_path: Path) -> None:
    """Catches an overwritten data set and a world that no later stage could use."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something is there already"):
        synthetic.write_world(tmp_path, 4, 3, 3)
    with pytest.raises(ConfigError, match="num_test"):
        synthetic.write_world(tmp_path / "world", 4, 3, 0)
