"""Tests of what every teacher shares: templates, priors, the dummy; and of BLIP's kind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from hts_ray.config import TeacherConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.teacher.captioner import (
    Captioner,
    ClassPrompts,
    DummyCaptioner,
    PromptScores,
    SearchingCaptioner,
    TopSearch,
    score_classes,
)
from hts_ray.teacher.models.architectures import CrossAttentionDecoder, GitDecoder
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.scoring import decoders

PROMPTS = ["a person riding a horse", "a person washing a dog", "a hot dog"]


@cache
def loaded(path: Path) -> Any:
    return load_captioner(TeacherConfig(model=str(path)))


def random_images(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]


def score(captioner: Captioner, images: list[np.ndarray]) -> np.ndarray:
    scores = captioner.score(images, PROMPTS).log_likelihoods
    assert scores.dtype == np.float32
    assert scores.max() < 0
    return scores


def test_float16_weights_load_in_the_asked_precision(tiny_blip_path: Path) -> None:
    """Catches the packaged half-precision files being run, slowly and roughly, as they are."""
    captioner = loaded(tiny_blip_path)
    assert captioner.decoder.model.dtype == torch.float32
    assert captioner.self_check() < 1e-4
    half = load_captioner(TeacherConfig(model=str(tiny_blip_path), dtype="bfloat16"))
    images = random_images((64, 48), (48, 48))
    difference = score(half, images) - score(captioner, images)
    assert 0 < np.abs(difference).max() < 2


def test_check_refuses_wrong_positions(
    tiny_blip_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a model that loads but scores wrongly, here by positions that are off by one."""
    build = CrossAttentionDecoder.__init__

    def shifted(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **{**kwargs, "first_position": 1})

    monkeypatch.setattr(CrossAttentionDecoder, "__init__", shifted)
    with pytest.raises(ConfigError, match="differ from plain forwards"):
        load_captioner(TeacherConfig(model=str(tiny_blip_path)))


def test_check_refuses_a_mask_that_is_added(
    tiny_git_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a boolean mask, which eager attention adds without a word."""
    assert isinstance(loaded(tiny_git_path).decoder, GitDecoder)
    build = decoders.additive_mask
    monkeypatch.setattr(decoders, "additive_mask", lambda *a: build(*a) == 0)
    with pytest.raises(ConfigError, match="differ from plain forwards"):
        load_captioner(TeacherConfig(model=str(tiny_git_path)))


@pytest.mark.parametrize("kind", ["trocr", "gpt2", "roberta"])
def test_other_text_decoders(kind: str, tmp_path: Path) -> None:
    """Catches decoders that count positions in another way than BERT does."""
    from transformers import GPT2Config, RobertaConfig, TrOCRConfig

    tokenizer = tiny_models.word_pieces()
    vocabulary = len(tokenizer)
    config: Any = {
        "trocr": lambda: TrOCRConfig(
            vocab_size=vocabulary,
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            cross_attention_hidden_size=32,
        ),
        "gpt2": lambda: GPT2Config(
            vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=4
        ),
        "roberta": lambda: RobertaConfig(
            vocab_size=vocabulary, max_position_embeddings=64, **tiny_models.SMALL
        ),
    }[kind]()
    path = tiny_models.encoder_decoder(tmp_path / kind, config, tokenizer)
    captioner: Any = load_captioner(TeacherConfig(model=str(path), prompt_batch=2))
    assert captioner.decoder.method == ("batched" if kind == "trocr" else "trie")
    images = random_images((32, 32), (48, 40))
    with torch.inference_mode():
        logits = captioner.decoder.model(
            pixel_values=captioner.prepare(images),
            decoder_input_ids=torch.tensor(
                [[tokenizer.cls_token_id, *captioner.tokenize(PROMPTS)[1]]] * 2
            ),
        ).logits.log_softmax(-1)
    tokens = captioner.tokenize(PROMPTS)[1]
    expected = logits[:, range(len(tokens)), tokens].sum(1).numpy()
    np.testing.assert_allclose(score(captioner, images)[:, 1], expected, atol=1e-4)


def test_prompts_that_cannot_be_scored(tiny_blip_path: Path) -> None:
    """Catches a prompt without tokens, and one that runs past the position table."""
    captioner = loaded(tiny_blip_path)
    for prompt in ("", "horse " * 70):
        with pytest.raises(DataError, match="tokens"):
            captioner.score(random_images((32, 32)), [prompt])


@pytest.mark.parametrize("name", ["git", "blip2_t5"])
def test_search_leaves_out_the_same_classes_by_trie_and_by_batches(
    name: str, tiny_path: Callable[[str], Path]
) -> None:
    """Catches regions or classes mixed up where a search runs over groups of regions."""
    captioner = loaded(tiny_path(name))
    assert isinstance(captioner, SearchingCaptioner)
    prompts = ClassPrompts.of([[text] for text in tiny_models.TEXTS], 1)
    images = random_images((64, 48), (48, 48), (40, 90))
    exact = score_classes(captioner, images, prompts)
    usual = captioner.decoder.workspace
    for workspace in (1, usual):
        captioner.decoder.workspace = workspace
        found = captioner.score_top(images, prompts, TopSearch(4))
        kept = np.isfinite(found)
        assert (kept.sum(1) == 4).all()
        np.testing.assert_allclose(found[kept], exact[kept], atol=1e-3)
        worst_kept = np.where(kept, exact, np.inf).min(1)
        assert (worst_kept >= np.where(kept, -np.inf, exact).max(1)).all()


def test_prompts_are_laid_out_once(tiny_git_path: Path) -> None:
    """Catches tokens and tries made anew for every batch of a run, and all of them kept."""
    captioner = loaded(tiny_git_path)
    images = random_images((32, 32))
    captioner.score(images, PROMPTS)
    first = captioner.decoder.tries(captioner.tokenize(PROMPTS))
    captioner.score(images, PROMPTS[:1])
    assert captioner.decoder.tries(captioner.tokenize(PROMPTS)) is first
    assert captioner.tokenize(PROMPTS) is captioner.tokenize(PROMPTS)
    for count in range(9):
        captioner.score(images, ["dog"] * (count + 1))
    assert captioner.decoder.split.cache_info().currsize < 9


class KnownCaptioner(DummyCaptioner):
    """Gives the scores it is made with."""

    def __init__(self, scores: PromptScores) -> None:
        super().__init__()
        self.scores = scores

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> PromptScores:
        """Return them."""
        return self.scores


def test_class_scores_average_templates() -> None:
    """Catches templates summed, or averaged over a neighbouring class."""
    prompts = ClassPrompts.of([["a", "b", "c"], ["d"], ["e", "f"]], templates=2)
    assert prompts.texts == ("a", "b", "d", "e", "f")
    assert prompts.by_class([1, 2, 3, 4, 5]) == [[1, 2], [3], [4, 5]]
    values = np.log(np.array([[0.1, 0.3, 0.5, 0.2, 0.4]], np.float32))
    known = KnownCaptioner(PromptScores(values, np.array([1, 2, 1, 4, 2])))
    scores = score_classes(known, [], prompts)
    np.testing.assert_allclose(np.exp(scores), [[0.2, 0.5, 0.3]], rtol=1e-5)
    normalized = score_classes(known, [], prompts, length_normalize=True)
    expected = [(0.1 + 0.3**0.5) / 2, 0.5, (0.2**0.25 + 0.4**0.5) / 2]
    np.testing.assert_allclose(np.exp(normalized), [expected], rtol=1e-5)
    far = PromptScores(np.full((1, 5), -3000.0, np.float32), np.ones(5, np.int64))
    np.testing.assert_allclose(score_classes(KnownCaptioner(far), [], prompts), -3000.0)


def test_nan_is_not_a_class_that_was_left_out() -> None:
    """Catches a broken model whose NaN sorts last and is stored as probability 0."""
    scores = np.array([[-1.0, np.nan, -3.0], [-1.0, -2.0, -3.0]], np.float32)
    kept = TopSearch(1).keep(scores)
    assert np.isnan(kept[0]).all()
    assert kept[1].tolist() == [-1.0, -np.inf, -np.inf]


def test_dummy_depends_on_pixels_and_prompts_only() -> None:
    """Catches a dummy teacher whose load tests cannot be repeated or show no structure."""
    images = random_images((20, 20), (30, 20), (20, 20))
    dummy = load_captioner(TeacherConfig(model="builtin:dummy"))
    scores = score(dummy, images)
    np.testing.assert_array_equal(scores, score(DummyCaptioner(), images))
    np.testing.assert_array_equal(scores[1:2], score(dummy, [images[1].copy()]))
    assert len(np.unique(scores)) == scores.size
    assert scores.min() > -40
    prompts = ClassPrompts.of([[prompt] for prompt in PROMPTS], 1)
    np.testing.assert_allclose(score_classes(dummy, images, prompts), scores, rtol=1e-6)


def test_planning_needs_no_torch() -> None:
    """Catches imports that cost a driver seconds and a gigabyte for naming a model."""
    code = (
        "import sys; import hts_ray.teacher.stage, hts_ray.teacher.models.catalog as c;"
        "from hts_ray.config import TeacherConfig;"
        "c.model_fingerprint(TeacherConfig(model='builtin:dummy'));"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
