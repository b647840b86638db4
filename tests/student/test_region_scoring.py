"""The student on the teacher's regions: the same crops, the same order, every image once."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from hts_ray.config import ImagesConfig, PoolConfig, SelfTrainingConfig
from hts_ray.engine.image_pass import decode_batch
from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import (
    REGION_SCORES_SCHEMA,
    STUDENT_SCORES_SCHEMA,
    read_table,
    write_table,
)
from hts_ray.student import load_student
from hts_ray.student.checkpoints import save_student
from hts_ray.student.model import build_student
from hts_ray.student.region_scoring import StudentRegionScorer, StudentScores, score_regions

BOXES = [[0.0, 0.0, 48.0, 40.0], [4.0, 8.0, 22.0, 32.0], [24.0, 0.0, 48.0, 20.0]]


@pytest.fixture(scope="module")
def student_path(tmp_path_factory, student_config, color_table):
    path = str(tmp_path_factory.mktemp("student") / "student-1")
    save_student(build_student(student_config, color_table), path)
    return path


@pytest.fixture(scope="module")
def teacher_pass(tmp_path_factory, color_world):
    """A region_scores folder of 30 images with 1 to 3 regions, 24 of them for training."""
    rows = []
    for i, row in enumerate(color_world.slice(0, 30).to_pylist()):
        uri = "/nowhere.png" if i == 7 else row["uri"]
        status = "quarantined" if i == 5 else "ok"
        boxes = BOXES[: 1 + i % 3]
        split = "train" if i < 24 else "test"
        rows.append(
            {"image_id": row["image_id"], "uri": uri, "split": split, "status": status}
            | {"boxes": boxes, "region_kinds": ["grid"] * len(boxes)}
        )
    path = str(tmp_path_factory.mktemp("run") / "region_scores-k")
    write_table(f"{path}/part-0.parquet", pa.Table.from_pylist(rows, REGION_SCORES_SCHEMA))
    return path


def crops_logits(student_path, uri, boxes):
    """Return the student's logits of crops that Pillow cut."""
    student = load_student(student_path)
    image = Image.open(uri).convert("RGB")
    crops = [np.asarray(image.crop([int(side) for side in box])) for box in boxes]
    with torch.no_grad():
        return student(student.preprocess(crops)).numpy()


def test_regions_are_scored_as_the_teacher_saw_them(
    ray_session, student_path, teacher_pass, tmp_path, color_table
):
    """Catches crops that are shifted or reordered, a lost image, and scores of another split."""
    stage = StageFolder(str(tmp_path), "student_scores", "k")
    arguments = {"images": ImagesConfig(), "student_path": student_path, "stage": stage}
    stats = score_regions(
        SelfTrainingConfig(batch_images=5, batch_regions=2),
        region_scores_path=teacher_pass,
        split="train",
        **arguments,
    )
    assert (stats["rows_in"], stats["rows_out"], stats["quarantined"]) == (23, 22, 1)
    assert read_table(stage.path).schema.equals(STUDENT_SCORES_SCHEMA)
    scores = StudentScores(stage.path)
    assert scores.class_ids == color_table.ids.tolist()
    rows = [r for r in read_table(teacher_pass).to_pylist() if r["split"] == "train"]
    for row in rows:
        found = scores.get(row["image_id"])
        if row["image_id"] in {"i005", "i007"}:
            assert found is None
            continue
        expected = crops_logits(student_path, row["uri"], row["boxes"])
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert scores.get("i029") is None
    bad = read_table(stage.file("quarantine", "part-0.parquet")).to_pylist()
    assert [(row["image_id"], row["stage"]) for row in bad] == [("i007", "student_scores")]
    again = score_regions(
        SelfTrainingConfig(), region_scores_path="/nowhere", split="train", **arguments
    )
    assert again == stats
    lost = StageFolder(str(tmp_path), "student_scores", "lost")
    with pytest.raises(DataError, match=r"no scored image of split 'val': it has test, train"):
        score_regions(
            SelfTrainingConfig(),
            region_scores_path=teacher_pass,
            split="val",
            **{**arguments, "stage": lost},
        )


def test_boxes_count_in_pixels_of_the_original(student_path, tmp_path):
    """Catches crops cut from a downscaled image with the original's coordinates."""
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[:, 300:] = 255
    path = tmp_path / "large.png"
    Image.fromarray(pixels).save(path)
    rows = {"image_id": ["a"], "uri": [str(path)], "split": ["train"]}
    boxes = pa.array([[[320.0, 0.0, 600.0, 400.0]]], pa.list_(pa.list_(pa.float32(), 4)))
    table = pa.table(rows).append_column("boxes", boxes)
    scorer = StudentRegionScorer(student_path, "", PoolConfig(), batch_regions=8)
    found = scorer(decode_batch(table, ImagesConfig(max_side=150))).to_pylist()[0]
    student = scorer.student
    with torch.no_grad():
        white = student(student.preprocess([np.full((8, 8, 3), 255, np.uint8)])).numpy()
    np.testing.assert_allclose(found["scores"], white[0], rtol=1e-3, atol=1e-3)


def test_scores_are_read_from_many_files(tmp_path):
    """Catches an index that confuses files, or that forgets what it closed."""
    path = str(tmp_path / "student_scores-k")
    expected = {}
    for number in range(7):
        rows = []
        for i in range(3):
            image_id = f"{number}-{i}"
            expected[image_id] = np.full((1 + i, 2), 10 * number + i, np.float32)
            rows.append(
                {"image_id": image_id, "status": "ok", "scores": expected[image_id].ravel()}
            )
        table = pa.Table.from_pylist(rows, schema=STUDENT_SCORES_SCHEMA)
        write_table(f"{path}/{number}.parquet", table)
    storage.write_json(f"{path}/table.json", {"class_ids": [3, 5]})
    scores = StudentScores(path)
    for image_id in [*expected, *reversed(expected)]:
        assert np.array_equal(scores.get(image_id), expected[image_id])
    assert scores.get("none") is None
