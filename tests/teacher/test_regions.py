"""Tests of the regions' geometry."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hts_ray.config import RegionsConfig
from hts_ray.teacher.regions import propose_regions


@st.composite
def configs(draw: st.DrawFn) -> RegionsConfig:
    scales = draw(st.lists(st.floats(0.01, 1.0), max_size=3))
    return RegionsConfig(
        whole=draw(st.booleans()) or not scales,
        grid_scales=tuple(scales),
        grid_steps=tuple(draw(st.integers(1, 5)) for _ in scales),
        min_side=draw(st.integers(1, 64)),
        max_regions=draw(st.integers(1, 80)),
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), configs())
def test_boxes_are_valid(width: int, height: int, config: RegionsConfig) -> None:
    """Catches boxes that leave the image, are empty, too small, repeated or too many."""
    regions = propose_regions(width, height, config)
    assert 1 <= len(regions) <= config.max_regions
    assert len({region.box for region in regions}) == len(regions)
    for region in regions:
        left, top, right, bottom = region.box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert all(value == int(value) for value in region.box)
        if region.kind == "grid":
            assert min(right - left, bottom - top) >= config.min_side
        else:
            assert region.box == (0, 0, width, height)
    assert regions == propose_regions(width, height, config)


def test_default_grid_covers_the_image() -> None:
    """Catches a grid that is off by one step or does not reach the borders."""
    regions = propose_regions(640, 480, RegionsConfig())
    assert [region.kind for region in regions] == ["whole"] + ["grid"] * 13
    assert [region.box for region in regions[1:5]] == [
        (0, 0, 448, 336),
        (192, 0, 640, 336),
        (0, 144, 448, 480),
        (192, 144, 640, 480),
    ]
    half = [region.box for region in regions[5:]]
    assert half[4] == (160, 120, 480, 360)  # centre
    assert half[8] == (320, 240, 640, 480)
    assert len({(right - left, bottom - top) for left, top, right, bottom in half}) == 1


def test_small_image_falls_back_to_whole() -> None:
    """Catches an image without a region, which would get no scores at all."""
    config = RegionsConfig(whole=False, grid_scales=(0.5,), grid_steps=(2,), min_side=64)
    assert [region.kind for region in propose_regions(20, 10, config)] == ["whole"]


def test_full_scale_grid_is_the_whole_image_once() -> None:
    """Catches duplicates of the whole image, which would count twice in aggregation."""
    config = RegionsConfig(grid_scales=(1.0,), grid_steps=(3,))
    assert [region.kind for region in propose_regions(100, 50, config)] == ["whole"]


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_empty_image_is_refused(size: tuple[int, int]) -> None:
    """Catches boxes without area being handed to the teacher."""
    with pytest.raises(ValueError, match="no region"):
        propose_regions(*size, RegionsConfig())
