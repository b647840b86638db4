"""A seeded, download-free world of human-object interaction scenes in HICO's classes and layout.

Every scene is a pure function of (seed, split, index): figures are sketched in units of a person's
height, placed on a canvas and drawn with Pillow, and the sketch itself yields the annotations.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hts_ray.classes import hico_classes, verb_phrase
from hts_ray.errors import ConfigError, DataError

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Color = tuple[int, int, int]

CANVAS_SIZES: tuple[tuple[int, int], ...] = ((112, 112), (112, 112), (128, 96), (96, 128))
SUPERSAMPLING = 2
JPEG_QUALITY = 90
TRAIN_EXPONENT = 1.4
TEST_EXPONENT = 0.5  # milder, so that every class has test images to be measured on
AMBIGUOUS_RATE = 0.04
SPLITS = ("train", "test")

_SKIN: tuple[Color, ...] = ((241, 194, 152), (224, 172, 125), (178, 120, 80), (122, 78, 52))
_SHIRT: tuple[Color, ...] = (
    (214, 48, 49),
    (225, 112, 30),
    (250, 211, 60),
    (70, 160, 70),
    (140, 60, 160),
    (245, 245, 245),
)
_TROUSERS: tuple[Color, ...] = ((40, 50, 90), (60, 60, 60), (90, 70, 50), (20, 20, 30))
_WATER: Color = (60, 190, 255)
_FOOD: Color = (255, 140, 0)
_DARK: Color = (35, 35, 40)
_STEEL: Color = (170, 175, 185)
_WHITE: Color = (250, 250, 250)

_OBJECT_COLORS: dict[str, tuple[Color, ...]] = {
    "bicycle": ((190, 30, 45), (20, 90, 170), (20, 120, 80)),
    "motorcycle": ((200, 40, 40), (30, 30, 35), (230, 150, 20)),
    "horse": ((110, 66, 36), (60, 42, 32), (200, 180, 150)),
    "dog": ((170, 112, 50), (70, 50, 40), (225, 205, 170)),
    "chair": ((150, 95, 45), (120, 60, 40), (200, 150, 90)),
    "bench": ((130, 85, 45), (95, 70, 50), (60, 100, 70)),
    "sports_ball": ((245, 245, 245), (240, 120, 40), (235, 220, 60)),
    "umbrella": ((200, 30, 90), (40, 70, 190), (120, 40, 140)),
    "skateboard": ((60, 60, 65), (170, 50, 120), (40, 130, 130)),
    "surfboard": ((250, 240, 200), (250, 190, 60), (240, 120, 110)),
    "car": ((190, 40, 40), (40, 80, 160), (210, 210, 215)),
    "kite": ((230, 60, 140), (250, 180, 30), (60, 190, 90)),
}


@dataclass(frozen=True)
class Prop:
    """Something that tells a verb: a kind and two points, in person heights (y down, feet at 0)."""

    kind: str
    start: Point
    end: Point = (0.0, 0.0)


@dataclass(frozen=True)
class Pose:
    """How a person and an object are arranged: points in person heights, angles in degrees."""

    place: Point = (0.0, 0.0)
    hip: Point = (0.0, -0.5)
    lean: float = 0.0
    hands: tuple[Point, Point] = ((-0.1, -0.42), (0.1, -0.42))
    feet: tuple[Point, Point] = ((-0.07, 0.0), (0.07, 0.0))
    facing: int = 1
    angle: float = 0.0
    zoom: float = 1.0
    lift: float = 0.0
    tilt: float = 0.0
    behind: bool = False
    bust: bool = False
    closed: bool = False
    props: tuple[Prop, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A pair (class_id >= 0) or a lone object (class_id -1) at a place in the scene, in pixels."""

    class_id: int
    object_name: str
    seed: int
    x: float
    y: float
    scale: float
    flip: bool

    @property
    def box(self) -> Box:
        """The bounding box of the whole figure (xyxy, pixels)."""
        return _sketch(self).extent()


@dataclass(frozen=True)
class Pair:
    """An interaction with its boxes (xyxy, pixels)."""

    class_id: int
    person_box: Box
    object_box: Box


@dataclass(frozen=True)
class SceneSpec:
    """What a scene is drawn from: the canvas in pixels, figures back to front and a seed."""

    width: int
    height: int
    seed: int
    figures: tuple[Figure, ...]

    @property
    def class_ids(self) -> tuple[int, ...]:
        """The classes that are true of the scene, ascending."""
        return tuple(sorted({f.class_id for f in self.figures if f.class_id >= 0}))

    @property
    def objects(self) -> tuple[str, ...]:
        """The names of the objects in the scene, sorted."""
        return tuple(sorted({f.object_name for f in self.figures}))

    def pairs(self) -> tuple[Pair, ...]:
        """The interactions with their boxes."""
        found = []
        for figure in self.figures:
            if figure.class_id >= 0:
                sketch = _sketch(figure)
                found.append(Pair(figure.class_id, sketch.box("person"), sketch.box("object")))
        return tuple(found)


def _stand(x: float) -> dict[str, Any]:
    """Arms and legs of an idle person at x."""
    return {
        "hip": (x, -0.5),
        "hands": ((x - 0.09, -0.42), (x + 0.09, -0.42)),
        "feet": ((x - 0.06, 0.0), (x + 0.06, 0.0)),
    }


def _push(x: float, hand: Point) -> Pose:
    return Pose(
        hip=(x, -0.47),
        lean=38,
        hands=(hand, (hand[0], hand[1] + 0.06)),
        feet=((x - 0.02, 0.0), (x - 0.34, 0.0)),
        props=(Prop("speed", (x - 0.3, -0.45), (x - 0.5, -0.45)),),
    )


def _wash(x: float, hand: Point, spread: float) -> Pose:
    return Pose(
        hip=(x, -0.48),
        lean=22,
        hands=(hand, (hand[0] - 0.05, hand[1] + 0.1)),
        feet=((x + 0.04, 0.0), (x - 0.14, 0.0)),
        props=(Prop("drops", (0.05, hand[1]), (spread, 0.3)), Prop("sponge", hand)),
    )


def _jump(pose: Pose, lift: float, tilt: float, *props: Prop) -> Pose:
    fields = {**pose.__dict__, "lift": lift, "tilt": tilt, "props": props}
    return Pose(**fields)


_RIDE_BICYCLE = Pose(
    hip=(-0.1, -0.54),
    lean=28,
    hands=((0.2, -0.52), (0.2, -0.5)),
    feet=((0.06, -0.08), (-0.05, -0.24)),
    props=(Prop("speed", (-0.55, -0.4), (-0.8, -0.4)),),
)
_RIDE_HORSE = Pose(
    hip=(-0.02, -0.72),
    lean=8,
    hands=((0.22, -0.82), (0.24, -0.8)),
    feet=((0.1, -0.34), (0.06, -0.36)),
    props=(Prop("line", (0.22, -0.82), (0.47, -0.84)),),
)
_RIDE_SKATEBOARD = Pose(
    hip=(-0.02, -0.5),
    lean=18,
    hands=((0.36, -0.72), (-0.34, -0.78)),
    feet=((-0.15, -0.1), (0.15, -0.1)),
    props=(Prop("speed", (-0.4, -0.2), (-0.65, -0.2)),),
)

# The order is the order of frequency in a long-tailed split: head first.
_POSES: dict[int, Pose] = {
    18: _RIDE_BICYCLE,
    139: _RIDE_HORSE,
    125: Pose(
        (0.3, 0),
        (-0.4, -0.5),
        6,
        ((-0.2, -0.5), (-0.52, -0.42)),
        ((-0.24, 0), (-0.56, 0)),
        props=(Prop("line", (-0.2, -0.5), (0.44, -0.3)),),
    ),
    89: Pose((0, 0), (-0.03, -0.34), 0, ((0.17, -0.36), (0.15, -0.38)), ((0.22, 0), (0.28, 0))),
    493: Pose((0.22, -0.55), (0, -0.5), 0, ((0.2, -0.58), (0.2, -0.7))),
    577: Pose((0.16, -0.62), (0, -0.5), 0, ((0.16, -0.66), (-0.09, -0.42))),
    153: Pose(
        (0, 0),
        (-0.12, -0.5),
        35,
        ((0.2, -0.54), (0.2, -0.52)),
        ((0.1, -0.14), (0.06, -0.16)),
        props=(Prop("speed", (-0.55, -0.35), (-0.85, -0.35)),),
    ),
    459: _RIDE_SKATEBOARD,
    523: Pose(
        (0, -0.14),
        (-0.02, -0.62),
        22,
        ((0.36, -0.82), (-0.36, -0.84)),
        ((-0.17, -0.26), (0.17, -0.26)),
        props=(Prop("wave", (0, 0), (0.62, 0.2)),),
    ),
    67: Pose(
        hip=(0.1, -0.42),
        bust=True,
        hands=((0.3, -0.5), (0.28, -0.48)),
        props=(Prop("speed", (-0.8, -0.3), (-1.0, -0.3)),),
    ),
    245: Pose((0, 0), (-0.12, -0.32), 0, ((0.06, -0.34), (0.02, -0.36)), ((0.06, 0), (0.13, 0))),
    495: Pose(
        (0.47, 0), (0, -0.5), -12, ((0.22, -0.66), (-0.36, -0.62)), ((0.37, -0.16), (-0.08, 0))
    ),
    370: Pose(
        (0.62, -1.05),
        (-0.1, -0.5),
        -8,
        ((0.14, -0.95), (0.1, -0.85)),
        props=(Prop("line", (0.14, -0.95), (0.62, -1.15)),),
    ),
    115: Pose((0.16, -0.42), (0, -0.5), -4, ((0.08, -0.58), (0.24, -0.56))),
    516: Pose((0, -1.08), (0, -0.5), 0, ((-0.16, -1.08), (0.16, -1.08))),
    129: Pose(
        (-0.3, 0),
        **{**_stand(0.62), "hands": ((0.33, -0.78), (0.68, -0.42))},
        facing=-1,
        props=(Prop("food", (0.3, -0.78)),),
    ),
    16: _push(-0.6, (-0.12, -0.47)),
    120: Pose(
        (0.22, 0), (-0.26, -0.26), 28, ((0.2, -0.36), (-0.12, -0.2)), ((-0.12, 0), (-0.42, 0))
    ),
    75: Pose((0.25, 0), **_stand(-0.72)),
    500: Pose(
        (0.5, -1.02),
        (-0.05, -0.5),
        16,
        ((0.3, -1.02), (-0.3, -0.72)),
        ((0.14, 0), (-0.3, 0)),
        props=(Prop("speed", (0.38, -1.12), (0.2, -1.16)),),
    ),
    143: Pose(
        (-0.4, 0),
        (0.55, -0.5),
        6,
        ((0.36, -0.6), (0.66, -0.42)),
        ((0.72, 0), (0.38, 0)),
        props=(Prop("line", (0.36, -0.6), (0.1, -0.82)),),
    ),
    244: Pose(
        (0, 0), (-0.02, -0.34), 90, ((0.08, -0.3), (0.1, -0.42)), ((-0.46, -0.31), (-0.44, -0.37))
    ),
    456: Pose((0.3, -0.4), (0, -0.5), 0, ((0.24, -0.5), (-0.09, -0.42)), angle=-82),
    74: _wash(-0.78, (-0.42, -0.5), 0.6),
    457: _jump(_RIDE_SKATEBOARD, 0.38, -14, Prop("shadow", (0, 0), (0.3, 0.04))),
    23: Pose((0.3, 0), **_stand(-0.34)),
    371: Pose((0.2, -0.55), (-0.04, -0.5), 0, ((0.12, -0.62), (0.16, -0.76))),
    86: Pose((0, -1.04), (0, -0.5), 0, ((-0.13, -1.1), (0.13, -1.1)), zoom=0.9),
    17: Pose(
        (0.2, 0),
        (-0.38, -0.26),
        30,
        ((-0.02, -0.24), (-0.1, -0.3)),
        ((-0.3, 0), (-0.58, 0)),
        props=(Prop("tool", (-0.02, -0.24), (0.12, -0.36)),),
    ),
    137: Pose((-0.25, 0), **{**_stand(0.5), "hands": ((0.2, -0.92), (0.57, -0.42))}, facing=-1),
    154: Pose((0, 0), (-0.08, -0.44), -6, ((0.02, -0.46), (-0.02, -0.44)), ((0.02, 0), (0.1, 0))),
    126: Pose(
        (0.25, 0),
        (-0.24, -0.28),
        26,
        ((0.14, -0.34), (0.04, -0.3)),
        ((-0.12, 0), (-0.4, 0)),
        props=(
            Prop("drops", (0.28, -0.32), (0.3, 0.25)),
            Prop("tub", (0.25, 0), (0.34, 0.17)),
            Prop("sponge", (0.14, -0.34)),
        ),
    ),
    521: Pose(
        (0, -0.12),
        (-0.08, -0.25),
        86,
        ((0.46, -0.16), (0.3, -0.14)),
        ((-0.5, -0.22), (-0.5, -0.27)),
        props=(Prop("wave", (0, 0), (0.62, 0.16)),),
    ),
    128: Pose((0.3, 0), **_stand(-0.24), facing=-1),
    151: _push(-0.64, (-0.2, -0.46)),
    10: Pose((0, -1.04), (0, -0.5), 0, ((-0.15, -1.1), (0.15, -1.1)), zoom=0.85),
    582: Pose((0.26, 0), **_stand(-0.14), zoom=2.2, behind=False),
    113: Pose(
        (-0.25, 0),
        (0.48, -0.46),
        -36,
        ((0.2, -0.42), (0.25, -0.36)),
        ((0.42, 0), (0.58, 0)),
        facing=-1,
        props=(Prop("food", (0.13, -0.36)),),
    ),
    133: _jump(_RIDE_HORSE, 0.4, -16, Prop("fence", (0, 0), (0.3, 0.36))),
    491: Pose(
        (0.32, -0.12),
        (-0.04, -0.46),
        24,
        ((0.3, -0.42), (-0.22, -0.52)),
        ((0.08, 0), (-0.22, 0)),
        props=(Prop("bounce", (0.32, 0), (0.32, -0.12)),),
    ),
    144: _wash(-0.56, (-0.26, -0.66), 0.34),
    246: Pose((0.32, 0), **_stand(-0.4), facing=-1),
    90: Pose((0, 0), (0, -0.77), 0, ((0.2, -1.36), (-0.12, -0.7)), ((-0.07, -0.28), (0.07, -0.28))),
    69: Pose(
        (0.3, 0),
        (-0.74, -0.47),
        36,
        ((-0.3, -0.5), (-0.62, -0.4)),
        ((-0.7, 0), (-0.86, 0)),
        props=(Prop("lens", (-0.26, -0.54)),),
    ),
    158: _wash(-0.62, (-0.26, -0.46), 0.36),
    576: Pose(
        (0.17, -0.08),
        (0, -0.5),
        0,
        ((0.17, -0.5), (-0.1, -0.42)),
        ((0.12, 0), (-0.12, 0)),
        closed=True,
    ),
    127: Pose(
        (0.48, 0),
        (-0.3, -0.52),
        28,
        ((0.1, -0.74), (-0.42, -0.62)),
        ((-0.04, -0.06), (-0.66, -0.2)),
        props=(
            Prop("speed", (-0.6, -0.6), (-0.85, -0.6)),
            Prop("speed", (0.22, -0.2), (0.05, -0.2)),
        ),
    ),
    13: _jump(_RIDE_BICYCLE, 0.4, -20, Prop("shadow", (0, 0), (0.35, 0.04))),
    22: _wash(-0.54, (-0.18, -0.44), 0.34),
    145: Pose((0.3, 0), **_stand(-0.5), facing=-1),
    460: Pose((0, 0), (-0.06, -0.17), -14, ((-0.26, -0.06), (0.12, -0.24)), ((0.38, 0), (0.34, 0))),
    517: Pose(
        (-0.5, -0.05),
        (0.16, -0.5),
        18,
        ((-0.08, -0.36), (0.3, -0.5)),
        ((0.3, 0), (-0.02, 0)),
        angle=-24,
    ),
    159: Pose((0.32, 0), **_stand(-0.38), facing=-1),
    91: Pose((0.26, 0), **_stand(-0.26), facing=-1),
    132: Pose(
        (-0.28, 0),
        (0.34, -0.5),
        -18,
        ((0.0, -0.72), (0.06, -0.62)),
        ((0.3, 0), (0.42, 0)),
        facing=-1,
    ),
}


@functools.cache
def _hico_objects() -> tuple[str, ...]:
    """The object of each of the 600 classes."""
    return tuple(item.object or "" for item in hico_classes())


def world_class_ids() -> tuple[int, ...]:
    """The 0-based HICO class ids that occur in the world, ascending."""
    return tuple(sorted(_POSES))


def class_ids_by_frequency() -> tuple[int, ...]:
    """The world's class ids, the most frequent of a long-tailed split first."""
    return tuple(_POSES)


def world_objects() -> tuple[str, ...]:
    """The HICO object names of the world, sorted."""
    return tuple(sorted(_OBJECT_COLORS))


class _Sketch:
    """Shapes in pixels, drawn through a stack of affine maps that starts at person heights."""

    def __init__(
        self, rng: np.random.Generator, x: float, y: float, scale: float, flip: bool
    ) -> None:
        self.rng = rng
        self.scale = scale
        sign = -1.0 if flip else 1.0
        self.matrix = np.array([[sign * scale, 0.0, x], [0.0, scale, y]])
        self.part = "prop"
        self.shapes: list[tuple[str, list[Point], float, Color]] = []
        self.points: dict[str, list[Point]] = {"person": [], "object": [], "prop": []}

    def move(self, dx: float, dy: float, angle: float = 0.0, zoom: float = 1.0) -> None:
        """Shifts, then turns (degrees, clockwise) and scales what is drawn from here on."""
        c, s = zoom * math.cos(math.radians(angle)), zoom * math.sin(math.radians(angle))
        local = np.array([[c, -s, dx], [s, c, dy], [0.0, 0.0, 1.0]])
        self.matrix = self.matrix @ local

    def _map(self, points: Iterable[Point], pad: float) -> list[Point]:
        (a, b, tx), (c, d, ty) = self.matrix.tolist()
        mapped = [(a * x + b * y + tx, c * x + d * y + ty) for x, y in points]
        reach = self.points[self.part]
        for x, y in mapped:
            reach.append((x - pad, y - pad))
            reach.append((x + pad, y + pad))
        return mapped

    def zoom(self) -> float:
        return float(math.hypot(self.matrix[0, 0], self.matrix[1, 0]))

    def line(self, points: Sequence[Point], width: float, color: Color) -> None:
        thick = max(width * self.zoom(), 0.8)
        self.shapes.append(("line", self._map(points, thick / 2), thick, color))

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        self.shapes.append(("polygon", self._map(points, 0.0), 0.0, color))

    def disc(self, x: float, y: float, radius: float, color: Color) -> None:
        r = max(radius * self.zoom(), 0.7)
        self.shapes.append(("disc", self._map([(x, y)], r), r, color))

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, color: Color, turn: float = 0.0
    ) -> None:
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        ring = [(rx * math.cos(k * math.pi / 8), ry * math.sin(k * math.pi / 8)) for k in range(16)]
        self.polygon([(x + c * u - s * v, y + s * u + c * v) for u, v in ring], color)

    def box(self, part: str) -> Box:
        """The bounding box (xyxy, pixels) of a part."""
        xs, ys = zip(*self.points[part], strict=True)
        return (min(xs), min(ys), max(xs), max(ys))

    def extent(self) -> Box:
        """The bounding box (xyxy, pixels) of everything."""
        reach = [p for points in self.points.values() for p in points]
        xs, ys = zip(*reach, strict=True)
        return (min(xs), min(ys), max(xs), max(ys))

    def draw(self, canvas: ImageDraw.ImageDraw) -> None:
        k = SUPERSAMPLING
        for kind, points, size, color in self.shapes:
            scaled = [(x * k, y * k) for x, y in points]
            if kind == "line":
                width = max(round(size * k), 1)
                canvas.line(scaled, fill=color, width=width, joint="curve")
                if width > 3:
                    for x, y in (scaled[0], scaled[-1]):
                        r = width / 2 - 0.5
                        canvas.ellipse((x - r, y - r, x + r, y + r), fill=color)
            elif kind == "polygon":
                canvas.polygon(scaled, fill=color)
            else:
                (x, y), r = scaled[0], size * k
                canvas.ellipse((x - r, y - r, x + r, y + r), fill=color)


def _shade(color: Color, factor: float) -> Color:
    r, g, b = (min(255, int(channel * factor)) for channel in color)
    return (r, g, b)


def _wheel(s: _Sketch, x: float, radius: float, width: float) -> None:
    ring = [
        (
            x + radius * math.cos(k * math.pi / 7),
            -radius - width / 2 + radius * math.sin(k * math.pi / 7),
        )
        for k in range(15)
    ]
    s.line(ring, width, _DARK)


def _bicycle(s: _Sketch, color: Color, closed: bool) -> None:
    _wheel(s, -0.27, 0.17, 0.035)
    _wheel(s, 0.27, 0.17, 0.035)
    s.line(
        [(-0.27, -0.19), (-0.1, -0.42), (0.19, -0.42), (0.0, -0.19), (-0.27, -0.19)], 0.035, color
    )
    s.line([(0.0, -0.19), (-0.1, -0.42), (-0.1, -0.48)], 0.035, color)
    s.line([(0.27, -0.19), (0.18, -0.52), (0.25, -0.54)], 0.035, color)
    s.line([(-0.16, -0.49), (-0.04, -0.49)], 0.045, _DARK)


def _motorcycle(s: _Sketch, color: Color, closed: bool) -> None:
    _wheel(s, -0.32, 0.14, 0.075)
    _wheel(s, 0.32, 0.14, 0.075)
    s.polygon(
        [(-0.42, -0.36), (-0.1, -0.34), (0.08, -0.46), (0.22, -0.4), (0.14, -0.16), (-0.16, -0.14)],
        color,
    )
    s.line([(0.32, -0.18), (0.18, -0.5), (0.26, -0.56)], 0.05, _STEEL)
    s.line([(-0.36, -0.38), (-0.02, -0.38)], 0.06, _DARK)
    s.line([(-0.44, -0.12), (-0.1, -0.12)], 0.04, _STEEL)


def _horse(s: _Sketch, color: Color, closed: bool) -> None:
    dark = _shade(color, 0.7)
    for x in (-0.26, -0.17, 0.17, 0.25):
        s.line(
            [(x, -0.5), (x + 0.02, -0.25), (x, 0.0)], 0.06, dark if x in (-0.17, 0.17) else color
        )
    s.ellipse(0.0, -0.55, 0.34, 0.14, color)
    s.polygon([(0.14, -0.6), (0.36, -0.92), (0.46, -0.84), (0.33, -0.48)], color)
    s.ellipse(0.48, -0.85, 0.14, 0.06, color, 28)
    s.line([(0.18, -0.68), (0.36, -0.94)], 0.05, dark)
    s.line([(-0.33, -0.6), (-0.42, -0.42), (-0.4, -0.25)], 0.05, dark)


def _dog(s: _Sketch, color: Color, closed: bool) -> None:
    dark = _shade(color, 0.7)
    for x in (-0.15, -0.1, 0.08, 0.14):
        s.line([(x, -0.22), (x, 0.0)], 0.045, color)
    s.ellipse(0.0, -0.24, 0.19, 0.075, color)
    s.line([(0.12, -0.26), (0.2, -0.36)], 0.08, color)
    s.disc(0.21, -0.37, 0.07, color)
    s.line([(0.22, -0.35), (0.31, -0.34)], 0.05, color)
    s.line([(0.17, -0.43), (0.14, -0.34)], 0.04, dark)
    s.line([(-0.18, -0.27), (-0.28, -0.4)], 0.035, color)
    s.line([(0.13, -0.32), (0.2, -0.29)], 0.03, (220, 30, 30))


def _chair(s: _Sketch, color: Color, closed: bool) -> None:
    dark = _shade(color, 0.75)
    for x in (-0.15, 0.14):
        s.line([(x, -0.28), (x, 0.0)], 0.04, dark)
    s.line([(-0.17, -0.28), (0.16, -0.28)], 0.06, color)
    s.line([(-0.16, -0.28), (-0.19, -0.68)], 0.05, color)
    s.line([(-0.13, -0.28), (-0.16, -0.62)], 0.03, dark)


def _bench(s: _Sketch, color: Color, closed: bool) -> None:
    dark = _shade(color, 0.7)
    for x in (-0.4, 0.4):
        s.line([(x, -0.5), (x, 0.0)], 0.045, dark)
    for y in (-0.48, -0.38):
        s.line([(-0.46, y), (0.46, y)], 0.05, color)
    s.line([(-0.47, -0.25), (0.47, -0.25)], 0.07, color)


def _sports_ball(s: _Sketch, color: Color, closed: bool) -> None:
    s.disc(0.0, -0.1, 0.1, _DARK)
    s.disc(0.0, -0.1, 0.085, color)
    s.disc(0.0, -0.1, 0.035, _DARK)


def _umbrella(s: _Sketch, color: Color, closed: bool) -> None:
    if closed:
        s.line([(0.0, -0.5), (0.0, 0.0)], 0.025, _DARK)
        s.polygon([(-0.05, -0.36), (0.05, -0.36), (0.0, -0.02)], color)
        return
    s.line([(0.0, 0.0), (0.0, -0.5)], 0.03, _DARK)
    arc = [
        (0.38 * math.cos(k * math.pi / 10), -0.48 - 0.27 * math.sin(k * math.pi / 10))
        for k in range(11)
    ]
    s.polygon(arc, color)
    s.polygon([(-0.13, -0.48), (0.0, -0.75), (0.13, -0.48)], _shade(color, 1.35))


def _skateboard(s: _Sketch, color: Color, closed: bool) -> None:
    s.disc(-0.17, -0.04, 0.04, _WHITE)
    s.disc(0.17, -0.04, 0.04, _WHITE)
    s.line([(-0.3, -0.13), (-0.22, -0.09), (0.22, -0.09), (0.3, -0.13)], 0.05, color)


def _surfboard(s: _Sketch, color: Color, closed: bool) -> None:
    s.ellipse(0.0, -0.07, 0.52, 0.075, color)
    s.line([(-0.44, -0.07), (0.44, -0.07)], 0.025, (40, 90, 160))


def _car(s: _Sketch, color: Color, closed: bool) -> None:
    s.polygon([(-0.38, -0.42), (-0.26, -0.72), (0.28, -0.72), (0.46, -0.42)], color)
    s.polygon([(-0.3, -0.43), (-0.22, -0.66), (0.24, -0.66), (0.37, -0.43)], (205, 228, 240))
    s.polygon(
        [
            (-0.75, -0.14),
            (-0.74, -0.38),
            (-0.4, -0.44),
            (0.48, -0.44),
            (0.74, -0.34),
            (0.76, -0.14),
        ],
        color,
    )
    for x in (-0.44, 0.44):
        s.disc(x, -0.13, 0.13, _DARK)
        s.disc(x, -0.13, 0.06, _STEEL)


def _kite(s: _Sketch, color: Color, closed: bool) -> None:
    s.polygon([(0.0, -0.36), (0.17, -0.16), (0.0, 0.1), (-0.17, -0.16)], color)
    s.line([(-0.17, -0.16), (0.17, -0.16)], 0.02, _DARK)
    s.line([(0.0, -0.36), (0.0, 0.1)], 0.02, _DARK)
    s.line([(0.0, 0.1), (0.06, 0.18), (-0.03, 0.26), (0.04, 0.32)], 0.025, _shade(color, 0.8))


_OBJECTS: dict[str, Callable[[_Sketch, Color, bool], None]] = {
    "bicycle": _bicycle,
    "motorcycle": _motorcycle,
    "horse": _horse,
    "dog": _dog,
    "chair": _chair,
    "bench": _bench,
    "sports_ball": _sports_ball,
    "umbrella": _umbrella,
    "skateboard": _skateboard,
    "surfboard": _surfboard,
    "car": _car,
    "kite": _kite,
}


def _limb(
    s: _Sketch, start: Point, end: Point, bone: float, bend: float, width: float, color: Color
) -> Point:
    """Draws two bones of equal length from start towards end; returns where the limb ends."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    reach = math.hypot(dx, dy) or 1e-6
    limit = min(reach, 2 * bone * 0.995)
    ux, uy = dx / reach, dy / reach
    tip = (start[0] + ux * limit, start[1] + uy * limit)
    height = math.sqrt(max(bone * bone - limit * limit / 4, 0.0)) * bend
    joint = ((start[0] + tip[0]) / 2 - uy * height, (start[1] + tip[1]) / 2 + ux * height)
    s.line([start, joint, tip], width, color)
    return tip


def _person(s: _Sketch, pose: Pose) -> None:
    """Draws the person of a pose with jittered joints."""
    s.part = "person"
    rng = s.rng
    skin = _SKIN[rng.integers(len(_SKIN))]
    shirt = _SHIRT[rng.integers(len(_SHIRT))]
    trousers = _TROUSERS[rng.integers(len(_TROUSERS))]
    shake = rng.normal(0.0, 0.015, (5, 2)).tolist()
    lean = math.radians(pose.lean + float(rng.normal(0.0, 3.0)))
    hip = (pose.hip[0] + shake[0][0], pose.hip[1] + 0.4 * shake[0][1])
    neck = (hip[0] + 0.3 * math.sin(lean), hip[1] - 0.3 * math.cos(lean))
    head = (neck[0] + 0.11 * math.sin(lean * 0.8), neck[1] - 0.11 * math.cos(lean * 0.8))
    hands = [(x + jx, y + jy) for (x, y), (jx, jy) in zip(pose.hands, shake[1:3], strict=True)]
    shoulder = (hip[0] + 0.26 * math.sin(lean), hip[1] - 0.26 * math.cos(lean))
    elbow = -0.9 * pose.facing
    if not pose.bust:
        for (x, y), (jx, _) in zip(pose.feet, shake[3:], strict=True):
            tip = _limb(s, hip, (x + jx, y), 0.255, 0.9 * pose.facing * -1, 0.085, trousers)
            s.line(
                [(tip[0] - 0.01, tip[1] - 0.015), (tip[0] + 0.05 * pose.facing, tip[1] - 0.015)],
                0.05,
                _DARK,
            )
    tip = _limb(s, shoulder, hands[1], 0.2, elbow * -1, 0.06, _shade(skin, 0.85))
    if pose.bust:
        neck = (hip[0], hip[1] - 0.1)
        head = (hip[0] + 0.01, hip[1] - 0.17)
        s.line([(hip[0], hip[1] - 0.03), neck], 0.17, shirt)
        s.line([neck, (hip[0] + 0.2, hip[1] - 0.03)], 0.05, skin)
    else:
        s.line([hip, neck], 0.15, shirt)
        _limb(s, shoulder, hands[0], 0.2, elbow * -1, 0.065, skin)
    s.disc(head[0], head[1], 0.085, skin)
    hair = (head[0] - 0.025 * pose.facing, head[1] - 0.04)
    s.disc(hair[0], hair[1], 0.065, _TROUSERS[rng.integers(2, 4)])


def _prop_line(s: _Sketch, start: Point, end: Point) -> None:
    s.line([start, end], 0.02, _DARK)


def _prop_speed(s: _Sketch, start: Point, end: Point) -> None:
    for dy in (-0.08, 0.0, 0.08):
        s.line([(start[0], start[1] + dy), (end[0], end[1] + dy)], 0.022, _WHITE)


def _prop_bounce(s: _Sketch, start: Point, end: Point) -> None:
    for dx in (-0.07, 0.07):
        s.line([(start[0] + dx, start[1] - 0.02), (end[0] + dx, end[1])], 0.022, _WHITE)


def _prop_drops(s: _Sketch, start: Point, end: Point) -> None:
    for dx, dy in s.rng.uniform(-1.0, 1.0, (11, 2)).tolist():
        s.disc(start[0] + dx * end[0], start[1] + dy * end[1] - 0.05, 0.03, _WATER)


def _prop_sponge(s: _Sketch, start: Point, end: Point) -> None:
    s.disc(*start, 0.06, (255, 230, 60))


def _prop_food(s: _Sketch, start: Point, end: Point) -> None:
    x, y = start
    s.disc(x, y, 0.06, _FOOD)
    s.line([(x - 0.05, y), (x - 0.02, y - 0.1)], 0.03, (60, 170, 60))


def _prop_tool(s: _Sketch, start: Point, end: Point) -> None:
    s.line([start, end], 0.045, _STEEL)
    s.disc(*end, 0.05, (255, 60, 30))


def _prop_lens(s: _Sketch, start: Point, end: Point) -> None:
    s.disc(*start, 0.085, _DARK)
    s.disc(*start, 0.055, (190, 240, 255))


def _prop_tub(s: _Sketch, start: Point, end: Point) -> None:
    (x, y), (u, v) = start, end
    rim, floor = [(x - u, y - v), (x + u, y - v)], [(x + u * 0.8, y), (x - u * 0.8, y)]
    s.polygon([*rim, *floor], (120, 140, 210))


def _prop_shadow(s: _Sketch, start: Point, end: Point) -> None:
    s.ellipse(*start, *end, (70, 70, 70))


def _prop_fence(s: _Sketch, start: Point, end: Point) -> None:
    (x, y), (u, v) = start, end
    for dy in (0.3, 0.7):
        s.line([(x - u, y - v * dy), (x + u, y - v * dy)], 0.045, _WHITE)
    for dx in (-u, u):
        s.line([(x + dx, y), (x + dx, y - v)], 0.045, _WHITE)


def _prop_wave(s: _Sketch, start: Point, end: Point) -> None:
    (x, y), (width, height) = start, end
    crest = [(x - width + k * width / 6, y - height - 0.03 * (k % 2)) for k in range(13)]
    s.polygon([*crest, (x + width, y), (x - width, y)], (50, 130, 200))
    s.line(crest, 0.03, _WHITE)


_PROPS: dict[str, Callable[[_Sketch, Point, Point], None]] = {
    "line": _prop_line,
    "speed": _prop_speed,
    "bounce": _prop_bounce,
    "drops": _prop_drops,
    "sponge": _prop_sponge,
    "food": _prop_food,
    "tool": _prop_tool,
    "lens": _prop_lens,
    "tub": _prop_tub,
    "shadow": _prop_shadow,
    "fence": _prop_fence,
    "wave": _prop_wave,
}
_BEHIND = ("wave", "shadow", "fence", "speed")  # props that the figures stand in front of


def _sketch(figure: Figure) -> _Sketch:
    """The shapes of a figure, in pixels of its scene."""
    rng = np.random.default_rng(figure.seed)
    s = _Sketch(rng, figure.x, figure.y, figure.scale, figure.flip)
    palette = _OBJECT_COLORS[figure.object_name]
    color = palette[rng.integers(len(palette))]
    zoom = float(rng.uniform(0.94, 1.06))
    if figure.class_id < 0:
        s.part = "object"
        s.move(0.0, 0.0, 0.0, zoom)
        _OBJECTS[figure.object_name](s, color, False)
        return s
    pose = _POSES[figure.class_id]
    for prop in pose.props:
        if prop.kind in _BEHIND:
            s.part = "prop"
            _PROPS[prop.kind](s, prop.start, prop.end)
    if pose.lift or pose.tilt:
        s.move(0.0, -pose.lift, pose.tilt)
    if pose.behind:
        _person(s, pose)
    base = s.matrix
    s.part = "object"
    s.move(pose.place[0], pose.place[1], pose.angle + float(rng.normal(0.0, 1.5)), pose.zoom * zoom)
    _OBJECTS[figure.object_name](s, color, pose.closed)
    s.matrix = base
    if not pose.behind:
        _person(s, pose)
    s.part = "prop"
    for prop in pose.props:
        if prop.kind not in _BEHIND:
            _PROPS[prop.kind](s, prop.start, prop.end)
    return s


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values: equal parts give equal seeds, on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def class_weights(exponent: float) -> NDArray[np.float64]:
    """The probabilities of `class_ids_by_frequency`, in its order; exponent 0 is uniform."""
    ranks = np.arange(len(_POSES), dtype=np.float64) + 2.0
    weights: NDArray[np.float64] = ranks**-exponent
    weights /= weights.sum()
    return weights


def _overlap(a: Box, b: Box) -> float:
    """The intersection over the smaller of the two areas."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / max(smaller, 1e-6)


@dataclass
class _Planner:
    """Places figures on a canvas without much overlap."""

    width: int
    height: int
    rng: np.random.Generator
    figures: list[Figure] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)

    def place(self, class_id: int, name: str, scale: float, tolerance: float) -> bool:
        rng = self.rng
        seed = int(rng.integers(2**62))
        flip = bool(rng.random() < 0.5)
        nominal = _sketch(Figure(class_id, name, seed, 0.0, 0.0, 50.0, flip)).extent()
        x0, y0, x1, y1 = (edge / 50.0 for edge in nominal)
        scale = min(scale, 0.68 * self.width / (x1 - x0), 0.8 * self.height / (y1 - y0))
        best: tuple[float, Figure, Box] | None = None
        for attempt in range(24):
            if attempt in (8, 16):
                scale *= 0.87
            x = rng.uniform(-x0 * scale + 1, self.width - x1 * scale - 1)
            y = rng.uniform(-y0 * scale + 1, self.height - y1 * scale - 1)
            box = (x + x0 * scale, y + y0 * scale, x + x1 * scale, y + y1 * scale)
            worst = max((_overlap(box, other) for other in self.boxes), default=0.0)
            if best is None or worst < best[0]:
                best = (worst, Figure(class_id, name, seed, float(x), float(y), scale, flip), box)
            if worst <= 0.02:
                break
        if best is None or best[0] > tolerance:
            return False
        self.figures.append(best[1])
        self.boxes.append(best[2])
        return True


def sample_scene(seed: int, split: str, index: int, exponent: float = TRAIN_EXPONENT) -> SceneSpec:
    """The scene at an index of a split: one or two pairs, rarely three, and lone objects.

    exponent is that of the class frequencies (0 is uniform); equal arguments give equal scenes.
    """
    scene_seed = derive_seed("hts-world", seed, split, index)
    rng = np.random.default_rng(scene_seed)
    width, height = CANVAS_SIZES[rng.integers(len(CANVAS_SIZES))]
    planner = _Planner(width, height, rng)
    ids = class_ids_by_frequency()
    weights = class_weights(exponent)
    num_pairs = 1 + int(rng.random() < 0.45) + int(rng.random() < 0.05)
    for number in range(num_pairs):
        class_id = int(ids[rng.choice(len(ids), p=weights)])
        name = _hico_objects()[class_id]
        if any(f.object_name == name for f in planner.figures):
            continue  # a second instance would blur what "object present, verb not" means
        scale = float(rng.uniform(44, 60)) if num_pairs == 1 else float(rng.uniform(38, 52))
        planner.place(class_id, name, scale, 1.0 if number == 0 else 0.2)
    names = world_objects()
    for _ in range(int(rng.integers(0, 3))):
        name = names[rng.integers(len(names))]
        if all(f.object_name != name for f in planner.figures):
            planner.place(-1, name, float(rng.uniform(30, 46)), 0.1)
    figures = tuple(sorted(planner.figures, key=lambda f: f.y))
    return SceneSpec(width, height, scene_seed, figures)


def _background(spec: SceneSpec, rng: np.random.Generator) -> Image.Image:
    k = SUPERSAMPLING
    width, height = spec.width * k, spec.height * k
    sky = tuple(int(c) for c in rng.uniform((165, 185, 200), (215, 220, 235)))
    ground = tuple(int(c) for c in rng.uniform((120, 130, 95), (190, 185, 160)))
    image = Image.new("RGB", (width, height), sky)
    canvas = ImageDraw.Draw(image)
    horizon = int(height * rng.uniform(0.3, 0.55))
    for _ in range(int(rng.integers(1, 4))):
        x, w, h = rng.uniform(0, width), rng.uniform(20, 50), rng.uniform(16, 46)
        if rng.random() < 0.5:
            wall = tuple(int(c) for c in rng.uniform(140, 190, 3))
            canvas.rectangle((x - w / 2, horizon - h, x + w / 2, horizon), fill=wall)
        else:
            leaf = (
                int(rng.uniform(95, 130)),
                int(rng.uniform(140, 165)),
                int(rng.uniform(90, 120)),
            )
            canvas.ellipse((x - w / 2, horizon - h, x + w / 2, horizon + 4), fill=leaf)
    canvas.rectangle((0, horizon, width, height), fill=ground)
    return image


def render_scene(spec: SceneSpec) -> NDArray[np.uint8]:
    """The pixels of a scene: (height, width, 3) uint8 RGB."""
    rng = np.random.default_rng(derive_seed("pixels", spec.seed))
    image = _background(spec, rng)
    canvas = ImageDraw.Draw(image)
    for figure in spec.figures:
        _sketch(figure).draw(canvas)
    pixels = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32)
    gain, noise = rng.uniform(0.88, 1.1), rng.normal(0.0, 4.0, (spec.height, spec.width, 1))
    return np.clip(pixels * gain + noise, 0, 255).astype(np.uint8)


def annotate(spec: SceneSpec, ambiguous_rate: float = AMBIGUOUS_RATE) -> NDArray[np.float64]:
    """HICO's annotation of a scene: (600,) with 1, -1 (object there, verb not), 0 or NaN.

    0 (ambiguous) falls on that share of the negatives, NaN (unknown) on absent objects' classes.
    """
    rng = np.random.default_rng(derive_seed("labels", spec.seed))
    present = set(spec.objects)
    there = np.array([name in present for name in _hico_objects()])
    labels = np.where(there, -1.0, np.nan)
    labels[there & (rng.random(len(labels)) < ambiguous_rate)] = 0.0
    labels[list(spec.class_ids)] = 1.0
    return labels


def image_name(split: str, index: int) -> str:
    """HICO's file name of the image at a 0-based index of a split."""
    return f"HICO_{split}2015_{index + 1:08d}.jpg"


def _write_images(
    indices: range, folder: Path, seed: int, split: str, exponent: float
) -> NDArray[np.float64]:
    """Renders scenes to JPEG files; returns their annotations, (600, len(indices))."""
    labels = np.empty((len(_hico_objects()), len(indices)))
    for column, index in enumerate(indices):
        spec = sample_scene(seed, split, index, exponent)
        labels[:, column] = annotate(spec)
        image = Image.fromarray(render_scene(spec))
        image.save(folder / image_name(split, index), quality=JPEG_QUALITY)
    return labels


def _write_split(
    folder: Path, seed: int, split: str, size: int, exponent: float, workers: int
) -> NDArray[np.float64]:
    folder.mkdir(parents=True)
    parts = [range(start, min(start + 250, size)) for start in range(0, size, 250)]
    work = functools.partial(
        _write_images, folder=folder, seed=seed, split=split, exponent=exponent
    )
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            done = list(pool.map(work, parts))
    else:
        done = [work(part) for part in parts]
    return np.concatenate(done, axis=1)


def _list_action() -> NDArray[Any]:
    """HICO's class table: a (600, 1) struct array."""
    names = ("nname", "vname", "vname_ing", "syn", "def")
    actions = np.empty((len(_hico_objects()), 1), dtype=[(name, object) for name in names])
    for row, item in enumerate(hico_classes()):
        verb = item.verb or ""
        actions[row, 0] = (item.object or "", verb, verb_phrase(verb).replace(" ", "_"), "", "")
    return actions


def _cells(names: Sequence[str]) -> NDArray[Any]:
    cells = np.empty((len(names), 1), dtype=object)
    cells[:, 0] = names
    return cells


def write_world(
    root: str | os.PathLike[str],
    seed: int,
    num_train: int,
    num_test: int,
    *,
    train_exponent: float = TRAIN_EXPONENT,
    test_exponent: float = TEST_EXPONENT,
    workers: int = 1,
) -> Path:
    """Writes a world in HICO's layout and returns its folder.

    `root` gets anno.mat and images/{train,test}2015; it appears complete or not at all. The
    exponents are those of the class frequencies. Raises DataError where root holds files already
    and ConfigError for an empty split.
    """
    import scipy.io

    target = Path(root)
    for name, size in (("num_train", num_train), ("num_test", num_test)):
        if size < 1:
            raise ConfigError(field=name, value=size, remedy="use at least 1")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} is not empty: write the world to a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        anno: dict[str, Any] = {"list_action": _list_action()}
        sizes, exponents = (num_train, num_test), (train_exponent, test_exponent)
        for split, size, exponent in zip(SPLITS, sizes, exponents, strict=True):
            folder = draft / "images" / f"{split}2015"
            anno[f"anno_{split}"] = _write_split(folder, seed, split, size, exponent, workers)
            anno[f"list_{split}"] = _cells([image_name(split, i) for i in range(size)])
        scipy.io.savemat(draft / "anno.mat", anno, do_compression=True)
        draft.chmod(0o755)  # mkdtemp gives 0700
        if target.exists():
            target.rmdir()
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return target
