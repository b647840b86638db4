"""Cached features: the tower's own numbers, every image once, found again only where they fit."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from crashes import crash_before_the_last_block, keep_blocks
from PIL import Image

from hts_ray.config import FeaturesConfig, ImagesConfig, PoolConfig
from hts_ray.engine.decoding import decode_batch
from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.tables import features_schema, read_table, write_table
from hts_ray.student import features, load_student
from hts_ray.student.checkpoints import save_student
from hts_ray.student.features import (
    FeatureEncoder,
    encoder_fingerprint,
    plan_features,
    read_feature_table,
)
from hts_ray.student.model import build_student

DIMENSION = 24  # of the tiny CLIP's embeddings
ON_RAY = FeaturesConfig(local_images=0, batch_images=16)


@pytest.fixture(scope="module")
def student_path(tmp_path_factory, student_config, color_table):
    path = str(tmp_path_factory.mktemp("student") / "student-1")
    save_student(build_student(student_config, color_table), path)
    return path


@pytest.fixture(scope="module")
def images(color_world):
    """40 images of which one is missing, the others of another split, in no order."""
    uris = color_world["uri"].to_pylist()
    uris[2] = "/nowhere.png"
    splits = ["train"] * 40 + ["test"] * 8
    table = pa.table({"image_id": color_world["image_id"], "uri": uris, "split": splits})
    return table.take(pa.array(np.random.default_rng(1).permutation(48)))


@pytest.fixture
def plan(tmp_path, student_path):
    def make(config, images, flipped=False):
        return plan_features(config, str(tmp_path), student_path, images, flipped=flipped)

    return make


@pytest.fixture(scope="module")
def expected(student_path, images):
    """The features of the readable images and of their mirror images, by the module itself."""
    student = load_student(student_path)
    rows = sorted(images.to_pylist(), key=lambda row: row["image_id"])
    pixels = [np.asarray(Image.open(row["uri"]).convert("RGB")) for row in rows[:2] + rows[3:]]
    inputs = student.preprocess(pixels)
    with torch.no_grad():
        return student.visual(inputs).numpy(), student.visual(inputs.flip(-1)).numpy()


def test_features_are_the_towers(ray_session, plan, images, expected, color_world):
    """Catches swapped rows, normalised features, a mirrored height, and a lost bad image."""
    told = []
    planned = plan(ON_RAY, images, flipped=True)
    stage = planned.run(lambda *counts: told.append(counts))
    stats = stage.stats
    assert (stats["rows_in"], stats["rows_out"], stats["quarantined"]) == (48, 47, 1)
    assert told[-1] == (48, 48, 1)
    assert read_table(stage.path).schema.equals(features_schema(DIMENSION, flipped=True))
    found = read_feature_table(stage.path)
    good = [i for i in color_world["image_id"].to_pylist() if i != "i002"]
    assert found.image_ids == good
    assert read_table(stage.path).sort_by("image_id")["split"].to_pylist() == (
        ["train"] * 40 + ["test"] * 8
    )
    np.testing.assert_allclose(found.features_ND, expected[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.flipped_ND, expected[1], rtol=1e-3, atol=1e-4)
    bad = read_table(stage.file("quarantine", "part-0.parquet")).to_pylist()
    assert [(row["image_id"], row["error_kind"]) for row in bad] == [("i002", "missing")]


def test_few_images_are_encoded_here(plan, images, expected):
    """Catches features that depend on where they were computed; needs no cluster."""
    threads = torch.get_num_threads()
    stage = plan(FeaturesConfig(batch_images=7), images).run()
    assert torch.get_num_threads() == threads
    found = read_feature_table(stage.path)
    ids, features = found.image_ids, found.features_ND
    assert (len(ids), ids) == (47, sorted(ids))
    np.testing.assert_allclose(features, expected[0], rtol=1e-3, atol=1e-4)
    assert found.flipped_ND is None
    taken = found.take(["i040", "i001"])
    assert taken.image_ids == ["i040", "i001"]
    assert np.array_equal(taken.features_ND, features[[ids.index("i040"), ids.index("i001")]])


def test_a_rerun_after_a_crash_encodes_the_rest_only(ray_session, plan, images, monkeypatch):
    """Catches rows written twice or never, and finished blocks that are computed again."""
    keep_blocks(monkeypatch)
    config = ON_RAY.model_copy(update={"pool": PoolConfig(num_gpus=1.0)})
    planned = plan(config, images)
    stage = planned.run()
    kept = crash_before_the_last_block(stage)
    assert planned.run().stats["rows_in"] == 48
    assert all(storage.read_bytes(stage.file(name)) == data for name, data in kept.items())
    assert len(read_feature_table(stage.path).image_ids) == 47


def test_features_are_found_again_where_they_fit_and_nowhere_else(
    tmp_path, student_path, images, student_config, color_table, resnet_path, monkeypatch
):
    """Catches features of another tower, file, decoding or side served as these images' own."""
    few = images.slice(5, 9)
    moved = few.set_column(1, "uri", pa.array([f"/elsewhere/{i}" for i in range(9)]))
    other = str(tmp_path / "student-other")
    config = student_config.model_copy(update={"model": f"local-dir:{resnet_path}"})
    save_student(build_student(config, color_table), other)

    def folder(path, table, flipped=False, run="run"):
        config = FeaturesConfig()
        return plan_features(config, str(tmp_path / run), path, table, flipped=flipped).folder

    stage = plan_features(FeaturesConfig(), str(tmp_path / "run"), student_path, images).run()
    assert folder(student_path, few) == folder(student_path, images) == stage
    assert not folder(student_path, few, flipped=True).finished
    assert not folder(student_path, moved).finished
    assert not folder(other, few).finished
    keys = {
        folder(path, table, flipped, run="empty").key
        for path, table, flipped in [
            (student_path, images, False),
            (student_path, images, True),
            (student_path, few, False),
            (student_path, moved, False),
            (other, images, False),
        ]
    }
    assert len(keys) == 5
    shuffled = images.take(pa.array(range(47, -1, -1)))
    assert folder(student_path, shuffled, run="empty").key == stage.key
    with monkeypatch.context() as patch:
        patch.setattr(features, "_DECODING", ImagesConfig(max_side=16))
        assert folder(student_path, few) != stage
        assert folder(student_path, images).key not in keys
    assert folder(student_path, few) == stage


def test_other_classes_share_their_tower(tmp_path, student_path, student_config, color_table):
    """Catches features that are computed anew for every class list, or kept for other weights."""
    fewer = str(tmp_path / "student-fewer")
    student = build_student(student_config, color_table.subset(color_table.ids[:2]))
    save_student(student, fewer)
    assert encoder_fingerprint(fewer) == encoder_fingerprint(student_path)
    with torch.no_grad():
        student.visual.conv1.weight[0, 0, 0, 0] += 1
    save_student(student, fewer)
    assert encoder_fingerprint(fewer) != encoder_fingerprint(student_path)


def test_numbers_that_are_not_finite_are_quarantined(student_path, images):
    """Catches a NaN among the features, which would end a fit much later."""
    encoder = FeatureEncoder(student_path, PoolConfig(), flipped=True)
    with torch.no_grad():
        encoder.student.visual.ln_post.weight[0] = torch.nan
    table = encoder(decode_batch(images.slice(0, 3), ImagesConfig(), square=32))
    assert table["features"].to_pylist() == table["flipped"].to_pylist() == [None] * 3
    assert set(table["error_kind"].to_pylist()) <= {"not_finite", "missing"}


def test_nothing_usable_is_told(plan, student_path, images, tmp_path):
    """Catches an empty result that looks finished, and one image under two names."""
    nowhere = images.slice(0, 2).set_column(1, "uri", pa.array(["/no/a", "/no/b"]))
    with pytest.raises(DataError, match=r"none of 2 images can be used.*missing.*/no/"):
        plan(FeaturesConfig(), nowhere).run()
    assert not plan(FeaturesConfig(), nowhere).folder.finished
    for table, message in [
        (images.slice(0, 0), "no image to encode"),
        (pa.concat_tables([images.slice(0, 1)] * 2), "image_id must be unique"),
    ]:
        with pytest.raises(DataError, match=message):
            plan(FeaturesConfig(), table)
    path = str(tmp_path / "rows.parquet")
    encoder = FeatureEncoder(student_path, PoolConfig())
    write_table(path, encoder(decode_batch(nowhere, ImagesConfig(), square=32)))
    with pytest.raises(DataError, match="no image with features"):
        read_feature_table(path)
    write_table(path, images)
    with pytest.raises(DataError, match="not a features table"):
        read_feature_table(path)
