"""Small JPEG copies of images for pages."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from hts_ray.images.thumbnail import thumbnail_data_uri


@pytest.mark.parametrize("shape", [(240, 320, 3), (10, 3000, 3), (50, 40), (1, 1, 3)])
def test_thumbnail_is_a_small_jpeg(shape):
    """Catches a data URI that is not the promised JPEG, or an image that is scaled up."""
    noise = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    uri = thumbnail_data_uri(noise, max_side=200, max_bytes=5_000)
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    data = base64.b64decode(body, validate=True)
    assert len(data) <= 5_000
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        assert max(image.size) <= min(200, max(shape[:2]))


def test_thumbnail_refuses_other_arrays():
    """Catches float pixels in [0, 1] that would be shown as black."""
    with pytest.raises(ValueError, match="uint8"):
        thumbnail_data_uri(np.zeros((4, 4, 3), np.float32))
