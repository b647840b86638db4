"""Tests of what regions become before a model sees them."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from hts_ray.images.crops import CropBatch
from hts_ray.teacher.models import inputs
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
    given = {
        "input_ids": torch.tensor([[1, 2]]),
        "attention_mask": torch.ones(1, 2, dtype=torch.long),
        "token_type_ids": torch.zeros(1, 2, dtype=torch.long),
        "mm_token_type_ids": torch.ones(1, 2, dtype=torch.int32),
        "pixel_values": torch.ones(1, 3, 2, 2),
    }
    assert extended(given, torch.tensor([[5]]))["token_type_ids"].tolist() == [[0, 0, 0]]
    longer = extended(given, torch.tensor([[5, 6, 7]]), token_type=1)
    assert longer["input_ids"].tolist() == [[1, 2, 5, 6, 7]]
    assert longer["attention_mask"].tolist() == [[1] * 5]
    assert longer["token_type_ids"].tolist() == [[0, 0, 1, 1, 1]]
    assert longer["mm_token_type_ids"].tolist() == [[1, 1, 0, 0, 0]]
    assert longer["mm_token_type_ids"].dtype == torch.int32
    assert given["input_ids"].shape == (1, 2)


def whole_crops(count: int) -> CropBatch:
    """Return crops whose widths are their numbers + 1."""
    images = random_images((count, 4))
    return CropBatch(images, [(0, (0, 0, number + 1, 4)) for number in range(count)])


def numbered(made: list[int], broken: int = -1) -> Any:
    """Return what makes inputs of a crop and notes its number, or fails on one."""

    def process(image: np.ndarray) -> dict[str, torch.Tensor]:
        number = image.shape[1] - 1
        made.append(number)
        if number == broken:
            raise ValueError(f"region {number}")
        return {"input_ids": torch.full((1, 1), number)}

    return process


def numbers(regions: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    return [int(region["input_ids"]) for region in regions]


def await_length(made: list[int], length: int) -> None:
    deadline = time.monotonic() + 10
    while len(made) < length:
        assert time.monotonic() < deadline, made
        time.sleep(0.01)


def test_regions_are_prepared_ahead_and_not_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a GPU that waits for the next region, and all tiles of all regions held at once."""
    monkeypatch.setattr(inputs, "_AHEAD", 3)
    made: list[int] = []
    regions = iter(RegionInputs(whole_crops(20), numbered(made)))
    assert not made
    assert numbers(islice(regions, 2)) == [0, 1]
    await_length(made, 5)  # while the second is in use, three more
    time.sleep(0.05)
    assert sorted(made) == [0, 1, 2, 3, 4]
    assert numbers(regions) == list(range(2, 20))
    monkeypatch.setattr(inputs, "_AHEAD_BYTES", {"cpu": 16})  # two regions'
    made.clear()
    regions = iter(RegionInputs(whole_crops(20), numbered(made)))
    assert numbers(islice(regions, 2)) == [0, 1]
    await_length(made, 4)
    time.sleep(0.05)
    assert sorted(made) == [0, 1, 2, 3]


def test_the_next_slice_is_begun_and_nothing_is_made_twice() -> None:
    """Catches a GPU that waits at the start of every slice, and regions mixed up between slices."""
    crops, made = whole_crops(9), []
    process = numbered(made)
    assert numbers(RegionInputs(crops[0:4], process)) == [0, 1, 2, 3]
    await_length(made, 9)
    assert numbers(RegionInputs(crops[4:8], process)) == [4, 5, 6, 7]
    assert numbers(RegionInputs(crops[8:], process)) == [8]
    assert sorted(made) == list(range(9))
    # Another part of the batch, as after an error, or another text to process it with.
    assert numbers(RegionInputs(crops[2:4], process)) == [2, 3]
    assert numbers(RegionInputs(crops[4:6], numbered([]))) == [4, 5]
    assert numbers(RegionInputs(crops[::4], process)) == [0, 4, 8]


def test_threads_end_with_their_batch() -> None:
    """Catches threads, and the regions that they made, of every batch kept for the whole run."""
    crops = whole_crops(9)
    process = numbered([])
    gc.disable()
    try:
        assert numbers(RegionInputs(crops[0:4], process)) == [0, 1, 2, 3]
        kept = weakref.ref(crops.kept[process][1])
        del crops
        assert kept() is None
    finally:
        gc.enable()


def test_what_cannot_be_prepared_fails_in_its_place() -> None:
    """Catches a bad region that costs the ones before it, or passes for another's."""
    regions = iter(RegionInputs(whole_crops(6), numbered([], broken=3)))
    assert numbers(islice(regions, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="region 3"):
        next(regions)


def test_an_image_travels_once_for_all_its_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches images that are sent again with every slice, or with what is left of one."""
    sent: list[int] = []

    def to_device(tensor: torch.Tensor, device: object) -> torch.Tensor:
        sent.append(tensor.numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(inputs, "to_device", to_device)
    images = [np.zeros((1536, 2048, 3), np.uint8) for _ in range(16)]
    spans = [(n % 16, (n, n, 1024 + n, 768 + n)) for n in range(224)]
    crops = CropBatch(images, spans)
    for size in (64, 32, 16):  # halved for want of memory
        for first in range(0, 224, size):
            on_device(crops[first : first + size], "cpu")
    assert sum(sent) <= 1.05 * sum(image.nbytes for image in images)


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
