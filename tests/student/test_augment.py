"""Augmentation: nothing moves that should not, and every image draws for itself."""

from __future__ import annotations

import math

import torch

from hts_ray.config import AugmentConfig
from hts_ray.student.augment import augment, stored_size


def test_augmentation_keeps_pixels_in_place_when_it_is_off():
    """Catches a half-pixel shift or a blur by resampling where nothing has to be resampled."""
    config = AugmentConfig(flip=False, crop_scale=(1.0, 1.0), color_jitter=0.0)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    images = augment(pixels, 32, config)
    assert torch.equal(images, pixels.permute(0, 3, 1, 2).float() / 255)
    assert stored_size(32, config) == 32
    torch.manual_seed(3)
    flipped = augment(pixels, 32, AugmentConfig(crop_scale=(1.0, 1.0), color_jitter=0))
    same = [torch.equal(a, b) for a, b in zip(flipped, images, strict=True)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True)]
    assert all(s != m for s, m in zip(same, mirrored, strict=True))


def test_crops_stay_inside_have_the_asked_area_and_differ_by_image():
    """Catches one crop for the whole batch, areas outside crop_scale, and padding in the image."""
    config = AugmentConfig(flip=False, color_jitter=0.0)
    size = stored_size(32, config)
    assert size == math.ceil(32 / math.sqrt(0.7))
    ramp = torch.linspace(0, 255, size).round().to(torch.uint8)
    pixels = torch.zeros(64, size, size, 3, dtype=torch.uint8)
    pixels[..., 0], pixels[..., 1] = ramp[None, None, :], ramp[None, :, None]
    torch.manual_seed(0)
    images = augment(pixels, 32, config)
    spans = [images[:, c].amax((1, 2)) - images[:, c].amin((1, 2)) for c in (0, 1)]
    area = spans[0] * spans[1] * (32 / 31) ** 2 * ((size - 1) / size) ** 2
    assert area.min() > 0.62
    assert area.max() < 1.05
    assert len({tuple(corner) for corner in images[:, :2, 0, 0].tolist()}) > 30
    torch.manual_seed(0)
    assert torch.equal(images, augment(pixels, 32, config))


def test_brightness_and_contrast_differ_by_image_and_stay_in_range():
    """Catches one factor for the whole batch, and a jitter that is never applied."""
    config = AugmentConfig(flip=False, crop_scale=(1.0, 1.0), color_jitter=0.4)
    torch.manual_seed(0)
    images = augment(torch.full((32, 8, 8, 3), 100, dtype=torch.uint8), 8, config)
    means = images.mean((1, 2, 3)) * 255 / 100
    assert means.min() > 0.58
    assert means.max() < 1.42
    assert means.std() > 0.1
