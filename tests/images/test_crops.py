"""Tests of regions as pixels."""

from __future__ import annotations

import numpy as np
import pytest

from hts_ray.images.crops import CropBatch, crop_region
from hts_ray.images.decode import DecodedImage
from hts_ray.images.regions import Region


def image(seed: int, height: int, width: int, scale: int = 1) -> DecodedImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return DecodedImage(pixels, width * scale, height * scale)


def test_crops_are_views_in_order() -> None:
    """Catches crops that come from another image, or that copy every region's pixels."""
    images = [image(0, 20, 30), image(1, 40, 10, scale=2)]
    regions = [
        [Region((0, 0, 30, 20), "whole"), Region((5, 6, 15, 16), "grid")],
        [Region((4, 10, 20, 80), "union", 0.2)],
    ]
    crops = CropBatch.of(images, regions)
    assert len(crops) == 3
    np.testing.assert_array_equal(crops[1], images[0].pixels[6:16, 5:15])
    np.testing.assert_array_equal(crops[2], images[1].pixels[5:40, 2:10])  # decoded at half size
    assert all(
        np.shares_memory(crop, images[n].pixels) for crop, n in zip(crops, (0, 0, 1), strict=True)
    )
    part = crops[1:]
    assert isinstance(part, CropBatch)
    assert [crop.shape for crop in part] == [(10, 10, 3), (35, 8, 3)]
    for crop, (number, (left, top, right, bottom)) in zip(crops, crops.spans, strict=True):
        np.testing.assert_array_equal(crop, crops.images[number][top:bottom, left:right])
    with pytest.raises(IndexError):
        crops[3]


def test_a_small_region_of_a_shrunk_image_keeps_a_pixel() -> None:
    """Catches empty crops, which no image processor takes."""
    large = DecodedImage(np.zeros((50, 100, 3), np.uint8), 2000, 1000)
    assert crop_region(large, Region((1999, 999, 2000, 1000), "grid")).shape == (1, 1, 3)
    assert crop_region(large, Region((0, 0, 2000, 1000), "whole")).shape == (50, 100, 3)
