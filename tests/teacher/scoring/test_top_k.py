"""Tests of the search for the best classes: equal to scoring everything, with less work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hts_ray.classes import ClassTable, hico_classes, load_class_table
from hts_ray.config import TeacherConfig
from hts_ray.demo.world import render_scene, sample_scene, world_class_ids
from hts_ray.teacher.captioner import (
    ClassPrompts,
    Reduction,
    TopSearch,
    reduce_templates,
)
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.scoring import top_k as top_k_module
from hts_ray.teacher.scoring import trie as trie_module
from hts_ray.teacher.scoring.decoders import Decoder, Prefix
from hts_ray.teacher.scoring.top_k import score_top
from hts_ray.teacher.scoring.trie import PromptTrie

VOCABULARY = 4
REDUCTIONS: tuple[Reduction, ...] = ("log_mean_exp", "mean", "max")


class TableCache:
    """The tokens and positions that a decoder has read, (R, length) each, in its one layer."""

    def __init__(self, regions: int) -> None:
        empty = torch.zeros(regions, 0, dtype=torch.int64)
        self.layers = [SimpleNamespace(tokens=empty, positions=empty)]

    def get_seq_length(self) -> int:
        """Return the length."""
        return self.layers[0].tokens.shape[1]

    def append(self, tokens: Tensor, positions: Tensor) -> None:
        """Add (R, N) more."""
        layer = self.layers[0]
        layer.tokens = torch.cat([layer.tokens, tokens], dim=1)
        layer.positions = torch.cat([layer.positions, positions], dim=1)

    def crop(self, length: int) -> None:
        """Drop the last -length."""
        layer = self.layers[0]
        layer.tokens, layer.positions = layer.tokens[:, :length], layer.positions[:, :length]


class TableDecoder(Decoder):
    """A language model that is a table: logits drawn for every image and every visible prefix.

    Images are numbers. `scale` says how much the logits differ, 0 being no preference at all;
    `dead` is the share of tokens of probability zero, `broken` an image that gives NaN.
    """

    def __init__(self, seed: int, scale: float, dead: float = 0.0, broken: int | None = None):
        super().__init__(None, nn.Identity(), end_ids=[VOCABULARY - 1])
        self.seed, self.scale, self.dead, self.broken = seed, scale, dead, broken

    def logits(self, image: int, context: Sequence[int]) -> Tensor:
        """Return the logits (V,) of what follows a context."""
        rng = np.random.default_rng([self.seed, image, len(context), *context])
        values = self.scale * rng.standard_normal(VOCABULARY)
        values[1:][rng.random(VOCABULARY - 1) < self.dead] = -np.inf
        if image == self.broken and len(context) > 1:
            values[0] = np.nan
        return torch.from_numpy(values).float()

    def encode(self, images: Any) -> Prefix:
        """Read nothing: the root is the empty context."""
        root = torch.stack([self.logits(image, ()) for image in images])[:, None]
        first = torch.zeros(len(images), dtype=torch.int64)
        return Prefix(TableCache(len(images)), root, first, features=(torch.tensor(images),))

    def forward(self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor) -> Any:
        """Return the logits behind what the mask lets each node see."""
        prefix.cache.append(tokens, positions)
        hidden = torch.empty(*tokens.shape, VOCABULARY)
        layer = prefix.cache.layers[0]
        for row, image in enumerate(prefix.features[0].tolist()):
            for node in range(tokens.shape[1]):
                seen = (mask[row, 0, node] == 0).nonzero()[:, 0]
                seen = seen[layer.positions[row, seen].argsort()]
                assert len(seen)
                assert layer.positions[row, seen].tolist() == list(range(len(seen)))
                hidden[row, node] = self.logits(image, layer.tokens[row, seen].tolist())
        return self.head(hidden)

    def region_bytes(self, image: Any, nodes: int | None = None) -> int:
        """Return nothing worth counting."""
        return 0

    def reference(self, images: Any, sequence: Sequence[int]) -> Tensor:
        """Add up the table's entries."""
        return torch.stack(
            [
                sum(
                    self.logits(image, sequence[:depth]).log_softmax(0)[token]
                    for depth, token in enumerate(sequence)
                )
                for image in images
            ]
        )


def brute_force(
    decoder: TableDecoder, images: Any, sequences: Any, counts: Any, reduction: Reduction
) -> np.ndarray:
    values = [decoder.reference(images, sequence).double().numpy() for sequence in sequences]
    return reduce_templates(np.stack(values, axis=1), counts, reduction).astype(np.float32)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a table, prompts shared out among classes, and what is asked of them."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
    sequence = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5)
    total = sum(counts)
    images = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    classes = len(counts)
    offsets = st.lists(st.floats(-20, 20, width=32), min_size=classes, max_size=classes)
    drawn_offsets = draw(st.none() | offsets)
    return {
        "decoder": TableDecoder(
            draw(st.integers(0, 99)),
            draw(st.sampled_from([0.0, 0.3, 3.0, 30.0])),
            draw(st.sampled_from([0.0, 0.0, 0.4])),
        ),
        "images": images,
        "sequences": draw(st.lists(sequence, min_size=total, max_size=total)),
        "counts": counts,
        "top_k": draw(st.integers(1, classes + 1)),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "offsets_C": None if drawn_offsets is None else np.array(drawn_offsets, dtype=np.float32),
    }


sizes = st.fixed_dictionaries(
    {
        "BEAM": st.integers(1, 4),
        "GROW_EVERY": st.integers(1, 5),
        "AHEAD": st.integers(0, 3),
        "GOES_ON": st.sampled_from([0.0, 0.5, 1.0]),
    }
)


def found(problem: dict[str, Any]) -> np.ndarray:
    arguments = dict(problem)
    positional = [arguments.pop(name) for name in ("decoder", "images", "sequences", "counts")]
    return score_top(*positional, TopSearch(**arguments))[0]


def assert_equal_but_for_ties(got: np.ndarray, exact: np.ndarray, problem: dict[str, Any]) -> None:
    """Compare with scoring everything; among equals any class may be left out."""
    top_k, offsets = problem["top_k"], problem["offsets_C"]
    expected = TopSearch(top_k, offsets_C=offsets).keep(exact)
    kept = np.isfinite(got)
    assert kept.sum(1).tolist() == np.isfinite(expected).sum(1).tolist()
    np.testing.assert_allclose(got[kept], exact[kept], atol=1e-4)
    shift = 0.0 if offsets is None else offsets
    np.testing.assert_allclose(
        np.sort(got + shift, axis=1), np.sort(expected + shift, axis=1), atol=1e-4
    )


@settings(max_examples=300, deadline=None)
@given(problems(), sizes, st.integers(1, 12))
def test_equals_scoring_everything(
    problem: dict[str, Any], constants: dict[str, int], max_nodes: int
) -> None:
    """Catches a bound that is none, a node fed twice or never, and a branch left too early.

    Any beam and any cache size, down to one that is emptied before every forward, must give
    the same answer.
    """
    exact = brute_force(
        *(problem[name] for name in ("decoder", "images", "sequences", "counts")),
        problem["reduction"],
    )
    with (
        mock.patch.multiple(top_k_module, **constants),
        mock.patch.object(trie_module, "MAX_NODES", max_nodes),
    ):
        got = found(problem)
    assert got.dtype == np.float32
    assert_equal_but_for_ties(got, exact, problem)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_regions_do_not_see_each_other(problem: dict[str, Any]) -> None:
    """Catches an answer that depends on the other regions of the batch.

    Padding, a shared threshold or a class that a neighbour completed would all show.
    """
    if problem["decoder"].scale == 0:
        return  # all ties
    together = found(problem)
    for row, image in enumerate(problem["images"]):
        alone = {**problem, "images": [image]}
        np.testing.assert_allclose(together[row], found(alone)[0], atol=1e-5)


def test_max_waits_for_every_prompt_that_may_be_better() -> None:
    """Catches a class taken for settled by its first prompt, though another may beat it."""
    continued = [[1, a, b] for a in range(4) for b in range(4)]
    sequences = [[first, *rest] for first in range(3) for rest in ([0], *continued)]
    counts = [17] * 3
    for seed in range(20):
        decoder, images = TableDecoder(seed, 3.0), [0, 1]
        exact = brute_force(decoder, images, sequences, counts, "max")
        with mock.patch.object(top_k_module, "BEAM", 1):
            got, _ = score_top(decoder, images, sequences, counts, TopSearch(2, "max"))
        np.testing.assert_allclose(got, TopSearch(2).keep(exact), atol=1e-4)


def pair_sequences() -> list[list[int]]:
    """Return 64 prompts of 4 tokens that fork at three of them."""
    return [[0, a, b, c] for a in range(4) for b in range(4) for c in range(4)]


def test_a_sure_model_costs_a_fraction() -> None:
    """Catches a search that is exact because it feeds everything."""
    sequences = pair_sequences()
    decoder = TableDecoder(seed=1, scale=8.0)
    with mock.patch.object(top_k_module, "BEAM", 2):
        scores, stats = score_top(decoder, [0, 1, 2], sequences, [1] * 64, TopSearch(3))
    assert stats.full_nodes == len(PromptTrie(sequences)) - 1 == 21
    assert stats.nodes_fed.max() <= 10
    assert (stats.completed >= 3).all()
    assert (stats.completed < 64).all()
    assert np.isfinite(scores).sum(1).tolist() == [3, 3, 3]


def test_an_undecided_model_costs_no_more_than_everything() -> None:
    """Catches nodes fed again and again while nothing can be left out."""
    sequences = pair_sequences()
    _, stats = score_top(TableDecoder(0, 0.0), [0, 1], sequences, [1] * 64, TopSearch(3))
    assert stats.nodes_fed.tolist() == [stats.full_nodes] * 2
    assert stats.padded.tolist() == [stats.full_nodes] * 2


class PickyDecoder(TableDecoder):
    """Prefers nothing on image 0, and is sure of token 0 on all others."""

    def logits(self, image: int, context: Sequence[int]) -> Tensor:
        """Return the logits (V,) of what follows a context."""
        return torch.tensor([30.0 * (image > 0), 0.0, 0.0, 0.0])


def test_regions_that_are_done_cost_nothing_more() -> None:
    """Catches a region that waits in the batch until the least decided one is done."""
    sequences = [[0, *pair] for pair in pair_sequences()]
    with mock.patch.object(top_k_module, "BEAM", 1):
        _, stats = score_top(PickyDecoder(0, 0.0), [0, 1, 2, 3], sequences, [1] * 64, TopSearch(1))
    assert stats.nodes_fed.tolist() == [stats.full_nodes, 4, 4, 4]
    assert stats.padded[0] >= stats.full_nodes
    assert stats.padded[1:].tolist() == [4, 4, 4]


def test_a_chain_is_one_forward() -> None:
    """Catches a forward for every token of a stretch without a fork."""
    sequences = [[0, 1, 2, 3, token, 0] for token in range(4)]
    _, stats = score_top(TableDecoder(0, 1.0), [0], sequences, [1] * 4, TopSearch(1))
    assert stats.forwards <= 2


@pytest.mark.parametrize("top_k", [1, 64])
def test_nan_is_not_mistaken_for_a_class_left_out(top_k: int) -> None:
    """Catches a model that overflows passing for one that finds nothing."""
    decoder = TableDecoder(0, 1.0, broken=7)
    scores, _ = score_top(decoder, [6, 7, 8], pair_sequences(), [1] * 64, TopSearch(top_k))
    assert np.isnan(scores[1]).all()
    assert not np.isnan(scores[[0, 2]]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"offsets_C": np.zeros(3, dtype=np.float32)}, "offsets of shape"),
        ({"offsets_C": np.array([0.0, np.inf], dtype=np.float32)}, "finite"),
        ({"counts": [1, 2]}, "counts of 2 classes"),
        ({"counts": [0, 2]}, "counts of 2 classes"),
        ({"sequences": [[1], []]}, "at least one token"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    """Catches shapes that broadcast into scores of the wrong classes."""
    problem = {
        "decoder": TableDecoder(0, 1.0),
        "images": [0],
        "sequences": [[1], [2, 3]],
        "counts": [1, 1],
        "top_k": 1,
    }
    with pytest.raises(ValueError, match=message):
        found({**problem, **changes})


PROMPTS = [
    f"{start} {verb} a {noun}"
    for verb in ("riding", "holding", "washing", "sitting on")
    for noun in ("bicycle", "horse", "hot dog", "dog", "bicycle wheel")
    for start in ("a person", "a dog")
]


@pytest.mark.parametrize("name", ["blip", "git", "blip2_opt", "florence2", "paligemma", "qwen2_vl"])
@pytest.mark.parametrize("max_nodes", [12, 384])
def test_real_decoders_agree(
    name: str, max_nodes: int, tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches masks, positions and caches of several forwards that a real model reads otherwise.

    With 12 nodes the cache is emptied many times on the way.
    """
    config = TeacherConfig(model=str(tiny_path(name)), append_eos=True)
    captioner: Any = load_captioner(config)
    assert captioner.decoder.by_trie
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 40 + 8 * i, 3), dtype=np.uint8) for i in range(3)]
    prompts = ClassPrompts(tuple(PROMPTS), (2,) * 20)
    values = captioner.score(images, prompts.texts).log_likelihoods.astype(np.float64)
    offsets = rng.normal(0, 3, 20).astype(np.float32)
    monkeypatch.setattr(trie_module, "MAX_NODES", max_nodes)
    monkeypatch.setattr(top_k_module, "BEAM", 3)
    for reduction in REDUCTIONS:
        exact = reduce_templates(values, prompts.counts, reduction).astype(np.float32)
        for top_k in (4, 20):
            got = captioner.score_top(images, prompts, TopSearch(top_k, reduction, offsets))
            expected = TopSearch(top_k, offsets_C=offsets).keep(exact)
            np.testing.assert_allclose(got, expected, atol=2e-4)


def world_crops(count: int) -> list[np.ndarray]:
    return [render_scene(sample_scene(100, "test", index)) for index in range(count)]


@pytest.mark.parametrize(
    ("table", "share"),
    [(load_class_table("hico", world_class_ids()), 0.75), (hico_classes(), 0.2)],
    ids=["demo", "hico"],
)
def test_the_packaged_captioner_finds_its_best_classes_early(
    table: ClassTable, share: float
) -> None:
    """Catches a search that is wrong, or no cheaper, on the teacher and the classes we ship."""
    captioner: Any = load_captioner(TeacherConfig())
    sequences = captioner.tokenize(table.primary_prompts)
    counts = [1] * len(table)
    with torch.inference_mode():
        pixels = captioner.prepare(world_crops(6))
        exact = captioner.decoder.log_likelihoods(pixels, sequences).numpy()
    got, stats = score_top(captioner.decoder, pixels, sequences, counts, TopSearch(10))
    np.testing.assert_allclose(got, TopSearch(10).keep(exact), atol=1e-4)
    assert stats.nodes_fed.mean() < share * stats.full_nodes
