"""Tests of what regions become before a model sees them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hts_ray.images.crops import CropBatch
from hts_ray.teacher.models.inputs import (
    RegionInputs,
    collate,
    extended,
    on_device,
    pixel_preparation,
)


def random_images(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]


@pytest.mark.parametrize("fixture", ["tiny_blip_path", "tiny_git_path", "tiny_vit_bert_path"])
def test_preparation_equals_the_processor(fixture: str, request: pytest.FixtureRequest) -> None:
    """Catches resizing, cropping or normalizing other than the checkpoint was trained with."""
    from transformers import AutoImageProcessor

    path = request.getfixturevalue(fixture)
    images = random_images((64, 48), (30, 70), (64, 48), (32, 32), (9, 300))
    processor = AutoImageProcessor.from_pretrained(path)
    ours = pixel_preparation(processor, "cpu", torch.float32)(images)
    theirs = processor(images=images, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_collating_pads_tokens_left_and_pixels_behind() -> None:
    """Catches padding on the wrong side, or token ids padded with an image's placeholder."""
    short = {
        "input_ids": torch.tensor([[7, 8]]),
        "attention_mask": torch.ones(1, 2, dtype=torch.long),
        "pixel_values": torch.ones(1, 1, 3, 2, 2),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }
    long = {
        "input_ids": torch.tensor([[4, 5, 6]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "pixel_values": torch.ones(1, 2, 3, 2, 2),
        "image_grid_thw": torch.tensor([[1, 4, 2]]),
    }
    joined = collate([short, long], pad_id=9)
    assert joined["input_ids"].tolist() == [[9, 7, 8], [4, 5, 6]]
    assert joined["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert joined["pixel_values"].shape == (2, 2, 3, 2, 2)
    assert joined["pixel_values"][0].sum((1, 2, 3)).tolist() == [12, 0]
    assert joined["image_grid_thw"].tolist() == [[1, 2, 2], [1, 4, 2]]


def test_patches_in_one_row_are_joined_in_order() -> None:
    """Catches Qwen's patches, of which regions have differing numbers, padded or mixed up."""
    parts = [{"pixel_values": torch.full((count, 6), float(count))} for count in (4, 8)]
    joined = collate(parts, pad_id=0)["pixel_values"]
    assert joined[:, 0].tolist() == [4.0] * 4 + [8.0] * 8


def test_prompt_tokens_are_text_and_seen() -> None:
    """Catches a prompt's tokens given the types of an image, or of PaliGemma's prefix."""
    inputs = {
        "input_ids": torch.tensor([[1, 2]]),
        "attention_mask": torch.ones(1, 2, dtype=torch.long),
        "token_type_ids": torch.zeros(1, 2, dtype=torch.long),
        "mm_token_type_ids": torch.ones(1, 2, dtype=torch.int32),
        "pixel_values": torch.ones(1, 3, 2, 2),
    }
    assert extended(inputs, torch.tensor([[5]]))["token_type_ids"].tolist() == [[0, 0, 0]]
    longer = extended(inputs, torch.tensor([[5, 6, 7]]), token_type=1)
    assert longer["input_ids"].tolist() == [[1, 2, 5, 6, 7]]
    assert longer["attention_mask"].tolist() == [[1] * 5]
    assert longer["token_type_ids"].tolist() == [[0, 0, 1, 1, 1]]
    assert longer["mm_token_type_ids"].tolist() == [[1, 1, 0, 0, 0]]
    assert longer["mm_token_type_ids"].dtype == torch.int32
    assert inputs["input_ids"].shape == (1, 2)


def test_regions_are_processed_when_asked_for() -> None:
    """Catches all tiles of all regions being made, and held, at once."""
    made: list[int] = []

    def process(image: np.ndarray) -> dict[str, torch.Tensor]:
        made.append(image.shape[1])
        return {"input_ids": torch.zeros(1, image.shape[1])}

    regions = RegionInputs(random_images((5, 4), (6, 4), (7, 4)), process)
    assert len(regions) == 3
    assert not made
    widths = [inputs["input_ids"].shape[1] for inputs in itertools.islice(regions, 2)]
    assert widths == made == [5, 6]


def test_crops_of_an_image_travel_as_one() -> None:
    """Catches crops cut elsewhere on the device than on the host, or images sent twice."""
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (40, 50, 3), np.uint8),
        rng.integers(0, 256, (9, 9, 3), np.uint8),
    ]
    images[0].setflags(write=False)  # as pixels out of Arrow are
    spans = [(0, (0, 0, 50, 40)), (0, (5, 6, 20, 30)), (1, (1, 2, 9, 9)), (0, (5, 6, 20, 30))]
    crops = CropBatch(images, spans)
    found = on_device(crops, "cpu")
    for tensor, crop in zip(found, crops, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), crop)
    assert found[1].untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr()
    plain = on_device([np.array(crop) for crop in crops], "cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
