"""The filter stage on stored region scores."""

import pytest

from hts_ray.errors import DataError
from hts_ray.labels.passes import TeacherPass
from hts_ray.labels.stage import filter_regions
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import read_table


def run(scores, tmp_path, config, split="train"):
    stage = StageFolder(str(tmp_path), "pseudo_labels", str(hash(config)))
    stats = filter_regions(config, [TeacherPass(scores, config)], split, stage)
    return {r["image_id"]: r for r in read_table(stage.path).to_pylist()}, stats


def test_labels_carry_the_table_s_class_ids(scores, tmp_path, plain):
    """Would catch positions written in place of class ids."""
    labels, stats = run(scores, tmp_path, plain)
    assert labels["b"]["positive_ids"] == [7]
    assert labels["a"]["positive_ids"] == [11]
    assert "t" not in labels
    assert labels["b"]["support"] == [2]
    assert stats["positives"] == 2
    assert stats["positives_per_class"] == {"7": 1, "3": 0, "11": 1}


def test_region_kinds_choose_what_counts(scores, tmp_path, plain):
    """Would catch a whole-image baseline that still sees the regions."""
    labels, _ = run(scores, tmp_path, plain.model_copy(update={"region_kinds": ("whole",)}))
    assert labels["b"]["positive_ids"] == []


def test_every_dropped_candidate_has_a_reason(scores, tmp_path, plain):
    """Would catch candidates that vanish from the counts."""
    labels, stats = run(scores, tmp_path, plain.model_copy(update={"min_support": 2}))
    assert labels["a"]["positive_ids"] == []
    assert labels["a"]["ignored_ids"] == [11]
    assert dict(labels["a"]["dropped"])["below_support"] == 1
    assert stats["below_support"] == 1


def test_nothing_left_is_an_error_and_no_result(scores, tmp_path, plain):
    """Would catch a training run on empty labels reported as success."""
    with pytest.raises(DataError, match="lower filter"):
        run(scores, tmp_path, plain.model_copy(update={"min_support": 50}))
    with pytest.raises(DataError, match="split 'none'"):
        run(scores, tmp_path, plain, split="none")


def test_a_finished_folder_is_not_computed_again(scores, tmp_path, plain):
    """Would catch work done twice, or a result that changes under its hash."""
    first = run(scores, tmp_path, plain)
    storage.remove_tree(scores.path)
    assert run(scores, tmp_path, plain) == first
