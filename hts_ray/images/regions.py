"""Which parts of an image the teacher looks at: geometry only, no pixels.

Boxes are (left, top, right, bottom) in pixels of the upright original; right and bottom are
exclusive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hts_ray.config import RegionsConfig

Box = tuple[float, float, float, float]

WHOLE = "whole"
GRID = "grid"
PERSON = "person"
UNION = "union"
GIVEN = "given"
KINDS = (WHOLE, UNION, PERSON, GIVEN, GRID)

# Two crops of one margin that overlap more than this show the teacher the same thing.
NEAR_DUPLICATE = 0.95


@dataclass(frozen=True)
class Region:
    """A box in an image: `box` is (left, top, right, bottom) in pixels of the upright original.

    Sides have whole-pixel lengths; right and bottom are exclusive. `kind` says where the
    box comes from: one of KINDS. `margin` is the context around a person or a pair, as a share
    of the sides of the box before it; 0 for the other kinds.
    """

    box: Box
    kind: str
    margin: float = 0.0


@dataclass(frozen=True)
class Detection:
    """Something found in an image: its box, its name and a score in [0, 1].

    `is_person` says that it is a person whatever its label; labels of
    `RegionsConfig.person_labels` count as persons in any case.
    """

    box: Box
    label: str
    score: float
    is_person: bool = False

    def scaled(self, x: float, y: float) -> Detection:
        """Return the detection in an image that is `x` times as wide and `y` times as high."""
        left, top, right, bottom = self.box
        return replace(self, box=(left * x, top * y, right * x, bottom * y))


def propose_regions(
    width: int,
    height: int,
    config: RegionsConfig,
    *,
    detections: Sequence[Detection] = (),
    given: Sequence[Box] = (),
    limit: int | None = None,
) -> list[Region]:
    """Return the regions of an image, those that matter most first.

    The whole image; pairs of a person and an object, then persons, both with the first of
    `config.margins` as context; the boxes `given`; pairs and persons with the further
    margins; a grid of overlapping crops. A cap thus takes the grid first, then the further
    margins, and leaves many pairs with one margin rather than a few with all. See
    `pair_boxes` for the order of the pairs; persons come by score, larger ones first.

    Detections are clipped to the image, and what overlaps more than `config.nms_iou` is one:
    objects label by label, persons whatever their label. Boxes are rounded outwards to whole
    pixels. Boxes that repeat, boxes with a side under `config.min_side` and boxes without
    area are left out, and so is a pair or person that covers what another of the same margin
    does (NEAR_DUPLICATE). At most `config.max_regions` are kept, and at most `limit`, but
    never less than one: if nothing else is left, the whole image. The result depends on the
    arguments alone. Raises ValueError for an empty image.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no region")
    whole = Region((0.0, 0.0, float(width), float(height)), WHOLE)
    clipped = ((found, clip_box(found.box, width, height)) for found in detections)
    found = [replace(found, box=box) for found, box in clipped if box is not None]
    people, objects = _people_and_objects(found, config)
    pairs = pair_boxes(people, objects, config.max_pairs) if config.unions else []
    persons = [person.box for person in people] if config.persons else []
    regions = [whole] if config.whole else []
    plain = [Region(box, GIVEN) for box in _pixel_boxes(given, 0.0, width, height)]
    for position, margin in enumerate(config.margins):
        regions += _with_context(pairs, persons, margin, width, height, config)
        if position == 0:
            regions += [region for region in plain if _is_large(region.box, config)]
    regions += _grid(width, height, config)
    first_of_box: dict[Box, Region] = {}
    for region in regions:
        first_of_box.setdefault(region.box, region)
    cap = config.max_regions if limit is None else max(1, min(limit, config.max_regions))
    return list(first_of_box.values())[:cap] or [whole]


def union_box(a: Box, b: Box) -> Box:
    """Return the smallest box that holds both."""
    return (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))


def expand_box(box: Box, margin: float) -> Box:
    """Return the box grown on every side by `margin` (>= 0) of its width or height."""
    left, top, right, bottom = box
    x, y = margin * (right - left), margin * (bottom - top)
    return (left - x, top - y, right + x, bottom + y)


def clip_box(box: Box, width: int, height: int) -> Box | None:
    """Return the part of a box inside an image; None where that has no area.

    None too for a box with a corner that is not finite.
    """
    if not all(map(math.isfinite, box)):
        return None
    left, top = max(0.0, float(box[0])), max(0.0, float(box[1]))
    right, bottom = min(float(width), float(box[2])), min(float(height), float(box[3]))
    return (left, top, right, bottom) if left < right and top < bottom else None


def nms(
    detections: Iterable[Detection],
    max_iou: float,
    group: Callable[[Detection], str] = lambda detection: detection.label,
) -> list[Detection]:
    """Return the detections that no better one of their group overlaps by more than `max_iou`.

    Greedy non-maximum suppression, by default label by label; the best scores come first.
    Equal scores are ordered by label and box, so that the order of the arguments does not count.
    """
    ranked = sorted(detections, key=lambda found: (-found.score, found.label, found.box))
    kept: list[Detection] = []
    boxes: dict[str, list[Box]] = {}
    for detection in ranked:
        others = boxes.setdefault(group(detection), [])
        if not _overlaps(detection.box, others, max_iou):
            others.append(detection.box)
            kept.append(detection)
    return kept


def pair_boxes(
    people: Sequence[Detection], objects: Sequence[Detection], max_pairs: int
) -> list[Box]:
    """Return boxes around a person and an object, or two persons, the likeliest pair first.

    A pair's score is score(a) * score(b) * reach / (reach + gap): `gap` is the shortest
    distance between the two boxes (0 where they touch) and `reach` the longer side of the
    person's box, of the larger one of two persons. A person's own length away thus halves
    the score, at every image size; nothing is ruled out. Pairs of equal scores are ordered by
    the distance of their centres. A pair whose box is that of a better one (NEAR_DUPLICATE)
    is left out, and the best `max_pairs` are kept.
    """
    if not people:
        return []
    found = [*people, *objects]
    second = np.array([one.box for one in found], dtype=np.float64)
    first = second[: len(people)]
    side = (second[:, 2:] - second[:, :2]).max(axis=1)
    side[len(people) :] = 0.0
    reach = np.maximum((first[:, 2:] - first[:, :2]).max(axis=1)[:, None], side[None, :])
    start = np.maximum(first[:, None, :2], second[None, :, :2])
    end = np.minimum(first[:, None, 2:], second[None, :, 2:])
    gap = np.hypot(*np.moveaxis(np.maximum(start - end, 0.0), -1, 0))
    centers = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (first, second)]
    apart = np.hypot(*np.moveaxis(centers[0][:, None] - centers[1][None], -1, 0))
    scores = np.array([one.score for one in found], dtype=np.float64)
    pair_scores = scores[: len(people), None] * scores[None, :] * reach / (reach + gap)
    # Every two persons once, and nobody with themselves.
    rows, columns = np.triu_indices(len(people), k=1, m=len(second))
    order = np.lexsort((apart[rows, columns], -pair_scores[rows, columns]))
    kept: list[Box] = []
    for a, b in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        box = union_box(found[a].box, found[b].box)
        if not _overlaps(box, kept, NEAR_DUPLICATE):
            kept.append(box)
            if len(kept) == max_pairs:
                break
    return kept


def _people_and_objects(
    detections: Sequence[Detection], config: RegionsConfig
) -> tuple[list[Detection], list[Detection]]:
    """Tell persons from objects and merge what overlaps."""
    labels = {label.lower() for label in config.person_labels}
    people: list[Detection] = []
    objects: list[Detection] = []
    for found in detections:
        is_person = found.is_person or found.label.lower() in labels
        (people if is_person else objects).append(found)
    # One human found both as `person` and as `man` would be a pair of its own.
    people = nms(people, config.nms_iou, group=lambda _: PERSON)
    people.sort(key=lambda found: (-found.score, -_area(found.box), found.box))
    return people, nms(objects, config.nms_iou)


def _with_context(
    pairs: Sequence[Box],
    persons: Sequence[Box],
    margin: float,
    width: int,
    height: int,
    config: RegionsConfig,
) -> list[Region]:
    """Return the regions of pairs and persons with one margin, without near-duplicates."""
    regions: list[Region] = []
    kept: list[Box] = []
    for kind, boxes in ((UNION, pairs), (PERSON, persons)):
        for box in _pixel_boxes(boxes, margin, width, height):
            if _is_large(box, config) and not _overlaps(box, kept, NEAR_DUPLICATE):
                kept.append(box)
                regions.append(Region(box, kind, margin))
    return regions


def _pixel_boxes(boxes: Iterable[Box], margin: float, width: int, height: int) -> list[Box]:
    """Expand and clip boxes, then round them outwards: no pixel of theirs is lost."""
    pixel_boxes = []
    for box in boxes:
        clipped = clip_box(expand_box(box, margin), width, height)
        if clipped is not None:
            left, top, right, bottom = clipped
            corner = (float(math.floor(left)), float(math.floor(top)))
            pixel_boxes.append((*corner, float(math.ceil(right)), float(math.ceil(bottom))))
    return pixel_boxes


def _is_large(box: Box, config: RegionsConfig) -> bool:
    return min(box[2] - box[0], box[3] - box[1]) >= config.min_side


def _grid(width: int, height: int, config: RegionsConfig) -> list[Region]:
    """Return a grid of overlapping crops at every scale.

    At a scale s with n steps, n x n crops of s*width x s*height are spread evenly, the
    first and last flush with the borders; one step is the centre.
    """
    regions = []
    for scale, steps in zip(config.grid_scales, config.grid_steps, strict=True):
        # All crops of a scale have the same size in pixels, so that they resize as one batch.
        crop_width = max(1, round(scale * width))
        crop_height = max(1, round(scale * height))
        if min(crop_width, crop_height) < config.min_side:
            continue
        regions += [
            Region((float(x), float(y), float(x + crop_width), float(y + crop_height)), GRID)
            for y in _offsets(height - crop_height, steps)
            for x in _offsets(width - crop_width, steps)
        ]
    return regions


def _offsets(room: int, steps: int) -> list[int]:
    """Spread `steps` positions evenly over 0..room; a single one lies in the middle."""
    if steps == 1:
        return [room // 2]
    return [round(room * step / (steps - 1)) for step in range(steps)]


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _overlaps(box: Box, others: Sequence[Box], max_iou: float) -> bool:
    """Return whether the IoU of a box with any of the others is above `max_iou`."""
    if not others:
        return False
    return bool((_ious(box, np.array(others, dtype=np.float64)) > max_iou).any())


def _ious(box: Box, others_N4: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the IoU of one box with each of N."""
    left, top, right, bottom = others_N4.T
    width = np.minimum(box[2], right) - np.maximum(box[0], left)
    height = np.minimum(box[3], bottom) - np.maximum(box[1], top)
    shared = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    areas = np.maximum(right - left, 0.0) * np.maximum(bottom - top, 0.0)
    total = areas + _area(box) - shared
    ious: npt.NDArray[np.float64] = np.zeros_like(shared)
    np.divide(shared, total, out=ious, where=total > 0)
    return ious.clip(0.0, 1.0)
