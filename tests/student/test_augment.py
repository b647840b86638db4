"""Augmentation: equal to torchvision's, each image by itself, and few operations a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from hts_ray.config import AugmentConfig
from hts_ray.student.augment import augment, draw, stored_size

PLAIN = {"flip": False, "crop_scale": (1.0, 1.0), "color_jitter": 0.0}


def noise(count: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)


def test_augmentation_keeps_pixels_in_place_when_it_is_off():
    """Catches a half-pixel shift or a blur by resampling where nothing has to be resampled."""
    config = AugmentConfig(**PLAIN)
    pixels = noise(16, 32)
    plain = pixels.permute(0, 3, 1, 2).float() / 255
    assert stored_size(32, config) == 32
    assert torch.equal(
        augment(pixels, draw(range(16), 0, 0, 32, config).table(32), 32, config), plain
    )
    config = AugmentConfig(**PLAIN | {"flip": True})
    drawn = draw(range(16), 0, 0, 32, config)
    assert 0 < drawn.mirrored_N.sum() < 16
    for image, before, mirrored in zip(
        augment(pixels, drawn.table(32), 32, config), plain, drawn.mirrored_N, strict=True
    ):
        assert torch.equal(image, before.flip(-1) if mirrored else before)


@pytest.mark.parametrize("scale", [(0.7, 1.0), (0.1, 0.5)])
@pytest.mark.parametrize("size", [32, 33])
def test_pixels_are_those_of_torchvision(scale, size):
    """Catches a missing antialias, taps beyond the crop, an exchanged axis or order of colours."""
    config = AugmentConfig(crop_scale=scale)
    side = stored_size(size, config)
    assert side == math.ceil(size * min(1.25, scale[0] ** -0.5))
    drawn, pixels = draw(range(24), 1, 2, side, config), noise(24, side)
    images = augment(pixels, drawn.table(size), size, config)
    for i in range(24):
        (left, top), (width, height) = drawn.start_N2[i].astype(int), drawn.size_N2[i].astype(int)
        image = functional.resized_crop(
            pixels[i].permute(2, 0, 1).float() / 255,
            top, left, height, width, [size, size],
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        ).clamp(0, 1)  # fmt: skip
        image = image.flip(-1) if drawn.mirrored_N[i] else image
        changes = [functional.adjust_brightness, functional.adjust_contrast]
        pairs = list(zip(changes, drawn.factors_N2[i].tolist(), strict=True))
        for change, factor in reversed(pairs) if drawn.contrast_first_N[i] else pairs:
            image = change(image, factor)
        torch.testing.assert_close(images[i], image, rtol=0, atol=2e-5)


def largest_gap(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Return the Kolmogorov-Smirnov statistic of two samples."""
    both = np.sort(np.concatenate([mine, theirs]))
    at = [
        np.searchsorted(np.sort(sample), both, "right") / len(sample) for sample in (mine, theirs)
    ]
    return float(np.abs(at[0] - at[1]).max())


def test_what_is_drawn_is_distributed_as_torchvision_draws():
    """Catches areas drawn by sides, ratios drawn evenly, corners that miss an edge, rare flips."""
    config, side, count = AugmentConfig(), 268, 4000
    drawn = draw(range(count), 0, 0, side, config)
    crop = v2.RandomResizedCrop(224, config.crop_scale, config.crop_ratio)
    jitter = v2.ColorJitter(config.color_jitter, config.color_jitter)
    torch.manual_seed(0)
    image = [torch.zeros(3, side, side)]
    boxes = [crop.make_params(image) for _ in range(count)]
    colours = [jitter.make_params(image) for _ in range(count)]
    theirs = {name: np.array([box[name] for box in boxes]) for name in boxes[0]}
    (left, top), (width, height) = drawn.start_N2.T, drawn.size_N2.T
    pairs = [
        (left, theirs["left"]),
        (top, theirs["top"]),
        (width * height, theirs["width"] * theirs["height"]),
        (width / height, theirs["width"] / theirs["height"]),
        (left + width, theirs["left"] + theirs["width"]),
    ]
    for place, name in enumerate(("brightness_factor", "contrast_factor")):
        pairs.append((drawn.factors_N2[:, place], np.array([c[name] for c in colours])))
    # Two samples of one distribution differ by more than this in one case of 10,000.
    limit = 2.23 * (2 / count) ** 0.5
    assert max(largest_gap(*pair) for pair in pairs) < limit
    first = np.mean(
        [c["fn_idx"].tolist().index(1) < c["fn_idx"].tolist().index(0) for c in colours]
    )
    assert abs(drawn.contrast_first_N.mean() - first) < 0.04
    assert abs(drawn.mirrored_N.mean() - 0.5) < 0.04
    correlations = np.corrcoef(np.stack([left / (side - width + 1), top, *drawn.factors_N2.T]))
    assert np.abs(correlations - np.eye(4)).max() < 0.06


@pytest.mark.parametrize("ratio", [(1.5, 2.0), (0.3, 0.5)])
def test_without_a_crop_that_fits_the_largest_in_the_middle_is_taken(ratio):
    """Catches a first try that is taken although it lies outside of the image."""
    config = AugmentConfig(crop_scale=(0.99, 1.0), crop_ratio=ratio)
    drawn = draw(range(3), 0, 0, 100, config)
    box = v2.RandomResizedCrop(64, (0.99, 1.0), ratio).make_params([torch.zeros(3, 100, 100)])
    expected = [box["left"], box["top"], box["width"], box["height"]]
    assert np.concatenate([drawn.start_N2, drawn.size_N2], axis=1).tolist() == [expected] * 3


def test_an_image_gets_the_same_in_any_batch_and_another_in_every_epoch():
    """Catches draws that depend on the worker or on what came before, or not on epoch or seed."""
    config = AugmentConfig()
    whole = draw(range(40), 3, 5, 64, config).table(32)
    part = draw([7, 30], 3, 5, 64, config).table(32)
    assert torch.equal(part, whole[[7, 30]])
    for seed, epoch in ((3, 6), (4, 5)):
        assert not (draw(range(40), seed, epoch, 64, config).table(32) == whole).all(1).any()
    pixels = noise(40, 64)
    alone = augment(pixels[7:8], part[:1], 32, config)
    torch.testing.assert_close(alone[0], augment(pixels, whole, 32, config)[7])


class _Counted(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_a_batch_takes_at_most_60_operations():
    """Catches a loop over images: a GPU would wait for every one of its small kernels."""
    config, counts = AugmentConfig(), []
    for count in (2, 16):
        table = draw(range(count), 0, 0, 39, config).table(32)
        with _Counted() as counted:
            augment(noise(count, 39), table, 32, config)
        counts.append(counted.operations - 1)  # the noise
    assert counts == [min(60, counts[0])] * 2
