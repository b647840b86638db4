"""The teacher on a GPU: `make test-gpu`; nothing here runs, or is skipped, without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hts_ray.config import CaptionConfig, TeacherConfig
from hts_ray.images.crops import CropBatch
from hts_ray.images.decode import DecodedImage
from hts_ray.images.regions import Region
from hts_ray.teacher.captioner import Captioner, ClassPrompts, TopSearch
from hts_ray.teacher.models.loading import load_captioner

pytestmark = pytest.mark.gpu
PROMPTS = ["a person riding a horse", "a person washing a dog", "a hot dog"]


def crops() -> CropBatch:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 60, 80, 3), dtype=np.uint8)
    images = [DecodedImage(of_image, 80, 60) for of_image in pixels]
    regions = [Region((0, 0, 80, 60), "whole"), Region((10, 5, 50, 45), "grid")]
    return CropBatch.of(images, [regions, regions])


def loaded(path: Path, dtype: str, device: str) -> Captioner:
    return load_captioner(TeacherConfig(model=str(path), dtype=dtype), device)  # type: ignore[arg-type]


@pytest.mark.parametrize("fixture", ["tiny_blip_path", "tiny_git_path", "tiny_vit_bert_path"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.02), ("bfloat16", 1.0)])
def test_scores_are_those_of_the_cpu(
    fixture: str, dtype: str, tolerance: float, request: pytest.FixtureRequest
) -> None:
    """Catches masks, caches or crops that are right on the CPU only.

    Float32 leaves room for resizing in floats instead of 8 bits, bfloat16 for its rounding of
    sums of some six tokens.
    """
    path = request.getfixturevalue(fixture)
    expected = loaded(path, "float32", "cpu").score(crops(), PROMPTS).log_likelihoods
    found = loaded(path, dtype, "cuda").score(crops(), PROMPTS).log_likelihoods
    assert np.abs(found - expected).max() < tolerance


def test_searches_and_captions_run_there(tiny_blip_path: Path) -> None:
    """Catches bookkeeping left on the CPU by a search or by writing captions."""
    captioner = loaded(tiny_blip_path, "float16", "cuda")
    prompts = ClassPrompts.of([[prompt] for prompt in PROMPTS], 1)
    top = captioner.score_top(crops(), prompts, TopSearch(1))  # type: ignore[attr-defined]
    assert (np.isfinite(top).sum(1) == 1).all()
    for decoding, count in (("greedy", 1), ("beam", 2), ("sample", 3)):
        settings = CaptionConfig.model_validate({"decoding": decoding, "count": count})
        assert [len(of_crop) for of_crop in captioner.caption(crops(), settings)] == [count] * 4
