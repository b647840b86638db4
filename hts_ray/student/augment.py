"""Augmentation of a whole batch on its device: crop, flip, brightness, contrast.

Every image of the batch draws its own numbers. They are drawn on the CPU, so that a seed means
the same augmentations on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from hts_ray.config import AugmentConfig

_LARGEST_MARGIN = 1.25  # beyond it a crop would rather be upsampled than stored larger


def stored_size(image_size: int, config: AugmentConfig) -> int:
    """Return the side at which training images are kept, so that a crop need not be upsampled."""
    if not _crops(config):
        return image_size
    return math.ceil(image_size * min(_LARGEST_MARGIN, 1 / math.sqrt(config.crop_scale[0])))


def augment(
    pixels: Tensor, image_size: int, config: AugmentConfig, generator: torch.Generator
) -> Tensor:
    """Turn uint8 (N, P, P, 3) into augmented images (N, 3, S, S) in 0..1 with S = `image_size`.

    `generator` is a CPU generator; the result is on the device of `pixels`. Crop and flip are
    one bilinear resampling; without crops nothing is resampled.
    """
    images = pixels.permute(0, 3, 1, 2).float() / 255
    draws_N7 = torch.rand(len(pixels), 7, generator=generator)
    flips_N = draws_N7[:, 5] < (0.5 if config.flip else 0.0)
    if _crops(config) or images.shape[-1] != image_size:
        boxes_N23 = _crop_transforms(draws_N7, flips_N, config).to(images.device)
        grid = F.affine_grid(boxes_N23, [len(images), 3, image_size, image_size], False)
        images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    else:
        flips_N111 = flips_N.to(images.device)[:, None, None, None]
        images = torch.where(flips_N111, images.flip(-1), images)
    if config.color_jitter:
        factors_N2 = 1 + config.color_jitter * (2 * draws_N7[:, 3:5] - 1)
        images = _jitter(images, factors_N2.to(images.device))
    return images


def _crops(config: AugmentConfig) -> bool:
    return config.crop_scale[0] < 1


def _crop_transforms(draws_N7: Tensor, flips_N: Tensor, config: AugmentConfig) -> Tensor:
    """Return affine_grid's transforms (N, 2, 3) of crops inside the image, mirrored by flips."""
    low, high = config.crop_scale if _crops(config) else (1.0, 1.0)
    area_N = low + (high - low) * draws_N7[:, 0]
    narrow, wide = config.crop_ratio if _crops(config) else (1.0, 1.0)
    ratio_N = torch.exp(math.log(narrow) + math.log(wide / narrow) * draws_N7[:, 1])
    width_N = (area_N * ratio_N).sqrt().clamp(max=1)
    height_N = (area_N / ratio_N).sqrt().clamp(max=1)
    # affine_grid's coordinates run from -1 to 1.
    x_N = (1 - width_N) * (2 * draws_N7[:, 2] - 1)
    y_N = (1 - height_N) * (2 * draws_N7[:, 6] - 1)
    mirror_N = torch.where(flips_N, -1.0, 1.0)
    zero_N = torch.zeros_like(x_N)
    rows = [torch.stack([width_N * mirror_N, zero_N, x_N]), torch.stack([zero_N, height_N, y_N])]
    return torch.stack(rows).permute(2, 0, 1)


def _jitter(images: Tensor, factors_N2: Tensor) -> Tensor:
    """Scale the brightness, then the contrast around each image's mean gray, within 0..1."""
    brightness, contrast = factors_N2[:, :1, None, None], factors_N2[:, 1:, None, None]
    images = (images * brightness).clamp(0, 1)
    gray = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - gray) * contrast + gray).clamp(0, 1)
