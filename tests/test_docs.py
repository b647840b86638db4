"""Tests that the documentation's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from hts_ray.assets import asset_path
from hts_ray.config import CaptionConfig, TeacherConfig
from hts_ray.teacher.loading import load_captioner

ROOT = Path(__file__).parents[1]


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def test_the_written_teacher_teaches(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches documentation of a protocol that the code has left behind."""
    source = next(block for block in blocks("docs/teacher.md", "python") if "class Clip" in block)
    body = source[source.index("class ClipTeacher") :].strip().splitlines()
    assert len(body) <= 30
    (plugins / "clip_teacher.py").write_text(source)
    folder = asset_path("world_clip/open_clip_config.json").parent
    monkeypatch.setenv("CLIP_TEACHER", f"local-dir:{folder}")
    teacher = load_captioner(TeacherConfig(model="import:clip_teacher:ClipTeacher"))
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    scores = teacher.score(list(images), ["a person riding a horse", "a dog"])
    assert scores.log_likelihoods.shape == (2, 2)
    assert scores.token_counts.tolist() == [5, 2]
    np.testing.assert_allclose(np.exp(scores.log_likelihoods).sum(1), 1, rtol=1e-5)
    captions = teacher.caption(list(images), CaptionConfig())
    assert all(caption[0].text.startswith("a photo of") for caption in captions)


def test_the_example_of_matching_finds_both() -> None:
    """Catches an example in the documentation that no longer shows what it says."""
    source = next(
        block for block in blocks("docs/teacher.md", "python") if "match_captions" in block
    )
    names: dict[str, object] = {}
    setup, call = source.strip().rsplit("\n\n", 1)
    exec(setup, names)
    (found,) = eval(call, names)
    from hts_ray.classes import hico_classes

    stated = {hico_classes()[position].name for position, p in found.items() if p >= 0.5}
    assert {"ride bicycle", "kick sports ball"} <= stated, stated
