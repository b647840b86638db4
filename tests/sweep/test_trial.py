"""A trial computes what the stages would, from packed arrays, and sees no annotation."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hts_ray.classes import read_class_csv
from hts_ray.config import FilterConfig, HtsConfig, load_config, override
from hts_ray.errors import ConfigError, DataError
from hts_ray.evaluate import label_matrix
from hts_ray.labels.passes import TeacherPass
from hts_ray.labels.stage import filter_regions
from hts_ray.metrics import hico_average_precision, mean_average_precision
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import (
    MANIFEST_SCHEMA,
    REGION_SCORES_SCHEMA,
    features_schema,
    read_table,
    write_table,
)
from hts_ray.student.head import HeadData, fit_head, head_logits
from hts_ray.student.targets import dense_targets, training_set
from hts_ray.sweep import data as sweep_data
from hts_ray.sweep.data import (
    SweepData,
    balanced,
    halve_regions,
    load_sweep_data,
    read_regions,
)
from hts_ray.sweep.objectives import OBJECTIVES, VALIDATION
from hts_ray.sweep.space import build_space, feels, trial_config
from hts_ray.sweep.trial import fit_classifier, pseudo_label, run_trial

IMAGES, CLASSES, WIDTH = 120, 7, 16
IDS = [3, 11, 7, 5, 2, 60, 41]
KINDS = ["whole", "grid", "person", "union"]
CONFIG = load_config(
    overrides=[
        "filter.positive_threshold=0.4",
        "filter.negative_threshold=0.05",
        "filter.quantile_floor=0.1",
        "filter.null_score=-9",
        "train.epochs=3",
        "train.batch_size=16",
        "train.optim.lr=0.1",
        "student.logit_scale=20",
    ]
)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """Return which classes (N, C) bool are in which image."""
    return np.random.default_rng(5).random((IMAGES, CLASSES)) < 0.25


def name(i: int) -> str:
    return f"image-{(i * 37) % IMAGES:03d}"  # the order of the files is not that of the ids


def split(i: int) -> str:
    return "test" if i % 6 == 0 else "train"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, truth: np.ndarray) -> dict[str, Any]:
    """Write region scores of uneven regions, features of most images, and a manifest."""
    folder = tmp_path_factory.mktemp("stored")
    rng = np.random.default_rng(0)
    class_file = folder / "classes.csv"
    class_file.write_text("class_id,name\n" + "\n".join(f"{i},thing {i}" for i in IDS) + "\n")
    direction = rng.normal(size=(CLASSES, WIDTH)).astype(np.float32)
    regions, features, manifest = [], [], []
    for i in range(IMAGES):
        count = int(rng.integers(1, 7))
        kinds = [KINDS[0], *rng.choice(KINDS[1:], count - 1)]
        margins = [float(rng.choice([0.2, 0.5])) if k in KINDS[2:] else 0.0 for k in kinds]
        scores = rng.normal(-14, 1.5, (count, CLASSES)) + 6 * truth[i]
        scores[rng.random(scores.shape) < 0.03] = -np.inf  # left out by a search
        positive = [IDS[c] for c in np.flatnonzero(truth[i])]
        base = {"image_id": name(i), "uri": f"/{i}.jpg", "split": split(i)}
        regions.append(
            {
                **base,
                "boxes": [[0.0, 0.0, 9.0, 9.0]] * count,
                "region_kinds": kinds,
                "margins": margins,
                "scores": scores.astype(np.float32).ravel().tolist(),
                "status": "ok",
            }
        )
        vector = truth[i] @ direction + rng.normal(0, 1.0, WIDTH)
        bad = i % 29 == 1
        features.append(
            {
                **base,
                "features": None if bad else vector.astype(np.float32).tolist(),
                "flipped": None if bad else (vector + 0.1).astype(np.float32).tolist(),
                "status": "quarantined" if bad else "ok",
            }
        )
        manifest.append({**base, "positive_ids": positive})
    regions[8].update(status="quarantined", scores=None, boxes=None, region_kinds=None)
    scores_stage = StageFolder(str(folder), "region_scores", "k")
    for part in (0, 1):
        rows = pa.Table.from_pylist(regions[part::2], schema=REGION_SCORES_SCHEMA)
        write_table(scores_stage.file(f"part-{part}.parquet"), rows)
    prior = rng.normal(-16, 1, CLASSES).tolist()
    storage.write_json(
        scores_stage.file("table.json"),
        {"class_ids": IDS, "prior_log_likelihoods": prior, "score_kind": "log_likelihood"},
    )
    features_stage = StageFolder(str(folder), "features", "k")
    write_table(
        features_stage.file("part-0.parquet"),
        pa.Table.from_pylist(features, schema=features_schema(WIDTH, flipped=True)),
    )
    start = direction + rng.normal(0, 1.5, direction.shape).astype(np.float32)
    return {
        "classes": read_class_csv(class_file),
        "scores": scores_stage.path,
        "features": features_stage.path,
        "manifest": pa.Table.from_pylist(manifest, schema=MANIFEST_SCHEMA),
        "start": start,
        "folder": folder,
    }


@pytest.fixture
def load(stored: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what loads the stored data, with a given zero-shot classifier in place of CLIP's."""
    monkeypatch.setattr(sweep_data, "zero_shot_classifier", lambda *_: stored["start"])

    def call(config: HtsConfig = CONFIG, **changed: Any) -> SweepData:
        return load_sweep_data(
            config, stored["classes"], stored["scores"], stored["features"], **changed
        )

    return call


def random_settings(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    low, high = sorted(rng.uniform(0.01, 0.7, 2))
    return {
        "filter.positive_threshold": float(high),
        "filter.negative_threshold": float(low),
        "filter.per_class_quantile": [None, 0.8, 0.95][rng.integers(3)],
        "filter.quantile_floor": float(rng.uniform(0.02, 0.4)),
        "filter.aggregation": ["max", "mean", "top_k_mean", "noisy_or"][seed % 4],
        "filter.top_k": int(rng.integers(1, 5)),
        "filter.prior_alpha": float(rng.choice([0.0, 0.6])),
        "filter.temperature": float(rng.uniform(0.5, 3)),
        "filter.null_score": [None, -8.5][rng.integers(2)],
        "filter.min_support": int(rng.integers(1, 3)),
        "filter.support_threshold": 0.1,
        "filter.max_positives_per_image": int(rng.integers(1, 4)),
        "filter.region_kinds": [None, ["whole"], ["grid", "union"]][seed % 3],
        "filter.margins": [None, [0.5]][rng.integers(2)],
    }


def published(config: HtsConfig, stored: dict[str, Any], folder: Path) -> StageFolder:
    """Run the filter stage."""
    stage = StageFolder(str(folder), "pseudo_labels", "k")
    run_dir, _, key = stored["scores"].partition("/region_scores-")
    scores = StageFolder(run_dir, "region_scores", key)
    filter_regions(config.filter, [TeacherPass(scores, config.filter)], "train", stage)
    return stage


def targets_of(stage: StageFolder, stored: dict[str, Any]) -> np.ndarray:
    """Return what training reads from a filter stage, in the order of the ids."""
    table = read_table(stage.path)
    data = training_set(table, stored["classes"], CONFIG.train)
    pieces = data.mapped(stored["classes"], CONFIG.train)
    rows = pa.concat_tables(pieces).sort_by("image_id")
    return dense_targets(rows["positive"], rows["ignored"], CLASSES)


@pytest.mark.parametrize("seed", range(24))
def test_pseudo_labels_are_those_of_the_filter_stage(seed, load, stored, tmp_path):
    """Catches any difference, to the last bit, between a trial and `hts filter`."""
    data = load()
    config = trial_config(CONFIG, random_settings(seed))
    labels = pseudo_label(data, config)
    try:
        stage = published(config, stored, tmp_path)
    except DataError:
        assert not (labels.targets_NC == 1).any()
        return
    seen = labels.seen_N
    ids = read_table(stage.path)["image_id"].to_pylist()
    assert ids == data.regions.image_ids[seen].tolist()
    np.testing.assert_array_equal(labels.targets_NC[seen], targets_of(stage, stored))
    assert labels.selection.summary()["positives"] == stage.stats["positives"]


def test_corrections_hold_in_a_trial_too(load, stored, tmp_path):
    """Catches a sweep that tries settings on labels which people have put right."""
    corrections = stored["manifest"].slice(1, 12)
    path = str(tmp_path / "corrections.parquet")
    write_table(path, corrections)
    config = load_config(overrides=["filter.positive_threshold=0.4", f"filter.overrides={path}"])
    data = load(config)
    labels = pseudo_label(data, config)
    stage = published(config, stored, tmp_path)
    assert stage.stats["corrected_labels"] > 0
    expected = targets_of(stage, stored)
    np.testing.assert_array_equal(labels.targets_NC[labels.seen_N], expected)
    without = pseudo_label(load(), trial_config(CONFIG, {}))
    assert not np.array_equal(labels.targets_NC, without.targets_NC)
    assert np.isfinite(run_trial(data, {}, 0)["unseen_ap"])


def test_the_student_is_the_one_of_head_only_training(load, stored, truth):
    """Catches rows out of step with features, a lost flip, or images without features."""
    data = load()
    labels = pseudo_label(data, CONFIG)
    ids = [i for i in range(IMAGES) if split(i) == "train" and i % 29 != 1 and i != 8]
    ids.sort(key=name)
    table = {row["image_id"]: row for row in read_table(stored["features"]).to_pylist()}
    row_of = {image_id: row for row, image_id in enumerate(data.regions.image_ids)}
    targets = labels.targets_NC[[row_of[name(i)] for i in ids]]
    stored_ND, flipped_ND = (
        np.array([table[name(i)][side] for i in ids]) for side in ("features", "flipped")
    )
    known = HeadData(stored_ND, targets, flipped_ND=flipped_ND)
    fit = fit_head(known, stored["start"], logit_scale=20.0, config=CONFIG.train, seed=4)
    np.testing.assert_array_equal(fit_classifier(data, CONFIG.train, labels, 4), fit.classifier_CD)


def test_a_trial_reports_every_criterion_and_repeats_itself(load):
    """Catches a missing number, one that is not finite, and chance that no seed governs."""
    data = load()
    first = run_trial(data, {}, 1)
    assert set(OBJECTIVES) <= set(first)
    assert all(np.isfinite(value) for value in first.values())
    again = run_trial(data, {}, 1)
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in again.items() if k != "seconds"
    }
    assert run_trial(data, {}, 2)["blended_ap"] != first["blended_ap"]


def test_objectives_follow_what_training_does(load):
    """Catches settings that never reach the classifier: a rate of almost 0 learns nothing."""
    data = load()
    learned = run_trial(data, {}, 0)
    idle = run_trial(data, {"train.optim.lr": 1e-9}, 0)
    assert learned["blended_ap"] > idle["blended_ap"] + 0.004
    assert idle["positives_per_image"] == learned["positives_per_image"]


def test_a_filter_that_keeps_nothing_is_refused(load):
    """Catches a setting that `hts filter` would refuse, winning the sweep."""
    with pytest.raises(DataError, match="leaves no pseudo-label"):
        run_trial(load(), {"filter.min_support": 50}, 0)


def test_annotations_change_nothing_but_the_validation_map(load, stored):
    """Catches labels that leak into objectives, and a validation mAP of other images."""
    plain = run_trial(load(), {}, 0)
    labeled = stored["manifest"].filter(pa.compute.equal(stored["manifest"]["split"], "test"))
    data = load(validation=labeled)
    found = run_trial(data, {}, 0)
    assert VALIDATION not in plain
    for key, value in plain.items():
        assert key == "seconds" or found[key] == value
    table = {row["image_id"]: row for row in read_table(stored["features"]).to_pylist()}
    known = [row["features"] is not None for row in map(table.get, labeled["image_id"].to_pylist())]
    rows = labeled.filter(pa.array(known))
    features = np.array([table[i]["features"] for i in rows["image_id"].to_pylist()])
    logits = head_logits(
        features, fit_classifier(data, CONFIG.train, pseudo_label(data, CONFIG), 0), 20.0
    )
    expected = hico_average_precision(logits, label_matrix(rows, stored["classes"]))
    assert found[VALIDATION] == mean_average_precision(expected)


OTHER = {
    "filter.region_kinds": ["whole"],
    "filter.margins": [0.2],
    "filter.prior": "sample",
    "filter.prior_alpha": 1.0,
    "filter.temperature": 2.0,
    "filter.background": False,
    "filter.null_score": None,
    "filter.aggregation": "max",
    "filter.top_k": 5,
    "filter.positive_threshold": 0.9,
    "filter.negative_threshold": 0.3,
    "filter.per_class_quantile": None,
    "filter.quantile_floor": 0.5,
    "filter.min_support": 3,
    "filter.support_threshold": 0.5,
    "filter.max_positives_per_image": 1,
    "train.loss": "bce",
    "train.loss_temperature": 4.0,
    "train.optim.lr": 0.5,
}


def test_no_setting_changes_the_reference(load):
    """Catches a run whose own reading of the scores is what its settings are measured by."""
    first = load().reference_NC
    for setting, value in OTHER.items():
        changed = trial_config(CONFIG, {setting: value})
        np.testing.assert_array_equal(load(changed).reference_NC, first, err_msg=setting)
    np.testing.assert_array_equal(
        load(override(CONFIG, {"sweep": {"seed": 5}})).reference_NC, first
    )
    swept = {name for name in FilterConfig.model_fields if feels(f"filter.{name}")}
    several = {"filter.passes", "filter.combine"}  # a sweep has one pass
    assert {f"filter.{name}" for name in swept} - several <= set(OTHER)


def test_no_student_is_trained_on_labeled_images(load, stored):
    """Catches a validation mAP of images whose pseudo-labels the student has seen."""
    table = stored["manifest"]
    labeled = table.filter(pa.compute.equal(table["split"], "train")).slice(0, 30)
    data = load(validation=labeled)
    ids = data.regions.image_ids
    assert set(ids[data.labeled_N]) == set(labeled["image_id"].to_pylist()) & set(ids)
    labels = pseudo_label(data, CONFIG)
    without = replace(data, feature_row_N=np.where(data.labeled_N, -1, data.feature_row_N))
    fitted, expected, every = (
        fit_classifier(some, CONFIG.train, labels, 0) for some in (data, without, load())
    )
    np.testing.assert_array_equal(fitted, expected)
    assert not np.array_equal(fitted, every)


def test_halves_of_the_regions_are_disjoint_and_even(stored):
    """Catches a half that sees more of every image than the other."""
    regions = read_regions(stored["scores"], "train", 3)
    view_G = halve_regions(np.diff(regions.offsets_N1), 3)
    offsets = regions.offsets_N1
    sizes = np.array([[(view_G[a:b] == v).sum() for v in (0, 1)] for a, b in pairwise(offsets)])
    assert (np.abs(sizes[:, 0] - sizes[:, 1]) <= 1).all()
    odd = sizes.sum(axis=1) % 2 == 1
    assert 0.2 < (sizes[odd, 0] > sizes[odd, 1]).mean() < 0.8
    assert list(regions.image_ids) == sorted(regions.image_ids)


def test_a_sample_of_images_is_drawn_by_seed(stored):
    """Catches a sample that depends on how the files were written, or is the same for any seed."""
    first = read_regions(stored["scores"], "train", 0, max_images=20)
    again = read_regions(stored["scores"], "train", 0, max_images=20)
    other = read_regions(stored["scores"], "train", 1, max_images=20)
    assert first.image_ids.tolist() == again.image_ids.tolist()
    assert first.image_ids.tolist() != other.image_ids.tolist()
    assert len(first.image_ids) == 20
    every = read_regions(stored["scores"], "train", 0, max_images=10**6)
    assert len(every.image_ids) == sum(split(i) == "train" for i in range(IMAGES) if i != 8)


def test_settings_that_a_trial_cannot_feel_are_refused(load):
    """Catches a sweep over the teacher's settings, which would find them all alike."""
    space = {"train.optim.layer_decay": {"choices": [0.5, 1.0]}}
    with pytest.raises(ConfigError, match=r"set sweep\.train=full"):
        build_space(override(CONFIG, {"sweep": {"space": space}}), "")
    assert feels("filter.top_k")
    assert feels("train.optim.head_lr")
    for setting in ("label.regions.whole", "train.augment.color_jitter", "train.optim.layer_decay"):
        assert not feels(setting)
    with pytest.raises(ConfigError, match="positive_threshold"):
        trial_config(CONFIG, {"filter.positive_treshold": 0.5})
    with pytest.raises(ConfigError, match="negative_threshold"):
        trial_config(CONFIG, {"filter.negative_threshold": 0.9})


def test_what_does_not_fit_together_is_told(load, stored):
    """Catches scores of other classes, and a split or labels of which nothing is stored."""
    with pytest.raises(DataError, match="no scored image of split 'nowhere'"):
        load(load_config(overrides=["train.split=nowhere"]))
    with pytest.raises(DataError, match="validation images"):
        load(validation=stored["manifest"].slice(0, 0))
    path = stored["folder"] / "other.csv"
    path.write_text("class_id,name\n3,thing\n")
    with pytest.raises(DataError, match="other classes"):
        load_sweep_data(CONFIG, read_class_csv(path), stored["scores"], stored["features"], 0)


def test_arrays_may_be_read_only_and_travel_without_copies(load):
    """Catches writes into the object store's arrays, and data that only pickles in-band."""
    data = load()
    buffers: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    arrays = [data.regions.scores_GS, data.features_MD, data.flipped_MD, data.classifier_CD]
    arrays.append(data.reference_NC)
    nbytes = sum(array.nbytes for array in arrays)
    assert sum(memoryview(buffer).nbytes for buffer in buffers) >= nbytes
    frozen = [memoryview(buffer).toreadonly() for buffer in buffers]
    copy = pickle.loads(packed, buffers=frozen)
    assert not copy.features_MD.flags.writeable
    before, after = run_trial(data, {}, 0), run_trial(copy, {}, 0)
    assert before["blended_ap"] == after["blended_ap"]


def test_soft_labels_weigh_positives_by_their_probability(load):
    """Catches weights that are lost on the way to the loss, or that weigh negatives too."""
    data = load()
    config = trial_config(CONFIG, {"train.soft_labels": True})
    labels = pseudo_label(data, config)
    assert labels.weights_NC is not None
    positive = labels.targets_NC == 1
    assert (labels.weights_NC[~positive] == 1).all()
    assert (labels.weights_NC[positive] < 1).any()
    assert not np.array_equal(
        fit_classifier(data, config.train, labels, 0),
        fit_classifier(data, config.train, replace(labels, weights_NC=None), 0),
    )


def test_a_sample_evens_the_classes_out():
    """Catches a sample that loses rare classes or labeled images, or differs each time."""
    random = np.random.default_rng(4)
    images, sizes = 3000, [2000, 400, 60, 5]
    pairs = [(row, c) for c, n in enumerate(sizes) for row in random.choice(images, n, False)]
    row_E, class_E = np.array(pairs)[random.permutation(len(pairs))].T
    always_N = np.zeros(images, bool)
    always_N[[7, 1500]] = True
    chosen_N = balanced(row_E, class_E, always_N, 300, 1)
    assert chosen_N.sum() == 300
    assert chosen_N[always_N].all()
    counts = np.bincount(class_E[chosen_N[row_E]], minlength=4)
    assert counts[3] == 5
    assert counts[2] == 60
    assert 70 < counts[1] < counts[0] < 180  # of 400 and 2000: by chance 40 and 200
    bare_N = np.bincount(row_E, minlength=images) == 0
    assert abs(chosen_N[bare_N].sum() - 300 * bare_N.mean()) < 2
    np.testing.assert_array_equal(balanced(row_E, class_E, always_N, 300, 1), chosen_N)
    assert (balanced(row_E, class_E, always_N, 300, 2) != chosen_N).any()


def test_a_sweep_looks_at_a_sample(load, stored):
    """Catches `sweep.max_images` that only cuts the trials, or leaves a labeled image out."""
    StageFolder(str(stored["folder"]), "region_scores", "k").publish({})
    config = override(CONFIG, {"sweep": {"max_images": 30}})
    train = pa.compute.equal(stored["manifest"]["split"], "train")
    labeled = stored["manifest"].filter(train).slice(3, 5)
    data = load(config, validation=labeled)
    every = load(validation=labeled).regions.image_ids.tolist()
    assert len(data.regions.image_ids) == 30 < len(every)
    assert set(data.regions.image_ids) <= set(every)
    assert set(labeled["image_id"].to_pylist()) & set(every) <= set(data.regions.image_ids)
    changed = override(config, {"filter": {"positive_threshold": 0.9}})
    np.testing.assert_array_equal(
        load(changed, validation=labeled).regions.image_ids, data.regions.image_ids
    )
