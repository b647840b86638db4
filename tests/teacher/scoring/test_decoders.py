"""Tests of what scoring by trie and by batches share: caches, groups, memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hts_ray.config import TeacherConfig
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.scoring.decoders import Prefix, select_regions
from hts_ray.teacher.scoring.memory import footprint


@cache
def loaded(path: Path) -> Any:
    return load_captioner(TeacherConfig(model=str(path)))


def random_images(*shapes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def encoded(captioner: Any, images: list[np.ndarray]) -> Prefix:
    with torch.inference_mode():
        return captioner.decoder.encode(list(captioner.prepare(images)))


@pytest.mark.parametrize("name", ["kosmos2", "blip2_t5"])
def test_selected_regions_leave_the_prefix_alone(
    name: str, tiny_path: Callable[[str], Path]
) -> None:
    """Catches prompts of one batch that stay in the cache behind which the next one runs."""
    captioner = loaded(tiny_path(name))
    decoder = captioner.decoder
    prefix = encoded(captioner, random_images((32, 32), (40, 40)))
    past = prefix.past
    tokens = torch.tensor([[5, 6, 7]] * 3)
    with torch.inference_mode():
        same = select_regions(prefix, [1, 1, 1])
        hidden = decoder.feed(same, tokens)
        assert (same.past, same.fed, prefix.past, prefix.fed) == (past, 3, past, 0)
        mixed = decoder.feed(select_regions(prefix, [1, 0, 1]), tokens)
    torch.testing.assert_close(hidden[0], mixed[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed[0], mixed[2], atol=1e-4, rtol=0)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-3


def test_one_region_is_repeated_without_copies(tiny_path: Callable[[str], Path]) -> None:
    """Catches a region's keys and values copied for each prompt before the model even runs."""
    prefix = encoded(loaded(tiny_path("kosmos2")), random_images((32, 32)))
    layer = prefix.cache.layers[0]
    repeated = select_regions(prefix, [0] * 50).cache.layers[0]
    assert repeated.keys.shape[0] == 50
    assert repeated.keys.data_ptr() == layer.keys.data_ptr()


def test_groups_keep_order_limit_and_what_can_be_joined(
    tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches regions of differing length read as one batch where there is no mask."""
    images = random_images((32, 32), (32, 32), (32, 96), (32, 32))
    tree, batched = loaded(tiny_path("qwen2_5_vl")), loaded(tiny_path("llava_sliding"))
    assert [len(g) for g in tree.decoder.groups(tree.prepare(images))] == [4]
    assert [len(g) for g in tree.decoder.groups(tree.prepare(images), 3)] == [3, 1]
    assert [len(g) for g in batched.decoder.groups(batched.prepare(images))] == [4]
    monkeypatch.setattr(type(batched.decoder), "joins", lambda self, first, image: first is image)
    assert [len(g) for g in batched.decoder.groups(batched.prepare(images))] == [1, 1, 1, 1]
    pixels = loaded(tiny_path("blip"))
    groups = list(pixels.decoder.groups(pixels.prepare(images), 3))
    assert torch.equal(torch.cat(groups), pixels.prepare(images))


def test_memory_grows_with_what_is_read_and_fed(tiny_path: Callable[[str], Path]) -> None:
    """Catches an estimate without the cache, the nodes or the features, which then bounds none."""
    sizes = footprint(loaded(tiny_path("qwen3_vl")).decoder.model)
    assert sizes.cached == 2 * 2 * 2 * 8  # keys and values, 2 layers, 2 heads, 8 wide
    assert (sizes.heads, sizes.itemsize, sizes.eager) == (4, 4, False)
    usual = sizes.region(100, 50)
    assert sizes.region(200, 50) > usual < sizes.region(100, 150)
    assert sizes.region(100, 50, features=99) > usual < sizes.region(100, 50, pixels=999)
    eager = footprint(loaded(tiny_path("git")).decoder.model)
    assert eager.eager
    t5 = footprint(loaded(tiny_path("blip2_t5")).decoder.model)
    assert t5.cached == 2 * 2 * 4 * 8
