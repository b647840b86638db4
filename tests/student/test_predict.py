"""Scoring a manifest: the same logits as in memory, every image once, resumption."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from crashes import crash_before_the_last_block, keep_blocks

from hts_ray.config import ImagesConfig, PoolConfig, PredictConfig
from hts_ray.engine.decoding import decode_batch
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.manifest import open_manifest
from hts_ray.store import storage
from hts_ray.store.tables import predictions_schema, read_table, write_table
from hts_ray.student import load_student
from hts_ray.student.checkpoints import save_student, student_fingerprint
from hts_ray.student.model import build_student
from hts_ray.student.predict import (
    StudentScorer,
    centered,
    estimate,
    plan_predict,
    score_images,
)


@pytest.fixture(scope="module")
def student_path(tmp_path_factory, student_config, color_table):
    path = str(tmp_path_factory.mktemp("student") / "student-1")
    save_student(build_student(student_config, color_table), path)
    return path


@pytest.fixture
def manifest(tmp_path, color_world):
    """40 test images of which one is missing, and 8 of another split."""
    uris = color_world["uri"].to_pylist()
    uris[2] = "/nowhere.png"
    splits = ["test"] * 40 + ["train"] * 8
    path = str(tmp_path / "manifest.parquet")
    write_table(path, pa.table({"image_id": color_world["image_id"], "uri": uris, "split": splits}))
    return path


@pytest.fixture
def plan(run_of, student_path, tmp_path):
    def make(manifest, **config):
        run = run_of(tmp_path, predict=PredictConfig(**config))
        return plan_predict(run, student_path, open_manifest(manifest))

    return make


def expected_logits(student_path, uris):
    from PIL import Image

    student = load_student(student_path)
    with torch.no_grad():
        pixels = [np.asarray(Image.open(uri).convert("RGB")) for uri in uris]
        return student(student.preprocess(pixels)).numpy()


def test_predictions_are_the_students_logits(
    ray_session, student_path, manifest, plan, color_world, color_table
):
    """Catches rows that swap images, a second preprocessing, a lost row, and other splits."""
    told = []
    stage = plan(manifest, batch_images=64).run(lambda *counts: told.append(counts))
    stats = stage.stats
    assert (stats["rows_in"], stats["rows_out"], stats["quarantined"]) == (40, 39, 1)
    assert told[-1] == (40, 40, 1)
    table = read_table(stage.path).sort_by("image_id")
    assert table.schema.equals(predictions_schema(3))
    assert table["image_id"].to_pylist() == color_world["image_id"].to_pylist()[:40]
    assert table["scores"].to_pylist()[2] is None
    good = [i for i in range(40) if i != 2]
    uris = [color_world["uri"].to_pylist()[i] for i in good]
    scores = np.array(table["scores"].take(pa.array(good)).to_pylist())
    assert np.allclose(scores, expected_logits(student_path, uris), atol=1e-3)
    bad = read_table(stage.file("quarantine", "part-0.parquet")).to_pylist()
    assert [(row["image_id"], row["error_kind"]) for row in bad] == [("i002", "missing")]
    info = storage.read_json(stage.file("table.json"))
    assert info["class_ids"] == color_table.ids.tolist()
    assert info["student_fingerprint"] == student_fingerprint(student_path)


def test_a_rerun_after_a_crash_scores_the_rest_only(ray_session, manifest, plan, monkeypatch):
    """Catches rows written twice or never, and finished blocks that are computed again."""
    keep_blocks(monkeypatch)
    planned = plan(manifest, batch_images=16, pool=PoolConfig(num_gpus=1.0))
    stage = planned.run()
    kept = crash_before_the_last_block(stage)
    assert planned.run().stats["rows_in"] == 40
    assert all(storage.read_bytes(stage.file(name)) == data for name, data in kept.items())
    assert sorted(read_table(stage.path)["image_id"].to_pylist()) == [
        f"i{i:03d}" for i in range(40)
    ]


def test_a_manifest_without_usable_images_is_refused(ray_session, plan, tmp_path):
    """Catches an empty result that looks finished, and a rerun that can never succeed."""
    path = str(tmp_path / "nowhere.parquet")
    columns = {"image_id": ["a", "b"], "uri": ["/no/a", "/no/b"], "split": ["test", "test"]}
    write_table(path, pa.table(columns))
    planned = plan(path)
    with pytest.raises(DataError, match=r"none of 2 images can be used.*missing.*/no/"):
        planned.run()
    assert not planned.folder.finished
    assert storage.list_names(planned.folder.path) == ["quarantine"]
    with pytest.raises(DataError, match="no image in split val: it has test"):
        plan(path, split="val").run()


def test_scorer_takes_batches_without_a_good_row(student_path):
    """Catches an empty stack that fails only in the rare batch whose images are all bad."""
    columns = {
        "image_id": ["a", "b"],
        "uri": ["x", "y"],
        "split": ["test", "test"],
        "pixels": pa.array([None, None], pa.large_binary()),
        "error_kind": ["missing", "empty"],
        "error": ["m", "e"],
    }
    table = StudentScorer(student_path, PoolConfig())(pa.table(columns))
    assert table["scores"].to_pylist() == [None, None]
    assert table["status"].to_pylist() == ["quarantined"] * 2


def test_infinite_logits_are_quarantined(student_path, color_world):
    """Catches NaN in a scores table, which no metric can rank."""
    uris = [*color_world["uri"].to_pylist()[:2], "/nowhere.png"]
    table = pa.table({"image_id": ["a", "b", "c"], "uri": uris, "split": ["test"] * 3})
    scorer = StudentScorer(student_path, PoolConfig())
    decoded = decode_batch(table, ImagesConfig(), square=32)
    compute, broken = scorer.student.compute, []

    def spoilt(images):
        logits = compute(images)
        logits[1, 2] = np.nan
        broken.append(logits)
        return logits

    scorer.student.compute = spoilt
    rows = scorer(decoded).to_pylist()
    assert [row["scores"] for row in rows] == [broken[0][0].tolist(), None, None]
    assert [row["error_kind"] for row in rows] == [None, "not_finite", "missing"]
    assert [row["status"] for row in rows] == ["ok", "quarantined", "quarantined"]


def test_scoring_in_process_equals_the_dataset(student_path, color_world, tmp_path):
    """Catches the demo's comparison rows scored otherwise than by `hts predict`."""
    images = color_world.select(["image_id", "uri"]).append_column(
        "split", pa.array(["test"] * len(color_world))
    )
    missing = pa.table({"image_id": ["no"], "uri": [str(tmp_path / "no.png")], "split": ["test"]})
    images = pa.concat_tables([images.cast(missing.schema), missing])
    ids, logits = score_images(str(student_path), images, PredictConfig(batch_images=5))
    assert ids == color_world["image_id"].to_pylist()
    expected = expected_logits(student_path, color_world["uri"].to_pylist())
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="none of 1 images"):
        score_images(str(student_path), missing, PredictConfig())


def test_estimate_measures_without_writing(student_path, manifest, tmp_path):
    """Catches a dry run that leaves files, counts another split, or fails on a bad image."""
    before = sorted(tmp_path.rglob("*"))
    figures = estimate(PredictConfig(), str(student_path), open_manifest(manifest), sample=40)
    assert (figures["images"], figures["sample"]) == (40, 39)
    assert figures["seconds"] == pytest.approx(40 * figures["seconds_per_image"])
    assert figures["gpu_hours"] == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_centred_scores_are_log_probabilities_less_the_means(student_path, color_world, tmp_path):
    """Catches means that a stored student loses, are not subtracted, or are added; no refusal."""
    student, folder = load_student(student_path), str(tmp_path / "student")
    save_student(student, folder)
    images = color_world.slice(0, 6).append_column("split", pa.array(["test"] * 6))
    with pytest.raises(ConfigError, match=r"predict\.center.*train\.center_images=500"):
        score_images(folder, images, PredictConfig(center=True))
    ids, logits_NC = score_images(folder, images, PredictConfig())
    student.class_means = [1.0, -2.0, 0.5]
    save_student(student, folder)
    again, found_NC = score_images(folder, images, PredictConfig(center=True))
    assert again == ids
    assert load_student(folder).class_means == student.class_means
    shifted_NC = logits_NC - np.array(student.class_means)
    expected = shifted_NC - np.log(np.exp(shifted_NC).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found_NC, expected, atol=1e-4)
    large = centered(np.float32([[1e4, 0.0]]), np.float32([0.0, 0.0]))
    assert large.tolist() == [[0.0, -1e4]]
