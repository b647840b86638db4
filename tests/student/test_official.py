"""Checkpoints of the paper's code: the same logits, nothing run, and reasons for refusals."""

from __future__ import annotations

import io
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812

from hts_ray.classes import hico_classes
from hts_ray.config import PredictConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.student import load_student
from hts_ray.student.official import import_checkpoint
from hts_ray.student.predict import score_images

VISUAL = "visual_encoder.visual."
BLOCK = VISUAL + "transformer.resblocks.{}."
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def official_state(*, classes=600, width=64, layers=2, patch=8, grid=4, features=None):
    """Return random weights under the names that the paper's code gives them."""
    random = torch.Generator().manual_seed(width + classes)

    def draw(*shape, std):
        return torch.randn(*shape, generator=random) * std

    state = {
        VISUAL + "class_embedding": draw(width, std=0.5),
        VISUAL + "positional_embedding": draw(grid * grid + 1, width, std=0.5),
        VISUAL + "conv1.weight": draw(width, 3, patch, patch, std=0.1),
    }
    for name in ("ln_pre", "ln_post", *(f"{i}.ln_{n}" for i in range(layers) for n in (1, 2))):
        prefix = VISUAL + (f"transformer.resblocks.{name}" if name[0].isdigit() else name)
        state[f"{prefix}.weight"] = 1 + draw(width, std=0.2)
        state[f"{prefix}.bias"] = draw(width, std=0.2)
    matrices = {
        "attn.in_proj_": (3 * width, width),
        "attn.out_proj.": (width, width),
        "mlp.c_fc.": (4 * width, width),
        "mlp.c_proj.": (width, 4 * width),
    }
    for i in range(layers):
        for name, shape in matrices.items():
            state[BLOCK.format(i) + name + "weight"] = draw(*shape, std=1.5 * shape[1] ** -0.5)
            state[BLOCK.format(i) + name + "bias"] = draw(shape[0], std=0.2)
    if features is not None:
        state[VISUAL + "proj"] = draw(width, features, std=width**-0.5)
    state["classifier"] = draw(classes, features or width, std=0.3)
    state["logit_scale"] = torch.tensor(4.61)
    return state


def original_logits(state, images):
    """Compute the paper's logits (N, C) of images (N, 3, S, S), from its description alone."""
    state = {name: value.float() for name, value in state.items()}
    kernel = state[VISUAL + "conv1.weight"]
    width, heads = len(kernel), len(kernel) // 64

    def normalise(x, name):
        return F.layer_norm(x, (width,), state[name + ".weight"], state[name + ".bias"], 1e-5)

    def linear(x, name):
        return x @ state[name + "weight"].T + state[name + "bias"]

    x = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    token = state[VISUAL + "class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([token, x], dim=1) + state[VISUAL + "positional_embedding"]
    x = normalise(x, VISUAL + "ln_pre")
    for i in range(sum(name.endswith("in_proj_bias") for name in state)):
        block = BLOCK.format(i)
        parts = linear(normalise(x, block + "ln_1"), block + "attn.in_proj_").chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), block + "attn.out_proj.")
        hidden = linear(normalise(x, block + "ln_2"), block + "mlp.c_fc.")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), block + "mlp.c_proj.")
    features = normalise(x[:, 0], VISUAL + "ln_post")
    if VISUAL + "proj" in state:
        features = features @ state[VISUAL + "proj"]
    classes = state["classifier"]
    if "m_classifier" in state:
        classes = state["m_classifier"] @ classes
    features = features / features.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    return state["logit_scale"].exp() * features @ classes.T


def write(path, state, prefix="", **more):
    """Save as the paper's trainer does, after some steps of AdamW."""
    moments = {0: {"step": 7, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
    groups = [{"lr": 1.5e-5, "betas": (0.9, 0.999), "amsgrad": False, "params": [0]}]
    content = {
        "epoch": 9,
        "model_state_dict": {prefix + name: value for name, value in state.items()},
        "optimizer_state_dict": {"state": moments, "param_groups": groups},
    }
    torch.save(content, path, **more)
    return str(path)


def class_list(path, count):
    path.write_text("name\n" + "".join(f"thing number {i}\n" for i in range(count)))
    return str(path)


@pytest.mark.parametrize(
    ("shape", "prefix", "dtype"),
    [
        ({}, "", torch.float32),
        ({}, "module.", torch.float16),
        (
            {"classes": 3, "width": 128, "layers": 3, "patch": 4, "grid": 5},
            "module.",
            torch.float32,
        ),
        ({"classes": 7, "width": 96, "features": 40}, "", torch.float32),
    ],
)
def test_imported_students_give_the_original_logits(shape, prefix, dtype, tmp_path):
    """Catches a wrong activation, scale, head count, token, norm or feature space."""
    state = {name: value.to(dtype) for name, value in official_state(**shape).items()}
    path = write(tmp_path / "checkpoint_0009.pt", state, prefix)
    count = shape.get("classes", 600)
    classes = None if count == 600 else class_list(tmp_path / "classes.csv", count)
    found = import_checkpoint(path, str(tmp_path / "student"), classes)
    student = load_student(str(tmp_path / "student"))
    size = shape.get("patch", 8) * shape.get("grid", 4)
    assert student.image_size == found["image size"] == size
    assert found["epoch"] == 9
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = student(images), original_logits(state, images)
    assert expected.std() > 1  # a difference below would be lost among equal logits
    assert (logits - expected).abs().max() < 1e-4
    if count == 600:
        assert student.class_table == hico_classes()
    else:
        assert student.class_table.names == [f"thing number {i}" for i in range(count)]
    assert student.config.feature_space == ("projected" if "features" in shape else "backbone")


def test_learned_mixtures_and_old_containers_are_read(tmp_path):
    """Catches the i-clip classifier taken unmixed, and files older than torch's zip format."""
    state = official_state()
    state["m_classifier"] = torch.eye(600) + 0.1 * torch.randn(600, 600)
    path = write(tmp_path / "old.pt", state, _use_new_zipfile_serialization=False)
    import_checkpoint(path, str(tmp_path / "student"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = load_student(str(tmp_path / "student"))(images)
    assert (logits - original_logits(state, images)).abs().max() < 1e-4


def test_imported_students_predict_photographs(tmp_path):
    """Catches a folder that `hts predict` cannot use, or other mean, deviation or resizing."""
    state = official_state()
    import_checkpoint(write(tmp_path / "c.pt", state), str(tmp_path / "student"))
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    rows = {"image_id": ["a"], "uri": [str(tmp_path / "photo.png")], "split": ["test"]}
    ids, scores = score_images(str(tmp_path / "student"), pa.table(rows), PredictConfig())
    resized = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    expected = original_logits(state, ((image - MEAN[:, None, None]) / STD[:, None, None])[None])
    assert ids == ["a"]
    assert np.abs(scores - expected.numpy()).max() < 1e-3


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("place", ["optimizer", "state", "bare pickle", "old container"])
def test_code_in_a_checkpoint_is_refused_and_not_run(place, tmp_path):
    """Catches unpickling of foreign code, wherever it hides, and advice to allow it."""
    trap = Malicious(tmp_path / "pwned")
    content = {"epoch": 1, "model_state_dict": official_state(), "optimizer_state_dict": {}}
    if place == "state":
        content["model_state_dict"]["extra"] = trap
    else:
        content["optimizer_state_dict"] = trap
    path = tmp_path / "evil.pt"
    if place == "bare pickle":
        path.write_bytes(pickle.dumps(content["optimizer_state_dict"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=place != "old container")
    named = "pickle" if place == "bare pickle" else r"posix\.mkdir"
    with pytest.raises(DataError, match=rf"evil\.pt is refused.*{named}.*never run") as caught:
        import_checkpoint(str(path), str(tmp_path / "student"))
    assert "weights_only" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pt"]
    with open(path, "rb") as stream:  # the trap works: only the loader keeps it shut
        if place == "bare pickle":
            pickle.load(stream)
            assert (tmp_path / "pwned").is_dir()


def test_torchscript_archives_are_refused(tmp_path):
    """Catches running the code of an archive such as OpenAI publishes."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "clip.pt"))
    with pytest.raises(DataError, match=r"clip\.pt is refused.*TorchScript"):
        import_checkpoint(str(tmp_path / "clip.pt"), str(tmp_path / "student"))


def _without(*names):
    return lambda state: [state.pop(name) for name in names]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.update({"vit.pos_embed": torch.ones(2)}), "ImageNet ViT"),
        (lambda s: s.update({VISUAL + "layer1.0.conv1.weight": torch.ones(2)}), "CLIP ResNet"),
        (lambda s: s.update({"classifier.weight": s.pop("classifier")}), "linear, with a bias"),
        (_without("logit_scale"), "logit_scale missing"),
        (_without(VISUAL + "conv1.weight"), "conv1.weight missing"),
        (_without(BLOCK.format(1) + "ln_2.bias"), "Missing key.*ln_2.bias"),
        (lambda s: s.update({"text.weight": torch.ones(2)}), "text.weight unknown"),
        (lambda s: s.update({VISUAL + "extra": torch.ones(2)}), "Unexpected key.*extra"),
        (lambda s: s.update({"module.classifier": torch.ones(2)}), "classifier occurs twice"),
        (lambda s: s.update({"logit_scale": torch.tensor(100.0)}), "100 is no logarithm"),
        (lambda s: s.update({"logit_scale": torch.tensor(0.0)}), "no cosine at all"),
        (lambda s: s["classifier"].fill_(math.nan), "classifier holds values that are not finite"),
        (lambda s: s.update({"classifier": torch.ones(600)}), r"shape \[600\]"),
        (lambda s: s.update({"classifier": torch.ones(600, 32)}), "32 columns for 64 features"),
        (lambda s: s.update({"m_classifier": torch.ones(2, 2)}), r"mixed by \[2, 2\]"),
        (lambda s: s.update({"classifier": torch.ones(2, dtype=torch.int8)}), "not a tensor of fl"),
        (lambda s: s.update({"classifier": [1.0]}), "not a tensor of floats but list"),
        (lambda s: s.update({VISUAL + "positional_embedding": torch.ones(16, 64)}), "square grid"),
        (lambda s: s.update({VISUAL + "conv1.weight": torch.ones(32, 3, 8, 8)}), "width 32"),
        (lambda s: s.update({VISUAL + "conv1.weight": torch.ones(64, 3, 8, 4)}), "cuts no patches"),
    ],
)  # fmt: skip
def test_other_models_are_refused_with_the_reason(change, reason, tmp_path):
    """Catches a student that loads with part of its weights, or a traceback for users."""
    state = official_state()
    change(state)
    path = write(tmp_path / "other.pt", state)
    with pytest.raises(DataError, match=reason) as caught:
        import_checkpoint(path, str(tmp_path / "student"))
    assert "other.pt" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.pt"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot be read"),
        (b"not a checkpoint at all", "cannot be read"),
        ([1, 2], "holds a list"),
        ({"state_dict": {}, "arch": "x"}, "model_state_dict is missing .found state_dict, arch"),
        (None, "no such file"),
    ],
)
def test_foreign_files_are_refused_with_the_reason(data, reason, tmp_path):
    """Catches a traceback for a text file, a truncated download or another project's weights."""
    path = tmp_path / "file.pt"
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif data is not None:
        torch.save(data, path)
    with pytest.raises(DataError, match=reason):
        import_checkpoint(str(path), str(tmp_path / "student"))


def test_truncated_checkpoints_are_refused(tmp_path):
    """Catches a half download that fails with torch's own error."""
    stream = io.BytesIO()
    write(stream, official_state())
    (tmp_path / "half.pt").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    with pytest.raises(DataError, match=r"half\.pt cannot be read"):
        import_checkpoint(str(tmp_path / "half.pt"), str(tmp_path / "student"))


def test_classes_must_be_named_and_fit(tmp_path):
    """Catches HICO's names given to other classes, or a list of another length."""
    path = write(tmp_path / "c.pt", official_state(classes=5))
    output = tmp_path / "student"
    with pytest.raises(ConfigError, match="5 classes and no names"):
        import_checkpoint(path, str(output))
    with pytest.raises(ConfigError, match="it lists 4 classes"):
        import_checkpoint(path, str(output), class_list(tmp_path / "four.csv", 4))
    with pytest.raises(ConfigError, match="600 classes"):
        import_checkpoint(path, str(output), "hico")
    assert not output.exists()


def test_nothing_is_written_over(tmp_path):
    """Catches a student that vanishes under an import, and temporary files that stay."""
    path = write(tmp_path / "c.pt", official_state())
    output = tmp_path / "new" / "student"
    import_checkpoint(path, str(output))
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    with pytest.raises(ConfigError, match="something is there already"):
        import_checkpoint(path, str(output))
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    assert [p.name for p in output.parent.iterdir()] == ["student"]
    with pytest.raises(ConfigError, match="--output"):
        import_checkpoint(path, str(Path(path) / "below-a-file"))
