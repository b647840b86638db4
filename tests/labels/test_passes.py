"""Which teacher passes the filter reads."""

import re

import numpy as np
import pyarrow as pa
import pytest

from hts_ray.classes import read_class_csv
from hts_ray.config import load_config
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.labels import passes
from hts_ray.labels.evidence import filter_info, image_evidence
from hts_ray.labels.passes import made_from
from hts_ray.labels.stage import plan_filter
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import REGION_SCORES_SCHEMA, write_table

IDS = [7, 3, 11]


def scored(run_dir, key, model, scores_NC, ids="abcdef", **info):
    """Write a finished pass of one region an image."""
    stage = StageFolder(str(run_dir), "region_scores", key)
    same = {"split": "train", "boxes": [[0, 0, 9, 9]], "region_kinds": ["whole"], "status": "ok"}
    rows = [
        {"image_id": name, "uri": f"/{name}.jpg", "scores": np.float32(of_image).tolist(), **same}
        for name, of_image in zip(ids, scores_NC, strict=True)
    ]
    write_table(stage.file("part.parquet"), pa.Table.from_pylist(rows, schema=REGION_SCORES_SCHEMA))
    known = {
        "class_ids": IDS, "class_fingerprint": "f", "model": model, "prior_log_likelihoods": None
    }  # fmt: skip
    storage.write_json(stage.file("table.json"), {**known, **info})
    stage.publish({})
    return stage


@pytest.fixture
def run(tmp_path):
    """A run with two passes: the first knows class 0, the second class 2."""
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 6, 3))
    first[:3, 0] += 4
    second[3:, 2] += 4
    scored(tmp_path, "aaaa", "some/captioner", first)
    scored(tmp_path, "bbbb", "open_clip:RN50/openai", second)
    path = tmp_path / "classes.csv"
    path.write_text("class_id,name\n" + "".join(f"{i},thing {i}\n" for i in IDS))
    settings = {"prior_alpha": 0.0, "positive_threshold": 0.4, "per_class_quantile": None}
    config = load_config(extra={"run_dir": str(tmp_path), "filter": settings})
    return Run(config, read_class_csv(str(path)))


def planned(run, passes, **settings):
    return plan_filter(run.changed({"filter": {"passes": passes, **settings}}))


def test_passes_are_found_by_key_model_and_folder(run, tmp_path):
    """Catches a pass that only its hash can name, and an order of naming that is another answer."""
    plans = [
        planned(run, "all"),
        planned(run, ["aaaa", "bbbb"]),
        planned(run, ["open_clip:RN50/openai", "some/captioner"]),
        planned(run, [{"scores": str(tmp_path / "region_scores-bbbb")}, "region_scores-aaaa"]),
    ]
    assert len({plan.folder.key for plan in plans}) == 1
    stage = plans[0].run()
    assert stage.stats["passes"] == 2
    assert stage.stats["images_in_some_passes"] == 0
    assert {tuple(r["positive_ids"]) for r in stage.read().to_pylist()} >= {(7,), (11,)}
    made = storage.read_object(stage.file("table.json"))
    assert [one.folder.key for one in made_from(str(tmp_path), made)] == ["aaaa", "bbbb"]


def test_the_key_names_all_that_decides(run, tmp_path):
    """Catches labels that are reused for other passes, weights or settings."""
    keys = [
        plan_filter(run, StageFolder(str(tmp_path), "region_scores", "aaaa")).folder.key,
        planned(run, "all").folder.key,
        planned(run, "all", combine="mean").folder.key,
        planned(run, ["aaaa", {"scores": "bbbb", "weight": 2}]).folder.key,
        planned(run, ["aaaa", {"scores": "bbbb", "settings": {"temperature": 2}}]).folder.key,
    ]
    scored(tmp_path, "cccc", "other", np.zeros((6, 3)))
    keys.append(planned(run, ["aaaa", "cccc"]).folder.key)
    assert len(set(keys)) == 6


def test_each_pass_is_read_with_its_own_settings(run, tmp_path):
    """Catches settings of one pass that change the other, or that are dropped."""
    own = {"scores": "bbbb", "weight": 0.5, "settings": {"temperature": 3.0, "prior": "sample"}}
    stage = planned(run, ["aaaa", own]).run()
    first, second = made_from(str(tmp_path), storage.read_object(stage.file("table.json")))
    assert (first.config.temperature, second.config.temperature) == (1.0, 3.0)
    assert (first.weight, second.weight) == (1.0, 0.5)
    assert second.config.prior == "sample"
    alone = image_evidence(second.folder.path, second.config)
    flat = image_evidence(second.folder.path, first.config)
    assert alone.probabilities_NC.max() < flat.probabilities_NC.max()


def test_images_of_one_pass_only_are_labeled_and_counted(run, tmp_path):
    """Catches images that are lost with the pass that could not read them."""
    scored(tmp_path, "cccc", "third", np.eye(3)[[0, 1, 2, 0]] * 9, ids="abcz")
    stage = planned(run, ["aaaa", "cccc"]).run()
    assert stage.stats["images"] == 7
    assert stage.stats["images_in_some_passes"] == 4


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        (["aaaa"], "nothing to combine"),
        (["aaaa", "aaaa"], "named twice"),
        (["aaaa", "bbbb", "aaaa"], "named twice"),
        (["aaaa", "nothing"], r"no such teacher pass.*aaaa \(some/captioner\)"),
        (["aaaa", {"scores": "bbbb", "weight": -1}], "weight"),
        ([{"scores": "aaaa", "weight": 0}, {"scores": "bbbb", "weight": 0}], "weight above 0"),
        (
            ["aaaa", {"scores": "bbbb", "settings": {"min_support": 2}}],
            "min_support is set for all",
        ),
        (
            ["aaaa", {"scores": "bbbb", "settings": {"temperature": 0}}],
            "settings of bbbb: temperat",
        ),
        (["aaaa", {"scores": "bbbb", "settings": {"tempra": 1}}], "settings of bbbb: tempra"),
        (["aaaa", {"scores": "bbbb", "wieght": 2}], "wieght: unknown setting"),
        ("some", "no such teacher pass"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(run, passes, text):
    """Catches a traceback, a pass that is dropped without a word, or a setting without effect."""
    with pytest.raises(ConfigError, match=text) as caught:
        planned(run, passes)
    assert re.match(r"filter(\.|: )passes", str(caught.value))


def test_a_model_of_two_passes_is_no_name(run, tmp_path):
    """Catches the wrong one of two passes of one model."""
    scored(tmp_path, "cccc", "some/captioner", np.zeros((6, 3)))
    with pytest.raises(ConfigError, match="fits several"):
        planned(run, ["some/captioner", "bbbb"])


def test_passes_over_other_classes_or_images_are_refused(run, tmp_path):
    """Catches columns of different classes, or images of different manifests, that are averaged."""
    scored(tmp_path, "cccc", "other", np.zeros((6, 3)), class_fingerprint="g")
    with pytest.raises(
        DataError, match=r"region_scores-aaaa and .*cccc were scored with different"
    ):
        planned(run, ["aaaa", "cccc"])
    scored(tmp_path, "dddd", "other", np.zeros((6, 3)), ids="uvwxyz")
    with pytest.raises(DataError, match="share no image"):
        planned(run, ["aaaa", "dddd"])
    moved = scored(tmp_path, "eeee", "other", np.zeros((6, 3)))
    table = moved.read()
    uris = pa.array([f"/elsewhere{uri}" for uri in table["uri"].to_pylist()])
    write_table(
        moved.file("part.parquet"), table.set_column(table.column_names.index("uri"), "uri", uris)
    )
    with pytest.raises(DataError, match="different files of image 'a'"):
        planned(run, ["aaaa", "eeee"])


def test_passes_that_do_not_fit_are_refused(run, tmp_path, monkeypatch):
    """Catches a filter that fills the machine's memory and is killed without a word."""
    for key in ("aaaa", "bbbb"):
        StageFolder(str(tmp_path), "region_scores", key).publish({"rows_out": 10**12})
    with pytest.raises(ConfigError, match=r"filter\.passes.*take \d+ GiB.*enough for \d+ images"):
        planned(run, "all")


def test_what_cannot_be_read_is_refused_by_the_plan(run, tmp_path):
    """Catches a cluster that is started, or scores that are read for hours, for a wrong setting."""
    pass_ = StageFolder(str(tmp_path), "region_scores", "aaaa")
    with pytest.raises(ConfigError, match=r"filter\.prior_alpha = 0\.5: the teacher stored no"):
        plan_filter(run.changed({"filter": {"prior_alpha": 0.5}}), pass_)
    plan_filter(run.changed({"filter": {"prior_alpha": 0.5, "prior": "sample"}}), pass_)
    info = storage.read_json(pass_.file("table.json"))
    storage.write_json(pass_.file("table.json"), {**info, "score_kind": "of tomorrow"})
    with pytest.raises(DataError, match=r"'of tomorrow'.*label again"):
        plan_filter(run, pass_)


def test_the_runs_own_prior_is_read_once(run, tmp_path, monkeypatch):
    """Catches a report that reads all scores of a million images to show two hundred."""
    sampled = run.changed({"filter": {"prior": "sample", "prior_alpha": 0.5}})
    stage = plan_filter(sampled, StageFolder(str(tmp_path), "region_scores", "aaaa")).run()
    (one,) = made_from(str(tmp_path), storage.read_object(stage.file("table.json")))
    expected = filter_info(one.folder.path, one.config, "train")
    monkeypatch.setattr(passes, "filter_info", None)
    assert one.reading("train") == expected
    assert expected["sample_prior"] is not None
