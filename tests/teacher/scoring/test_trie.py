"""Tests of the prompt trie: exactness above all."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hts_ray.config import TeacherConfig
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.scoring import trie as trie_module
from hts_ray.teacher.scoring.decoders import capture_hidden
from hts_ray.teacher.scoring.trie import PromptTrie, edge_log_probs, split_tries

PROMPTS = [
    f"a person {verb} a {noun}"
    for verb in ("riding", "holding", "washing", "sitting on")
    for noun in ("bicycle", "horse", "hot dog", "dog", "bicycle wheel")
]
sequences_strategy = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=30
)


@settings(max_examples=200, deadline=None)
@given(sequences_strategy)
def test_layout_matches_the_sequences(sequences: list[list[int]]) -> None:
    """Catches wrong parents, depths, paths or ancestors for any shape of trie."""
    trie = PromptTrie(sequences)
    prefixes = {tuple(seq[:n]) for seq in sequences for n in range(len(seq) + 1)}
    inner = {tuple(seq[:n]) for seq in sequences for n in range(len(seq))}
    assert len(trie) == len(inner)
    assert trie.num_edges == len(prefixes) - 1
    assert trie.edge_source.tolist() == sorted(trie.edge_source.tolist())
    for sequence, path in zip(sequences, trie.paths, strict=True):
        edges = path[path < trie.num_edges]
        assert trie.edge_target[edges].tolist() == sequence
        sources = trie.edge_source[edges].tolist()
        assert trie.depths[sources].tolist() == list(range(len(sequence)))
        assert trie.tokens[sources[1:]].tolist() == sequence[:-1]
        for depth, node in enumerate(sources):
            seen = trie.ancestors[node].nonzero()[:, 0].tolist()
            assert sorted(seen) == sorted(sources[: depth + 1])


@settings(max_examples=100, deadline=None)
@given(sequences_strategy, st.integers(1, 20))
def test_split_keeps_every_prompt_once(sequences: list[list[int]], limit: int) -> None:
    """Catches prompts lost, doubled or misplaced when a large trie is cut into several."""
    parts = split_tries(sequences, limit)
    assert sorted(i for _, indices in parts for i in indices) == list(range(len(sequences)))
    for trie, indices in parts:
        assert len(trie) <= max(limit, *(len(sequences[i]) for i in indices)) + 1
        for path, index in zip(trie.paths, indices, strict=True):
            assert trie.edge_target[path[path < trie.num_edges]].tolist() == sequences[index]


def test_sums_and_chunks_agree_with_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the vocabulary chunks reading a neighbouring node's logits."""
    torch.manual_seed(0)
    sequences = [[1, 2, 3], [1, 2, 4], [1], [5, 2], [1, 2, 3, 3, 0]]
    trie = PromptTrie(sequences)
    head = torch.nn.Linear(8, 6)
    hidden = torch.randn(2, len(trie), 8)
    log_probs = head(hidden).log_softmax(-1)
    whole = trie.sum_paths(edge_log_probs(head, hidden, trie))
    monkeypatch.setattr(trie_module, "MAX_LOGITS", 24)  # two nodes at a time
    chunked = trie.sum_paths(edge_log_probs(head, hidden, trie))
    for prompt, (sequence, path) in enumerate(zip(sequences, trie.paths, strict=True)):
        nodes = trie.edge_source[path[: len(sequence)]]
        expected = log_probs[:, nodes, torch.tensor(sequence)].sum(1)
        torch.testing.assert_close(whole[:, prompt], expected)
        torch.testing.assert_close(chunked[:, prompt], expected)


def test_heads_see_contiguous_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches slices given to the head, of whose weights torch then copies one a region."""
    seen: list[bool] = []
    head = torch.nn.Linear(8, 6)
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    monkeypatch.setattr(trie_module, "MAX_LOGITS", 24)
    trie = PromptTrie([[1, 2, 3], [1, 2, 4], [1], [5, 2]])
    edge_log_probs(head, torch.randn(2, len(trie), 8), trie)
    assert len(seen) > 1
    assert all(seen)


def test_hidden_states_are_captured_without_logits() -> None:
    """Catches a prefix of hundreds of tokens times the vocabulary made and thrown away."""
    head = torch.nn.Linear(8, 6)
    hidden = torch.randn(2, 5, 8)
    captured, logits = capture_hidden(head, lambda: head(hidden))
    assert torch.equal(captured, hidden)
    assert logits.numel() == 0
    assert head(hidden).shape == (2, 5, 6)  # the hook is gone


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_empty_prompts_are_refused(sequences: list[list[int]]) -> None:
    """Catches a prompt without tokens scoring 0, the best score there is."""
    with pytest.raises(ValueError, match="at least one token"):
        PromptTrie(sequences)


def random_images(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (40, 40 + 8 * i, 3), dtype=np.uint8) for i in range(count)]


@pytest.mark.parametrize("fixture", ["tiny_blip_path", "tiny_git_path", "tiny_vit_bert_path"])
@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("max_nodes", [8, 384])
def test_trie_equals_full_forwards(
    fixture: str,
    append_eos: bool,
    max_nodes: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches wrong masks, positions, caches or targets: each costs tenths of a nat."""
    monkeypatch.setattr(trie_module, "MAX_NODES", max_nodes)
    captioner = loaded(request.getfixturevalue(fixture), append_eos)
    captioner.decoder.split.cache_clear()
    images = random_images(3)
    scores = captioner.score(images, PROMPTS)
    tries = captioner.decoder.tries(captioner.tokenize(PROMPTS))
    assert (len(tries) == 1) == (max_nodes == 384)
    sequences = captioner.tokenize(PROMPTS)
    with torch.inference_mode():
        pixels = captioner.prepare(images)
        expected = torch.stack([captioner.decoder.reference(pixels, s) for s in sequences], dim=1)
    assert scores.log_likelihoods.dtype == np.float32
    np.testing.assert_allclose(scores.log_likelihoods, expected.numpy(), atol=1e-4)
    assert scores.token_counts.tolist() == [len(s) for s in sequences]
    # The images must matter, or everything above proves little.
    assert np.abs(np.diff(scores.log_likelihoods, axis=0)).max() > 0.01


@cache
def loaded(path: Path, append_eos: bool = False) -> Any:
    captioner: Any = load_captioner(TeacherConfig(model=str(path), append_eos=append_eos))
    assert captioner.decoder.method == "trie"
    return captioner


def test_reference_is_the_model_s_own_forward(tiny_blip_path: Path) -> None:
    """Catches reference and trie being wrong alike: compares with BLIP's top-level logits."""
    captioner = loaded(tiny_blip_path, append_eos=True)
    decoder = captioner.decoder
    sequence = captioner.tokenize(PROMPTS[:1])[0]
    with torch.inference_mode():
        pixels = captioner.prepare(random_images(1))
        ids = torch.tensor([[*decoder.start_ids, *sequence]])
        logits = decoder.model(pixel_values=pixels, input_ids=ids).logits[0].log_softmax(-1)
        expected = sum(float(logits[i, token]) for i, token in enumerate(sequence))
        assert float(decoder.reference(pixels, sequence)) == pytest.approx(expected, abs=1e-4)


def test_single_token_prompts(tiny_git_path: Path) -> None:
    """Catches a trie whose only fed node is the root, which lies in GIT's cache."""
    captioner = loaded(tiny_git_path)
    with torch.inference_mode():
        pixels = captioner.prepare(random_images(2))
        scores = captioner.decoder.log_likelihoods(pixels, [[7], [9]])
        expected = torch.stack([captioner.decoder.reference(pixels, [t]) for t in (7, 9)], dim=1)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
