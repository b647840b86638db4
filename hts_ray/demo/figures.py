"""The figures of the built-in world: people and objects, sketched in units of a person's height.

`world.yaml` holds the shapes of the objects and a pose for each class; this module draws them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import ImageDraw

from hts_ray.classes import hico_classes

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Color = tuple[int, int, int]
Shape = Sequence[Any]  # its kind, its color, and the arguments of the method of that kind

SUPERSAMPLING = 2
_BEHIND = ("wave", "shadow", "fence", "speed")  # props that the figures stand in front of


@functools.cache
def _drawings() -> dict[str, Any]:
    """Read `world.yaml`."""
    text = Path(__file__).with_name("world.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # faster where it is built
    content: dict[str, Any] = yaml.load(text, Loader=loader)  # noqa: S506
    return content


@dataclass(frozen=True)
class Pose:
    """How a person and an object are arranged: points in person heights, angles in degrees.

    `props` show the verb: (kind, place) or (kind, place, end or size).
    """

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
    bust: bool = False
    closed: bool = False
    props: tuple[tuple[Any, ...], ...] = ()

    @classmethod
    def read(cls, content: dict[str, Any]) -> Pose:
        """Return the pose that `world.yaml` describes; `stand` is the x of an idle person."""
        given = dict(content)
        if "stand" in given:
            x = given.pop("stand")
            hands, feet = ((x - 0.09, -0.42), (x + 0.09, -0.42)), ((x - 0.06, 0.0), (x + 0.06, 0.0))
            given = {"hip": (x, -0.5), "hands": hands, "feet": feet, **given}
        return cls(**given)


@functools.cache
def poses() -> dict[int, Pose]:
    """Return the pose of each class of the world, the most frequent class first."""
    ids = {f"{item.verb} {item.object}": number for number, item in enumerate(hico_classes())}
    return {ids[name]: Pose.read(content) for name, content in _drawings()["poses"].items()}


def world_objects() -> tuple[str, ...]:
    """The HICO object names of the world, sorted."""
    return tuple(sorted(_drawings()["colors"]))


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

    def line(self, color: Color, width: float, points: Sequence[Point]) -> None:
        thick = max(width * self.zoom(), 0.8)
        self.shapes.append(("line", self._map(points, thick / 2), thick, color))

    def polygon(self, color: Color, points: Sequence[Point]) -> None:
        self.shapes.append(("polygon", self._map(points, 0.0), 0.0, color))

    def disc(self, color: Color, x: float, y: float, radius: float) -> None:
        r = max(radius * self.zoom(), 0.7)
        self.shapes.append(("disc", self._map([(x, y)], r), r, color))

    def ellipse(
        self, color: Color, x: float, y: float, rx: float, ry: float, turn: float = 0.0
    ) -> None:
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        ring = _arc(0.0, 0.0, rx, ry, 8, 16)
        self.polygon(color, [(x + c * u - s * v, y + s * u + c * v) for u, v in ring])

    def dome(self, color: Color, x: float, y: float, rx: float, ry: float) -> None:
        self.polygon(color, _arc(x, y, rx, -ry, 10, 11))

    def wheel(self, color: Color, x: float, radius: float, width: float) -> None:
        self.line(color, width, _arc(x, -radius - width / 2, radius, radius, 7, 15))

    def box(self, *parts: str) -> Box:
        """The bounding box (xyxy, pixels) of some parts, without any of everything."""
        points = [point for part in parts or self.points for point in self.points[part]]
        xs, ys = zip(*points, strict=True)
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


def _arc(x: float, y: float, rx: float, ry: float, steps: int, count: int) -> list[Point]:
    """Return `count` points of an ellipse around (x, y), `steps` of them on half a turn."""
    angles = [k * math.pi / steps for k in range(count)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def _color(name: str | Sequence[int], own: Color = (0, 0, 0)) -> Color:
    """Return a color of `world.yaml`: RGB, a name of its palette, or a shade of an object's own."""
    if not isinstance(name, str):
        r, g, b = name
        return (r, g, b)
    kind, _, factor = name.partition(" ")
    if kind != "own":
        return _color(_drawings()["palette"][name])
    return _shade(own, float(factor)) if factor else own


def _shade(color: Color, factor: float) -> Color:
    r, g, b = (min(255, int(channel * factor)) for channel in color)
    return (r, g, b)


def _draw_shapes(s: _Sketch, shapes: Iterable[Shape], own: Color = (0, 0, 0)) -> None:
    """Draw shapes as `world.yaml` writes them: kind, color, numbers."""
    for kind, color, *numbers in shapes:
        getattr(s, kind)(_color(color, own), *numbers)


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
    s.line(color, width, [start, joint, tip])
    return tip


def _draw_person(s: _Sketch, pose: Pose) -> None:
    """Draws the person of a pose with jittered joints."""
    s.part = "person"
    rng = s.rng
    people, dark = _drawings()["people"], _color("dark")
    skin, shirt, trousers = (
        _color(people[part][rng.integers(len(people[part]))])
        for part in ("skin", "shirt", "trousers")
    )
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
            toe = (tip[0] + 0.05 * pose.facing, tip[1] - 0.015)
            s.line(dark, 0.05, [(tip[0] - 0.01, tip[1] - 0.015), toe])
    tip = _limb(s, shoulder, hands[1], 0.2, elbow * -1, 0.06, _shade(skin, 0.85))
    if pose.bust:
        neck = (hip[0], hip[1] - 0.1)
        head = (hip[0] + 0.01, hip[1] - 0.17)
        s.line(shirt, 0.17, [(hip[0], hip[1] - 0.03), neck])
        s.line(skin, 0.05, [neck, (hip[0] + 0.2, hip[1] - 0.03)])
    else:
        s.line(shirt, 0.15, [hip, neck])
        _limb(s, shoulder, hands[0], 0.2, elbow * -1, 0.065, skin)
    s.disc(skin, *head, 0.085)
    hair = (head[0] - 0.025 * pose.facing, head[1] - 0.04)
    s.disc(_color(people["trousers"][rng.integers(2, 4)]), *hair, 0.065)


# The shapes of a prop at (x, y); (u, v) is where it ends or, for those that have one, its size.
_PROPS: dict[str, Callable[[float, float, float, float], list[Shape]]] = {
    "line": lambda x, y, u, v: [("line", "dark", 0.02, [(x, y), (u, v)])],
    "speed": lambda x, y, u, v: [
        ("line", "white", 0.022, [(x, y + dy), (u, v + dy)]) for dy in (-0.08, 0.0, 0.08)
    ],
    "bounce": lambda x, y, u, v: [
        ("line", "white", 0.022, [(x + dx, y - 0.02), (u + dx, v)]) for dx in (-0.07, 0.07)
    ],
    "sponge": lambda x, y, u, v: [("disc", (255, 230, 60), x, y, 0.06)],
    "food": lambda x, y, u, v: [
        ("disc", "food", x, y, 0.06),
        ("line", (60, 170, 60), 0.03, [(x - 0.05, y), (x - 0.02, y - 0.1)]),
    ],
    "tool": lambda x, y, u, v: [
        ("line", "steel", 0.045, [(x, y), (u, v)]),
        ("disc", (255, 60, 30), u, v, 0.05),
    ],
    "lens": lambda x, y, u, v: [
        ("disc", "dark", x, y, 0.085),
        ("disc", (190, 240, 255), x, y, 0.055),
    ],
    "tub": lambda x, y, u, v: [
        ("polygon", (120, 140, 210),
         [(x - u, y - v), (x + u, y - v), (x + u * 0.8, y), (x - u * 0.8, y)])
    ],
    "shadow": lambda x, y, u, v: [("ellipse", (70, 70, 70), x, y, u, v)],
    "fence": lambda x, y, u, v: [
        *(("line", "white", 0.045, [(x - u, y - v * h), (x + u, y - v * h)]) for h in (0.3, 0.7)),
        *(("line", "white", 0.045, [(x + dx, y), (x + dx, y - v)]) for dx in (-u, u)),
    ],
    "wave": lambda x, y, u, v: [
        ("polygon", (50, 130, 200), [*_crest(x, y, u, v), (x + u, y), (x - u, y)]),
        ("line", "white", 0.03, _crest(x, y, u, v)),
    ],
}  # fmt: skip


def _crest(x: float, y: float, width: float, height: float) -> list[Point]:
    return [(x - width + k * width / 6, y - height - 0.03 * (k % 2)) for k in range(13)]


def _draw_props(s: _Sketch, pose: Pose, *, behind: bool) -> None:
    s.part = "prop"
    for kind, (x, y), *end in pose.props:
        (u, v) = end[0] if end else (0.0, 0.0)
        if kind == "drops" and not behind:
            for dx, dy in s.rng.uniform(-1.0, 1.0, (11, 2)).tolist():
                s.disc(_color("water"), x + dx * u, y + dy * v - 0.05, 0.03)
        elif kind != "drops" and behind == (kind in _BEHIND):
            _draw_shapes(s, _PROPS[kind](x, y, u, v))


def sketch(figure: Figure) -> _Sketch:
    """The shapes of a figure, in pixels of its scene."""
    rng = np.random.default_rng(figure.seed)
    s = _Sketch(rng, figure.x, figure.y, figure.scale, figure.flip)
    objects, palette = _drawings()["objects"], _drawings()["colors"][figure.object_name]
    color = _color(palette[rng.integers(len(palette))])
    zoom = float(rng.uniform(0.94, 1.06))
    if figure.class_id < 0:
        s.part = "object"
        s.move(0.0, 0.0, 0.0, zoom)
        _draw_shapes(s, objects[figure.object_name], color)
        return s
    pose = poses()[figure.class_id]
    _draw_props(s, pose, behind=True)
    if pose.lift or pose.tilt:
        s.move(0.0, -pose.lift, pose.tilt)
    base = s.matrix
    s.part = "object"
    s.move(pose.place[0], pose.place[1], pose.angle + float(rng.normal(0.0, 1.5)), pose.zoom * zoom)
    _draw_shapes(s, objects[figure.object_name + ("_closed" if pose.closed else "")], color)
    s.matrix = base
    _draw_person(s, pose)
    _draw_props(s, pose, behind=False)
    return s
