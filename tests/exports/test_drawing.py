"""Drawn predictions."""

from __future__ import annotations

import numpy as np
import pytest

from hts_ray.classifier import Label
from hts_ray.exports.drawing import COLORS, draw_labels


def near(image, color):
    """Return which pixels of an image have this colour."""
    return (np.abs(np.asarray(image, int) - color) < 12).all(axis=-1)


def test_boxes_lie_where_they_belong_after_scaling():
    """Catches boxes in pixels of the original on a picture of another size, or x for y."""
    pixels = np.zeros((100, 200, 3), np.uint8)
    label = Label(1, "a", 2.0, box=(400.0, 0.0, 800.0, 200.0))  # of an original of 800 x 400
    picture = draw_labels(pixels, [label], 800, 400)
    assert picture.width == 480
    rows, columns = np.nonzero(near(picture, COLORS[0])[:240])
    assert columns.min() == 240
    assert columns.max() == 479
    assert rows.min() == 0
    assert rows.max() == 119


def test_boxes_that_share_a_corner_keep_their_flags():
    """Catches a label whose number another box's number hides."""
    pixels = np.full((200, 300, 3), 128, np.uint8)
    boxes = [(0.0, 0.0, 300.0, 200.0), (0.0, 0.0, 150.0, 100.0), (0.0, 0.0, 300.0, 200.0)]
    labels = [Label(i, "a", 1.0, box=box) for i, box in enumerate(boxes)]
    corner = draw_labels(pixels, labels, 300, 200).crop((0, 0, 80, 16))
    assert all(near(corner, COLORS[number]).sum() > 60 for number in range(3))


def test_the_image_is_not_written_over_and_every_label_has_a_line():
    """Catches text on top of what it is about."""
    pixels = np.full((300, 500, 3), 90, np.uint8)
    labels = [Label(i, f"a class number {i}" * 9, 1.5) for i in range(9)]
    picture = draw_labels(pixels, labels, 500, 300)
    assert near(picture, (90, 90, 90))[:300].all()
    strip = np.asarray(picture)[300:]
    assert len(strip) > 9 * 13
    assert all(near(strip, color).any() for color in COLORS)


@pytest.mark.parametrize("shape", [(8, 3000, 3), (3000, 8, 3), (8, 8, 3), (4000, 3000, 3)])
def test_odd_shapes_are_drawn(shape):
    """Catches a strip too narrow for its text, and pictures too large to look at."""
    labels = [Label(0, "long name of a class", -1.25, box=(0.0, 0.0, 4.0, 4.0))]
    picture = draw_labels(np.zeros(shape, np.uint8), labels, shape[1], shape[0])
    assert max(picture.size) <= 1400
    assert draw_labels(np.zeros(shape, np.uint8), [], shape[1], shape[0]).width
