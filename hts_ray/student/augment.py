"""Augmentation on the batch's device: the paper's crop, flip, brightness and contrast.

Every image of a batch draws its own numbers, from torch's global generator on the CPU, so that a
seed means the same augmentations on every device.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from hts_ray.config import AugmentConfig

_LARGEST_MARGIN = 1.25  # images are not stored larger than this; smaller crops are upsampled


def stored_size(image_size: int, config: AugmentConfig) -> int:
    """Return the side at which training images are stored, so that crops need no upsampling."""
    if not _crops(config):
        return image_size
    return math.ceil(image_size * min(_LARGEST_MARGIN, 1 / math.sqrt(config.crop_scale[0])))


def augment(pixels: Tensor, image_size: int, config: AugmentConfig) -> Tensor:
    """Turn uint8 (N, P, P, 3) into augmented images (N, 3, S, S) in 0..1 with S = `image_size`.

    The result is on the device of `pixels`. Without crops and with P = S nothing is resampled.
    """
    images = pixels.permute(0, 3, 1, 2)
    transform = _transform(image_size, config, images.shape[-1])
    # torchvision draws once per call, and each image should get its own crop.
    return torch.stack([transform(image) for image in images]).float() / 255


@lru_cache(maxsize=8)
def _transform(image_size: int, config: AugmentConfig, stored: int) -> v2.Compose:
    steps: list[v2.Transform] = []
    if _crops(config):
        steps.append(
            v2.RandomResizedCrop(
                image_size,
                scale=config.crop_scale,
                ratio=config.crop_ratio,
                interpolation=InterpolationMode.BICUBIC,
            )
        )
    elif stored != image_size:
        steps.append(v2.Resize((image_size, image_size), InterpolationMode.BICUBIC))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.color_jitter:
        steps.append(v2.ColorJitter(brightness=config.color_jitter, contrast=config.color_jitter))
    return v2.Compose(steps or [v2.Identity()])


def _crops(config: AugmentConfig) -> bool:
    return config.crop_scale[0] < 1
