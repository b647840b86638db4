"""Regions of decoded images as the pixels that a teacher looks at.

Knows geometry and arrays, no model. Shape legend: R crops, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from hts_ray.images.decode import DecodedImage
from hts_ray.images.regions import Region
from hts_ray.store.aliases import Pixels

Span = tuple[int, int, int, int]


class CropBatch(Sequence[Pixels]):
    """R crops of a few images: a sequence of uint8 views (H, W, 3), and where each was cut.

    A teacher may take the views one by one like any other pixels, or, to send every image to
    its device once however much its crops overlap, `images` and `spans`: crop r is
    `images[n][top:bottom, left:right]` with `(n, (left, top, right, bottom)) = spans[r]`.
    """

    def __init__(self, images: Sequence[Pixels], spans: Sequence[tuple[int, Span]]) -> None:
        self.images = images
        self.spans = spans

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
        return len(self.spans)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> CropBatch: ...
    def __getitem__(self, index: int | slice) -> Pixels | CropBatch:
        if isinstance(index, slice):
            return CropBatch(self.images, self.spans[index])
        number, (left, top, right, bottom) = self.spans[index]
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


def crop_region(image: DecodedImage, region: Region) -> Pixels:
    """Return a region's pixels, a view; see `pixel_span`."""
    left, top, right, bottom = pixel_span(image, region)
    return image.pixels[top:bottom, left:right]


def _span(start: float, stop: float, scale: float, limit: int) -> tuple[int, int]:
    first = min(round(start * scale), limit - 1)
    return first, min(limit, first + max(1, round((stop - start) * scale)))
