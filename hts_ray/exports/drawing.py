"""Predictions drawn: the image, a box for each located label, and a strip of labels below."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from hts_ray.classifier import Box, Label, Prediction
from hts_ray.errors import ConfigError
from hts_ray.exports.image_files import FileNames
from hts_ray.store import storage

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Okabe and Ito's colours, which people with colour blindness can tell apart.
COLORS = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0),
    (240, 228, 66),
)  # fmt: skip
_SMALLEST, _LARGEST = 480, 1280  # pixels of the drawn image's longer side
_INK, _PAPER, _FAINT = (30, 30, 30), (255, 255, 255), (120, 120, 120)


def require_empty(folder: str) -> None:
    """Raise ConfigError when the folder to draw into holds something."""
    if storage.list_names(folder):
        raise ConfigError(
            "the folder holds something already", field="--draw", value=folder,
            remedy="name an empty or a new one",
        )  # fmt: skip


def draw_predictions(predictions: Iterable[Prediction], folder: str) -> Iterator[Prediction]:
    """Draw every usable prediction as it passes, into a JPEG under the image's own name."""
    names = FileNames()
    for prediction in predictions:
        if prediction.error is None and prediction.pixels is not None:
            picture = draw_labels(
                prediction.pixels, prediction.labels, prediction.width, prediction.height
            )
            sink = io.BytesIO()
            picture.save(sink, "JPEG", quality=92)
            name = names.of(prediction.source, "jpg")
            storage.write_bytes(storage.join(folder, name), sink.getvalue())
        yield prediction


def draw_labels(
    pixels: npt.NDArray[np.uint8], labels: Sequence[Label], width: int, height: int
) -> Image.Image:
    """Return the uint8 image (H, W, 3) with its labels in a strip below and their boxes on it.

    The boxes are in a `width` x `height` image. Only their outlines and numbers cover the image.
    Labels that share a box share its outline.
    """
    image = _scaled(Image.fromarray(pixels))
    size = max(13, image.width // 38)
    font = ImageFont.load_default(size)
    scale = (image.width / width, image.height / height)
    _draw_boxes(image, labels, scale, font, size)
    strip = _strip(labels, image.width, font, size)
    drawn = Image.new("RGB", (image.width, image.height + strip.height), _PAPER)
    drawn.paste(image, (0, 0))
    drawn.paste(strip, (0, image.height))
    return drawn


def _scaled(image: Image.Image) -> Image.Image:
    """Enlarge small images, so that text beside them is readable, and shrink large ones."""
    side = max(image.size)
    factor = _SMALLEST / side if side < _SMALLEST else min(1.0, _LARGEST / side)
    if factor == 1.0:
        return image.convert("RGB")
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _draw_boxes(
    image: Image.Image, labels: Sequence[Label], scale: tuple[float, float], font: Font, size: int
) -> None:
    draw = ImageDraw.Draw(image)
    line = max(2, size // 6)
    boxes: dict[Box, list[int]] = {}
    for number, label in enumerate(labels):
        if label.box is not None:
            boxes.setdefault(label.box, []).append(number)
    free: dict[tuple[int, int], int] = {}  # where the next flag goes, by corner
    # Large boxes first, so that small ones lie on top.
    for box in sorted(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]), reverse=True):
        left, right = (round(side * scale[0]) for side in (box[0], box[2]))
        top, bottom = (round(side * scale[1]) for side in (box[1], box[3]))
        color = _color(boxes[box][0])
        draw.rectangle((left, top, right - 1, bottom - 1), outline=color, width=line)
        for number in boxes[box]:  # one flag a label that shows here
            text, x = str(number + 1), free.get((left, top), left)
            room = round(draw.textlength(text, font)) + size // 2
            draw.rectangle((x, top, x + room, top + size + size // 3), fill=_color(number))
            draw.text((x + size // 4, top), text, fill=_text_on(_color(number)), font=font)
            free[left, top] = x + room + 1


def _strip(labels: Sequence[Label], width: int, font: Font, size: int) -> Image.Image:
    """Draw the labels one below the other: number, name and score."""
    row = round(size * 1.6)
    strip = Image.new("RGB", (width, row * max(1, len(labels)) + size // 2), _PAPER)
    draw = ImageDraw.Draw(strip)
    if not labels:
        draw.text((size // 2, size // 3), "no label", fill=_FAINT, font=font)
    for number, label in enumerate(labels):
        top = row * number + size // 3
        flag = round(size * 1.5)
        draw.rectangle((size // 3, top, size // 3 + flag, top + round(size * 1.3)), _color(number))
        text = str(number + 1)
        inset = size // 3 + (flag - draw.textlength(text, font)) / 2
        draw.text((inset, top), text, fill=_text_on(_color(number)), font=font)
        score = f"{label.score:.2f}"
        right = width - size // 2 - draw.textlength(score, font)
        name = _cut(label.name, right - flag - size * 1.5, draw, font)
        draw.text((flag + size, top), name, fill=_INK, font=font)
        draw.text((right, top), score, fill=_FAINT, font=font)
    return strip


def _cut(text: str, room: float, draw: ImageDraw.ImageDraw, font: Font) -> str:
    if draw.textlength(text, font) <= room:
        return text
    while text and draw.textlength(text + "...", font) > room:
        text = text[:-1]
    return text + "..."


def _color(number: int) -> Color:
    return COLORS[number % len(COLORS)]


def _text_on(color: Color) -> Color:
    """Return black or white, whichever is easier to read on a colour (ITU-R BT.601 luma)."""
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return _INK if luma > 140 else _PAPER
