"""Tests of answers that pass from one teacher pass to the next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from hts_ray.classes import hico_classes
from hts_ray.config import LabelConfig, PrepareConfig
from hts_ray.engine.image_pass import committed_files, committed_rows
from hts_ray.images.manifest import Manifest, open_manifest
from hts_ray.images.stage import prepare_manifest
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import REGION_SCORES_SCHEMA, read_files, read_table
from hts_ray.teacher.assignment import Assignment
from hts_ray.teacher.reuse import TAKEN, _commit, take_over
from hts_ray.teacher.stage import label_images

DUMMY = {"teacher": {"model": "builtin:dummy"}}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        draw(folder / f"{number}.bmp", number)
    return folder


def draw(path: Path, shade: int) -> None:
    Image.new("RGB", (40, 30), (20 * shade, 90, 60)).save(path)


def listed(photos: Path) -> Manifest:
    run_dir = str(photos.parent / "run")
    return open_manifest(prepare_manifest(PrepareConfig(), run_dir, "folder", str(photos)).path)


def asked(photos: Path, manifest: Manifest, key: str, **label: Any) -> StageFolder:
    """Begin a pass as `label_images` does, up to the first image."""
    stage = StageFolder(str(photos.parent / "run"), "region_scores", key)
    classes = hico_classes().subset(range(label.pop("classes", 3)))
    config = LabelConfig.model_validate(DUMMY | label)
    rows = manifest.rows(config.splits, config.limit)
    assignment = Assignment.plan(config, classes, rows, fingerprint="dummy@1", stage=stage)
    take_over(stage, assignment, manifest, rows["image_id"].combine_chunks())
    return stage


def answer(stage: StageFolder, manifest: Manifest, bad: str = "") -> None:
    """Answer all images of a pass, without a teacher."""
    rows = [
        {**image, "scores": [1.5], "status": "quarantined" if image["image_id"] == bad else "ok"}
        for image in manifest.rows().to_pylist()
    ]
    _commit(stage, pa.Table.from_pylist(rows, REGION_SCORES_SCHEMA))
    storage.write_json(stage.file("table.json"), {"class_ids": [0, 1, 2]})


def taken(stage: StageFolder) -> list[str]:
    files = [file for file in committed_files(stage) if f"/{TAKEN}" in file]
    return sorted(read_files(files, ["image_id"])["image_id"].to_pylist())


def test_unchanged_images_keep_their_answers(photos: Path) -> None:
    """Catches ten new images that cost a pass over all, and answers of a file that was replaced."""
    before = listed(photos)
    answer(asked(photos, before, "a"), before, bad="1.bmp")
    changed = photos / "2.bmp"
    size = changed.stat().st_size
    draw(changed, 9)
    os.utime(changed, ns=(1, 1))
    assert changed.stat().st_size == size
    draw(photos / "new.bmp", 5)
    after = listed(photos)
    assert after.fingerprint != before.fingerprint
    stage = asked(photos, after, "b")
    assert taken(stage) == ["0.bmp", "3.bmp"]  # not the bad one: it is tried again
    assert storage.read_json(stage.file("table.json")) == {"class_ids": [0, 1, 2]}
    asked(photos, after, "b")
    assert committed_rows(stage) == 2  # once


def test_a_sample_is_part_of_the_whole(photos: Path) -> None:
    """Catches a sample that is labeled twice."""
    manifest = listed(photos)
    sample = asked(photos, manifest, "sample", limit=2)
    answer(sample, manifest)
    assert len(taken(asked(photos, manifest, "whole"))) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": {"model": "builtin:dummy", "append_eos": True}},
        {"regions": {"grid_scales": [0.5], "grid_steps": [2]}},
        {"regions": {"budget": 8}},
        {"teacher": {"model": "builtin:dummy", "prior": "sample"}},
        {"teacher": {"model": "builtin:dummy", "dtype": "bfloat16"}},
        {"classes": 4},
    ],
)
def test_another_question_gets_no_old_answer(photos: Path, change: dict[str, Any]) -> None:
    """Catches scores of another teacher, of other regions or of other classes."""
    manifest = listed(photos)
    answer(asked(photos, manifest, "a"), manifest)
    assert taken(asked(photos, manifest, "b", **change)) == []


def test_without_a_stamp_nothing_is_taken_over(photos: Path) -> None:
    """Catches answers given to files of which nobody knows whether they changed."""
    manifest = listed(photos)
    bare = Manifest(manifest.path, manifest.images)
    answer(asked(photos, manifest, "a"), manifest)
    assert taken(asked(photos, bare, "b")) == []


def test_only_new_images_reach_the_teacher(ray_session: None, photos: Path) -> None:
    """Catches rows that Ray Data does after they were taken over, or does not do at all."""

    def label(key: str) -> dict[str, Any]:
        return label_images(
            LabelConfig.model_validate(DUMMY | {"batch_images": 2}),
            manifest=listed(photos),
            class_table=hico_classes().subset(range(3)),
            stage=StageFolder(str(photos.parent / "run"), "region_scores", key),
        )

    first = label("a")
    draw(photos / "new.bmp", 5)
    second = label("b")
    assert (first["rows_taken_over"], second["rows_taken_over"]) == (0, 4)
    assert (second["rows_resumed"], second["rows_out"]) == (4, 5)
    old, new = (
        {
            row["image_id"]: row
            for row in read_table(f"{photos.parent}/run/region_scores-{key}").to_pylist()
        }
        for key in "ab"
    )
    assert {name: new[name] for name in old} == old
    (photos / "new.bmp").unlink()
    assert label("c")["rows_taken_over"] == 4
