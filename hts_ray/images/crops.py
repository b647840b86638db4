"""Regions of decoded images as the pixels that a teacher looks at.

Knows geometry and arrays, no model. Shape legend: R crops, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from PIL import Image

from hts_ray.images.decode import DecodedImage
from hts_ray.images.regions import Region
from hts_ray.store.aliases import Pixels

Span = tuple[int, int, int, int]


class CropBatch(Sequence[Pixels]):
    """R crops of a few images: a sequence of uint8 views (H, W, 3), and where each was cut.

    A teacher may take the views one by one like any other pixels, or, to send every image to
    its device once however much its crops overlap, `images` and `spans`: crop r is
    `images[n][top:bottom, left:right]` with `(n, (left, top, right, bottom)) = spans[r]`.

    A slice is a batch too. `part` says which crops of the `whole` list of spans it has; what a
    teacher keeps in `kept` from one slice to the next lives as long as they do.
    """

    def __init__(
        self,
        images: Sequence[Pixels],
        spans: Sequence[tuple[int, Span]],
        part: range | None = None,
        kept: dict[Any, Any] | None = None,
    ) -> None:
        self.images = images
        self.whole = spans
        self.part = range(len(spans)) if part is None else part
        self.kept: dict[Any, Any] = {} if kept is None else kept

    @property
    def spans(self) -> Sequence[tuple[int, Span]]:
        """Where each crop was cut: the image's number, and the span."""
        return [self.whole[number] for number in self.part]

    @classmethod
    def of(cls, images: Sequence[DecodedImage], regions: Sequence[Sequence[Region]]) -> CropBatch:
        """Cut every image's regions, image by image."""
        spans = [
            (number, pixel_span(image, region))
            for number, (image, of_image) in enumerate(zip(images, regions, strict=True))
            for region in of_image
        ]
        return cls([image.pixels for image in images], spans)

    def __len__(self) -> int:
        return len(self.part)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> CropBatch: ...
    def __getitem__(self, index: int | slice) -> Pixels | CropBatch:
        if isinstance(index, slice):
            return CropBatch(self.images, self.whole, self.part[index], self.kept)
        number, (left, top, right, bottom) = self.whole[self.part[index]]
        return self.images[number][top:bottom, left:right]


def pixel_span(image: DecodedImage, region: Region) -> Span:
    """Return (left, top, right, bottom) of a region in an image's pixels.

    Boxes count in pixels of the original image. Where that was downscaled while decoding, the
    box shrinks with it, to no less than one pixel a side.
    """
    height, width = image.pixels.shape[:2]
    left, top, right, bottom = region.box
    x0, x1 = _span(left, right, width / image.width, width)
    y0, y1 = _span(top, bottom, height / image.height, height)
    return x0, y0, x1, y1


def fitting(shape: Sequence[int], most: int | None) -> tuple[int, int]:
    """Return the height and width of an image (H, W, ...) shrunk to at most `most` pixels."""
    height, width = shape[0], shape[1]
    scale = 1.0 if most is None else math.sqrt(most / (height * width))
    if scale >= 1:
        return height, width
    return max(1, int(height * scale)), max(1, int(width * scale))


def shrunk(image: Pixels, most: int | None) -> Pixels:
    """Return an image (H, W, 3) of at most `most` pixels; itself where it has no more."""
    height, width = fitting(image.shape, most)
    if (height, width) == image.shape[:2]:
        return image
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0))


def crop_region(image: DecodedImage, region: Region) -> Pixels:
    """Return a region's pixels, a view; see `pixel_span`."""
    left, top, right, bottom = pixel_span(image, region)
    return image.pixels[top:bottom, left:right]


def _span(start: float, stop: float, scale: float, limit: int) -> tuple[int, int]:
    first = min(round(start * scale), limit - 1)
    return first, min(limit, first + max(1, round((stop - start) * scale)))
