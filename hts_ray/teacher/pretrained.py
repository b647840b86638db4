"""Captioners of the transformers library as teachers.

Models load from a local folder, from safetensors only, and prove on three prompts that
their fast scores equal plain forwards before they are used.

Shape legend: R regions, P prompts, V vocabulary, H x W pixels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hts_ray.config import TeacherConfig
from hts_ray.errors import DataError
from hts_ray.teacher.captioner import Caption, Pixels, PromptScores
from hts_ray.teacher.decoders import (
    BatchedCrossAttentionDecoder,
    BatchedDecoder,
    CrossAttentionDecoder,
    Decoder,
    GitDecoder,
)
from hts_ray.teacher.loading import model_error, supported_families

logger = logging.getLogger(__name__)

CHECK_PROMPTS = ("a person riding a horse", "a person riding a bicycle", "a dog")
# Largest difference of fast and plain scores in nats a token: rounding at each precision,
# far below the 0.5 and more that a wrong mask or position was seen to cost.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# What chat and instruction models are asked before the prompts.
INSTRUCTION = "Describe the image in one sentence."
PHOTO_PREFIX = "a photo of"

# Text decoders that take explicit position ids; the value is what the start token's is.
_POSITIONED = {"bert": 0, "gpt2": 0, "roberta": None, "xlm-roberta": None}

_RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic", 1: "bicubic"}


class TransformersCaptioner:
    """A pretrained captioner; see `Captioner`.

    `decoder` scores what `prepare` makes of R images; prompts become tokens after
    `prompt_prefix` (a space where the tokenizer glues words to it).
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        prepare: Callable[[Sequence[Pixels]], Any],
        *,
        append_eos: bool = False,
        prompt_prefix: str = "",
        max_tokens: int | None = None,
    ) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.prepare = prepare
        self.append_eos = append_eos
        self.prompt_prefix = prompt_prefix
        self.max_tokens = max_tokens
        self._prompts: tuple[str, ...] = ()
        self._sequences: list[list[int]] = []

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the scored tokens of P prompts, the end token included if asked for.

        Raises DataError for a prompt that has no token or too many.
        """
        if tuple(prompts) == self._prompts:
            return self._sequences
        texts = [self.prompt_prefix + prompt for prompt in prompts]
        sequences = self.tokenizer(texts, add_special_tokens=False).input_ids
        end = [self.decoder.end_id] if self.append_eos else []
        sequences = [[*sequence, *end] for sequence in sequences]
        for prompt, sequence in zip(prompts, sequences, strict=True):
            if not sequence or len(sequence) > (self.max_tokens or len(sequence)):
                raise DataError(
                    f"prompt {prompt!r} has {len(sequence)} tokens,"
                    f" the teacher takes 1 to {self.max_tokens or 'many'}"
                )
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown != self.decoder.end_id:
            strange = [p for p, s in zip(prompts, sequences, strict=True) if unknown in s]
            if strange:
                logger.warning(
                    "%d prompts hold words the teacher does not know, e.g. %r",
                    len(strange),
                    strange[0],
                )
        self._prompts, self._sequences = tuple(prompts), sequences
        return sequences

    @torch.inference_mode()
    def score(self, images: Sequence[Pixels], prompts: Sequence[str]) -> PromptScores:
        """Return log P(prompt | image) for every pair."""
        sequences = self.tokenize(prompts)
        scores = self.decoder.log_likelihoods(self.prepare(images), sequences)
        return PromptScores(
            log_likelihoods=scores.float().cpu().numpy(),
            token_counts=np.array([len(sequence) for sequence in sequences], dtype=np.int64),
        )

    @torch.inference_mode()
    def caption(self, images: Sequence[Pixels], max_tokens: int) -> list[Caption]:
        """Return one greedy caption of at most `max_tokens` tokens an image."""
        prepared = self.prepare(images)
        if isinstance(prepared, Tensor):
            return self._generate({"pixel_values": prepared}, max_tokens)
        return [self._generate(dict(inputs), max_tokens)[0] for inputs in prepared]

    def _generate(self, inputs: dict[str, Any], max_tokens: int) -> list[Caption]:
        output = self.decoder.model.generate(
            **inputs,
            **self.decoder.generation,
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[:, -len(output.logits) :]
        log_probs = torch.stack([step.float().log_softmax(-1) for step in output.logits], dim=1)
        chosen = log_probs.gather(2, tokens[..., None])[..., 0]
        # What follows the end token is padding and says nothing about the caption.
        ended_before = (tokens == self.decoder.end_id).long().cumsum(1).roll(1, dims=1)
        ended_before[:, 0] = 0
        totals = chosen.masked_fill(ended_before > 0, 0.0).sum(1).tolist()
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [Caption(text.strip(), total) for text, total in zip(texts, totals, strict=True)]

    @torch.inference_mode()
    def self_check(self) -> float:
        """Return the largest difference of fast and plain scores, nats a token.

        Three prompts on two noise images, each against one full forward.
        """
        rng = np.random.default_rng(0)
        noise = [rng.integers(0, 256, (48, width, 3), dtype=np.uint8) for width in (48, 64)]
        texts = [self.prompt_prefix + prompt for prompt in CHECK_PROMPTS]
        sequences = self.tokenizer(texts, add_special_tokens=False).input_ids
        sequences = [[*sequence, self.decoder.end_id] for sequence in sequences]
        images = self.prepare(noise)
        fast = self.decoder.log_likelihoods(images, sequences)
        plain = torch.stack([self.decoder.reference(images, s) for s in sequences], dim=1)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=fast.device)
        difference = ((fast - plain).abs() / lengths).max()
        return float(difference)


@dataclass(frozen=True)
class ImagePreparation:
    """Resize, crop and normalize R images in one batch on the model's device.

    Does what the checkpoint's own image processor does (bit for bit on the CPU where both
    resize 8-bit pixels), without a Python loop over images and without building one: images
    of equal size are resized together. `size` is (height, width), or one number for the
    shorter side, which needs a `crop` (height, width) after it.
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    resample: str
    device: str
    dtype: torch.dtype

    def __call__(self, images: Sequence[Pixels]) -> Tensor:
        """Return pixel values (R, 3, H, W)."""
        same_size: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            same_size.setdefault(image.shape, []).append(index)
        parts, order = [], []
        for indices in same_size.values():
            stacked = torch.from_numpy(np.stack([images[i] for i in indices])).to(self.device)
            parts.append(self._resized(stacked.permute(0, 3, 1, 2)))
            order += indices
        pixels = torch.cat(parts)[torch.tensor(order, device=self.device).argsort()]
        mean = torch.tensor(self.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(1, 3, 1, 1)
        return ((pixels * self.scale - mean) / std).to(self.dtype)

    def _resized(self, pixels: Tensor) -> Tensor:
        """Resize and crop uint8 (N, 3, h, w) to whole numbers in 0..255, (N, 3, H, W) float."""
        height, width = pixels.shape[-2:]
        target = self.size
        if isinstance(target, int):
            short, long = sorted((height, width))
            other = int(target * long / short)
            target = (target, other) if height <= width else (other, target)
        if target != (height, width):
            if pixels.device.type != "cpu":  # no 8-bit kernel there
                pixels = pixels.float()
            pixels = torch.nn.functional.interpolate(
                pixels,
                target,
                mode=self.resample,
                antialias=self.resample in {"bilinear", "bicubic"},
            )
        pixels = pixels.float().round().clamp(0, 255)
        return _center_crop(pixels, self.crop) if self.crop else pixels


def _center_crop(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the middle (height, width) out of (N, 3, h, w), padding with black where it is less."""
    height, width = size
    missing = (max(0, width - pixels.shape[-1]), max(0, height - pixels.shape[-2]))
    if any(missing):
        left, top = missing[0] // 2, missing[1] // 2
        pixels = torch.nn.functional.pad(pixels, (left, missing[0] - left, top, missing[1] - top))
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def image_preparation(
    config: TeacherConfig, folder: Path, device: str, dtype: torch.dtype
) -> ImagePreparation:
    """Read an ImagePreparation from a checkpoint's preprocessor or processor settings.

    Raises ConfigError when they are missing or do not lead to images of one size.
    """
    settings = _processor_settings(config, folder)
    size: Any = settings.get("size")
    short_side = "CLIP" in str(settings.get("image_processor_type", ""))
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    elif isinstance(size, int) and not short_side:
        size = (size, size)
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    if isinstance(crop, dict):
        crop = (crop["height"], crop["width"])
    elif isinstance(crop, int):
        crop = (crop, crop)
    known = isinstance(size, int) or (
        isinstance(size, tuple) and all(isinstance(side, int) for side in size)
    )
    complete = settings.get("image_mean") and settings.get("image_std")
    if not known or not complete or (isinstance(size, int) and crop is None):
        raise model_error(
            config,
            f"its image processor settings (size {settings.get('size')}, crop {crop}) do not"
            " give images of one size",
            "save the processor with a height and a width, a mean and a std",
        )
    normalize = settings.get("do_normalize", True)
    scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    return ImagePreparation(
        size=size,
        crop=crop,
        mean=tuple(settings["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=tuple(settings["image_std"]) if normalize else (1.0, 1.0, 1.0),
        scale=float(scale),
        resample=_RESAMPLE.get(int(settings.get("resample", 2)), "bicubic"),
        device=device,
        dtype=dtype,
    )


def _processor_settings(config: TeacherConfig, folder: Path) -> dict[str, Any]:
    """Return the image processor's settings from whichever file the checkpoint has."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            found = settings.get("image_processor", settings)
            if "size" in found:
                return dict(found)
    raise model_error(
        config, f"{folder} holds no image processor settings", "save the model's processor with it"
    )


def load_pretrained(config: TeacherConfig, folder: Path, device: str) -> TransformersCaptioner:
    """Load a checked model folder; ConfigError when it does not load or its scores are off.

    Weights are converted to `config.dtype` whatever precision they are stored in.
    """
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.utils import logging as library_logging

    library_logging.disable_progress_bar()
    dtype: torch.dtype = getattr(torch, config.dtype)
    options: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": config.trust_remote_code,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, loading = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        model = model.to(device).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise model_error(config, f"does not load: {error}") from error
    # The library fills in random numbers; no captioner reads the poolers.
    missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
    if missing:
        raise model_error(
            config, f"its files lack {len(missing)} weights, e.g. {missing[0]}", "save it again"
        )
    captioner = _captioner_of(config, folder, model, tokenizer, device)
    difference = captioner.self_check()
    if not difference <= TOLERANCE[dtype]:
        raise model_error(
            config,
            f"prompt scores differ from plain forwards by {difference:.2g} nats a token"
            f" ({captioner.decoder.method}, {config.dtype})",
            "label.teacher.dtype=float32, or a supported family: " + supported_families(),
        )
    return captioner


def _captioner_of(
    config: TeacherConfig,
    folder: Path,
    model: Any,
    tokenizer: Any,
    device: str,
) -> TransformersCaptioner:
    family = model.config.model_type
    text = model.config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if family in {"blip", "git", "vision-encoder-decoder"}:
        build = {"blip": _blip, "git": _git, "vision-encoder-decoder": _encoder_decoder}[family]
        return TransformersCaptioner(
            build(config, model, tokenizer),
            tokenizer,
            image_preparation(config, folder, device, model.dtype),
            append_eos=config.append_eos,
            max_tokens=longest - 3 if longest else None,  # start, end and RoBERTa's offset
        )
    return _prefix_captioner(config, folder, model, tokenizer)


def _blip(config: TeacherConfig, model: Any, tokenizer: Any) -> Decoder:
    text = model.config.text_config
    return CrossAttentionDecoder(
        model,
        model.text_decoder,
        lambda pixels: model.vision_model(pixel_values=pixels).last_hidden_state,
        start_id=text.bos_token_id,
        end_id=text.sep_token_id,
    )


def _git(config: TeacherConfig, model: Any, tokenizer: Any) -> Decoder:
    return GitDecoder(model, start_id=model.config.bos_token_id, end_id=model.config.eos_token_id)


def _encoder_decoder(config: TeacherConfig, model: Any, tokenizer: Any) -> Decoder:
    start = _first_set(model, tokenizer, "decoder_start_token_id", "bos_token_id", "cls_token_id")
    end = _first_set(model, tokenizer, "eos_token_id", "sep_token_id")
    if start is None or end is None:
        raise model_error(
            config, "it names no decoder_start_token_id or eos_token_id", "set them in config.json"
        )

    def features(pixels: Tensor) -> Tensor:
        hidden: Tensor = model.encoder(pixel_values=pixels).last_hidden_state
        project = getattr(model, "enc_to_dec_proj", None)
        return hidden if project is None else project(hidden)

    ends = {"start_id": start, "end_id": end}
    family = model.config.decoder.model_type
    decoder: Decoder
    if family in _POSITIONED:
        first = _POSITIONED[family]
        if first is None:  # RoBERTa counts from behind its padding token's id
            first = model.config.decoder.pad_token_id + 1
        decoder = CrossAttentionDecoder(
            model, model.decoder, features, first_position=first, **ends
        )
    else:
        decoder = BatchedCrossAttentionDecoder(
            model, model.decoder, features, prompt_batch=config.prompt_batch, **ends
        )
    # Older checkpoints keep these in places where `generate` does not look.
    decoder.generation = {
        "decoder_start_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    return decoder


def _first_set(model: Any, tokenizer: Any, *names: str) -> int | None:
    """Return the first special token id that the model or else its tokenizer names."""
    places = (model.config, model.generation_config, model.config.decoder, tokenizer)
    for name in names:
        for place in places:
            value = getattr(place, name, None)
            if value is not None:
                return int(value[0] if isinstance(value, list) else value)
    return None


def _prefix_captioner(
    config: TeacherConfig, folder: Path, model: Any, tokenizer: Any
) -> TransformersCaptioner:
    """Wrap a model that reads image and instruction as one prefix and the prompt behind it."""
    from transformers import AutoProcessor

    if not getattr(model.config, "use_decoder_only_language_model", True):
        raise model_error(config, "its language model is no causal decoder", supported_families())
    processor = AutoProcessor.from_pretrained(
        folder, local_files_only=True, trust_remote_code=config.trust_remote_code
    )
    chat = getattr(processor, "chat_template", None)
    text = PHOTO_PREFIX
    if chat:
        content = [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    def prepare(images: Sequence[Pixels]) -> list[dict[str, Tensor]]:
        prepared = []
        for image in images:
            inputs = processor(images=np.ascontiguousarray(image), text=text, return_tensors="pt")
            inputs = inputs.to(model.device)
            prepared.append(
                {
                    name: value.to(model.dtype) if value.is_floating_point() else value
                    for name, value in inputs.items()
                    if isinstance(value, Tensor)
                }
            )
        return prepared

    return TransformersCaptioner(
        BatchedDecoder(model, tokenizer.eos_token_id, config.prompt_batch),
        tokenizer,
        prepare,
        append_eos=config.append_eos,
        prompt_prefix="" if chat else " ",
    )
