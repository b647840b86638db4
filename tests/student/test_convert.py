"""Exports: read by the tools that they are for, they compute what the student does."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from hts_ray.classes import hico_classes
from hts_ray.config import StudentConfig
from hts_ray.engine.compat import build_image_tower
from hts_ray.errors import ConfigError, DataError
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.student import convert as export
from hts_ray.student import load_student
from hts_ray.student.checkpoints import save_student, student_fingerprint
from hts_ray.student.convert import export_student, model_card
from hts_ray.student.model import Student, build_student
from hts_ray.student.official import import_checkpoint

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
PAPER = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}


def paper_student(table, *, vision=None, quick_gelu=True, mean=None, **config):
    """Return a random student of the paper's kind: a CLIP ViT, cosine in the backbone space."""
    torch.manual_seed(0)
    model_cfg = {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": {**PAPER, **(vision or {})},
    }
    visual = build_image_tower(model_cfg)
    settings = {"model": "own", "feature_space": "backbone", "logit_scale": 100.48, **config}
    if settings["feature_space"] == "backbone":
        visual.proj = None
    features = 64 if settings["feature_space"] == "backbone" else 24
    return Student(
        visual,
        torch.randn(len(table), features),
        config=StudentConfig.model_validate(settings),
        class_table=table,
        model_cfg=model_cfg,
        image_size=32,
        image_mean=mean or CLIP_MEAN,
        image_std=CLIP_STD,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory, color_table, vit_path):
    """Student folders: the demo's ResNet, a ViT at another size in both spaces, the paper's."""
    vit = {"model": f"local-dir:{vit_path}", "image_size": 48}
    students = {
        "demo": build_student(StudentConfig(model="builtin:world_clip"), color_table),
        "projected": build_student(StudentConfig.model_validate(vit), color_table),
        "backbone": build_student(
            StudentConfig.model_validate({**vit, "feature_space": "backbone"}), color_table
        ),
        "timm": build_student(
            StudentConfig(model="builtin:world_clip", feature_space="backbone"), color_table
        ),
        "paper": paper_student(color_table),
    }
    root = tmp_path_factory.mktemp("students")
    for name, student in students.items():
        with torch.no_grad():  # not what the starting model computes
            for value in student.parameters():
                value.add_(0.05 * torch.randn_like(value))
        save_student(student, str(root / name), {"epochs": 3})
    return root


def images_of(student, count):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, student.image_size, student.image_size, generator=generator)


@pytest.mark.parametrize("name", ["demo", "paper"])
def test_onnx_gives_the_same_logits_at_any_batch_size(name, folders, tmp_path):
    """Catches a fixed batch, a layer that ONNX computes otherwise, and lost classes."""
    import onnxruntime

    path = tmp_path / "student.onnx"
    done = export_student(str(folders / name), "onnx", str(path))
    assert 0 < done.difference < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["student.onnx"]  # no weights beside it
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    student = load_student(str(folders / name))
    for count in (1, 5):
        images = images_of(student, count)
        logits = session.run(["logits"], {"images": images.numpy()})[0]
        with torch.no_grad():
            assert np.abs(logits - student(images).numpy()).max() < 1e-4
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["class_names"]) == student.class_table.names
    assert json.loads(told["class_ids"]) == student.class_table.ids.tolist()
    assert json.loads(told["image_mean"]) == student.image_mean.tolist()
    assert told["image_size"] == str(student.image_size)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("demo", ".pt"), ("projected", ".safetensors"), ("backbone", ".safetensors"),
     ("backbone", ".pt"), ("timm", ".pt")],
)  # fmt: skip
def test_open_clip_gives_the_same_image_features(name, suffix, folders, tmp_path):
    """Catches weights that open_clip silently leaves out, and a printed call that fails."""
    import open_clip

    path = tmp_path / f"tower{suffix}"
    done = export_student(str(folders / name), "open_clip", str(path))
    call = done.notes[0].removesuffix("(images)")
    assert str(path) in call
    student = load_student(str(folders / name))
    images = images_of(student, 3)
    with torch.no_grad():
        features = eval(call, {"open_clip": open_clip})(images)
        assert (features - student.visual(images)).abs().max() < 1e-5
    if suffix == ".pt":
        state = torch.load(path, weights_only=True)
        assert all(type(value) is torch.Tensor for value in state.values())


def test_students_that_open_clip_has_no_model_for_are_refused(folders, tmp_path):
    """Catches a file that nobody can load."""
    with pytest.raises(ConfigError, match="open_clip has no model for this student"):
        export_student(str(folders / "paper"), "open_clip", str(tmp_path / "x.pt"))
    assert not list(tmp_path.iterdir())


def test_the_paper_s_format_goes_round(folders, color_table, tmp_path):
    """Catches names that the paper's code does not know, and a scale that is not a logarithm."""
    path = tmp_path / "checkpoint_0002.pt"
    done = export_student(str(folders / "paper"), "hts", str(path))
    assert "--classes" in done.notes[0]
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"epoch", "model_state_dict", "optimizer_state_dict"}
    assert content["epoch"] == 2
    state = content["model_state_dict"]
    assert float(state["logit_scale"]) == pytest.approx(4.61, abs=1e-4)
    assert "visual_encoder.visual.proj" not in state
    assert state["visual_encoder.visual.positional_embedding"].shape == (17, 64)
    assert "visual_encoder.visual.transformer.resblocks.1.attn.in_proj_weight" in state
    import_checkpoint(str(path), str(tmp_path / "again"), str(folders / "paper" / "classes.csv"))
    student, again = load_student(str(folders / "paper")), load_student(str(tmp_path / "again"))
    images = images_of(student, 3)
    with torch.no_grad():
        assert (student(images) - again(images)).abs().max() < 1e-4
    assert again.class_table == color_table


def test_hico_students_go_round_without_a_class_list(tmp_path):
    """Catches classes that must be given although the format means HICO's."""
    save_student(paper_student(hico_classes()), str(tmp_path / "student"))
    done = export_student(str(tmp_path / "student"), "hts", str(tmp_path / "c.pt"))
    assert done.notes == (f"hts import-checkpoint {tmp_path / 'c.pt'} --output DIR",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quick_gelu": False}, "QuickGELU"),
        ({"vision": {"head_width": 32}}, "vision_cfg.head_width = 32"),
        ({"vision": {"pool_type": "avg"}}, "vision_cfg.pool_type = avg"),
        ({"vision": {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value"),
        ({"feature_space": "projected"}, "feature_space=backbone"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean and deviation"),
        ({"logit_scale": 1.0}, "logit scale 1"),
        ("demo", "not a CLIP ViT"),
    ],
)
def test_what_the_paper_s_format_cannot_hold_is_refused(
    changes, reason, folders, color_table, tmp_path
):
    """Catches checkpoints that the paper's code would read and compute something else with."""
    source = folders / "demo"
    if changes != "demo":
        source = tmp_path / "student"
        save_student(paper_student(color_table, **changes), str(source))
    with pytest.raises(ConfigError, match=reason):
        export_student(str(source), "hts", str(tmp_path / "c.pt"))
    assert not (tmp_path / "c.pt").exists()


def a_run(root, student):
    """Write a run with this student, its evaluation, and another student's evaluation."""
    run = str(root / "run")
    stage = StageFolder(run, "student", "1")
    train = {"labels": "pseudo", "loss": "lse_sign", "optim": {"lr": 0.001}}
    save_student(student, stage.path, {"train": train, "seed": 4, "epochs": 6})
    stage.publish({})
    storage.write_json(f"{run}/provenance.json", {"teacher_model": "Some/captioner"})
    predictions = StageFolder(run, "predictions", "1")
    storage.write_json(
        predictions.file("table.json"), {"student_fingerprint": student_fingerprint(stage.path)}
    )
    for key, source, value in (
        ("1", predictions.path, 0.612),
        ("2", f"{run}/student-2", 0.999),
        ("3", f"{run}/region_scores-1", 0.998),
    ):
        evaluation = StageFolder(run, "evaluation", key)
        metrics = {"mAP": value, "num_images": 9, "num_classes": 3, "predictions": source}
        storage.write_json(evaluation.file("metrics.json"), metrics)
        evaluation.publish({})
    return run


def test_safetensors_is_a_whole_student_with_a_card(color_table, tmp_path):
    """Catches an export that needs its run, and a card with another student's figures."""
    student = paper_student(color_table)
    run = a_run(tmp_path, student)
    output = tmp_path / "export"
    export_student(run, "safetensors", str(output))
    storage.remove_tree(run)
    loaded = load_student(str(output))
    images = images_of(student, 2)
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
    card = (output / "README.md").read_text()
    for words in (
        "3 classes",
        "- red object",
        "pseudo-labels of a generative captioner (Some/captioner)",
        "No human label",
        "| 9 | 3 | 61.2 | - |",
        "load_student(",
        "## Licences",
        "| loss | lse_sign |",
        "32 x 32",
    ):
        assert words in card, words
    assert "99." not in card
    assert {p.name for p in output.iterdir()} == {
        "README.md", "student.json", "model.safetensors", "classes.csv",
    }  # fmt: skip


def test_cards_say_where_the_labels_came_from(color_table, tmp_path):
    """Catches a supervised or imported student that is passed on as made without labels."""
    student = paper_student(color_table)
    cases = {
        "annotations": ({"train": {"labels": "annotations"}}, "human annotations"),
        "none": ({"train": {"labels": "none"}}, "zero-shot"),
        "imported": ({"imported": {"file": "a.pt", "sha256": "12"}}, "Imported from `a.pt`"),
        "unknown": ({}, "Not recorded"),
    }
    for name, (info, words) in cases.items():
        save_student(student, str(tmp_path / name), info)
        card = model_card(student, str(tmp_path / name))
        assert words in card
        assert "No human label" not in card


def test_an_export_that_computes_something_else_is_not_kept(folders, tmp_path, monkeypatch):
    """Catches a check that compares nothing: here what is read again has another classifier."""
    write = export._WRITERS["safetensors"]

    def spoiled(source, target):
        written = write(source, target)
        with torch.no_grad():
            written.again.classifier[0] += 0.1
        return written

    monkeypatch.setitem(export._WRITERS, "safetensors", spoiled)
    with pytest.raises(DataError, match="computes other logits"):
        export_student(str(folders / "paper"), "safetensors", str(tmp_path / "x"))
    assert not list(tmp_path.iterdir())


def test_existing_outputs_and_wrong_names_are_refused(folders, tmp_path):
    """Catches a file that is written over, and a suffix that promises another format."""
    source, there = str(folders / "paper"), tmp_path / "there.pt"
    there.write_text("precious")
    for form, name, words in (
        ("hts", "there.pt", "something is there already"),
        ("hts", "x.onnx", "end its name in .pt or .pth"),
        ("onnx", "x", "end its name in .onnx"),
        ("safetensors", "x.safetensors", "writes a folder"),
        ("tensorflow", "x", "safetensors, open_clip, onnx, hts"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_student(source, form, str(tmp_path / name))
    with pytest.raises(DataError, match="no student at"):
        export_student(str(tmp_path), "hts", str(tmp_path / "x.pt"))
    assert there.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["there.pt"]


def test_without_onnx_the_remedy_is_named(folders, tmp_path, monkeypatch):
    """Catches an ImportError for users who did not install the extra."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'hts-ray\[onnx\]'"):
        export_student(str(folders / "demo"), "onnx", str(tmp_path / "x.onnx"))
