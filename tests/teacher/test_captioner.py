"""Tests of the teachers: loading, preprocessing, averaging, captions."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hts_ray.config import TeacherConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.teacher.captioner import (
    Captioner,
    ClassPrompts,
    DummyCaptioner,
    PromptScores,
    class_scores,
    load_captioner,
    model_fingerprint,
    plain_images,
    prior_log_likelihoods,
    score_classes,
)
from hts_ray.teacher import decoders
from hts_ray.teacher.decoders import CrossAttentionDecoder, GitDecoder
from hts_ray.teacher.pretrained import image_preparation

PROMPTS = ["a person riding a horse", "a person washing a dog", "a hot dog"]


@pytest.fixture(scope="session")
def shared() -> Any:
    """Return the test helpers of conftest.py, which pytest's import mode hides."""
    path = Path(__file__).parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("hts_ray_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def loaded(path: Path) -> Any:
    return load_captioner(TeacherConfig(model=str(path)))


def random_images(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]


@pytest.mark.parametrize("fixture", ["tiny_blip_path", "tiny_git_path", "tiny_vit_bert_path"])
def test_preparation_equals_the_processor(fixture: str, request: pytest.FixtureRequest) -> None:
    """Catches resizing, cropping or normalizing other than the checkpoint was trained with."""
    from transformers import AutoImageProcessor

    path = request.getfixturevalue(fixture)
    images = random_images((64, 48), (30, 70), (64, 48), (32, 32), (9, 300))
    prepare = image_preparation(TeacherConfig(model=str(path)), path, "cpu", torch.float32)
    ours = prepare(images)
    processor = AutoImageProcessor.from_pretrained(path)
    theirs = processor(images=images, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_preparation_on_a_device_without_8_bit_kernels(tiny_blip_path: Path) -> None:
    """Catches float resizing, as on a GPU, drifting from 8-bit resizing by more than a level."""
    config = TeacherConfig(model=str(tiny_blip_path))
    prepare = image_preparation(config, tiny_blip_path, "cpu", torch.float32)
    pixels = torch.from_numpy(np.stack(random_images((64, 48)))).permute(0, 3, 1, 2)
    options: Any = {"mode": prepare.resample, "antialias": True}
    floating = torch.nn.functional.interpolate(pixels.float(), prepare.size, **options)
    difference = floating.round().clamp(0, 255) - prepare._resized(pixels)
    assert difference.abs().max() <= 1


def test_float16_weights_load_in_the_asked_precision(tiny_blip_path: Path) -> None:
    """Catches the packaged half-precision files being run, slowly and roughly, as they are."""
    captioner = loaded(tiny_blip_path)
    assert captioner.decoder.model.dtype == torch.float32
    assert captioner.self_check() < 1e-4
    half = load_captioner(TeacherConfig(model=str(tiny_blip_path), dtype="bfloat16"))
    images = random_images((64, 48), (48, 48))
    difference = score(half, images) - score(captioner, images)
    assert 0 < np.abs(difference).max() < 2


def score(captioner: Captioner, images: list[np.ndarray]) -> np.ndarray:
    scores = captioner.score(images, PROMPTS).log_likelihoods
    assert scores.dtype == np.float32
    assert scores.max() < 0
    return scores


@pytest.mark.parametrize("fixture", ["tiny_blip_path", "tiny_git_path", "tiny_vit_bert_path"])
def test_captions_carry_their_own_probability(fixture: str, request: pytest.FixtureRequest) -> None:
    """Catches captions cut at the wrong token, or padding counted into their probability."""
    captioner = loaded(request.getfixturevalue(fixture))
    images = random_images((64, 48), (48, 48), (40, 90))
    decoder = captioner.decoder
    together = captioner.caption(images, max_tokens=6)
    for image, caption in zip(images, together, strict=True):
        alone = captioner.caption([image], max_tokens=6)[0]
        assert alone.text == caption.text
        assert alone.log_probability == pytest.approx(caption.log_probability, abs=1e-3)
    # Find the first caption again, token by token.
    pixels = captioner.prepare(images[:1])
    tokens = greedy_tokens(decoder, pixels, 6)
    with torch.inference_mode():
        expected = float(decoder.reference(pixels, tokens))
    assert together[0].log_probability == pytest.approx(expected, abs=1e-3)
    text = captioner.tokenizer.decode(tokens, skip_special_tokens=True)
    assert together[0].text == text.strip()


def greedy_tokens(decoder: Any, pixels: torch.Tensor, count: int) -> list[int]:
    """Return the best next token again and again, each by full forwards of every candidate."""
    tokens: list[int] = []
    vocabulary = decoder.head.out_features
    with torch.inference_mode():
        for _ in range(count):
            candidates = [[*tokens, token] for token in range(vocabulary)]
            tokens = candidates[int(decoder.log_likelihoods(pixels, candidates).argmax())]
            if tokens[-1] == decoder.end_id:
                break
    return tokens


def test_self_check_refuses_wrong_scores(
    tiny_blip_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a model that loads but scores wrongly, here by positions that are off by one."""
    build = CrossAttentionDecoder.__init__

    def shifted(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **{**kwargs, "first_position": 1})

    monkeypatch.setattr(CrossAttentionDecoder, "__init__", shifted)
    with pytest.raises(ConfigError, match="differ from plain forwards"):
        load_captioner(TeacherConfig(model=str(tiny_blip_path)))


def test_self_check_refuses_a_mask_that_is_added(
    tiny_git_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a boolean mask, which eager attention adds without a word."""
    build = decoders.additive_mask
    monkeypatch.setattr(decoders, "additive_mask", lambda *a: build(*a) == 0)
    with pytest.raises(ConfigError, match="differ from plain forwards"):
        load_captioner(TeacherConfig(model=str(tiny_git_path)))
    assert isinstance(loaded(tiny_git_path).decoder, GitDecoder)


@pytest.mark.parametrize("kind", ["trocr", "gpt2", "roberta"])
def test_other_text_decoders(kind: str, shared: Any, tmp_path: Path) -> None:
    """Catches decoders that count positions in another way than BERT does."""
    from transformers import GPT2Config, RobertaConfig, TrOCRConfig

    tokenizer = shared.word_pieces()
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
            vocab_size=vocabulary, max_position_embeddings=64, **shared.SMALL
        ),
    }[kind]()
    path = shared.save_encoder_decoder(tmp_path / kind, config, tokenizer)
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


def save_blip2(folder: Path, shared: Any) -> None:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
        GPT2Tokenizer,
        OPTConfig,
    )

    vocabulary, merges = shared.byte_pieces(["<pad>", "</s>"])
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, pad_token="<pad>", **special)
    size = {"height": 32, "width": 32}
    processor = Blip2Processor(BlipImageProcessor(size=size), tokenizer, num_query_tokens=4)
    text = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=shared.VISION,
            num_query_tokens=4,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            qformer_config={
                **shared.SMALL,
                "encoder_hidden_size": 32,
                "cross_attention_frequency": 1,
            },
            text_config=text.to_dict(),
        )
    )
    shared.perturb(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def test_prefix_model_by_batches(shared: Any, tmp_path: Path) -> None:
    """Catches padding or batching of prompts that leaks into the scores of BLIP-2."""
    save_blip2(tmp_path / "blip2", shared)
    config = TeacherConfig(model=str(tmp_path / "blip2"), prompt_batch=2)
    captioner: Any = load_captioner(config)
    assert captioner.decoder.method == "batched"
    images = random_images((32, 32), (48, 40))
    scores = score(captioner, images)
    with torch.inference_mode():
        prepared = captioner.prepare(images)
        for row, inputs in enumerate(prepared):
            for column, sequence in enumerate(captioner.tokenize(PROMPTS)):
                ids = torch.cat([inputs["input_ids"], torch.tensor([sequence])], dim=1)
                mask = torch.ones_like(ids)
                logits = captioner.decoder.model(
                    pixel_values=inputs["pixel_values"], input_ids=ids, attention_mask=mask
                ).logits[0, -len(sequence) - 1 : -1]
                expected = logits.log_softmax(-1)[range(len(sequence)), sequence].sum()
                assert scores[row, column] == pytest.approx(float(expected), abs=1e-3)
    assert len(captioner.caption(images, 3)) == 2


def test_prompts_that_cannot_be_scored(tiny_blip_path: Path) -> None:
    """Catches a prompt without tokens, and one that runs past the position table."""
    captioner = loaded(tiny_blip_path)
    for prompt in ("", "horse " * 70):
        with pytest.raises(DataError, match="tokens"):
            captioner.score(random_images((32, 32)), [prompt])


def broken_copy(source: Path, target: Path, *, remove: str = "", **changes: Any) -> str:
    shutil.copytree(source, target)
    if remove:
        (target / remove).unlink()
    if changes:
        settings = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**settings, **changes}))
    return str(target)


def lacking_a_weight(source: Path, target: Path) -> str:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    del weights["vision_model.embeddings.class_embedding"]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_unusable_models_are_named(tiny_blip_path: Path, tmp_path: Path) -> None:
    """Catches a wrong model ending in a traceback, or pickled weights being loaded."""
    (tmp_path / "empty").mkdir()
    cases = {
        "/no/such/folder": "no such folder",
        "builtin:nothing": "no packaged file",
        str(tmp_path / "empty"): "no config.json",
        broken_copy(tiny_blip_path, tmp_path / "w", remove="model.safetensors"): "no .safetensors",
        lacking_a_weight(tiny_blip_path, tmp_path / "l"): "lack 1 weights",
        broken_copy(tiny_blip_path, tmp_path / "t", model_type="t5"): "family 't5' .*BLIP.*GIT",
        broken_copy(tiny_blip_path, tmp_path / "p", remove="processor_config.json"): "processor",
    }
    for model, told in cases.items():
        with pytest.raises(ConfigError, match=told) as caught:
            load_captioner(TeacherConfig(model=model))
        assert caught.value.field == "label.teacher.model"
        assert model in str(caught.value)


def test_fingerprint_follows_the_files(tiny_blip_path: Path, tmp_path: Path) -> None:
    """Catches a changed model answering under the old settings hash."""
    copy = Path(broken_copy(tiny_blip_path, tmp_path / "blip"))
    config = TeacherConfig(model=str(copy))
    before = model_fingerprint(config)
    assert before == model_fingerprint(TeacherConfig(model=str(tiny_blip_path)))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(config) != before
    hub = TeacherConfig(model="some/model", revision="abc")
    assert model_fingerprint(hub) == "some/model@abc"


def test_class_scores_average_templates() -> None:
    """Catches templates summed, or averaged over a neighbouring class."""
    prompts = ClassPrompts.of([["a", "b", "c"], ["d"], ["e", "f"]], templates=2)
    assert prompts.texts == ("a", "b", "d", "e", "f")
    assert prompts.by_class([1, 2, 3, 4, 5]) == [[1, 2], [3], [4, 5]]
    values = np.log(np.array([[0.1, 0.3, 0.5, 0.2, 0.4]], np.float32))
    scores = PromptScores(values, np.array([1, 2, 1, 4, 2]))
    np.testing.assert_allclose(np.exp(class_scores(scores, prompts)), [[0.2, 0.5, 0.3]], rtol=1e-5)
    normalized = class_scores(scores, prompts, length_normalize=True)
    expected = [(0.1 + 0.3**0.5) / 2, 0.5, (0.2**0.25 + 0.4**0.5) / 2]
    np.testing.assert_allclose(np.exp(normalized), [expected], rtol=1e-5)
    far = PromptScores(np.full((1, 5), -3000.0, np.float32), np.ones(5, np.int64))
    np.testing.assert_allclose(class_scores(far, prompts), -3000.0)


def test_prior_is_the_mean_over_plain_images() -> None:
    """Catches a prior that averages log-probabilities, or that skips an image."""
    captioner = DummyCaptioner()
    scores = captioner.score(plain_images(4), PROMPTS).log_likelihoods.astype(np.float64)
    prior = prior_log_likelihoods(captioner, PROMPTS, null_images=4)
    np.testing.assert_allclose(prior, np.log(np.exp(scores).mean(0)), rtol=1e-6)
    assert len({image.tobytes() for image in plain_images(5)}) == 5
    with pytest.raises(ValueError, match="at least one"):
        prior_log_likelihoods(captioner, PROMPTS, null_images=0)


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
        "import sys; import hts_ray.teacher.labeling, hts_ray.teacher.captioner as c;"
        "from hts_ray.config import TeacherConfig;"
        "c.model_fingerprint(TeacherConfig(model='builtin:dummy'));"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
