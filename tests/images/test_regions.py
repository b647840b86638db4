"""Tests of the regions' geometry."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hts_ray.config import RegionsConfig
from hts_ray.images.regions import (
    GIVEN,
    GRID,
    NEAR_DUPLICATE,
    PERSON,
    UNION,
    WHOLE,
    Box,
    Detection,
    Region,
    _ious,
    clip_box,
    expand_box,
    nms,
    pair_boxes,
    propose_regions,
    union_box,
)

coordinates = st.floats(-500, 1500, allow_nan=False)
any_coordinates = st.one_of(coordinates, st.sampled_from([math.nan, math.inf, -math.inf, 1e308]))
LABELS = ("person", "man", "horse", "hot dog")
NO_GRID = {"grid_scales": (), "grid_steps": ()}


def iou(a, b) -> float:
    """Return the intersection over union of two boxes, by the function that takes many."""
    return float(_ious(a, np.array([b], dtype=np.float64))[0])


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """Boxes with an area, some of them far outside an image."""
    left, top = draw(coordinates), draw(coordinates)
    return (left, top, left + draw(st.floats(0.5, 900)), top + draw(st.floats(0.5, 900)))


@st.composite
def detections(draw: st.DrawFn) -> list[Detection]:
    """Detections of distinct scores; a few are no boxes at all."""
    scores = draw(st.lists(st.integers(1, 1000), max_size=12, unique=True))
    wild = st.tuples(any_coordinates, any_coordinates, any_coordinates, any_coordinates)
    return [
        Detection(
            draw(st.one_of(boxes(), boxes(), wild)), draw(st.sampled_from(LABELS)), score / 1000
        )
        for score in scores
    ]


@st.composite
def rich_configs(draw: st.DrawFn) -> RegionsConfig:
    margins = draw(st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0]), min_size=1, unique=True))
    return RegionsConfig(
        whole=draw(st.booleans()),
        margins=tuple(margins),
        unions=draw(st.booleans()),
        persons=draw(st.booleans()),
        nms_iou=draw(st.sampled_from([0.3, 0.7, 1.0])),
        max_pairs=draw(st.integers(1, 6)),
        min_side=draw(st.integers(1, 40)),
        max_regions=draw(st.integers(1, 60)),
    )


def contains(outer: Box, inner: Box) -> bool:
    return (
        outer[0] <= inner[0]
        and outer[1] <= inner[1]
        and outer[2] >= inner[2]
        and outer[3] >= inner[3]
    )


def kinds(regions: list[Region]) -> list[str]:
    return [region.kind for region in regions]


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


@settings(max_examples=200, deadline=None)
@given(boxes(), boxes())
def test_iou_and_union(a: Box, b: Box) -> None:
    """Catches an IoU outside [0, 1] or not symmetric, and a union that cuts a box."""
    assert iou(a, a) == pytest.approx(1.0)
    assert 0 <= iou(a, b) <= 1
    assert iou(a, b) == pytest.approx(iou(b, a))
    union = union_box(a, b)
    assert contains(union, a)
    assert contains(union, b)
    assert union == union_box(b, a)
    assert set(union) <= {*a, *b}


def test_iou_by_hand() -> None:
    """Catches inclusive pixels (a width off by one) and boxes that only touch counted as shared."""
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


@settings(max_examples=200, deadline=None)
@given(boxes(), st.floats(0, 4), st.floats(0, 4))
def test_more_margin_is_more_box(box: Box, one: float, two: float) -> None:
    """Catches a margin that shrinks a box or shifts it to one side."""
    assert contains(expand_box(box, max(one, two)), expand_box(box, min(one, two)))
    assert expand_box(box, 0) == box
    left, top, right, bottom = expand_box(box, one)
    assert left + right == pytest.approx(box[0] + box[2], abs=1e-6)
    assert right - left == pytest.approx((1 + 2 * one) * (box[2] - box[0]))
    assert bottom - top == pytest.approx((1 + 2 * one) * (box[3] - box[1]))


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(any_coordinates, any_coordinates, any_coordinates, any_coordinates),
    st.integers(1, 900),
    st.integers(1, 900),
)
def test_clipped_boxes_lie_in_the_image(box: Box, width: int, height: int) -> None:
    """Catches empty, inverted or infinite boxes that reach the crops."""
    clipped = clip_box(box, width, height)
    if clipped is None:
        finite = all(map(math.isfinite, box))
        assert not finite or iou(box, (0, 0, width, height)) == 0
        return
    assert contains((0, 0, width, height), clipped)
    assert contains(box, clipped)
    assert clipped[0] < clipped[2]
    assert clipped[1] < clipped[3]
    assert clip_box(clipped, width, height) == clipped


@settings(max_examples=150, deadline=None)
@given(detections(), st.sampled_from([0.3, 0.7, 1.0]), st.randoms(use_true_random=False))
def test_nms(found: list[Detection], max_iou: float, random: object) -> None:
    """Catches NMS that depends on the order, is not finished after one pass, or loses the best."""
    clipped = [(one, clip_box(one.box, 1500, 1500)) for one in found]
    found = [replace(one, box=box) for one, box in clipped if box]
    kept = nms(found, max_iou)
    assert nms(kept, max_iou) == kept
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert nms(shuffled, max_iou) == kept
    for one, two in itertools.combinations(kept, 2):
        assert one.label != two.label or iou(one.box, two.box) <= max_iou
    for lost in set(found) - set(kept):
        assert any(
            one.label == lost.label and one.score > lost.score and iou(one.box, lost.box) > max_iou
            for one in kept
        )


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 1000),
    st.integers(1, 1000),
    rich_configs(),
    detections(),
    st.lists(
        st.one_of(
            boxes(), st.tuples(any_coordinates, any_coordinates, any_coordinates, any_coordinates)
        ),
        max_size=4,
    ),
    st.one_of(st.none(), st.integers(-1, 30)),
)
def test_proposals_hold_for_any_boxes(
    width: int,
    height: int,
    config: RegionsConfig,
    found: list[Detection],
    given_boxes: list[Box],
    limit: int | None,
) -> None:
    """Catches boxes outside the image, repeats, broken caps and results that depend on order."""
    regions = propose_regions(
        width, height, config, detections=found, given=given_boxes, limit=limit
    )
    cap = config.max_regions if limit is None else max(1, min(limit, config.max_regions))
    assert 1 <= len(regions) <= cap
    assert len({region.box for region in regions}) == len(regions)
    for region in regions:
        assert all(type(value) is float and value == int(value) for value in region.box)
        assert contains((0, 0, width, height), region.box)
        left, top, right, bottom = region.box
        assert left < right
        assert top < bottom
        if region.kind != WHOLE:
            assert min(right - left, bottom - top) >= config.min_side
        assert region.margin in (config.margins if region.kind in (UNION, PERSON) else (0.0,))
    assert regions[0].kind == WHOLE or not config.whole
    for margin in config.margins:
        crops = [r.box for r in regions if r.margin == margin and r.kind in (UNION, PERSON)]
        unions = [r for r in regions if r.margin == margin and r.kind == UNION]
        assert len(unions) <= config.max_pairs
        for one, two in itertools.combinations(crops, 2):
            assert iou(one, two) <= NEAR_DUPLICATE
    again = propose_regions(
        width, height, config, detections=found[::-1], given=given_boxes, limit=limit
    )
    assert again == regions


@settings(max_examples=150, deadline=None)
@given(boxes(), boxes(), st.sampled_from([0.0, 0.2, 0.5]))
def test_a_pair_keeps_its_person(person: Box, thing: Box, margin: float) -> None:
    """Catches a crop that reads "hot dog" alone because it cuts the person who eats it."""
    width, height = 700, 500
    config = RegionsConfig(margins=(margin,), whole=False, min_side=1, **NO_GRID, detector="x")
    found = [Detection(person, "person", 0.9), Detection(thing, "hot dog", 0.8)]
    regions = propose_regions(width, height, config, detections=found)
    inside = [clip_box(box, width, height) for box in (person, thing)]
    if None in inside:
        return
    union = regions[0]
    assert union.kind == UNION
    for box in inside:
        assert box is not None
        assert contains(union.box, box)
    wide = clip_box(expand_box(union_box(*inside), margin), width, height)  # type: ignore[arg-type]
    assert wide is not None
    assert contains(union.box, wide)
    assert all(abs(one - two) < 1 for one, two in zip(union.box, wide, strict=True))


RIDER = Detection((100, 50, 200, 250), "person", 0.9)
HORSE = Detection((80, 150, 260, 350), "horse", 0.8)
OTHER = Detection((500, 60, 560, 240), "man", 0.7)
PLAIN = RegionsConfig(margins=(0.0,))


def test_kinds_in_order() -> None:
    """Catches an order in which a cap takes pairs before the grid."""
    regions = propose_regions(
        640, 480, PLAIN, detections=[RIDER, HORSE, OTHER], given=[(300.2, 10, 400.7, 99)]
    )
    assert kinds(regions)[:8] == [WHOLE, UNION, UNION, UNION, PERSON, PERSON, GIVEN, GRID]
    assert regions[1].box == (80, 50, 260, 350)
    assert regions[4].box == RIDER.box
    assert regions[6] == Region((300, 10, 401, 99), GIVEN)


def test_a_cap_keeps_one_margin_of_many_pairs() -> None:
    """Catches all margins of the first pair before any of the second."""
    config = replace_config(PLAIN, margins=(0.1, 0.3, 0.6), whole=False, **NO_GRID, detector="x")
    found = [RIDER, HORSE, OTHER]
    everything = propose_regions(640, 480, config, detections=found)
    assert [r.margin for r in everything] == [0.1] * 5 + [0.3] * 5 + [0.6] * (len(everything) - 10)
    for limit in range(1, len(everything) + 1):
        capped = propose_regions(640, 480, config, detections=found, limit=limit)
        assert capped == everything[:limit]


def replace_config(config: RegionsConfig, **changes: object) -> RegionsConfig:
    return RegionsConfig.model_validate({**config.model_dump(), **changes})


def test_a_limit_below_one_keeps_the_best() -> None:
    """Catches an image that a small budget leaves without any region."""
    assert kinds(propose_regions(640, 480, PLAIN, detections=[RIDER], limit=0)) == [WHOLE]
    config = replace_config(PLAIN, whole=False)
    best = propose_regions(640, 480, config, detections=[RIDER, HORSE], limit=-5)
    assert kinds(best) == [UNION]


def test_near_pairs_come_first() -> None:
    """Catches pairs ranked by score alone, and a distance in pixels instead of person sizes."""
    person = Detection((0, 0, 50, 100), "person", 0.5)
    near = Detection((60, 0, 100, 40), "dog", 0.5)
    far = Detection((600, 0, 640, 40), "kite", 0.6)
    assert pair_boxes([person], [far, near], 2) == [(0, 0, 100, 100), (0, 0, 640, 100)]
    # The near one 0.5 * 0.5 * 100 / 110 = 0.227, the far one 0.5 * 1 * 100 / 650 = 0.077 at best.
    sure = replace(far, score=1.0)
    assert pair_boxes([person], [sure, near], 1) == [(0, 0, 100, 100)]
    # To a person of 1000 pixels 100 are little: 0.5 * 0.6 * 1000 / 1100 = 0.273, above 0.248.
    big = Detection((0, 0, 500, 1000), "person", 0.5)
    distant = Detection((600, 0, 640, 40), "kite", 0.6)
    close = replace(near, box=(510, 0, 560, 40))
    assert pair_boxes([big], [close, distant], 1) == [(0, 0, 640, 1000)]


def test_two_persons_are_a_pair_once() -> None:
    """Catches `hug person` without a crop, or one crop for each order of the two."""
    regions = propose_regions(640, 480, PLAIN, detections=[RIDER, OTHER])
    unions = [region.box for region in regions if region.kind == UNION]
    assert unions == [(100, 50, 560, 250)]


def test_one_human_under_two_names_is_no_pair() -> None:
    """Catches a zero-shot detector's `person` and `man` on one human taken for two people."""
    twin = Detection((101, 51, 199, 249), "man", 0.6)
    regions = propose_regions(640, 480, PLAIN, detections=[RIDER, twin])
    assert kinds(regions)[:3] == [WHOLE, PERSON, GRID]


def test_persons_are_known_by_label_or_flag() -> None:
    """Catches labels compared with their case, and a flag that is not read."""
    upper = replace(RIDER, label="PERSON")
    odd = replace(RIDER, label="rider", is_person=True)
    nobody = replace(RIDER, label="rider")
    for found, expected in ((upper, True), (odd, True), (nobody, False)):
        regions = propose_regions(640, 480, PLAIN, detections=[found, HORSE])
        assert (UNION in kinds(regions)) == expected
        assert (PERSON in kinds(regions)) == expected


def test_switches() -> None:
    """Catches `unions=false` or `persons=false` without effect."""
    found = [RIDER, HORSE]
    no_unions = propose_regions(640, 480, replace_config(PLAIN, unions=False), detections=found)
    assert set(kinds(no_unions)) == {WHOLE, PERSON, GRID}
    no_persons = propose_regions(640, 480, replace_config(PLAIN, persons=False), detections=found)
    assert set(kinds(no_persons)) == {WHOLE, UNION, GRID}


def test_crowds_stay_within_the_pairs() -> None:
    """Catches a crowd that makes thousands of regions, or takes seconds to pair."""
    people = [
        Detection((x * 20.0, y * 40.0, x * 20.0 + 18, y * 40.0 + 38), "person", 0.9 - x / 100)
        for x in range(30)
        for y in range(10)
    ]
    config = replace_config(PLAIN, persons=False)
    regions = propose_regions(640, 480, config, detections=people)
    assert kinds(regions).count(UNION) == config.max_pairs


def test_detections_scale_to_the_original() -> None:
    """Catches boxes of a shrunk copy laid on the original."""
    scaled = Detection((10, 20, 30, 40), "dog", 0.5, True).scaled(2.0, 3.0)
    assert scaled == Detection((20, 60, 60, 120), "dog", 0.5, True)
