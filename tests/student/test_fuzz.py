"""Damaged and hostile students and checkpoints: the same student, or a reason; never another.

`tests/fuzzing.py` tells how a case that failed is run again.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fuzzing import CSV, VALUES, Trap, corrupted, damaged, dumped, fuzz

from hts_ray.errors import DataError
from hts_ray.student.checkpoints import load_student, save_student
from hts_ray.student.official import read_official


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Return a stored student of random weights."""
    folder = tmp_path_factory.mktemp("student")
    checkpoint = tmp_path_factory.mktemp("official") / "good.pt"
    checkpoint.write_bytes(official())
    save_student(read_checkpoint(checkpoint), str(folder))
    return folder


def read_checkpoint(path: Path) -> Any:
    """Read an official checkpoint of the four classes in CSV."""
    classes = path.with_name("classes.csv")
    classes.write_text(CSV)
    return read_official(str(path), str(classes))


def official_content() -> dict[str, Any]:
    """Return what the paper's code would save for a ViT of one layer and width 64."""
    generator = torch.Generator().manual_seed(0)
    visual = "visual_encoder.visual."
    block = visual + "transformer.resblocks.0."
    shapes = {
        visual + "class_embedding": (64,), visual + "positional_embedding": (5, 64),
        visual + "conv1.weight": (64, 3, 16, 16),
        block + "attn.in_proj_weight": (192, 64), block + "attn.in_proj_bias": (192,),
        block + "attn.out_proj.weight": (64, 64), block + "attn.out_proj.bias": (64,),
        block + "mlp.c_fc.weight": (256, 64), block + "mlp.c_fc.bias": (256,),
        block + "mlp.c_proj.weight": (64, 256), block + "mlp.c_proj.bias": (64,),
        "classifier": (4, 64),
    }  # fmt: skip
    for norm in (visual + "ln_pre", visual + "ln_post", block + "ln_1", block + "ln_2"):
        shapes |= {f"{norm}.weight": (64,), f"{norm}.bias": (64,)}
    state = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    state["logit_scale"] = torch.tensor(4.61)
    return {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}


def official(content: Any = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(official_content() if content is None else content, stream, **options)
    return stream.getvalue()


def wrong_content(rng: random.Random) -> tuple[str, Any]:
    """Return a checkpoint with a tensor of another shape, type or content, or none."""
    content = official_content()
    state = content["model_state_dict"]
    name = rng.choice(list(state))
    value = state[name]
    wrong = {
        "nan": torch.full_like(value, math.nan),
        "infinite": torch.full_like(value, -math.inf),
        "integers": value.to(torch.int64),
        "empty": torch.zeros(0),
        "one more": torch.cat([value.reshape(-1), torch.zeros(1)]),
        "turned": value.T if value.ndim == 2 else value[None, None],
        "sparse": torch.zeros(4, 4).to_sparse(),
        "huge": torch.zeros(1).expand(1 << 20, 1 << 12),
        "number": 3.0,
        "text": "\u202e",
        "none": None,
    }
    kind = rng.choice([*wrong, "missing", "renamed", "no dictionary", "list"])
    if kind in ("missing", "renamed"):
        del state[name]
        if kind == "renamed":
            state[name + "_"] = value
    elif kind == "no dictionary":
        content["model_state_dict"] = rng.choice(VALUES)
    elif kind == "list":
        return kind, [content]
    else:
        state[name] = wrong[kind]
    return f"{name} {kind}", content


def test_official_checkpoints_are_read_whole_or_refused(tmp_path):
    """Would catch torch's own errors, and weights that are damaged and taken for good."""
    whole = official()
    (tmp_path / "good.pt").write_bytes(whole)
    expected = read_checkpoint(tmp_path / "good.pt").state_dict()

    def make(rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.4:
            what, content = wrong_content(rng)
            return f"wrong {what}", official(content)
        return damaged(whole, rng)

    def check(path: Path, what: str) -> None:
        student = read_checkpoint(path)
        assert len(student.classifier) == len(student.class_table) == 4
        state = student.state_dict()
        assert all(torch.isfinite(value).all() for value in state.values())
        if not what.startswith("wrong"):
            assert all(torch.equal(value, expected[name]) for name, value in state.items())

    fuzz("official", 50, tmp_path, "checkpoint.pt", make, check)


def test_damaged_students_do_not_load(tmp_path, stored):
    """Would catch other weights, classes or settings than those that were stored."""
    good = {path.name: path.read_bytes() for path in stored.iterdir()}
    expected = load_student(str(stored))
    description = json.loads(good["student.json"])

    def make(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(["model.safetensors", "student.json", "student.json", "classes.csv"])
        for other, data in good.items():
            (tmp_path / other).write_bytes(data)
        what, data = damaged(good[name], rng)
        if name == "student.json" and rng.random() < 0.7:
            what, data = "other values", dumped(corrupted(description, rng))
        (tmp_path / name).write_bytes(data)
        return f"{name}, {what}", b""

    def check(path: Path, _: str) -> None:
        student = load_student(str(path.parent))
        assert student.class_table == expected.class_table
        assert student.config == expected.config
        assert student.image_size == expected.image_size
        for name in ("image_mean", "image_std"):
            assert torch.equal(getattr(student, name), getattr(expected, name)), name
        for name, value in student.state_dict().items():
            assert torch.equal(value, expected.state_dict()[name]), name

    fuzz("student", 80, tmp_path, "case", make, check)


@pytest.mark.parametrize("form", ["missing", "header", "more"])
def test_weights_that_do_not_fit_are_refused_whatever_their_hash(tmp_path, stored, form):
    """Would catch safetensors' own errors where a file was made to look right."""
    weights = safetensors.torch.load((stored / "model.safetensors").read_bytes())
    if form == "missing":
        del weights["classifier"]
    elif form == "more":
        weights["classifiers"] = weights["classifier"].clone()
    data = safetensors.torch.save(weights)
    if form == "header":
        data = struct.pack("<Q", 1 << 60) + data[8:]
    folder = forged(tmp_path / "student", stored, data)
    with pytest.raises(DataError, match=str(folder)):
        load_student(str(folder))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_weights_is_refused_and_not_run(tmp_path, stored, zipped):
    """Would catch code in a checkpoint, or in a student's weights, that runs when it is read."""
    trap = Trap(tmp_path / "sprung")
    content = {**official_content(), "optimizer_state_dict": trap}
    data = official(content, _use_new_zipfile_serialization=zipped)
    (tmp_path / "checkpoint.pt").write_bytes(data)
    with pytest.raises(DataError, match="never run"):
        read_checkpoint(tmp_path / "checkpoint.pt")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_student(str(forged(tmp_path / "student", stored, data)))
    assert not trap.target.exists()


def forged(folder: Path, stored: Path, weights: bytes) -> Path:
    """Write a student with other weights, whose hashes are right."""
    folder.mkdir()
    for path in stored.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_bytes(weights)
    description = json.loads((folder / "student.json").read_text())
    del description["sha256"]["student.json"]
    description["sha256"]["model.safetensors"] = hashlib.sha256(weights).hexdigest()
    (folder / "student.json").write_text(json.dumps(description))
    return folder
