"""What stored regions say of their images, in blocks as image by image."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from hts_ray.config import FilterConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.labels import evidence as evidence_module
from hts_ray.labels.evidence import (
    PRIOR_IMAGES,
    aggregate_regions,
    class_probabilities,
    image_evidence,
    iter_region_rows,
    kept_regions,
    pack_regions,
    read_regions,
    require_abstention,
    with_sample_prior,
)
from hts_ray.labels.select import aggregate, support
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import REGION_SCORES_SCHEMA, write_table

IMAGES, CLASSES = 60, 5
KINDS = ["grid", "person", "union"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Images of uneven regions in several files, some without margins, and one quarantined."""
    stage = StageFolder(str(tmp_path_factory.mktemp("many")), "region_scores", "k")
    rng, rows = np.random.default_rng(2), []
    for i in range(IMAGES):
        kinds = ["whole", *rng.choice(KINDS, rng.integers(0, 6))]
        scores = rng.normal(-14, 3, (len(kinds), CLASSES))
        scores[rng.random(scores.shape) < 0.05] = -np.inf
        margins = [float(rng.choice([0.2, 0.5])) if k in KINDS[1:] else 0.0 for k in kinds]
        rows.append(
            {
                "image_id": f"image-{(i * 37) % IMAGES:02d}",
                "uri": f"/{i}.jpg",
                "split": "test" if i % 4 == 0 else "train",
                "boxes": [[0, 0, 9, 9]] * len(kinds),
                "region_kinds": kinds,
                "margins": None if i % 7 == 0 else margins,
                "scores": scores.astype(np.float32).ravel().tolist(),
                "status": "ok",
            }
        )
    rows[5].update(status="quarantined", scores=None, boxes=None, region_kinds=None, margins=None)
    for part in range(3):
        table = pa.Table.from_pylist(rows[part::3], schema=REGION_SCORES_SCHEMA)
        write_table(stage.file(f"part-{part}.parquet"), table)
    info = {
        "class_ids": list(range(CLASSES)),
        "prior_log_likelihoods": [-9.0] * 5,
        "score_kind": "log_likelihood",
    }
    storage.write_json(stage.file("table.json"), info)
    return stage.path


def image_by_image(path, config, split):
    """Return {image: (probabilities, support)}, aggregated one image at a time."""
    info, found = evidence_module.read_info(path), {}
    for row in iter_region_rows(path):
        keep = kept_regions(row["region_kinds"], row["margins"], config)
        if split in (None, row["split"]) and keep.any():
            p_RC = class_probabilities(row["scores"][keep], info, config)
            found[row["image_id"]] = (
                aggregate(p_RC, config.aggregation, config.top_k),
                support(p_RC, config.support_threshold),
            )
    return dict(sorted(found.items()))


@pytest.mark.parametrize("aggregation", ["max", "mean", "top_k_mean", "noisy_or"])
@pytest.mark.parametrize(
    ("split", "choice"),
    [
        (None, {}),
        ("train", {"region_kinds": ("grid", "union"), "top_k": 3}),
        ("test", {"margins": (0.5,), "null_score": -12.0, "prior_alpha": 0.7}),
    ],
)
def test_blocks_say_what_single_images_say(many, monkeypatch, aggregation, split, choice):
    """Catches any difference, to the last bit, and rows that a block mixes up or loses."""
    monkeypatch.setattr(evidence_module, "_BATCH_ROWS", 7)
    monkeypatch.setattr(evidence_module, "_BLOCK_BYTES", 300)
    config = FilterConfig(aggregation=aggregation, support_threshold=0.1, **choice)
    expected = image_by_image(many, config, split)
    found = image_evidence(many, config, split)
    assert found.image_ids == list(expected)
    assert found.images["uri"].null_count == 0
    for row, (probabilities_C, support_C) in enumerate(expected.values()):
        np.testing.assert_array_equal(found.probabilities_NC[row], probabilities_C)
        np.testing.assert_array_equal(found.support_NC[row], support_C)


def test_packed_regions_are_those_of_the_rows_in_the_order_of_the_ids(many, monkeypatch):
    """Catches scores, kinds or margins out of step with their images."""
    monkeypatch.setattr(evidence_module, "_BATCH_ROWS", 7)
    rows = {row["image_id"]: row for row in iter_region_rows(many)}
    packed = pack_regions([*read_regions(many)])
    assert packed.image_ids.tolist() == sorted(rows)
    for image_id, (start, end) in zip(packed.image_ids, pairwise(packed.offsets_N1), strict=True):
        row = rows[image_id]
        np.testing.assert_array_equal(packed.scores_GS[start:end], row["scores"])
        assert packed.kinds_G[start:end].tolist() == row["region_kinds"]
        margins = row["margins"] or [0.0] * (end - start)
        np.testing.assert_allclose(packed.margins_G[start:end], margins)
    some = pack_regions([*read_regions(many, "train", ["image-37", "image-00", "image-14"])])
    assert set(some.image_ids) <= {"image-37", "image-14"}  # image-00 is of the other split


def test_images_of_which_no_region_counts_are_not_seen(many):
    """Catches rows of zeros taken for evidence."""
    regions = pack_regions([*read_regions(many)])
    found = aggregate_regions(regions, FilterConfig(), regions.kinds_G == "grid")
    grids = [(regions.kinds_G[a:b] == "grid").any() for a, b in pairwise(regions.offsets_N1)]
    assert found.seen_N.tolist() == grids
    assert (found.probabilities_NC[~found.seen_N] == 0).all()
    assert found.seen().image_ids == regions.image_ids[grids].tolist()


def test_scores_come_back_as_regions_by_classes(scores):
    """Would catch a transposed or shifted score matrix, with unscored rows in between."""
    rows = {r["image_id"]: r["scores"] for r in iter_region_rows(scores.path)}
    assert set(rows) == {"a", "b", "t"}
    assert rows["b"].shape == (3, 3)
    assert rows["b"][1].tolist() == [-1, -9, -9]


def test_kinds_that_were_not_stored_are_told(scores, plain):
    """Would catch a sweep or a filter over regions that the teacher did not look at."""
    with pytest.raises(ConfigError, match="stored only grid, whole"):
        image_evidence(scores.path, plain.model_copy(update={"region_kinds": ("union",)}))
    with pytest.raises(DataError, match="split 'none'"):
        image_evidence(scores.path, plain, "none")


def test_the_prior_is_taken_off(scores, plain):
    """Would catch an alpha that is read but not applied."""
    before = image_evidence(scores.path, plain)
    corrected = image_evidence(scores.path, plain.model_copy(update={"prior_alpha": 1.0}))
    place = before.image_ids.index("a")
    # Class 7 is frequent in the prior, so taking the prior off must lower its share.
    assert corrected.probabilities_NC[place, 0] < before.probabilities_NC[place, 0]


def test_margins_choose_among_what_is_stored():
    """Catches a sweep over context margins that also throws out the grid and the whole image."""
    kinds, margins = ["whole", "union", "union", "person", "grid"], [0.0, 0.2, 0.5, 0.2, 0.0]
    assert kept_regions(kinds, margins, FilterConfig()).tolist() == [True] * 5
    only = kept_regions(kinds, margins, FilterConfig(margins=(0.5,)))
    assert only.tolist() == [True, False, True, False, True]
    both = kept_regions(kinds, margins, FilterConfig(margins=(0.2, 0.5), region_kinds=("union",)))
    assert both.tolist() == [False, True, True, False, False]
    older = kept_regions(["whole", "grid"], None, FilterConfig(margins=(0.2,)))
    assert older.tolist() == [True, True]


def test_what_captions_state_is_a_probability_already():
    """Catches a softmax over caption matches, which would make one weak hint certain."""
    scores_RC = np.array([[np.log(0.25), -np.inf, np.log(0.9)]], np.float32)
    info = {"score_kind": "log_probability", "prior_log_likelihoods": None}
    found = class_probabilities(scores_RC, info, FilterConfig(prior_alpha=0.5))
    np.testing.assert_allclose(found, [[0.25, 0.0, 0.9]], rtol=1e-6)


def test_classes_that_a_search_left_out_are_negative():
    """Catches -inf, the mark of a class that was left out, that turns a region into NaN."""
    scores_RC = np.array([[-3.0, -np.inf, -4.0]], np.float32)
    prior = [-1.0, -2.0, -3.0]
    info = {"class_ids": [0, 1, 2], "prior_log_likelihoods": prior}
    found = class_probabilities(scores_RC, info, FilterConfig(prior_alpha=0.5))
    assert found[0, 1] == 0
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)


BACKGROUND = {
    "class_ids": [4],
    "prior_log_likelihoods": [-2.0],
    "background": ["a wall", "the sky"],
    "null_log_odds": [-9.0],
}


def test_the_background_takes_the_probability_where_no_class_is_shown():
    """Catches one class that is at probability 1 on every picture."""
    scores_RS = np.array([[-1.0, -8.0, -9.0], [-8.0, -1.0, -9.0]], np.float32)
    found = class_probabilities(scores_RS, BACKGROUND, FilterConfig(prior_alpha=0.0))
    assert found.shape == (2, 1)
    assert found[0, 0] > 0.99
    assert found[1, 0] < 0.01
    alone = FilterConfig(prior_alpha=0.0, background=False)
    np.testing.assert_array_equal(class_probabilities(scores_RS, BACKGROUND, alone), 1)


def test_alpha_chooses_between_classes_and_makes_none_of_the_background():
    """Catches a prior that lifts rare classes above what the picture shows."""
    scores_RS = np.array([[-12.0, -15.0, -8.0, -9.0]], np.float32)
    info = BACKGROUND | {"class_ids": [4, 5], "prior_log_likelihoods": [-2.0, -30.0]}
    odds = scores_RS[0, :2] - np.logaddexp(-8.0, -9.0)
    for alpha, between in ((0.0, [3.0, 0.0]), (1.0, [5.0, 30.0])):
        found = class_probabilities(scores_RS, info, FilterConfig(prior_alpha=alpha))
        share = np.exp(between) / np.exp(between).sum()
        np.testing.assert_allclose(found[0], share / (1 + np.exp(-odds)), rtol=1e-4)
        assert found.max() < 0.05


def test_a_class_that_nothing_looks_like_has_to_stand_above_that():
    """Catches noise that is taken for a class, as it would be without pictures of nothing."""
    scores_RS = np.array([[-2.0, -8.0, -9.0], [-2.0, -4.0, -30.0]], np.float32)
    noisy = BACKGROUND | {"null_log_odds": [2.0]}  # of 0.88
    found = class_probabilities(scores_RS, noisy, FilterConfig(prior_alpha=0.0))
    odds = [-2 - np.logaddexp(-8, -9), 2.0]
    expected = 1 / (1 + np.exp(-(np.array(odds) - 2)) * 19)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    assert found[1, 0] == pytest.approx(0.05, abs=1e-3)
    before = {**BACKGROUND, "null_log_odds": None}  # folders of before have none
    assert class_probabilities(scores_RS, before, FilterConfig(prior_alpha=0.0))[1, 0] > 0.85


def test_a_search_may_leave_out_a_class_or_all_of_the_background():
    """Catches the NaN of two sentences that were both left out."""
    left_out = -np.inf
    scores_RS = np.array([[left_out, left_out, left_out], [-3, left_out, left_out]], np.float32)
    found = class_probabilities(scores_RS, BACKGROUND, FilterConfig(prior_alpha=0.0))
    np.testing.assert_array_equal(found[:, 0], [0, 1])


def test_one_class_with_nothing_beside_it_is_refused():
    """Catches a filter whose every image is positive by construction."""
    alone = {"class_ids": [4], "background": []}
    with pytest.raises(ConfigError, match=r"label\.teacher\.background=general"):
        require_abstention(alone, FilterConfig())
    with pytest.raises(ConfigError, match=r"filter\.background = False"):
        require_abstention(BACKGROUND, FilterConfig(background=False))
    require_abstention(alone, FilterConfig(null_score=-2.0))
    require_abstention(BACKGROUND, FilterConfig())
    require_abstention({**alone, "score_kind": "log_probability"}, FilterConfig())


def centred(scores_GS, alpha, weight, teachers_S):
    """Return the softmax of scores without their mean, drawn towards the teacher's prior."""
    prior_S = weight * scores_GS.mean(axis=0) + (1 - weight) * np.asarray(teachers_S)
    shifted = scores_GS - alpha * prior_S
    return np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)


def test_the_runs_own_prior_is_the_mean_score_of_its_regions(tmp_path, monkeypatch):
    """Catches a mean over images or blocks, other splits in it, and a background left out."""
    monkeypatch.setattr(evidence_module, "_BATCH_ROWS", 3)
    stage = StageFolder(str(tmp_path), "region_scores", "k")
    rng, rows, kept = np.random.default_rng(3), [], []
    for i in range(12):
        scores = rng.normal(-14, 3, (1 + i % 3, 4)).astype(np.float32)
        split = "test" if i % 4 == 0 else "train"
        kept += [scores] if split == "train" else []
        row = {"image_id": f"{i:02d}", "uri": "/x.jpg", "split": split, "status": "ok"}
        row |= {"boxes": [[0, 0, 9, 9]] * len(scores), "region_kinds": ["grid"] * len(scores)}
        row |= {"scores": scores[:, :3].ravel(), "background": scores[:, 3:].ravel()}
        rows.append(row)
    write_table(
        stage.file("part-0.parquet"), pa.Table.from_pylist(rows, schema=REGION_SCORES_SCHEMA)
    )
    info = {"class_ids": [0, 1, 2], "prior_log_likelihoods": [-3.0] * 3}
    storage.write_json(stage.file("table.json"), info)
    config = FilterConfig(prior="sample", prior_alpha=0.7, aggregation="max")
    found = image_evidence(stage.path, config, "train")
    weight = 9 / (9 + PRIOR_IMAGES)
    kept_GS = np.concatenate(kept)
    odds_GC = kept_GS[:, :3] - kept_GS[:, 3:]
    wanted = centred(kept_GS[:, :3], 0.7, weight, [-3, -3, -3]) / (1 + np.exp(-odds_GC))
    ends = np.cumsum([len(scores) for scores in kept])[:-1]
    expected = [part.max(axis=0) for part in np.split(wanted, ends)]
    np.testing.assert_allclose(found.probabilities_NC, expected, rtol=1e-4)


def test_the_runs_own_prior_needs_no_prior_of_the_teacher(tmp_path):
    """Catches `label.teacher.prior=none` refused where the teacher's prior is not asked for."""
    scores_GS = np.random.default_rng(4).normal(-9, 2, (8, 3)).astype(np.float32)
    info = with_sample_prior({"class_ids": [0, 1, 2]}, [(4, scores_GS)])
    found = class_probabilities(scores_GS, info, FilterConfig(prior="sample", prior_alpha=1.0))
    np.testing.assert_allclose(found, centred(scores_GS, 1.0, 4 / (4 + 16), [0] * 3), rtol=1e-4)


def test_a_rare_class_keeps_its_prior():
    """Catches a mean of likelihoods, which the few regions that show a class would rule."""
    scores_GS = np.full((200, 2), -20, np.float32)
    scores_GS[:2, 1] = -2  # shown in 1 of 100 regions
    info = with_sample_prior(
        {"class_ids": [0, 1], "prior_log_likelihoods": [-20.0, -20.0]}, [(200, scores_GS)]
    )
    assert info["sample_prior"][1] - info["sample_prior"][0] < 0.2


def test_scores_that_a_search_left_out_have_no_mean():
    """Catches -inf averaged into a prior that turns every score into NaN."""
    scores_GS = np.array([[-1, -np.inf], [-2, -3]], np.float32)
    info = with_sample_prior(
        {"class_ids": [0, 1], "prior_log_likelihoods": [-1.0, -1.0]}, [(2, scores_GS)]
    )
    with pytest.raises(ConfigError, match=r"search=top_k left out.*filter.prior=teacher"):
        class_probabilities(scores_GS, info, FilterConfig(prior="sample"))
    class_probabilities(scores_GS, info, FilterConfig(prior="sample", prior_alpha=0.0))


def test_answers_to_questions_do_not_compete():
    """Would catch odds read as likelihoods: one class would then take another's probability."""
    info = {"class_ids": [1, 2], "score_kind": "log_odds", "prior_log_odds": None}
    odds_RC = np.float32([[0, 0], [2, 2], [-np.inf, -2]])
    found = class_probabilities(odds_RC, info, FilterConfig(null_score=50.0))
    np.testing.assert_allclose(found[:2], 1 / (1 + np.exp(-odds_RC[:2])), rtol=1e-6)
    assert found[2, 0] == 0
    cooler = class_probabilities(odds_RC, info, FilterConfig(temperature=2.0))
    assert cooler[1, 0] == pytest.approx(1 / (1 + np.exp(-1)))
    require_abstention({**info, "class_ids": [1]}, FilterConfig())
    with pytest.raises(DataError, match=r"'log_lines'.*label again"):
        class_probabilities(odds_RC, {**info, "score_kind": "log_lines"}, FilterConfig())
