"""Tests of the page that shows a teacher's sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hts_ray.images.decode import DecodedImage
from hts_ray.images.regions import Region
from hts_ray.report.preview import write_preview
from hts_ray.teacher.estimate import Estimate, ImageExample, RegionExample


def measured(*examples: ImageExample) -> Estimate:
    figures = {
        "images": 9,
        "sample": len(examples),
        "device": "cpu",
        "seconds an image": 0.5,
        "tokens a region": 30,
        "GPU-hours": None,
    }
    return Estimate(figures, list(examples))


def example(caption: str = "a man rides") -> ImageExample:
    image = DecodedImage(np.full((48, 64, 3), 90, np.uint8), 640, 480)
    union = Region((10.0, 20.0, 600.0, 480.0), "union", 0.2)
    whole = Region((0.0, 0.0, 640.0, 480.0), "whole")
    regions = [RegionExample(union, caption, [("ride horse", 0.625)]), RegionExample(whole, "", [])]
    return ImageExample("x", "/images/x.png", image, regions)


def test_preview_shows_boxes_and_words(tmp_path: Path) -> None:
    """Catches a page that needs the network, leaves regions out, or boxes of the wrong size."""
    path = tmp_path / "preview.html"
    write_preview(str(path), measured(example(), example()))
    page = path.read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == page.count("data:image/jpeg;base64,") == 2
    assert page.count('class="region"') == page.count("<rect ") == 4
    assert 'viewBox="0 0 640 480"' in page  # the original's pixels, whatever was decoded
    assert 'x="10.0" y="20.0" width="590.0" height="460.0"' in page
    assert "union, context 0.2" in page
    assert "62.5 %" in page
    assert "tokens a region" in page
    assert "http" not in page.replace('http-equiv="Content', "")


def test_captions_are_text(tmp_path: Path) -> None:
    """Catches a page that runs what a model wrote."""
    path = tmp_path / "preview.html"
    write_preview(str(path), measured(example("<script>alert(1)</script>")))
    assert "<script>alert" not in path.read_text()


def test_preview_without_a_readable_image(tmp_path: Path) -> None:
    """Catches a page that fails just when something is wrong with the images."""
    path = tmp_path / "preview.html"
    write_preview(str(path), measured())
    assert "<article>" not in path.read_text()
