"""A seeded, download-free world of human-object interaction scenes in HICO's classes and layout.

Every scene is a pure function of (seed, split, index): figures are sketched in units of a person's
height, placed on a canvas and drawn with Pillow, and the sketch itself yields the annotations.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hts_ray.classes import hico_classes, verb_phrase
from hts_ray.demo.figures import SUPERSAMPLING, Box, Figure, poses, sketch, world_objects
from hts_ray.errors import ConfigError
from hts_ray.store.outputs import new_output

CANVAS_SIZES: tuple[tuple[int, int], ...] = ((112, 112), (112, 112), (128, 96), (96, 128))
JPEG_QUALITY = 90
TRAIN_EXPONENT = 1.4
TEST_EXPONENT = 0.5  # milder, so that every class has test images to be measured on
AMBIGUOUS_RATE = 0.04


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


@functools.cache
def _hico_objects() -> tuple[str, ...]:
    """The object of each of the 600 classes."""
    return tuple(item.object or "" for item in hico_classes())


def world_class_ids() -> tuple[int, ...]:
    """The 0-based HICO class ids that occur in the world, ascending."""
    return tuple(sorted(poses()))


def class_ids_by_frequency() -> tuple[int, ...]:
    """The world's class ids, the most frequent of a long-tailed split first."""
    return tuple(poses())


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values: equal parts give equal seeds, on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def class_weights(exponent: float) -> NDArray[np.float64]:
    """The probabilities of `class_ids_by_frequency`, in its order; exponent 0 is uniform."""
    ranks = np.arange(len(poses()), dtype=np.float64) + 2.0
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
        nominal = sketch(Figure(class_id, name, seed, 0.0, 0.0, 50.0, flip)).box()
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
            leaf = tuple(int(c) for c in rng.uniform((95, 140, 90), (130, 165, 120)))
            canvas.ellipse((x - w / 2, horizon - h, x + w / 2, horizon + 4), fill=leaf)
    canvas.rectangle((0, horizon, width, height), fill=ground)
    return image


def render_scene(spec: SceneSpec) -> NDArray[np.uint8]:
    """The pixels of a scene: (height, width, 3) uint8 RGB."""
    rng = np.random.default_rng(derive_seed("pixels", spec.seed))
    image = _background(spec, rng)
    canvas = ImageDraw.Draw(image)
    for figure in spec.figures:
        sketch(figure).draw(canvas)
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


def _write_split(
    folder: Path, seed: int, split: str, size: int, exponent: float
) -> NDArray[np.float64]:
    """Render a split to JPEG files; returns the annotations, (600, size)."""
    folder.mkdir(parents=True)
    labels = np.empty((len(_hico_objects()), size))
    for index in range(size):
        spec = sample_scene(seed, split, index, exponent)
        labels[:, index] = annotate(spec)
        image = Image.fromarray(render_scene(spec))
        image.save(folder / image_name(split, index), quality=JPEG_QUALITY)
    return labels


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


def write_world(root: str | os.PathLike[str], seed: int, num_train: int, num_test: int) -> Path:
    """Writes a world in HICO's layout and returns its folder.

    `root` gets anno.mat and images/{train,test}2015; it appears complete or not at all. Raises
    ConfigError where something is at root already and for an empty split.
    """
    import scipy.io

    for name, size in (("num_train", num_train), ("num_test", num_test)):
        if size < 1:
            raise ConfigError(field=name, value=size, remedy="use at least 1")
    anno: dict[str, Any] = {"list_action": _list_action()}
    with new_output(str(root)) as draft:
        for split, size, exponent in (
            ("train", num_train, TRAIN_EXPONENT),
            ("test", num_test, TEST_EXPONENT),
        ):
            folder = draft / "images" / f"{split}2015"
            anno[f"anno_{split}"] = _write_split(folder, seed, split, size, exponent)
            anno[f"list_{split}"] = _cells([image_name(split, i) for i in range(size)])
        scipy.io.savemat(draft / "anno.mat", anno, do_compression=True)
    return Path(root)
