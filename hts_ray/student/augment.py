"""Augmentation on the batch's device: the paper's crop, flip, brightness and contrast.

What an image gets is drawn on the CPU from the seed, the epoch and its row alone: neither its
batch, nor the worker, nor the device changes it. The distribution is that of torchvision's
RandomResizedCrop, RandomHorizontalFlip and ColorJitter.

A batch is cropped, resized and mirrored by two weighted sums, one an axis, with the weights of
torchvision's antialiased bicubic filter inside the crop. `grid_sample` knows no such filter, and
most crops are shrunk, because stored images are larger than the student's.

Shapes: N images, P pixels of a stored side, S of the student's, T neighbours of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hts_ray.config import AugmentConfig
from hts_ray.store.aliases import BoolArray, FloatArray

_LARGEST_MARGIN = 1.25  # images are not stored larger than this; smaller crops are upsampled
_TRIES = 10  # to find a crop that fits, as torchvision has it
_GREY = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision has it


def stored_size(image_size: int, config: AugmentConfig) -> int:
    """Return the side at which training images are stored, so that crops need no upsampling."""
    if not _crops(config):
        return image_size
    return math.ceil(image_size * min(_LARGEST_MARGIN, 1 / math.sqrt(config.crop_scale[0])))


class Drawn(NamedTuple):
    """What N images get: a crop in pixels of the stored image, and what is done to it.

    `start_N2` is (left, top), `size_N2` (width, height) and `factors_N2` (brightness, contrast),
    whose order an image has too.
    """

    start_N2: FloatArray
    size_N2: FloatArray
    mirrored_N: BoolArray
    factors_N2: FloatArray
    contrast_first_N: BoolArray

    def table(self, image_size: int) -> Tensor:
        """Return what `augment` takes, (N, 18, 1, 1) float32 on the CPU.

        Of x and y: first and last pixel, slope, offset and reach; then of each change of colour a
        factor and, for red, green and blue, how much of the image's mean is added. The first one
        turns 0..255 into 0..1.
        """
        scale_N2, flip_N1 = self.size_N2 / image_size, self.mirrored_N[:, None] & (True, False)
        # Where pixel j of the student's image lies: at slope * j + offset, in stored pixels.
        slope_N2 = np.where(flip_N1, -scale_N2, scale_N2)
        first_N2 = np.where(flip_N1, image_size - 0.5, 0.5) * scale_N2 + self.start_N2 - 0.5
        # Shrinking averages over a whole new pixel, enlarging interpolates between old ones.
        reach_N2 = np.maximum(scale_N2, 1)
        first = self.contrast_first_N[:, None]
        changes = []
        for is_contrast_N1 in (first, ~first):
            factor_N1 = np.where(is_contrast_N1, self.factors_N2[:, 1:], self.factors_N2[:, :1])
            changes += [factor_N1, np.where(is_contrast_N1, 1 - factor_N1, 0) * _GREY]
        changes[:2] = [change / 255 for change in changes[:2]]  # from 0..255 to 0..1
        last_N2 = self.start_N2 + self.size_N2 - 1
        columns = (self.start_N2, last_N2, slope_N2, first_N2, reach_N2, *changes)
        table = np.concatenate(columns, axis=1).astype(np.float32)
        return torch.from_numpy(table[..., None, None])


def draw(rows: Sequence[int], seed: int, epoch: int, stored: int, config: AugmentConfig) -> Drawn:
    """Draw what the images of some rows, stored at a side of `stored`, get in an epoch."""
    numbers = [np.random.default_rng((seed, epoch, row)).random(6 + 2 * _TRIES) for row in rows]
    uniform = np.array(numbers).reshape(-1, 6 + 2 * _TRIES)
    size_N2 = np.full((len(uniform), 2), float(stored))
    start_N2 = np.zeros_like(size_N2)
    if _crops(config):
        start_N2, size_N2 = _boxes(uniform[:, :2], uniform[:, 6:], stored, config)
    low, high = max(0.0, 1 - config.color_jitter), 1 + config.color_jitter
    mirrored_N, contrast_first_N = (uniform[:, 4:6] < (0.5 * config.flip, 0.5)).T
    factors_N2 = low + (high - low) * uniform[:, 2:4]
    return Drawn(start_N2, size_N2, mirrored_N, factors_N2, contrast_first_N)


def _boxes(
    corner_N2: FloatArray, shape: FloatArray, stored: int, config: AugmentConfig
) -> tuple[FloatArray, FloatArray]:
    """Return (left, top) and (width, height) of a crop an image, from numbers in 0..1.

    The first of ten areas and aspect ratios that fits is taken, or the largest crop in the middle
    whose ratio is allowed. Source: torchvision.transforms.v2.RandomResizedCrop.
    """
    (small, large), ratios = config.crop_scale, config.crop_ratio
    low, high = np.log(ratios)
    area = stored**2 * (small + (large - small) * shape[:, :_TRIES])
    ratio = np.exp(low + (high - low) * shape[:, _TRIES:])
    sizes = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], axis=2)))
    fits = ((sizes > 0) & (sizes <= stored)).all(axis=2)
    size_N2 = sizes[np.arange(len(sizes)), fits.argmax(axis=1)]
    start_N2 = np.floor(corner_N2 * (stored - size_N2 + 1))
    nearest = min(max(1.0, ratios[0]), ratios[1])
    whole = np.rint([stored * min(1.0, nearest), stored / max(1.0, nearest)])
    found = fits.any(axis=1, keepdims=True)
    return np.where(found, start_N2, (stored - whole) // 2), np.where(found, size_N2, whole)


def augment(pixels: Tensor, table: Tensor, image_size: int, config: AugmentConfig) -> Tensor:
    """Turn uint8 (N, P, P, 3) into augmented images (N, 3, S, S) in 0..1 with S = `image_size`.

    `table` is that of `Drawn`, on the device of `pixels`. Nothing waits for the device. Without
    crops and with P = S nothing is resampled.
    """
    axes, factor, grey, factor_2, grey_2 = table.split_with_sizes((10, 1, 3, 1, 3), dim=1)
    if _crops(config) or pixels.shape[1] != image_size:
        of_axes = axes.transpose(0, 1).contiguous().split_with_sizes((2, 2, 2, 2, 2))
        images = _crop(pixels, of_axes, image_size)
    else:
        images = pixels.permute(0, 3, 1, 2).float()
        if config.flip:
            images = torch.where(axes[:, 4:5] < 0, images.flip(-1), images)
    images = images.clamp_(0, 255)  # a filter that sharpens passes white and black
    if not config.color_jitter:
        return images.div_(255)
    for by, share_of_grey in ((factor, grey), (factor_2, grey_2)):
        mean_grey = (images.mean((2, 3), keepdim=True) * share_of_grey).sum(1, keepdim=True)
        images = torch.addcmul(mean_grey, images, by).clamp_(0, 1)
    return images


def _crop(pixels: Tensor, axes: Sequence[Tensor], size: int) -> Tensor:
    """Return crops (N, 3, S, S) float32 in 0..255 of uint8 (N, P, P, 3).

    `axes` are start, last, slope, offset and reach of `Drawn.table`, (2, N, 1, 1) of x and y. A
    row of a crop is a weighted sum of T rows of its image, and so is a column.
    """
    stored = pixels.shape[1]
    places, weights = _neighbours(axes, size, stored)
    bags = torch.arange(
        0, places.shape[1], places.shape[1] // (len(pixels) * size), device=pixels.device
    )
    (across, down), (across_weights, down_weights) = places.unbind(), weights.unbind()

    def weighted(lines: Tensor, chosen: Tensor, by: Tensor) -> Tensor:
        return torch.embedding_bag(lines, chosen, bags, per_sample_weights=by, mode=0)[0]

    rows = weighted(pixels.view(-1, stored * 3).float(), down, down_weights)
    columns = rows.view(-1, size, stored, 3).permute(0, 2, 3, 1).reshape(-1, 3 * size)
    columns = weighted(columns, across, across_weights)
    return columns.view(-1, size, 3, size).permute(0, 2, 3, 1)


def _neighbours(axes: Sequence[Tensor], size: int, stored: int) -> tuple[Tensor, Tensor]:
    """Return which T lines each line of a crop is made of, and how much of each: (2, N * S * T).

    Of the axes x and y; lines are counted over all images.
    """
    start, last, slope, offset, reach = axes
    taps = math.ceil(2 * max(1.0, stored / size) + 0.5) - 1
    place = torch.arange(size, device=slope.device)[:, None] * slope + offset
    near = place.round() + torch.arange(-taps, taps + 1, device=slope.device)
    x = ((near - place).abs() / reach).clamp(max=2)
    # The cubic of Keys with a = -0.5, as Pillow and torchvision have it, twice.
    weights = (1 - x) * torch.where(x < 1, (2 - 3 * x) * x + 2, (2 - x).square())
    inside = near.clamp(start, last)
    weights = weights * (near == inside)
    images = torch.arange(0, slope.shape[1] * stored, stored, device=slope.device)
    places = inside.long() + images.view(-1, 1, 1)
    return places.flatten(1), (weights / weights.sum(-1, keepdim=True)).flatten(1)


def _crops(config: AugmentConfig) -> bool:
    return config.crop_scale[0] < 1
