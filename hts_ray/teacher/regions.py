"""Which parts of an image the teacher looks at: geometry only, no pixels."""

from __future__ import annotations

from dataclasses import dataclass

from hts_ray.config import RegionsConfig

WHOLE = "whole"
GRID = "grid"


@dataclass(frozen=True)
class Region:
    """A box in an image: `box` is (left, top, right, bottom) in pixels of the upright original.

    Sides have whole-pixel lengths; right and bottom are exclusive. `kind` says where the
    box comes from: `whole` or `grid`.
    """

    box: tuple[float, float, float, float]
    kind: str


def propose_regions(width: int, height: int, config: RegionsConfig) -> list[Region]:
    """Return the whole image and a grid of overlapping crops at every scale, in this order.

    At a scale s with n steps, n x n crops of s*width x s*height are spread evenly, the
    first and last flush with the borders; one step is the centre. Boxes that repeat and
    boxes with a side under `config.min_side` are left out, and at most
    `config.max_regions` are kept. The result depends on nothing but the arguments and
    always holds at least one region: the whole image stands in where nothing else is
    left. Raises ValueError for an empty image.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no region")
    whole = Region((0.0, 0.0, float(width), float(height)), WHOLE)
    regions = [whole] if config.whole else []
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
    first_of_box: dict[tuple[float, float, float, float], Region] = {}
    for region in regions:
        first_of_box.setdefault(region.box, region)
    return list(first_of_box.values())[: config.max_regions] or [whole]


def _offsets(room: int, steps: int) -> list[int]:
    """Spread `steps` positions evenly over 0..room; a single one lies in the middle."""
    if steps == 1:
        return [room // 2]
    return [round(room * step / (steps - 1)) for step in range(steps)]
