"""Tests of every family of captioners: scores, captions and their refusal when wrong.

What is expected comes from the models' top-level forwards on what their own processors make of
image and whole text, prompt by prompt: nothing of the package takes part in it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from hts_ray.config import CaptionConfig, TeacherConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.crops import CropBatch
from hts_ray.teacher.models import architectures, catalog, families
from hts_ray.teacher.models.catalog import FAMILIES
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.models.pretrained import TransformersCaptioner
from hts_ray.teacher.scoring import captioning, decoders
from hts_ray.teacher.scoring import trie as prompt_tree

PROMPTS = [
    "a person riding a horse",
    "a person riding a bicycle",
    "a person riding a bicycle wheel",
    "a person washing a hot dog",
    "a dog",
    "horse",
]
ASKED = "Describe the image in one sentence."
# (height, width): grids, tiles and prefix lengths differ.
SHAPES = ((48, 64), (64, 40), (32, 96))


def random_images(*shapes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


IMAGES = random_images(*SHAPES)


@dataclass
class Plain:
    """A family as its documentation uses it.

    `full(picture, prompt)` makes the model's inputs of image and text up to the prompt's end, or
    further; `key` names the tokens among them, of which the prompt's begin at `start(picture)`.
    """

    model: Any
    processor: Any
    full: Callable[[Any, str], dict[str, Any]]
    start: Callable[[Any], int]
    key: str
    end: str

    def text_keys(self, inputs: dict[str, Any], length: int) -> list[str]:
        """Name the inputs that have an entry for each of `length` tokens."""
        if self.key == "decoder_input_ids":
            return [self.key]
        shapes = {
            key: value.shape[1:]
            for key, value in inputs.items()  # three tokens are no three colours
            if "qformer" not in key and not value.is_floating_point()
        }
        return [key for key, shape in shapes.items() if shape[:1] == (length,)]

    def picture(self, image: np.ndarray) -> Image.Image:
        """Return what is shown: a square with margins where the ends would be cut off."""
        picture, images = Image.fromarray(image), self.processor.image_processor
        if not getattr(images, "do_center_crop", False):
            return picture
        side, color = max(picture.size), tuple(round(255 * mean) for mean in images.image_mean)
        square = Image.new("RGB", (side, side), color)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square

    @property
    def end_id(self) -> int:
        """The token that ends a caption."""
        tokenizer = self.processor.tokenizer
        return int(tokenizer(self.end, add_special_tokens=False).input_ids[-1])


@cache
def plain(name: str, path: Path) -> Plain:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    tokenizer = processor.tokenizer

    def bare(prompt: str) -> list[int]:
        ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
        return ids

    if name in {"blip", "git", "vit_bert", "vit_trocr"}:
        key = "decoder_input_ids" if name.startswith("vit") else "input_ids"
        first = tokenizer.bos_token_id if name == "blip" else tokenizer.cls_token_id

        def full(picture: Any, prompt: str) -> dict[str, Any]:
            pixels = processor(images=picture, return_tensors="pt").pixel_values
            return {"pixel_values": pixels, key: torch.tensor([[first, *bare(prompt)]])}

        return Plain(model, processor, full, lambda _: 1, key, "[SEP]")
    if name in {"blip2_t5", "instructblip_t5", "florence2"}:
        words, first_ids = {
            "blip2_t5": ("a photo of", [tokenizer.pad_token_id]),
            "instructblip_t5": ("A short image description:", [tokenizer.pad_token_id]),
            "florence2": ("<CAPTION>", [2, 0]),
        }[name]

        def full(picture: Any, prompt: str) -> dict[str, Any]:
            inputs = processor(images=picture, text=words, return_tensors="pt")
            ids = torch.tensor([[*first_ids, *bare(prompt)]])
            return {**inputs, "decoder_input_ids": ids}

        start = len(first_ids)
        return Plain(model, processor, full, lambda _: start, "decoder_input_ids", "</s>")
    return plain_prefix(name, model, processor)


def plain_prefix(name: str, model: Any, processor: Any) -> Plain:
    end = {"blip2_opt": "\n", "llava_onevision": "<|im_end|>"}.get(name, "</s>")
    end = "<eos>" if name.startswith("paligemma") else end
    end = "<|im_end|>" if name.startswith("qwen") else end
    end = "<end_of_utterance>" if name in {"smolvlm", "idefics3"} else end
    end = {"internvl": "<|im_end|>", "gemma3": "<end_of_turn>", "mllama": "<|eot_id|>"}.get(
        name, end
    )
    words = {
        "blip2_opt": "a photo of",
        "instructblip_vicuna": "A short image description:",
        "kosmos2": "An image of",
    }

    def full(picture: Any, prompt: str) -> dict[str, Any]:
        if name.startswith("paligemma"):
            inputs = processor(
                images=picture, text="<image>caption en", suffix=prompt, return_tensors="pt"
            )
        elif name in words:
            text = f"{words[name]} {prompt}".strip()
            inputs = processor(images=picture, text=text, return_tensors="pt")
            if name == "instructblip_vicuna":  # the Q-Former reads the instruction alone
                asked = processor(images=picture, text=words[name], return_tensors="pt")
                inputs.update({k: v for k, v in asked.items() if k.startswith("qformer")})
        elif name == "llava_sliding":
            text = f"USER: <image>\n{ASKED} ASSISTANT: {prompt}".strip()
            inputs = processor(images=picture, text=text, return_tensors="pt")
        elif name == "llava_onevision":  # its template writes an answer otherwise than it asks
            text = f"<|im_start|>user <image>\n{ASKED}<|im_end|><|im_start|>assistant\n{prompt}"
            inputs = processor(images=picture, text=text, return_tensors="pt")
        else:
            question = [{"type": "image", "image": picture}, {"type": "text", "text": ASKED}]
            turns: list[Any] = [{"role": "user", "content": question}]
            if prompt:
                answer = [{"type": "text", "text": prompt}]
                turns.append({"role": "assistant", "content": answer})
            inputs = processor.apply_chat_template(
                turns,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=not prompt,
            )
        return {key: value for key, value in inputs.items() if key != "labels"}

    def start(picture: Any) -> int:
        if name.startswith("paligemma"):
            return int((full(picture, "a")["token_type_ids"] == 0).sum())
        return int(full(picture, "")["input_ids"].shape[1])

    return Plain(model, processor, full, start, "input_ids", end)


@torch.inference_mode()
def expected(family: Plain, image: np.ndarray, prompt: str, tokens: list[int]) -> list[float]:
    """Return the log-probabilities of a prompt's tokens and of the end token behind them."""
    picture = family.picture(image)
    inputs = family.full(picture, prompt)
    start = family.start(picture)
    ids = inputs[family.key]
    assert ids[0, start : start + len(tokens)].tolist() == tokens
    length, size = ids.shape[1], start + len(tokens) + 1
    for key in family.text_keys(inputs, length):  # what follows the prompt is cut off
        value = inputs[key][:, : size - 1]
        inputs[key] = torch.cat([value, value[:, -1:]], 1)
    inputs[family.key][0, -1] = family.end_id
    logits = family.model(**inputs).logits[0, -len(tokens) - 2 : -1].log_softmax(-1)
    return [float(logits[i, token]) for i, token in enumerate([*tokens, family.end_id])]


@cache
def loaded(path: Path, append_eos: bool = False, **settings: Any) -> Any:
    config = TeacherConfig(model=str(path), append_eos=append_eos, prompt_batch=4, **settings)
    captioner = load_captioner(config)
    assert isinstance(captioner, TransformersCaptioner)
    return captioner


@cache
def table(name: str, path: Path) -> np.ndarray:
    """Return the expected sums (2, R, P), without and with the end token."""
    sequences = loaded(path).tokenize(PROMPTS)
    sums = np.zeros((2, len(IMAGES), len(PROMPTS)))
    for row, image in enumerate(IMAGES):
        for column, (prompt, tokens) in enumerate(zip(PROMPTS, sequences, strict=True)):
            values = expected(plain(name, path), image, prompt, tokens)
            sums[:, row, column] = sum(values[:-1]), sum(values)
    return sums


TRIES = {
    "blip",
    "git",
    "vit_bert",
    "blip2_opt",
    "instructblip_vicuna",
    "florence2",
    "paligemma",
    "llava",
    "llava_onevision",
    "smolvlm",
    "idefics3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "llava_next",
    "internvl",
    "mistral3",
    "mllama",
}
every_family = pytest.mark.parametrize("name", tiny_models.BUILDERS)


@every_family
@pytest.mark.parametrize("append_eos", [False, True])
def test_scores_equal_full_forwards(
    name: str,
    append_eos: bool,
    tiny_path: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches wrong masks, positions, padding, tokens or caches: each costs tenths of a nat."""
    captioner = loaded(tiny_path(name), append_eos)
    assert captioner.decoder.method == ("trie" if name in TRIES else "batched")
    sums = table(name, tiny_path(name))[int(append_eos)]
    assert captioner.decoder.end_id == plain(name, tiny_path(name)).end_id
    together = captioner.score(IMAGES, PROMPTS)
    np.testing.assert_allclose(together.log_likelihoods, sums, atol=2e-4)
    alone = [captioner.score([image], PROMPTS).log_likelihoods[0] for image in IMAGES]
    np.testing.assert_allclose(alone, sums, atol=2e-4)
    # The images must matter, or everything above proves little.
    assert np.abs(np.diff(sums, axis=0)).max() > 0.01
    if name in TRIES:  # several tries behind one cache
        monkeypatch.setattr(prompt_tree, "MAX_NODES", 4)
        captioner.decoder.split.cache_clear()
        split = captioner.score(IMAGES, PROMPTS).log_likelihoods
        assert len(captioner.decoder.tries(captioner.tokenize(PROMPTS))) > 1
        np.testing.assert_allclose(split, sums, atol=2e-4)


@every_family
def test_memory_is_bounded_by_groups(
    name: str, tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches logits of a whole batch, and groups that come back in another order."""
    captioner = loaded(tiny_path(name))
    made: list[int] = []
    head = captioner.decoder.head
    handle = head.register_forward_hook(lambda m, inputs, logits: made.append(logits.numel()))
    monkeypatch.setattr(captioner.decoder, "workspace", 1)
    monkeypatch.setattr(prompt_tree, "MAX_LOGITS", 1500)
    assert [len(g) for g in captioner.decoder.groups(captioner.prepare(IMAGES))] == [1, 1, 1]
    scores = captioner.score(IMAGES, PROMPTS).log_likelihoods
    handle.remove()
    assert max(made) <= max(1500, head.out_features)
    np.testing.assert_allclose(scores, table(name, tiny_path(name))[0], atol=2e-4)


def test_captions_share_steps_where_scoring_needs_groups(
    tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches captions written an image at a time for want of memory that only scoring needs."""
    captioner = loaded(tiny_path("blip"))
    decoder, settings = captioner.decoder, CaptionConfig(max_tokens=4)
    pixels = captioner.prepare(IMAGES)
    monkeypatch.setattr(decoder, "workspace", 3 * decoder.region_bytes(pixels[0], 4))
    assert len(list(decoder.groups(pixels))) > 1
    read: list[int] = []
    encode = decoder.encode
    monkeypatch.setattr(decoder, "encode", lambda g: (read.append(len(g)), encode(g))[1])
    assert len(captioner.caption(IMAGES, settings)) == len(IMAGES)
    assert read == [len(IMAGES)]


def generated(family: Plain, image: np.ndarray, **settings: Any) -> list[tuple[str, float]]:
    """Return what the model's own `generate` writes, with its log-probability."""
    picture = family.picture(image)
    inputs = family.full(picture, "a")
    start = family.start(picture)
    length = inputs[family.key].shape[1]
    for key in family.text_keys(inputs, length):
        inputs[key] = inputs[key][:, :start]
    tokenizer = family.processor.tokenizer
    if "decoder_input_ids" in inputs:
        settings["decoder_start_token_id"] = int(inputs["decoder_input_ids"][0, 0])
    if family.model.config.model_type == "blip":  # its `generate` knows start and end
        del inputs["input_ids"]
    else:
        settings |= {"eos_token_id": family.end_id, "pad_token_id": tokenizer.pad_token_id}
    output = family.model.generate(
        **inputs,
        **settings,
        do_sample=False,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_logits=True,
    )
    indices = getattr(output, "beam_indices", None)
    scores = family.model.compute_transition_scores(
        output.sequences, tuple(step.log_softmax(-1) for step in output.logits), indices
    )
    written = []
    for sequence, values in zip(output.sequences[:, -scores.shape[1] :], scores, strict=True):
        ended = (sequence == family.end_id).nonzero()[:, 0].tolist() or [len(sequence) - 1]
        kept = sequence[: ended[0] + 1]
        text = tokenizer.decode(kept[kept != family.end_id], skip_special_tokens=True).strip()
        written.append((text, float(values[: ended[0] + 1].sum())))
    return written


@every_family
@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_what_the_model_generates(
    name: str, beams: int, tiny_path: Callable[[str], Path]
) -> None:
    """Catches captions cut at the wrong token, beams that are mixed up, or padding counted."""
    captioner = loaded(tiny_path(name))
    settings = (
        CaptionConfig(max_tokens=8)
        if beams == 1
        else CaptionConfig(decoding="beam", num_beams=beams, count=2, max_tokens=8)
    )
    captions = captioner.caption(IMAGES, settings)
    options = {} if beams == 1 else {"num_beams": beams, "num_return_sequences": 2}
    for image, of_image in zip(IMAGES, captions, strict=True):
        wanted = generated(plain(name, tiny_path(name)), image, **options)
        wanted = sorted(wanted, key=lambda text: -text[1])
        assert [caption.text for caption in of_image] == [text for text, _ in wanted]
        values = [caption.log_probability for caption in of_image]
        np.testing.assert_allclose(values, [value for _, value in wanted], atol=1e-3)


@every_family
def test_samples_depend_on_seed_and_image_only(name: str, tiny_path: Callable[[str], Path]) -> None:
    """Catches samples that a rerun or another batch does not repeat, or that are all alike."""
    captioner = loaded(tiny_path(name))
    settings = CaptionConfig(decoding="sample", count=3, max_tokens=5, temperature=1.5)
    captions = captioner.caption(IMAGES, settings)
    assert captions == captioner.caption(IMAGES, settings)
    for image, of_image in zip(IMAGES, captions, strict=True):
        alone = captioner.caption([image], settings)[0]
        assert [caption.text for caption in alone] == [caption.text for caption in of_image]
        values = [caption.log_probability for caption in of_image]
        assert values == sorted(values, reverse=True)
    assert len({caption.text for of_image in captions for caption in of_image}) >= 3
    other = captioner.caption(IMAGES, settings.model_copy(update={"seed": 1}))
    assert other != captions


@pytest.mark.parametrize("name", ["qwen2_5_vl", "blip2_t5"])
def test_caption_probabilities_are_what_scoring_gives(
    name: str, tiny_path: Callable[[str], Path]
) -> None:
    """Catches sampling's temperature or nucleus leaking into the reported probability."""
    captioner = loaded(tiny_path(name))
    settings = CaptionConfig(decoding="sample", count=4, max_tokens=6, temperature=2.0, top_p=0.5)
    decoder = captioner.decoder
    with torch.inference_mode():
        images = captioner.prepare(IMAGES[:1])
        group = next(decoder.groups(images))
        for tokens, value in captioning.write_captions(decoder, group, settings, [[7]])[0]:
            ended = [*tokens, decoder.end_id] if len(tokens) < 6 else tokens
            again = float(decoder.log_likelihoods(images, [ended])[0, 0])
            assert value == pytest.approx(again, abs=1e-3)


def test_nucleus_and_temperature() -> None:
    """Catches tokens drawn from outside the nucleus, or by other shares than the model's."""
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 4000, 4)
    wide = CaptionConfig(decoding="sample", count=64, max_tokens=1, top_p=1.0)
    object.__setattr__(wide, "count", 4000)
    shares = drawn(wide, log_probs)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    narrow = wide.model_copy(update={"top_p": 0.8})
    np.testing.assert_allclose(drawn(narrow, log_probs), [0.625, 0.375, 0, 0], atol=0.03)
    cold = wide.model_copy(update={"temperature": 0.5})
    squares = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(drawn(cold, log_probs), squares / squares.sum(), atol=0.03)


def drawn(settings: CaptionConfig, log_probs: torch.Tensor) -> np.ndarray:
    tokens = captioning._sampler(settings, [[3]])(log_probs, 0)
    return np.bincount(tokens[0].numpy(), minlength=4) / tokens.numel()


@pytest.mark.parametrize("name", ["blip2_t5", "kosmos2", "paligemma2", "vit_trocr"])
def test_images_are_encoded_once(
    name: str, tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an image encoder that runs again for every batch of prompts."""
    captioner = loaded(tiny_path(name))
    assert len(PROMPTS) > captioner.decoder.prompt_batch
    model = captioner.decoder.model
    vision = [m for n, m in model.named_modules() if n.endswith(("vision_model", "vision_tower"))]
    calls = []
    handle = (vision or [model.encoder])[0].register_forward_hook(lambda *a: calls.append(1))
    try:
        captioner.score(IMAGES, PROMPTS)
    finally:
        handle.remove()
    assert sum(calls) == 1


# -- what the check at load refuses ------------------------------------------------------------


def refused(path: Path, **settings: Any) -> None:
    with pytest.raises(ConfigError, match="differ from plain forwards"):
        load_captioner(TeacherConfig(model=str(path), **settings))


@pytest.mark.parametrize("name", ["llava", "paligemma", "smolvlm"])
def test_check_refuses_shifted_positions(
    name: str, tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check that positions behind the prefix, off by one, would pass."""
    place = architectures.PrefixDecoder.first_position
    monkeypatch.setattr(
        architectures.PrefixDecoder, "first_position", lambda *args: place(*args) + 1
    )
    refused(tiny_path(name))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_check_refuses_qwen_without_its_jumps(
    name: str, tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check that an image counted by its tokens would pass."""
    monkeypatch.setattr(
        architectures.QwenDecoder, "first_position", architectures.PrefixDecoder.first_position
    )
    refused(tiny_path(name))


@pytest.mark.parametrize("name", ["llava", "blip2_opt", "florence2", "qwen3_vl"])
def test_check_refuses_a_mask_that_hides_nothing(
    name: str, tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check that prompts which see one another would pass."""
    build = decoders.additive_mask
    monkeypatch.setattr(decoders, "additive_mask", lambda *args: build(*args) * 0)
    refused(tiny_path(name))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "llava_onevision"])
def test_check_refuses_prompts_that_see_padding(
    name: str, tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check whose two images are read with prefixes of one length."""
    build = decoders.additive_mask

    def careless(prefix: Any, visible: torch.Tensor) -> torch.Tensor:
        return build(decoders.replace(prefix, visible=None), visible)

    monkeypatch.setattr(decoders, "additive_mask", careless)
    refused(tiny_path(name))


@pytest.mark.parametrize("name", ["llava_sliding", "paligemma2"])
def test_sliding_windows_go_to_batches(
    name: str, tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a window of attention taken for a tree mask's, and a rule that nothing needs."""
    assert loaded(tiny_path(name)).decoder.method == "batched"
    monkeypatch.setattr(families, "tree_obstacle", lambda text: None)
    with pytest.raises(ConfigError, match=r"differ from plain forwards|does not score"):
        load_captioner(TeacherConfig(model=str(tiny_path(name))))


def test_obstacles_are_told_from_the_config() -> None:
    """Catches hybrids and windows let onto the tree, and windows that are turned off kept off."""
    from transformers import Gemma3TextConfig, MistralConfig, Qwen2Config, Qwen3NextConfig

    assert families.tree_obstacle(MistralConfig(sliding_window=None)) is None
    assert families.tree_obstacle(MistralConfig(sliding_window=4096)) == "sliding_attention"
    assert families.tree_obstacle(Qwen2Config(use_sliding_window=False)) is None
    assert "linear_attention" in str(families.tree_obstacle(Qwen3NextConfig()))
    assert families.tree_obstacle(Gemma3TextConfig()) == "sliding_attention"
    full = Gemma3TextConfig(layer_types=["full_attention"] * 26, sliding_window=None)
    assert families.tree_obstacle(full) == "gemma3_text text"  # seen by nobody


def test_every_family_in_the_list_is_built() -> None:
    """Catches a family that is promised but not there, or there but not told of."""
    assert set(FAMILIES) == set(families._BUILDERS)


# -- instructions, precision, devices ----------------------------------------------------------


@pytest.mark.parametrize("name", ["blip", "git", "vit_bert", "vit_trocr", "blip2_opt", "llava"])
def test_instructions_change_what_is_asked(name: str, tiny_path: Callable[[str], Path]) -> None:
    """Catches an instruction that is ignored, or one whose words are scored too."""
    usual, asked = loaded(tiny_path(name)), loaded(tiny_path(name), instruction="a person")
    usual_scores, scores = (c.score(IMAGES[:1], ["riding a dog"]) for c in (usual, asked))
    assert scores.token_counts == usual_scores.token_counts
    assert abs(scores.log_likelihoods - usual_scores.log_likelihoods)[0, 0] > 0.01
    if name in {"blip", "git", "vit_bert", "vit_trocr"}:
        whole, begin = (
            usual.score(IMAGES[:1], [text]).log_likelihoods[0, 0]
            for text in ("a person riding a dog", "a person")
        )
        assert scores.log_likelihoods[0, 0] == pytest.approx(whole - begin, abs=1e-3)


def test_processors_without_a_template_are_refused(
    tiny_path: Callable[[str], Path], tmp_path: Path
) -> None:
    """Catches a chat model fed text in which it finds no image."""
    shutil.copytree(tiny_path("qwen2_vl"), tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="chat template"):
        load_captioner(TeacherConfig(model=str(tmp_path / "bare")))


@pytest.mark.parametrize(
    ("name", "method"), [("llava_next", "trie"), ("gemma3", "batched"), ("qwen3_vl", "batched")]
)
def test_families_that_nobody_listed_are_fed_as_their_check_tells(
    name: str, method: str, tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a chat model of transformers that is refused by its name, or scored wrongly.

    Qwen's three positions a token fail with plain ones, by trie and by batches: it counts itself.
    """
    monkeypatch.setattr(families, "_BUILDERS", {})
    monkeypatch.setattr(catalog, "FAMILIES", {})
    captioner: Any = load_captioner(TeacherConfig(model=str(tiny_path(name))))
    assert captioner.decoder.method == method
    scores = captioner.score(IMAGES, PROMPTS).log_likelihoods
    np.testing.assert_allclose(scores, table(name, tiny_path(name))[0], atol=2e-4)


def test_families_of_no_chat_are_refused(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches a traceback for a model of text alone, and a list that leaves others out."""
    shutil.copytree(tiny_path("qwen2_vl"), tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**settings, "model_type": "bert"}))
    with pytest.raises(ConfigError, match=r"'bert' is not supported: .*Gemma 3.*other chat models"):
        load_captioner(TeacherConfig(model=str(tmp_path / "other")))


def test_the_documentation_says_how_each_family_is_scored(
    tiny_path: Callable[[str], Path],
) -> None:
    """Catches a table of families that tells another path than the one that is taken."""
    text = (Path(__file__).parents[3] / "docs" / "teacher.md").read_text()
    rows = re.findall(r"^\| [^|]*\((`[^|]*)\) \| (trie|batched prompts)\b", text, re.M)
    told = {
        tuple(kind.split("+")): path.split()[0]
        for kinds, path in rows
        for kind in re.findall(r"`([^`]+)`", kinds)
    }
    seen = set()
    for name in tiny_models.BUILDERS:
        captioner = loaded(tiny_path(name))
        config = captioner.decoder.model.config
        text_type = config.get_text_config(decoder=True).model_type
        kind = next(k for k in ((config.model_type, text_type), (config.model_type,)) if k in told)
        assert told[kind] == captioner.decoder.method, name
        seen.add(kind[0])
    assert {kind[0] for kind in told} == set(FAMILIES)
    assert set(FAMILIES) - seen == {"qwen3_5_moe"}  # built as qwen3_5


@pytest.mark.parametrize("name", ["blip2_opt", "blip2_t5", "florence2", "qwen3_vl", "kosmos2"])
def test_half_precision(name: str, tiny_path: Callable[[str], Path]) -> None:
    """Catches inputs or masks of another type than the weights'."""
    captioner = loaded(tiny_path(name), dtype="bfloat16")
    assert captioner.decoder.model.dtype == torch.bfloat16
    scores = captioner.score(IMAGES, PROMPTS)
    assert scores.log_likelihoods.dtype == np.float32
    exact = table(name, tiny_path(name))[0]
    difference = np.abs(scores.log_likelihoods - exact)
    assert difference.max() > 0
    assert (difference < 1 + 0.03 * np.abs(exact)).all()
    assert len(captioner.caption(IMAGES[:1], CaptionConfig(max_tokens=3))[0]) == 1


@pytest.mark.parametrize("name", ["blip2_opt", "qwen2_5_vl"])
def test_layers_laid_out_by_accelerate(name: str, tiny_path: Callable[[str], Path]) -> None:
    """Catches device="auto" that does not load, or moves results to the wrong place."""
    captioner = load_captioner(TeacherConfig(model=str(tiny_path(name))), "auto")
    scores = captioner.score(IMAGES, PROMPTS).log_likelihoods
    np.testing.assert_allclose(scores, table(name, tiny_path(name))[0], atol=2e-4)


def test_flat_regions_are_not_taken_for_channels(tiny_path: Callable[[str], Path]) -> None:
    """Catches a region 3 or 1 pixels high whose rows are taken for colours."""
    flat = random_images((3, 40), (1, 50), (40, 3))
    for name in ("llava", "smolvlm", "blip2_opt"):
        captioner = loaded(tiny_path(name))
        upright = [np.repeat(np.repeat(image, 2, 0), 2, 1) for image in flat]
        scores = captioner.score([*flat, *upright], PROMPTS[:2]).log_likelihoods
        assert np.isfinite(scores).all()


def test_settings_of_a_checkpoint_are_read(tiny_path: Callable[[str], Path]) -> None:
    """Catches the tokenizer's end token scored where captions were trained to end otherwise."""
    settings = json.loads((tiny_path("blip2_opt") / "generation_config.json").read_text())
    captioner = loaded(tiny_path("blip2_opt"))
    assert captioner.decoder.end_id == settings["eos_token_id"]
    assert captioner.decoder.end_id != captioner.tokenizer.eos_token_id


# -- how long a prompt may be --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blip", "git", "blip2_t5", "florence2", "llava", "kosmos2"])
def test_prompts_end_where_positions_do(name: str, tiny_path: Callable[[str], Path]) -> None:
    """Catches scores past a model's positions, and an IndexError in place of a reason."""
    path = tiny_path(name)
    longest = load_captioner(TeacherConfig(model=str(path)), "meta").longest_prompt()
    captioner = loaded(path)
    assert captioner.longest_prompt() == longest  # known without weights
    if name in {"blip2_t5", "instructblip_t5"}:
        assert longest is None
    elif longest < 1000:
        word = captioner.tokenize(["dog"])[0][-1]
        for length in (longest, longest + 99):
            sequences = [[word] * length, [word]]
            images = captioner.prepare(IMAGES[:1])
            if length == longest:
                scores = captioner.decoder.log_likelihoods(images, sequences)
                assert torch.isfinite(scores).all()
                continue
            with pytest.raises(DataError, match=f"the model has {captioner.decoder.positions} pos"):
                captioner.decoder.log_likelihoods(images, sequences)
        limit = CaptionConfig(max_tokens=longest + 99)
        assert len(captioner.caption(IMAGES[:1], limit)[0]) == 1


@pytest.mark.parametrize("name", ["git", "llava", "kosmos2", "blip", "qwen2_5_vl"])
def test_the_ends_of_wide_regions_are_seen(name: str, tiny_path: Callable[[str], Path]) -> None:
    """Catches processors that cut off the ends of a union box, with the person or the thing."""
    wide = random_images((32, 96))[0]
    ends = wide.copy()
    ends[:, :30] = ends[:, 66:] = 255  # 62 % of it
    pair = [wide, ends]
    scores = loaded(tiny_path(name)).score(pair, PROMPTS).log_likelihoods
    assert np.abs(scores[0] - scores[1]).max() > 0.01
    if name in {"git", "llava", "kosmos2"}:
        cut = loaded(tiny_path(name), pad_to_square="never").score(pair, PROMPTS).log_likelihoods
        assert np.array_equal(cut[0], cut[1])
    else:  # what sees all of it is left alone
        never = loaded(tiny_path(name), pad_to_square="never").score(pair, PROMPTS)
        np.testing.assert_array_equal(never.log_likelihoods, scores)
        always = loaded(tiny_path(name), pad_to_square="always").score(pair, PROMPTS)
        assert np.abs(always.log_likelihoods - scores).max() > 0.01


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "llava", "paligemma", "internvl"])
def test_a_gpu_would_prepare_the_same_inputs(
    name: str, tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches channels or margins mixed up where pixels go to the device before the processor."""
    crops = CropBatch(IMAGES, [(n, (2, 1, image.shape[1], 30)) for n, image in enumerate(IMAGES)])
    expected = list(loaded(tiny_path(name)).prepare(crops))
    monkeypatch.setattr(families.Loaded, "processing_gpu", lambda loaded, text: "cpu")
    config = TeacherConfig(model=str(tiny_path(name)), pad_to_square="auto")
    found = list(load_captioner(config).prepare(crops))
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=1e-6, rtol=0)


def test_a_gpu_is_taken_only_where_it_agrees(tiny_path: Callable[[str], Path]) -> None:
    """Catches a processor that is trusted on a GPU with other pixels, or refused with the same."""

    class Gpu(str):  # a CPU that says that it is a GPU
        __slots__ = ()
        type = "cuda"

    for name, words in (
        ("qwen2_5_vl", "<|image_pad|>"),
        ("smolvlm", "<image>"),
        ("llava", "<image>"),
    ):
        folder = tiny_path(name)
        model = SimpleNamespace(dtype=torch.float32, device=Gpu("cpu"))
        loaded_parts = families.Loaded(TeacherConfig(model=str(folder)), folder, model)
        assert loaded_parts.processing_gpu(words) == "cpu"
        other = families.Loaded(TeacherConfig(model=str(folder)), folder, model)
        assert other.processing_gpu("no picture at all") == ""
        model.device = Gpu("meta")  # no values to compare
        other = families.Loaded(TeacherConfig(model=str(folder)), folder, model)
        assert other.processing_gpu(words) == ""


def test_large_regions_are_shrunk_where_the_settings_say(tiny_path: Callable[[str], Path]) -> None:
    """Catches a setting that a processor never sees, and small regions changed by it."""
    path = tiny_path("qwen2_5_vl")
    small, large = random_images((24, 40), (64, 128))
    captioners = [loaded(path), loaded(path, max_pixels=2048)]
    tokens = [
        [one["input_ids"].shape[1] for one in captioner.prepare([small, large])]
        for captioner in captioners
    ]
    assert tokens[0][0] == tokens[1][0]
    assert tokens[0][1] > tokens[1][1]


def test_captions_seldom_wait_for_the_device(
    tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a look at every token, for which the host and the device wait for each other."""
    captioner, looks = loaded(tiny_path("blip2_opt")), []
    settings = CaptionConfig(max_tokens=12)
    expected = captioner.caption(IMAGES, settings)
    monkeypatch.setattr(
        captioning, "bool", lambda flag: looks.append(1) or bool(flag), raising=False
    )
    assert captioner.caption(IMAGES, settings) == expected
    assert len(looks) <= 2
    monkeypatch.setattr(captioning, "_LOOK", 1)
    assert captioner.caption(IMAGES, settings) == expected
