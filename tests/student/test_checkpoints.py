"""The student's folder: round trip, where it is looked for, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from hts_ray.config import StudentConfig
from hts_ray.errors import DataError
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.student import load_student
from hts_ray.student.checkpoints import save_student, student_fingerprint
from hts_ray.student.model import build_student


@pytest.fixture(scope="module")
def student(student_config, color_table):
    student = build_student(student_config, color_table)
    with torch.no_grad():
        student.classifier.add_(0.1)
    return student.eval()


@pytest.fixture
def folder(student, tmp_path):
    save_student(student, str(tmp_path / "student-1"), {"seed": 3})
    return tmp_path / "student-1"


def test_round_trip_needs_no_other_file(color_table, tmp_path, resnet_path, vit_path, monkeypatch):
    """Catches a folder that needs the original model, a lost image size or feature space."""
    import open_clip

    for path, update in (
        (vit_path, {"image_size": 48, "feature_space": "backbone"}),
        (resnet_path, {"image_size": 96}),
    ):
        config = StudentConfig(model=f"local-dir:{path}", **update)
        student = build_student(config, color_table).eval()
        save_student(student, str(tmp_path / path.name))
        with monkeypatch.context() as patch:
            patch.setattr(open_clip, "create_model", None)
            patch.setattr(open_clip, "get_model_config", None)
            loaded = load_student(str(tmp_path / path.name))
        images = torch.randn(2, 3, student.image_size, student.image_size)
        assert torch.equal(loaded(images), student(images))
        assert loaded.class_table == color_table
        assert not loaded.training
        assert torch.equal(loaded.image_mean, student.image_mean)


def test_found_by_run_directory_stage_folder_and_folder(student, folder):
    """Catches a run directory whose unfinished student is taken, or whose finished one is not."""
    run = folder.parent
    with pytest.raises(DataError, match="no student at"):
        load_student(str(run))
    StageFolder(str(run), "student", "1").publish({})
    for path in (run, folder):
        assert torch.equal(load_student(str(path)).classifier, student.classifier)


def test_same_student_gives_the_same_bytes(student, folder, tmp_path):
    """Catches time stamps or unordered tensors in what the annotation-free proof compares."""
    save_student(student, str(tmp_path / "again"), {"seed": 3})
    for name in ("student.json", "model.safetensors", "classes.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert student_fingerprint(str(folder)) == student_fingerprint(str(tmp_path / "again"))


def test_students_of_earlier_versions_load(student, folder):
    """Catches a description that is refused because it has no hash of itself."""
    description = json.loads((folder / "student.json").read_text())
    del description["sha256"]["student.json"]
    (folder / "student.json").write_text(json.dumps(description))
    assert torch.equal(load_student(str(folder)).classifier, student.classifier)


def test_interrupted_save_leaves_no_student(student, folder, monkeypatch):
    """Catches an old description beside new weights after a crash between the two."""
    write = storage.write_bytes

    def fail_at_classes(path, data):
        if path.endswith("classes.csv"):
            raise OSError("disk full")
        write(path, data)

    monkeypatch.setattr(storage, "write_bytes", fail_at_classes)
    with pytest.raises(OSError, match="disk full"):
        save_student(student, str(folder))
    with pytest.raises(DataError, match="no student at"):
        load_student(str(folder))


def test_damaged_and_foreign_files_are_named(folder, tmp_path):
    """Catches a traceback, or a student that loads with wrong weights or classes."""
    weights, description, classes = (
        folder / name for name in ("model.safetensors", "student.json", "classes.csv")
    )
    good = {path: path.read_bytes() for path in (weights, description, classes)}

    def refused(match):
        with pytest.raises(DataError, match=match):
            load_student(str(folder))
        for path, data in good.items():
            path.write_bytes(data)

    weights.write_bytes(good[weights][:-8])
    refused("model.safetensors is damaged")
    weights.unlink()
    refused("model.safetensors cannot be read")
    classes.write_bytes(good[classes].replace(b"red object", b"red thing"))
    refused("classes.csv is damaged")
    description.write_bytes(b"{")
    refused("student.json cannot be read")
    description.write_text(json.dumps({"model": "x"}))
    refused("does not describe a student")
    parsed = json.loads(good[description])
    description.write_text(json.dumps({**parsed, "format_version": 99}))
    refused("format version 99")
    for change in ({"image_size": 64}, {"image_mean": [0.0, 0.0, 0.0]}):
        description.write_text(json.dumps({**parsed, **change}))
        refused("student.json was changed or damaged")
    hashes = {name: value for name, value in parsed["sha256"].items() if name != "student.json"}
    description.write_text(json.dumps({**parsed, "image_size": 64, "sha256": hashes}))
    refused("does not fit its description")
    description.write_text(json.dumps({**parsed, "sha256": "none"}))
    refused("student.json was changed or damaged")
    (tmp_path / "official.pt").write_bytes(b"x")
    with pytest.raises(DataError, match="import-checkpoint"):
        load_student(str(tmp_path / "official.pt"))
    with pytest.raises(DataError, match="nothing is there"):
        load_student(str(tmp_path / "missing"))
