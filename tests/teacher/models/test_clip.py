"""Tests of a CLIP model as a teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from hts_ray.config import OPEN_CLIP, CaptionConfig, TeacherConfig, load_config
from hts_ray.errors import ConfigError
from hts_ray.images.crops import CropBatch
from hts_ray.teacher.captioner import ClassPrompts, score_classes
from hts_ray.teacher.models.catalog import check_teacher, clip_model, model_fingerprint
from hts_ray.teacher.models.loading import load_captioner

WORLD = f"{OPEN_CLIP}builtin:world_clip"
PROMPTS = ClassPrompts.of([["a person riding a bicycle", "a bicycle"], ["a person on a horse"]], 2)


def world_files() -> Path:
    name = clip_model(TeacherConfig(model=WORLD)).resolve()
    return Path(name.removeprefix("local-dir:"))


def random_images(count: int = 3) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [
        np.asarray(Image.fromarray(small).resize((90 + 17 * n, 120), Image.Resampling.BICUBIC))
        for n, small in enumerate(random.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8))
    ]


def by_hand(folder: Path, images: list[np.ndarray]) -> torch.Tensor:
    """Logits (R, C) by open_clip's own preparation and plain forwards, one image at a time."""
    import open_clip

    clip, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    clip.eval()
    size = clip.visual.image_size
    with torch.no_grad():
        texts = [
            normalize(clip.encode_text(tokenizer(texts), normalize=True).mean(0), dim=-1)
            for texts in PROMPTS.by_class(PROMPTS.texts)
        ]
        features = torch.cat([
            clip.encode_image(
                prepare(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))[None],
                normalize=True,
            )
            for image in images
        ])  # fmt: skip
        return clip.logit_scale.exp() * features @ torch.stack(texts).T


def test_scores_are_those_of_open_clip() -> None:
    """Catches a lost scale, another mean or size, and a class of only one of its sentences."""
    images = random_images()
    teacher = load_captioner(TeacherConfig(model=WORLD))
    found = score_classes(teacher, images, PROMPTS, reduction="max")
    # Bytes resized by torch and by Pillow differ by 1 of 255 in places.
    np.testing.assert_allclose(found, by_hand(world_files(), images).numpy(), atol=0.05)
    assert found.dtype == np.float32
    assert np.ptp(found) > 1
    alone = teacher.score(images, PROMPTS.texts)
    assert alone.log_likelihoods.shape == (3, 3)
    np.testing.assert_allclose(alone.log_likelihoods[:, 2], found[:, 1], atol=1e-4)
    assert teacher.caption(images, CaptionConfig())[0][0].text == ""


def test_crops_score_as_they_do_alone() -> None:
    """Catches crops of a batch that are cut from the wrong image or at the wrong place."""
    images = random_images(2)
    crops = CropBatch(images, [(1, (10, 20, 70, 110)), (0, (0, 0, 50, 60)), (1, (0, 0, 107, 120))])
    teacher = load_captioner(TeacherConfig(model=WORLD))
    one_by_one = np.concatenate(
        [score_classes(teacher, [np.ascontiguousarray(crop)], PROMPTS) for crop in crops]
    )
    np.testing.assert_allclose(score_classes(teacher, crops, PROMPTS), one_by_one, atol=1e-4)


def test_sentences_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches every batch paying for the text tower, which takes longer than the images."""
    teacher: Any = load_captioner(TeacherConfig(model=WORLD))
    score_classes(teacher, random_images(1), PROMPTS)
    monkeypatch.setattr(teacher._clip, "encode_text", lambda tokens: pytest.fail("encoded again"))
    score_classes(teacher, random_images(2), PROMPTS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near(dtype: Any) -> None:
    """Catches a tower that mixes types, and cosines that are computed in half precision."""
    images = random_images()
    exact = score_classes(load_captioner(TeacherConfig(model=WORLD)), images, PROMPTS)
    teacher = load_captioner(TeacherConfig(model=WORLD, dtype=dtype))
    found = score_classes(teacher, images, PROMPTS)
    assert 0 < np.abs(found - exact).max() < 0.3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ViT-B-31/openai", "did you mean ViT-B-32"),
        ("ViT-B-32/opnai", "did you mean openai"),
        ("ViT-B-32", "neither a tag.*openai"),
        ("/no/such/folder", "has no open_clip_config.json"),
        ("builtin:nothing", "builtin:world_clip"),
    ],
)
def test_unusable_models_are_named(name: str, text: str) -> None:
    """Catches a traceback of open_clip, and an error that names the student's settings."""
    with pytest.raises(ConfigError, match=text) as caught:
        check_teacher(TeacherConfig(model=OPEN_CLIP + name))
    assert caught.value.field == "label.teacher.model"


def test_names_mean_what_the_student_s_mean() -> None:
    """Catches a tag, a file of weights or a folder that is taken for another."""
    named = clip_model(TeacherConfig(model="open_clip:ViT-B-32/laion2b_s34b_b79k"))
    assert (named.model, named.pretrained) == ("ViT-B-32", "laion2b_s34b_b79k")
    assert clip_model(TeacherConfig(model="open_clip:RN50//w/a.pt")).pretrained == "/w/a.pt"
    assert clip_model(TeacherConfig(model=f"open_clip:{world_files()}")).model == (
        f"local-dir:{world_files()}"
    )
    assert clip_model(TeacherConfig(model="open_clip:hf-hub:a/b")).model == "hf-hub:a/b"
    own = load_config(
        overrides=["label.teacher.model=open_clip:student", "student.model=ViT-B/32",
                   "student.pretrained=openai"]
    )  # fmt: skip
    assert own.labeling.teacher.model == "open_clip:ViT-B-32/openai"
    assert own.label.teacher.model == "open_clip:student"


def test_the_key_follows_the_weights(tmp_path: Path) -> None:
    """Catches weights that were trained on in place and reuse the old scores."""
    shutil.copytree(world_files(), tmp_path / "clip")
    config = TeacherConfig(model=f"{OPEN_CLIP}{tmp_path / 'clip'}")
    before = model_fingerprint(config)
    assert before == model_fingerprint(config)
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_fingerprint(config) != before


@pytest.mark.parametrize(
    "setting", ["mode=captions", "append_eos=true", "length_normalize=true", "instruction=what?"]
)
def test_settings_of_captioners_are_refused(setting: str) -> None:
    """Catches a setting that looks as if it had an effect."""
    with pytest.raises(ConfigError, match="is for captioners"):
        load_config(overrides=[f"label.teacher.model={WORLD}", f"label.teacher.{setting}"])
