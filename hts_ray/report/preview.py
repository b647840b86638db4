"""A page that shows, before a teacher pass is paid for, what the teacher sees and says."""

from __future__ import annotations

from typing import Any

from hts_ray.images.thumbnail import thumbnail_data_uri
from hts_ray.report.page import environment
from hts_ray.store import storage
from hts_ray.teacher.estimate import Estimate, ImageExample, RegionExample

_PICTURE_SIDE = 640
_PICTURE_BYTES = 80_000


def write_preview(path: str, estimate: Estimate) -> None:
    """Write one HTML file, which needs no network, with the sampled images and their regions."""
    page = (
        environment()
        .get_template("preview.html.j2")
        .render(
            sample=estimate.sample,
            figures=[(name, _shown(value)) for name, value in estimate.figures().items()],
            items=[_item(number, example) for number, example in enumerate(estimate.examples)],
        )
    )
    storage.write_bytes(path, page.encode())


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _item(number: int, example: ImageExample) -> dict[str, Any]:
    image = example.image
    return {
        "number": number,
        "title": f"{example.uri}, {image.width} x {image.height}",
        "width": image.width,
        "height": image.height,
        "image": thumbnail_data_uri(image.pixels, _PICTURE_SIDE, _PICTURE_BYTES),
        "regions": [_region(shown) for shown in example.regions],
    }


def _region(shown: RegionExample) -> dict[str, Any]:
    left, top, right, bottom = shown.region.box
    margin = shown.region.margin
    return {
        "kind": f"{shown.region.kind}, context {margin:g}" if margin else shown.region.kind,
        "place": f"{left:.0f}, {top:.0f} to {right:.0f}, {bottom:.0f}",
        "x": left,
        "y": top,
        "width": right - left,
        "height": bottom - top,
        "caption": shown.caption,
        "classes": [(name, f"{100 * p:.1f}") for name, p in shown.top_classes],
    }
