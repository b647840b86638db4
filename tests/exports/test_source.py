"""Where an export's labels come from."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from labeled_run import IGNORED, POSITIVES

from hts_ray.config import override
from hts_ray.errors import ConfigError, DataError
from hts_ray.exports.source import read_labels
from hts_ray.store.run import require_stage


def test_pseudo_labels_come_with_sizes_regions_and_their_making(labeled):
    """Catches labels of another image, lost supports, and an origin that is not recorded."""
    rows = read_labels(labeled)
    images = {image.image_id: image for image in rows.images()}
    assert {i: list(image.positive_ids) for i, image in images.items()} == {
        i: sorted(ids, key=ids.index) for i, ids in POSITIVES.items()
    }
    assert {i: list(image.ignored_ids) for i, image in images.items() if image.ignored_ids} == (
        IGNORED
    )
    two = images["a/2"]
    assert (two.width, two.height, two.support) == (60, 40, (2, 2))
    assert two.probability == pytest.approx((0.9, 0.9))
    assert [(r.class_id, r.box, r.kind) for r in two.regions] == [
        (18, (0, 0, 60, 40), "whole"),
        (18, (30, 0, 60, 40), "grid"),
        (19, (0, 0, 60, 40), "whole"),
        (19, (0, 0, 30, 40), "grid"),
    ]
    assert two.negative_ids is None
    origin = rows.origin
    assert (origin.kind, origin.teacher, origin.teacher_revision) == (
        "pseudo_labels", "Some/captioner", "0123abc",
    )  # fmt: skip
    assert origin.settings["positive_threshold"] == 0.5
    assert origin.details["settings hash"] in origin.name
    assert rows.root is not None
    assert rows.root.endswith("images")


def test_annotations_are_known_positives_and_negatives(labeled):
    """Catches images without annotations that are exported as if they had no class."""
    rows = read_labels(labeled, manifest="")
    images = list(rows.images())
    assert [image.image_id for image in images] == ["a/1", "a/2", "b/1", "b/2", "gone"]
    assert images[0].negative_ids == (19,)
    assert images[0].probability == ()
    assert rows.origin.kind == "annotations"
    with pytest.raises(ConfigError, match="give --labels or --manifest"):
        read_labels(labeled, labels="x", manifest="")


def test_a_sample_is_the_same_for_the_same_seed(labeled):
    """Catches a review of other images than the ones that were exported."""
    drawn = [[i.image_id for i in read_labels(labeled, limit=3).images()] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 3
    with pytest.raises(DataError, match="it has train"):
        read_labels(labeled, split="test")


def test_classes_outside_the_run_are_left_out(labeled):
    """Catches ids that no class list of the export explains."""
    fewer = replace(labeled, class_table=labeled.class_table.subset([18]))
    two = next(i for i in read_labels(fewer).images() if i.image_id == "a/2")
    assert (two.positive_ids, len(two.probability), len(two.support)) == ((18,), 1, 1)


def test_boxes_need_the_teacher_pass_they_came_from(labeled, tmp_path):
    """Catches boxes of another teacher pass, and an export that fails where there is none."""
    stage = require_stage(labeled.run_dir, "pseudo_labels", "filter")
    moved = tmp_path / stage.path.rsplit("/", 1)[-1]
    shutil.copytree(stage.path, moved)
    rows = read_labels(labeled, str(moved))
    assert not rows.regions
    assert "no region boxes" in rows.notes[0]
    config = override(labeled.config, {"export": {"region_boxes": False}})
    without = read_labels(replace(labeled, config=config))
    assert (without.regions, without.notes) == ({}, ())


def test_nothing_to_export_names_the_stage(labeled, tmp_path):
    """Catches a traceback for a run that was not filtered yet."""
    empty = replace(labeled, config=override(labeled.config, {"run_dir": str(tmp_path)}))
    with pytest.raises(DataError, match="hts filter"):
        read_labels(empty)
    with pytest.raises(DataError, match="hts prepare"):
        read_labels(empty, manifest="")
