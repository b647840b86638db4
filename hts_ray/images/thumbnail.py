"""Small JPEG copies of images as data URIs, which a page holds instead of files."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from hts_ray.images.decode import ImageError, decode_image
from hts_ray.images.retry import read_image_bytes

_QUALITIES, _LEAST_SIDE = (80, 65, 50, 35), 32


def thumbnail_data_uri(
    pixels: npt.NDArray[np.uint8], max_side: int = 320, max_bytes: int = 8_000
) -> str:
    """Return (H, W, 3) or (H, W) uint8 pixels as a JPEG data URI of at most `max_bytes` JPEG.

    Large images are scaled down to `max_side`, small ones keep their size. Quality falls
    first, then size, because a page full of noisy images must still open quickly. Raises
    ValueError for other arrays.
    """
    array = np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"pixels are {array.dtype} {array.shape}: give uint8 (H, W, 3) or (H, W)")
    image = Image.fromarray(array).convert("RGB")
    side = min(max_side, max(image.size))
    while True:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            sink = io.BytesIO()
            small.save(sink, "JPEG", quality=quality, optimize=True)
            smallest = quality == _QUALITIES[-1] and side <= _LEAST_SIDE
            if sink.tell() <= max_bytes or smallest:
                text = base64.b64encode(sink.getvalue()).decode()
                return f"data:image/jpeg;base64,{text}"
        side = max(_LEAST_SIDE, int(side * 0.75))


def stored_thumbnail(uri: str, max_side: int, max_bytes: int) -> str | None:
    """Return a stored image as `thumbnail_data_uri` does; None when it cannot be read any more."""
    try:
        image = decode_image(read_image_bytes(uri), max_side=max_side)
    except ImageError:
        return None
    return thumbnail_data_uri(image.pixels, max_side, max_bytes)
