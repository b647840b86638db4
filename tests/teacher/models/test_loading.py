"""Tests of naming, checking, hashing and loading teachers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hts_ray.config import CaptionConfig, LabelConfig, TeacherConfig
from hts_ray.errors import ConfigError
from hts_ray.teacher.captioner import ClassPrompts, SearchingCaptioner, score_classes
from hts_ray.teacher.models.catalog import check_teacher, model_fingerprint
from hts_ray.teacher.models.loading import load_captioner, load_on_device


def broken_copy(source: Path, target: Path, *, remove: str = "", **changes: Any) -> str:
    shutil.copytree(source, target)
    if remove:
        (target / remove).unlink()
    if changes:
        settings = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**settings, **changes}))
    return str(target)


def lacking_a_weight(source: Path, target: Path) -> str:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    del weights["vision_model.embeddings.class_embedding"]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def half_copied(source: Path, target: Path) -> str:
    shutil.copytree(source, target)
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return str(target)


def test_unusable_models_are_named(tiny_blip_path: Path, tmp_path: Path) -> None:
    """Catches a wrong model ending in a traceback, or pickled weights being loaded."""
    (tmp_path / "empty").mkdir()
    cases = {
        "/no/such/folder": "no such folder",
        "builtin:nothing": r"no packaged model.*builtin:world_captioner",
        str(tmp_path / "empty"): "no config.json",
        broken_copy(tiny_blip_path, tmp_path / "w", remove="model.safetensors"): "no .safetensors",
        lacking_a_weight(tiny_blip_path, tmp_path / "l"): "lack 1 weights",
        half_copied(tiny_blip_path, tmp_path / "h"): "does not load",
        broken_copy(
            tiny_blip_path, tmp_path / "t", model_type="t5"
        ): "family 't5' .*BLIP.*Qwen3-VL.*import:",
        broken_copy(tiny_blip_path, tmp_path / "p", remove="processor_config.json"): "processor",
    }
    for model, told in cases.items():
        with pytest.raises(ConfigError, match=told) as caught:
            load_captioner(TeacherConfig(model=model))
        assert caught.value.field == "label.teacher.model"
        assert model in str(caught.value)


def test_fingerprint_follows_the_files(tiny_blip_path: Path, tmp_path: Path) -> None:
    """Catches a changed model answering under the old settings hash."""
    copy = Path(broken_copy(tiny_blip_path, tmp_path / "blip"))
    config = TeacherConfig(model=str(copy))
    before = model_fingerprint(config)
    assert before == model_fingerprint(TeacherConfig(model=str(tiny_blip_path)))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(config) != before
    hub = TeacherConfig(model="some/model", revision="abc")
    assert model_fingerprint(hub) == "some/model@abc"


def test_a_missing_gpu_is_refused_or_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an actor that scores on the CPU unseen, and an estimate that needs a GPU here."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = LabelConfig.model_validate({"pool": {"num_gpus": 1}})
    with pytest.raises(ConfigError, match="no GPU") as caught:
        load_on_device(config)
    assert caught.value.field == "label.pool.num_gpus"
    assert load_on_device(config, or_cpu=True)[1] == "cpu"


# -- classes of the user's own ------------------------------------------------------------------

COLOURS = """
from __future__ import annotations

import numpy as np

from hts_ray.teacher.captioner import Caption, PromptScores

COLOURS = {"red": 0, "green": 1, "blue": 2}


class ColourTeacher:
    def __init__(self, config, device):
        self.sharpness = 10.0
        self.device = device

    def _shares(self, image):
        total = image.reshape(-1, 3).sum(0).astype(np.float64) + 1.0
        return np.log(total / total.sum())

    def score(self, images, prompts):
        shares = np.stack([self._shares(image) for image in images])
        columns = [COLOURS[prompt.split()[-1]] for prompt in prompts]
        return PromptScores(
            (self.sharpness * shares[:, columns]).astype(np.float32),
            np.array([len(prompt.split()) for prompt in prompts]),
        )

    def caption(self, images, settings):
        captions = []
        for image in images:
            shares = self._shares(image)
            best = np.argsort(-shares)[: settings.count]
            names = list(COLOURS)
            captions.append([Caption(f"something {names[i]}", float(shares[i])) for i in best])
        return captions


class Silent:
    def score(self, images, prompts):
        return None
"""


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "colour_teacher.py").write_text(COLOURS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "colour_teacher", raising=False)
    return "import:colour_teacher:"


def test_a_class_of_your_own_is_a_teacher(colours: str) -> None:
    """Catches a protocol that asks more of a user's class than is promised."""
    config = TeacherConfig(model=f"{colours}ColourTeacher")
    check_teacher(config)
    teacher = load_captioner(config, "cpu")
    assert teacher.device == "cpu"  # type: ignore[attr-defined]
    assert not isinstance(teacher, SearchingCaptioner)
    images = [np.zeros((8, 9, 3), np.uint8) for _ in range(3)]
    for channel, image in enumerate(images):
        image[..., channel] = 200
    prompts = ClassPrompts.of([["all red"], ["all green"], ["all blue"]], 1)
    scores = score_classes(teacher, images, prompts)
    assert scores.argmax(1).tolist() == [0, 1, 2]
    captions = teacher.caption(images, CaptionConfig(decoding="beam", count=2))
    assert [len(of_image) for of_image in captions] == [2, 2, 2]
    assert captions[2][0].text == "something blue"
    assert model_fingerprint(config).startswith(config.model)


def test_a_class_that_is_none_is_told(colours: str) -> None:
    """Catches a mistyped module or class, or one without captions, failing on the workers only."""
    cases = {
        "import:no_such_module:Teacher": "does not import: No module",
        "import:colour_teacher": "does not import",
        "import:": "does not import",
        f"{colours}Nobody": "has no attribute 'Nobody'",
        f"{colours}Silent": "has no method caption",
    }
    for model, told in cases.items():
        for refuse in (check_teacher, load_captioner):
            with pytest.raises(ConfigError, match=told) as caught:
                refuse(TeacherConfig(model=model))
            assert caught.value.field == "label.teacher.model"


def test_large_weights_that_were_trained_on_are_another_model(tmp_path: Path) -> None:
    """Catches old scores that are used again for weights of the same name and size."""
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    weights = tmp_path / "model.safetensors"
    with open(weights, "wb") as stream:
        stream.truncate(70 << 20)
    before = model_fingerprint(TeacherConfig(model=str(tmp_path)))
    with open(weights, "r+b") as stream:
        stream.seek(65 << 20)
        stream.write(b"x")
    assert weights.stat().st_size == 70 << 20
    assert model_fingerprint(TeacherConfig(model=str(tmp_path))) != before


def test_the_fingerprint_follows_the_source(colours: str, tmp_path: Path) -> None:
    """Catches a changed teacher answering under the old settings hash."""
    config = TeacherConfig(model=f"{colours}ColourTeacher")
    before = model_fingerprint(config)
    (tmp_path / "colour_teacher.py").write_text(COLOURS.replace("10.0", "11.0"))
    assert model_fingerprint(config) != before
