"""The student on the teacher's regions: the same crops, the same order, every image once."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from hts_ray.config import ImagesConfig, PoolConfig, parse_config
from hts_ray.engine.decoding import decode_batch
from hts_ray.engine.run import Run
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
from hts_ray.student.region_scoring import StudentRegionScorer, plan_score

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


def plan(tmp_path, student_path, teacher_pass, color_table, **train):
    settings = {
        "run_dir": str(tmp_path),
        "train": train,
        "score": {"batch_images": 5, "batch_regions": 2},
    }
    folder, _, key = teacher_pass.rpartition("/region_scores-")
    region_scores = StageFolder(folder, "region_scores", key)
    return plan_score(Run(parse_config(settings), color_table), student_path, region_scores)


def test_regions_are_scored_as_the_teacher_saw_them(
    ray_session, student_path, teacher_pass, tmp_path, color_table
):
    """Catches crops that are shifted or reordered, a lost image, and scores of another split."""
    stage = plan(tmp_path, student_path, teacher_pass, color_table).run()
    stats = stage.stats
    assert (stats["rows_in"], stats["rows_out"], stats["quarantined"]) == (23, 22, 1)
    table = read_table(stage.path)
    assert table.schema.equals(STUDENT_SCORES_SCHEMA)
    class_ids = storage.read_json(stage.file("table.json"))["class_ids"]
    assert class_ids == color_table.ids.tolist()
    scores = {row["image_id"]: row["scores"] for row in table.to_pylist()}
    rows = [r for r in read_table(teacher_pass).to_pylist() if r["split"] == "train"]
    assert scores.keys() == {row["image_id"] for row in rows} - {"i005"}
    assert scores["i007"] is None
    for row in rows:
        if row["image_id"] not in {"i005", "i007"}:
            expected = crops_logits(student_path, row["uri"], row["boxes"])
            found = np.reshape(scores[row["image_id"]], expected.shape)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    bad = read_table(stage.file("quarantine", "part-0.parquet")).to_pylist()
    assert [(row["image_id"], row["stage"]) for row in bad] == [("i007", "student_scores")]
    with pytest.raises(DataError, match=r"no scored image of split 'val': it has test, train"):
        plan(tmp_path, student_path, teacher_pass, color_table, split="val").run()


def test_boxes_count_in_pixels_of_the_original(student_path, tmp_path):
    """Catches crops cut from a downscaled image with the original's coordinates."""
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[:, 300:] = 255
    path = tmp_path / "large.png"
    Image.fromarray(pixels).save(path)
    rows = {"image_id": ["a"], "uri": [str(path)], "split": ["train"]}
    boxes = pa.array([[[320.0, 0.0, 600.0, 400.0]]], pa.list_(pa.list_(pa.float32(), 4)))
    table = pa.table(rows).append_column("boxes", boxes)
    scorer = StudentRegionScorer(student_path, PoolConfig(), batch_regions=8)
    found = scorer(decode_batch(table, ImagesConfig(max_side=150))).to_pylist()[0]
    student = scorer.student
    with torch.no_grad():
        white = student(student.preprocess([np.full((8, 8, 3), 255, np.uint8)])).numpy()
    np.testing.assert_allclose(found["scores"], white[0], rtol=1e-3, atol=1e-3)
