"""The filter stage on stored region scores."""

import numpy as np
import pyarrow as pa
import pytest

from hts_ray.config import FilterConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.labels.stage import (
    class_probabilities,
    filter_regions,
    image_evidence,
    iter_region_rows,
    kept_regions,
)
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import REGION_SCORES_SCHEMA, read_table, write_table

IDS = np.array([7, 3, 11], dtype=np.int16)


def row(image_id, scores_RC, kinds, split="train", status="ok"):
    scored = status == "ok"
    return {
        "image_id": image_id,
        "uri": f"/{image_id}.jpg",
        "split": split,
        "boxes": [[0, 0, 9, 9]] * len(kinds) if scored else None,
        "region_kinds": kinds if scored else None,
        "scores": np.asarray(scores_RC, dtype=np.float32).ravel().tolist() if scored else None,
        "status": status,
    }


@pytest.fixture
def scores(tmp_path):
    """Two images: one clear by its grid regions only, one quarantined, one of another split."""
    stage = StageFolder(str(tmp_path), "region_scores", "k")
    rows = [
        row("b", [[-9, -9.1, -9], [-1, -9, -9], [-1, -9, -9]], ["whole", "grid", "grid"]),
        row("a", [[-9, -9, -1]], ["whole"]),
        row("bad", [], [], status="quarantined"),
        row("t", [[-1, -9, -9]], ["whole"], split="test"),
    ]
    write_table(stage.file("part.parquet"), pa.Table.from_pylist(rows, schema=REGION_SCORES_SCHEMA))
    storage.write_json(
        stage.file("table.json"),
        {"class_ids": IDS.tolist(), "prior_log_likelihoods": [-1.0, -9.0, -9.0]},
    )
    return stage


PLAIN = FilterConfig(
    prior_alpha=0.0, per_class_quantile=None, negative_threshold=0.05, support_threshold=0.4
)


def run(scores, tmp_path, config, split="train"):
    stage = StageFolder(str(tmp_path), "pseudo_labels", str(hash(config)))
    stats = filter_regions(
        config, region_scores_path=scores.path, class_ids=IDS, split=split, stage=stage
    )
    return {r["image_id"]: r for r in read_table(stage.path).to_pylist()}, stats


def test_scores_come_back_as_regions_by_classes(scores):
    """Would catch a transposed or shifted score matrix, with unscored rows in between."""
    rows = {r["image_id"]: r["scores"] for r in iter_region_rows(scores.path)}
    assert set(rows) == {"a", "b", "t"}
    assert rows["b"].shape == (3, 3)
    assert rows["b"][1].tolist() == [-1, -9, -9]


def test_labels_carry_the_table_s_class_ids(scores, tmp_path):
    """Would catch positions written in place of class ids."""
    labels, stats = run(scores, tmp_path, PLAIN)
    assert labels["b"]["positive_ids"] == [7]
    assert labels["a"]["positive_ids"] == [11]
    assert "t" not in labels
    assert labels["b"]["support"] == [2]
    assert stats["positives"] == 2
    assert stats["positives_per_class"] == {"7": 1, "3": 0, "11": 1}


def test_region_kinds_choose_what_counts(scores, tmp_path):
    """Would catch a whole-image baseline that still sees the regions."""
    config = PLAIN.model_copy(update={"region_kinds": ("whole",)})
    labels, _ = run(scores, tmp_path, config)
    assert labels["b"]["positive_ids"] == []
    with pytest.raises(ConfigError, match="stored only grid, whole"):
        image_evidence(scores.path, PLAIN.model_copy(update={"region_kinds": ("union",)}))


def test_the_prior_is_taken_off(scores):
    """Would catch an alpha that is read but not applied."""
    plain = image_evidence(scores.path, PLAIN)
    corrected = image_evidence(scores.path, PLAIN.model_copy(update={"prior_alpha": 1.0}))
    place = plain.image_ids.index("a")
    # Class 7 is frequent in the prior, so taking the prior off must lower its share.
    assert corrected.probabilities_NC[place, 0] < plain.probabilities_NC[place, 0]


def test_every_dropped_candidate_has_a_reason(scores, tmp_path):
    """Would catch candidates that vanish from the counts."""
    config = PLAIN.model_copy(update={"min_support": 2})
    labels, stats = run(scores, tmp_path, config)
    assert labels["a"]["positive_ids"] == []
    assert labels["a"]["ignored_ids"] == [11]
    assert dict(labels["a"]["dropped"])["below_support"] == 1
    assert stats["below_support"] == 1


def test_nothing_left_is_an_error_and_no_result(scores, tmp_path):
    """Would catch a training run on empty labels reported as success."""
    config = PLAIN.model_copy(update={"min_support": 50})
    with pytest.raises(DataError, match="lower filter"):
        run(scores, tmp_path, config)
    with pytest.raises(DataError, match="split 'none'"):
        run(scores, tmp_path, PLAIN, split="none")


def test_a_finished_folder_is_not_computed_again(scores, tmp_path):
    """Would catch work done twice, or a result that changes under its hash."""
    first = run(scores, tmp_path, PLAIN)
    storage.remove_tree(scores.path)
    assert run(scores, tmp_path, PLAIN) == first


def test_margins_choose_among_what_is_stored():
    """Catches a sweep over context margins that also throws out the grid and the whole image."""
    stored = {
        "region_kinds": ["whole", "union", "union", "person", "grid"],
        "margins": [0.0, 0.2, 0.5, 0.2, 0.0],
    }
    assert kept_regions(stored, FilterConfig()).tolist() == [True] * 5
    only = kept_regions(stored, FilterConfig(margins=(0.5,)))
    assert only.tolist() == [True, False, True, False, True]
    both = kept_regions(stored, FilterConfig(margins=(0.2, 0.5), region_kinds=("union",)))
    assert both.tolist() == [False, True, True, False, False]
    older = {"region_kinds": ["whole", "grid"], "margins": None}
    assert kept_regions(older, FilterConfig(margins=(0.2,))).tolist() == [True, True]


def test_what_captions_state_is_a_probability_already():
    """Catches a softmax over caption matches, which would make one weak hint certain."""
    scores_RC = np.array([[np.log(0.25), -np.inf, np.log(0.9)]], np.float32)
    info = {"score_kind": "log_probability", "prior_log_likelihoods": None}
    found = class_probabilities(scores_RC, info, FilterConfig(prior_alpha=0.5))
    np.testing.assert_allclose(found, [[0.25, 0.0, 0.9]], rtol=1e-6)


def test_classes_that_a_search_left_out_are_negative():
    """Catches -inf, the mark of a class that was left out, that turns a region into NaN."""
    scores_RC = np.array([[-3.0, -np.inf, -4.0]], np.float32)
    info = {"score_kind": "log_likelihood", "prior_log_likelihoods": [-1.0, -2.0, -3.0]}
    found = class_probabilities(scores_RC, info, FilterConfig(prior_alpha=0.5))
    assert found[0, 1] == 0
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)


def test_an_opinion_changes_the_regions_that_count(scores, tmp_path):
    """Would catch a second opinion that is asked and dropped, or that meets other regions."""
    asked = {}

    def opinion(image_id, keep_R, probabilities_RC):
        asked[image_id] = (keep_R.tolist(), probabilities_RC.shape)
        return probabilities_RC[:, [1, 0, 2]] if image_id == "b" else probabilities_RC

    config = PLAIN.model_copy(update={"region_kinds": ("grid", "whole")})
    stage = StageFolder(str(tmp_path), "pseudo_labels", "opinion")
    filter_regions(
        config,
        region_scores_path=scores.path,
        class_ids=IDS,
        split="train",
        stage=stage,
        opinion=opinion,
    )
    labels = {r["image_id"]: r["positive_ids"] for r in read_table(stage.path).to_pylist()}
    assert labels == {"a": [11], "b": [3]}
    assert asked["b"] == ([True] * 3, (3, 3))
    image_evidence(scores.path, PLAIN.model_copy(update={"region_kinds": ("grid",)}), opinion)
    assert asked["b"] == ([False, True, True], (2, 3))
