"""How a loaded model of each family becomes a captioner: decoder, instruction, tokens, pixels.

A prompt's tokens are those that the model would see:
- Behind an instruction, prompt and instruction are tokenized together, so that a leading space is
  written as the family writes it.
- At the start of a decoder's text, the prompt is tokenized alone.
Capital letters and full stops stay as given.

| family | in front of the prompt, by default |
|---|---|
| BLIP, GIT, VisionEncoderDecoder | the start token |
| BLIP-2 | "a photo of" |
| InstructBLIP | "A short image description:", which its Q-Former reads too |
| PaliGemma | "caption en" and a line break |
| Florence-2 | the question that its processor makes of `<CAPTION>` |
| Kosmos-2 | "An image of" |
| chat models | INSTRUCTION in their chat template, and what it puts before an answer |

`label.teacher.instruction` replaces the words; where there are none, it begins the sentence. With
mode=questions the families that follow instructions are asked `label.teacher.question`: BLIP-2
between "Question:" and "Answer:", PaliGemma behind "answer en", the others as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hts_ray.config import TeacherConfig
from hts_ray.images.crops import fitting, shrunk
from hts_ray.store.aliases import Pixels
from hts_ray.teacher.models.architectures import (
    CountingDecoder,
    CrossAttentionDecoder,
    Florence2Decoder,
    GitDecoder,
    KosmosDecoder,
    MllamaDecoder,
    PaliGemmaDecoder,
    PrefixDecoder,
    QFormerDecoder,
    QwenDecoder,
    SequenceToSequenceDecoder,
)
from hts_ray.teacher.models.catalog import INSTRUCTION, model_error, supported_families
from hts_ray.teacher.models.inputs import (
    RegionInputs,
    cuts_ends,
    margin_color,
    on_device,
    pixel_preparation,
    squared,
)
from hts_ray.teacher.models.questions import (
    AnswerTokens,
    Encode,
    Questions,
    SplitQuestions,
    WholeQuestions,
)
from hts_ray.teacher.scoring.decoders import Decoder

LLAVA_TEXT = "USER: <image>\n{} ASSISTANT:"
_PROBE = "PROBE"
_ROUNDED = 0.02  # a level of a pixel in 255, at the usual standard deviations
# How a template opens a model's thoughts before its answer, and what ends them.
_THOUGHTS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
}

# Text decoders of VisionEncoderDecoder that take explicit position ids; the value is the start
# token's. RoBERTa counts from behind its padding token's id.
_POSITIONED = {"bert": 0, "gpt2": 0, "roberta": None, "xlm-roberta": None}
# Text models whose attention was seen to take a tree mask behind a cache. Others may be as good,
# or silently wrong, as T5's position bias is.
TREE_TEXT_MODELS = {
    "gemma",
    "llama",
    "mistral",
    "mllama_text_model",
    "opt",
    "qwen2",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_vl_moe_text",
    "qwen3_vl_text",
}


@dataclass(frozen=True)
class Family:
    """What a captioner is put together from.

    `decoder` scores what `prepare` makes of R images; `encode` makes tokens of prompts. Of families
    that follow instructions `frame` puts what they read around a question, up to the answer, and
    `vision` is the image encoder of those that read image and question together. `questions` is
    there with mode=questions.
    """

    decoder: Decoder
    tokenizer: Any
    prepare: Callable[[Sequence[Pixels]], Any]
    encode: Encode
    frame: Callable[[str], str] | None = None
    vision: nn.Module | None = None
    questions: Questions | None = None


@dataclass(frozen=True)
class Loaded:
    """A model that was loaded from a folder, with its settings."""

    config: TeacherConfig
    folder: Path
    model: Any
    places: list[str] = field(default_factory=list)  # of `processing_gpu`

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, of families that need no processor."""
        return self._load("AutoTokenizer")

    @cached_property
    def processor(self) -> Any:
        """The processor of image and text."""
        processor = self._load("AutoProcessor")
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise model_error(
                self.config,
                f"{self.folder} holds no processor of image and text",
                "save the model's processor with it",
            )
        return processor

    @cached_property
    def image_processor(self) -> Any:
        """The image processor, of families that need no text with the image."""
        return self._load("AutoImageProcessor")

    def processing_gpu(self, text: str) -> str:
        """Return the GPU on which its processor prepares images beside a text, "" for the CPU.

        Taken where it makes of noise what it makes on the CPU, but for rounding. Asked once.
        """
        device = self.model.device
        if device.type != "cuda" or self.places:
            return self.places[0] if self.places else ""
        noise = np.random.default_rng(0).integers(0, 256, (3, 96, 160), np.uint8)
        options = {"text": text, "input_data_format": "channels_first", "return_tensors": "pt"}
        try:
            there, here = (
                self.processor(images=torch.from_numpy(noise).to(place), **options)
                for place in (device, "cpu")
            )
            pixels = there.pixel_values.cpu() - here.pixel_values
            same = {k: v.shape for k, v in there.items()} == {k: v.shape for k, v in here.items()}
            same = same and float(pixels.abs().mean()) < _ROUNDED
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError):
            same = False
        self.places.append(str(device) if same else "")
        return self.places[0]

    def _load(self, kind: str) -> Any:
        import transformers

        try:
            return getattr(transformers, kind).from_pretrained(
                self.folder,
                local_files_only=True,
                trust_remote_code=self.config.trust_remote_code,
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
            raise model_error(
                self.config,
                f"its tokenizer or processor does not load: {error}",
                "save them in the model's folder with save_pretrained",
            ) from error

    def pads(self, image_processor: Any) -> bool:
        """Return whether regions are padded to squares for an image processor."""
        wanted = self.config.pad_to_square
        return wanted == "always" or (wanted == "auto" and cuts_ends(image_processor))

    def end_ids(self, tokenizer: Any) -> list[int]:
        """Return the tokens that end a caption, the one that is scored first."""
        text = self.model.config.get_text_config(decoder=True)
        places = (self.model.generation_config, text, tokenizer)
        for place in places:
            found = getattr(place, "eos_token_id", None)
            if found is not None:
                ids = [int(i) for i in found] if isinstance(found, list) else [int(found)]
                usual = tokenizer.eos_token_id
                return [usual, *(i for i in ids if i != usual)] if usual in ids else ids
        raise model_error(
            self.config, "it names no end token", "set eos_token_id in generation_config.json"
        )


def ways(loaded: Loaded) -> int:
    """Return in how many ways a model may be fed: one, or all that a chat model may need."""
    return 1 if loaded.model.config.model_type in _BUILDERS else len(_WAYS)


def build_family(loaded: Loaded, way: int = 0) -> Family:
    """Put the parts of a captioner together; ConfigError where the checkpoint lacks one.

    A family that is not in the list is a chat model of transformers, or was let in by
    trust_remote_code. The check of its scores tells which of `ways` is what it needs, if any.
    """
    builder = _BUILDERS.get(loaded.model.config.model_type)
    family = builder(loaded) if builder else _unknown(loaded, *_WAYS[way])
    if loaded.config.mode != "questions":
        return family
    return replace(family, questions=_questions(loaded, family))


def _questions(loaded: Loaded, family: Family) -> Questions:
    """Make what a family is asked of its frame and the settings' question."""
    config, tokenizer, frame = loaded.config, family.tokenizer, family.frame
    assert frame is not None, "families that cannot be asked are refused by name"
    # The token of an answer may hold the space in front of it.
    begun = frame(config.question.replace("{}", _PROBE)).rstrip(" ")
    answers = answer_tokens(config, tokenizer, begun)
    before, _, after = begun.partition(_PROBE)
    front = before.rstrip()

    def ended(encode: Encode, front: str = "") -> Encode:
        return lambda phrases: encode([f"{front}{phrase}{after}" for phrase in phrases])

    if family.vision is None:
        encode = ended(behind(tokenizer, front, before[len(front) :]))
        return SplitQuestions(processed(loaded, front), family.decoder, answers, encode)

    def process(image: Pixels, phrase: str) -> dict[str, Tensor]:
        return next(iter(processed(loaded, f"{before}{phrase}{after}")([image])))

    encode = ended(behind(tokenizer), before)
    return WholeQuestions(process, family.vision, family.decoder, answers, encode)


def answer_tokens(config: TeacherConfig, tokenizer: Any, begun: str) -> AnswerTokens:
    """Return the tokens that answer behind `begun`; ConfigError where there are none."""
    answers = AnswerTokens.of(behind(tokenizer, begun), behind(tokenizer))
    if answers is None:
        raise model_error(
            config,
            "its tokenizer has no single token for yes and another for no",
            "label.teacher.mode=prompts, or another model",
        )
    return answers


def tree_obstacle(text: Any) -> str | None:
    """Return why a text model's config rules out a tree mask, None where nothing does.

    A sliding window counts rows of the cache, which for a tree are no distances; linear
    attention has no mask.
    """
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return ", ".join(sorted(kinds))
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return "sliding_attention"
    if text.model_type not in TREE_TEXT_MODELS:
        return f"{text.model_type} text"
    return None


def behind(tokenizer: Any, context: str = "", glue: str = "") -> Encode:
    """Return what makes tokens of prompts that follow `context` and `glue`.

    Text and context are tokenized together and the context's tokens cut off. Where a prompt
    changes them it is tokenized alone, as the context's tokens are what the model has read.
    """
    before: list[int] = tokenizer(context, add_special_tokens=False).input_ids if context else []

    def encode(prompts: Sequence[str]) -> list[list[int]]:
        texts = [glue + prompt for prompt in prompts]
        alone: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
        if not before:
            return alone
        together = tokenizer([context + text for text in texts], add_special_tokens=False)
        return [
            whole[len(before) :] if whole[: len(before)] == before else text
            for whole, text in zip(together.input_ids, alone, strict=True)
        ]

    return encode


def _pixel_family(loaded: Loaded, decoder: Decoder, encode: Encode) -> Family:
    model = loaded.model
    device = "cpu" if model.device.type == "meta" else str(model.device)
    processor = loaded.image_processor
    prepare = pixel_preparation(processor, device, model.dtype, pad=loaded.pads(processor))
    return Family(decoder, loaded.tokenizer, prepare, encode)


def _positions(text: Any) -> int | None:
    """Return how many positions a text model has; None where they are relative, as T5's."""
    return getattr(text, "max_position_embeddings", None)


def _begun(loaded: Loaded, start_id: int) -> tuple[list[int], Encode]:
    """Return the tokens before a prompt, and what makes tokens of prompts."""
    tokenizer, words = loaded.tokenizer, loaded.config.instruction
    if not words:
        return [start_id], behind(tokenizer)
    begun = tokenizer(words, add_special_tokens=False).input_ids
    return [start_id, *begun], behind(tokenizer, words, " ")


def _blip(loaded: Loaded) -> Family:
    model = loaded.model
    text = model.config.text_config
    start_ids, encode = _begun(loaded, text.bos_token_id)
    decoder = CrossAttentionDecoder(
        model,
        model.text_decoder,
        lambda pixels: model.vision_model(pixel_values=pixels).last_hidden_state,
        start_ids=start_ids,
        end_ids=[text.sep_token_id],
        positions=_positions(text),
    )
    return _pixel_family(loaded, decoder, encode)


def _git(loaded: Loaded) -> Family:
    config = loaded.model.config
    start_ids, encode = _begun(loaded, config.bos_token_id)
    decoder = GitDecoder(
        loaded.model,
        start_ids=start_ids,
        end_ids=[config.eos_token_id],
        positions=_positions(config),
    )
    return _pixel_family(loaded, decoder, encode)


def _vision_encoder_decoder(loaded: Loaded) -> Family:
    model, tokenizer = loaded.model, loaded.tokenizer
    start = _first_set(model, tokenizer, "decoder_start_token_id", "bos_token_id", "cls_token_id")
    end = _first_set(model, tokenizer, "eos_token_id", "sep_token_id")
    if start is None or end is None:
        raise model_error(
            loaded.config,
            "it names no decoder_start_token_id or eos_token_id",
            "set them in config.json",
        )

    def features(pixels: Tensor) -> Tensor:
        hidden: Tensor = model.encoder(pixel_values=pixels).last_hidden_state
        project = getattr(model, "enc_to_dec_proj", None)
        return hidden if project is None else project(hidden)

    start_ids, encode = _begun(loaded, start)
    text = model.config.decoder
    first = _POSITIONED.get(text.model_type)
    if first is None and text.model_type in _POSITIONED:
        first = text.pad_token_id + 1
    decoder = CrossAttentionDecoder(
        model,
        model.decoder,
        features,
        start_ids=start_ids,
        end_ids=[end],
        positions=_positions(text),
        first_position=first,
        by_trie=first is not None,
        prompt_batch=loaded.config.prompt_batch,
    )
    return _pixel_family(loaded, decoder, encode)


def _first_set(model: Any, tokenizer: Any, *names: str) -> int | None:
    """Return the first special token id that the model or else its tokenizer names."""
    places = (model.config, model.generation_config, model.config.decoder, tokenizer)
    for name in names:
        for place in places:
            value = getattr(place, name, None)
            if value is not None:
                return int(value[0] if isinstance(value, list) else value)
    return None


def processed(loaded: Loaded, text: str) -> Callable[[Sequence[Pixels]], RegionInputs]:
    """Return what makes a model's inputs of images and one text."""
    from PIL import Image
    from torchvision.transforms.v2 import InterpolationMode, functional

    processor, model, most = loaded.processor, loaded.model, loaded.config.max_pixels
    pads, color = loaded.pads(processor.image_processor), margin_color(processor.image_processor)
    start, gpu = processor.tokenizer.bos_token, loaded.processing_gpu(text)
    # A chat template may have written the start token that the tokenizer would add.
    options: dict[str, Any] = {}
    if start and text.startswith(start):
        options["add_special_tokens"] = False

    def pictured(image: Pixels) -> Image.Image:
        image = shrunk(image, most)
        pixels = squared(torch.tensor(image), color).numpy() if pads else image
        # A PIL image: of an array of 3 rows it would have to be guessed what is a channel.
        return Image.fromarray(np.ascontiguousarray(pixels))

    def on_gpu(image: Tensor) -> Tensor:
        height, width = fitting(image.shape, most)
        pixels = image.permute(2, 0, 1)
        if (height, width) != image.shape[:2]:
            size = [height, width]
            pixels = functional.resize(pixels, size, InterpolationMode.BICUBIC, antialias=True)
        return squared(pixels.permute(1, 2, 0), color).permute(2, 0, 1) if pads else pixels

    if gpu:
        options["input_data_format"] = "channels_first"

    def process(image: Any) -> dict[str, Tensor]:
        picture = on_gpu(image) if gpu else pictured(image)
        inputs = processor(images=picture, text=text, return_tensors="pt", **options)
        return {
            name: value.to(model.dtype) if value.is_floating_point() else value
            for name, value in inputs.items()
            if isinstance(value, Tensor) and name != "labels"
        }

    def prepare(images: Sequence[Pixels]) -> RegionInputs:
        sources = on_device(images, gpu) if gpu else images
        return RegionInputs(sources, process, model.device.type)

    return prepare


def _prefix_family(
    loaded: Loaded, kind: type[PrefixDecoder], text: str, encode: Encode, *, tree: bool = True
) -> Family:
    """Put together a decoder-only family that reads an image and `text`."""
    tokenizer = loaded.processor.tokenizer
    end_ids = loaded.end_ids(tokenizer)
    language = loaded.model.config.get_text_config(decoder=True)
    decoder = kind(
        loaded.model,
        end_ids=end_ids,
        pad_id=end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        positions=_positions(language),
        by_trie=tree and tree_obstacle(language) is None,
        prompt_batch=loaded.config.prompt_batch,
    )
    return Family(decoder, tokenizer, processed(loaded, text), encode)


def chat_of(loaded: Loaded) -> Callable[[str], tuple[str, str]]:
    """Return what makes of words beside an image the text up to the answer, see `_chat_text`.

    ConfigError for a checkpoint without a chat template.
    """
    if getattr(loaded.processor, "chat_template", None):
        return partial(_chat_text, loaded.processor)
    # The first checkpoints of LLaVA have no template.
    if "llava" in type(loaded.processor).__name__.lower():
        return _llava_text
    raise model_error(
        loaded.config,
        f"{loaded.folder} holds no chat template",
        "save chat_template.jinja with the processor",
    )


def _chat(loaded: Loaded, kind: type[PrefixDecoder], *, tree: bool = True) -> Family:
    processor, chat = loaded.processor, chat_of(loaded)
    text, glue = chat(loaded.config.instruction or INSTRUCTION)
    encode = behind(processor.tokenizer, text, glue)
    family = _prefix_family(loaded, kind, text, encode, tree=tree)
    return replace(family, frame=lambda question: "".join(chat(question)))


def _chat_text(processor: Any, words: str) -> tuple[str, str]:
    """Return the text up to the answer, and what the template writes between the two.

    Thoughts that the template opens are closed: captions and answers follow at once.
    """
    from jinja2 import TemplateError

    asked: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": _PROBE}]}
    options = {}
    if "enable_thinking" in str(processor.chat_template):
        options["enable_thinking"] = False
    text = processor.apply_chat_template(asked, add_generation_prompt=True, **options)
    text = _without_thoughts(text, text.rfind(words) + len(words))
    try:
        whole: str = processor.apply_chat_template([*asked, answer], **options)
    except (TemplateError, TypeError, ValueError):
        return text, ""
    before, found, _ = whole.partition(_PROBE)
    return text, before[len(text) :] if found and before.startswith(text) else ""


def _without_thoughts(text: str, start: int) -> str:
    """Return text whose thoughts, if any are begun behind `start`, are ended."""
    for opening, closing in _THOUGHTS.items():
        if text.rfind(opening, start) > text.rfind(closing, start):
            return f"{text.rstrip()}\n\n{closing}\n\n"
    return text


def _llava_text(words: str) -> tuple[str, str]:
    return LLAVA_TEXT.format(words), " "


def _qformer(loaded: Loaded, words: str, frame: str, *, reads_question: bool) -> Family:
    model = loaded.model
    words = loaded.config.instruction or words
    tokenizer = loaded.processor.tokenizer
    if getattr(model.config, "use_decoder_only_language_model", True):
        family = _prefix_family(loaded, QFormerDecoder, words, behind(tokenizer, words, " "))
        vision = model.vision_model if reads_question else None
        return replace(family, frame=frame.format, vision=vision)
    end_ids = loaded.end_ids(tokenizer)
    text = model.config.text_config
    start = text.decoder_start_token_id
    decoder = SequenceToSequenceDecoder(
        model,
        model.language_model,
        start_ids=[text.pad_token_id if start is None else start],
        end_ids=end_ids,
        pad_id=text.pad_token_id,
        positions=_positions(text),
        by_trie=False,  # T5's position bias counts from the cache
        prompt_batch=loaded.config.prompt_batch,
    )
    family = Family(decoder, tokenizer, processed(loaded, words), behind(tokenizer))
    return replace(family, frame=frame.format, vision=model.vision_model)


def _paligemma(loaded: Loaded) -> Family:
    words = loaded.config.instruction or "caption en"
    # The processor puts a line break behind the words; the answer begins a line.
    encode = behind(loaded.processor.tokenizer, words + "\n")
    family = _prefix_family(loaded, PaliGemmaDecoder, f"<image>{words}", encode)
    vision = loaded.model.model.vision_tower
    return replace(family, frame="<image>answer en {}".format, vision=vision)


def _kosmos(loaded: Loaded) -> Family:
    words = loaded.config.instruction or "An image of"
    encode = behind(loaded.processor.tokenizer, words, " ")
    return _prefix_family(loaded, KosmosDecoder, words, encode, tree=False)


def _florence(loaded: Loaded) -> Family:
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    text = model.config.text_config
    # Captions were learned as the tokenizer writes them, behind a start token of its own.
    written, alone = (tokenizer("a", add_special_tokens=own).input_ids for own in (True, False))
    front = written[: written.index(alone[0])]
    decoder = Florence2Decoder(
        model,
        model.model.language_model.decoder.embed_positions,
        start_ids=[text.decoder_start_token_id, *front],
        end_ids=loaded.end_ids(tokenizer),
        pad_id=tokenizer.pad_token_id,
        positions=_positions(text),
    )
    words = loaded.config.instruction or "<CAPTION>"
    return Family(decoder, tokenizer, processed(loaded, words), behind(tokenizer))


def _unknown(loaded: Loaded, kind: type[PrefixDecoder], tree: bool) -> Family:
    try:
        return _chat(loaded, kind, tree=tree)
    except (AttributeError, TypeError, ValueError) as error:
        raise model_error(
            loaded.config, f"it is no chat model of image and text: {error}", supported_families()
        ) from error


# How a family of which nothing is known may be fed, the fastest first.
_WAYS = ((PrefixDecoder, True), (PrefixDecoder, False), (CountingDecoder, False))
_CHAT: dict[str, type[PrefixDecoder]] = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "smolvlm"), PrefixDecoder),
    **dict.fromkeys(("idefics3", "internvl", "mistral3", "gemma3"), PrefixDecoder),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), QwenDecoder),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), QwenDecoder),
    "mllama": MllamaDecoder,
}
_BUILDERS: dict[str, Callable[[Loaded], Family]] = {
    "blip": _blip,
    "git": _git,
    "vision-encoder-decoder": _vision_encoder_decoder,
    "blip-2": lambda loaded: _qformer(
        loaded, "a photo of", "Question: {} Answer:", reads_question=False
    ),
    "instructblip": lambda loaded: _qformer(
        loaded, "A short image description:", "{}", reads_question=True
    ),
    "paligemma": _paligemma,
    "florence2": _florence,
    "kosmos-2": _kosmos,
    **{family: partial(_chat, kind=kind) for family, kind in _CHAT.items()},
}
