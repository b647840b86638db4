"""Captioners of the transformers library as teachers.

Models load from a local folder, from safetensors only, and prove on a few prompts that their
fast scores equal plain forwards before they are used. How each family is fed:
`hts_ray.teacher.models.families`.

Shape legend: R regions, P prompts, C classes, V vocabulary, H x W pixels.
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hts_ray.config import CaptionConfig, TeacherConfig
from hts_ray.errors import DataError
from hts_ray.store.aliases import FloatArray, Pixels
from hts_ray.teacher.captioner import (
    Answers,
    Caption,
    ClassPrompts,
    PromptScores,
    TopSearch,
    score_classes,
)
from hts_ray.teacher.models.catalog import TeacherModel, model_error, supported_families
from hts_ray.teacher.models.families import Family, Loaded, build_family, ways
from hts_ray.teacher.scoring import trie as prompt_tree
from hts_ray.teacher.scoring.captioning import write_captions
from hts_ray.teacher.scoring.memory import WORKSPACE
from hts_ray.teacher.scoring.top_k import score_top
from hts_ray.teacher.scoring.trie import TokenIds

logger = logging.getLogger(__name__)

CHECK_PROMPTS = ("a person riding a horse", "a person riding a bicycle", "a dog")
# Height and width of the two images of the check: most families that cut an image into tiles or
# patches of its own shape read prefixes of two lengths.
CHECK_SHAPES = ((64, 64), (64, 160))
# Shapes of regions for which one model or another reads the most tokens.
LONGEST_SHAPES = ((1024, 1024), (512, 1536), (1536, 512))
# Largest difference of fast and plain scores in nats a token: rounding at each precision,
# far below the 0.5 and more that a wrong mask or position was seen to cost.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Lists of prompts whose tokens are kept.
_KEPT = 4


class TransformersCaptioner:
    """A pretrained captioner of a family; see `SearchingCaptioner`.

    With `append_eos` the end of the sentence is scored too.
    """

    def __init__(self, family: Family, *, append_eos: bool = False) -> None:
        self.decoder = family.decoder
        self.tokenizer = family.tokenizer
        self.prepare = family.prepare
        self.encode = family.encode
        self.questions = family.questions
        self.append_eos = append_eos
        self._tokens = functools.lru_cache(_KEPT)(self._tokenized)

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the scored tokens of P prompts, the end token included if asked for.

        Raises DataError for a prompt that has no token.
        """
        return self._tokens(tuple(prompts))

    def _tokenized(self, prompts: Sequence[str]) -> list[list[int]]:
        end = [self.decoder.end_id] if self.append_eos else []
        # A prompt of nothing but an end token says nothing of the image.
        sequences = [[*sequence, *end] if sequence else [] for sequence in self.encode(prompts)]
        for prompt, sequence in zip(prompts, sequences, strict=True):
            if not sequence:
                raise DataError(f"prompt {prompt!r} has no tokens for this teacher")
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown != self.decoder.end_id:
            strange = [p for p, s in zip(prompts, sequences, strict=True) if unknown in s]
            if strange:
                logger.warning(
                    "%d prompts hold words the teacher does not know, e.g. %r",
                    len(strange),
                    strange[0],
                )
        return sequences

    def fed_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of P prompts, or of the questions about them with mode=questions."""
        return self.questions.encode(prompts) if self.questions else self.tokenize(prompts)

    def longest_prompt(self) -> int | None:
        """Return how many tokens `fed_tokens` may have behind image and instruction, None for any.

        A model that cuts images into tiles reads longer ones for some shapes: the longest counts.
        """
        decoder = self.decoder
        if decoder.positions is None:
            return None
        plain = [np.zeros((*shape, 3), np.uint8) for shape in LONGEST_SHAPES]
        prepare = self.questions.prepare if self.questions else self.prepare
        return decoder.positions - max(decoder.taken(image) for image in prepare(plain))

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
    def ask(self, images: Sequence[Pixels], phrases: Sequence[str]) -> Answers:
        """Return log P(yes) - log P(no) of every pair; the model is loaded with mode=questions."""
        assert self.questions is not None
        counts = [len(sequence) for sequence in self.questions.encode(phrases)]
        odds = self.questions.log_odds(images, phrases)
        return Answers(odds.float().cpu().numpy(), np.array(counts, dtype=np.int64))

    def score_top(
        self, images: Sequence[Pixels], prompts: ClassPrompts, search: TopSearch
    ) -> FloatArray:
        """Return class log-likelihoods (R, C), -inf for the classes that were left out.

        A family without a trie scores every class and leaves out the same ones.
        """
        decoder = self.decoder
        if search.top_k >= len(prompts) or not decoder.by_trie:
            return search.keep(score_classes(self, images, prompts, reduction=search.reduction))
        sequences = self.tokenize(prompts.texts)
        groups = decoder.groups(self.prepare(images))
        return np.concatenate(
            [score_top(decoder, group, sequences, prompts.counts, search)[0] for group in groups]
        )

    @torch.inference_mode()
    def caption(self, images: Sequence[Pixels], settings: CaptionConfig) -> list[list[Caption]]:
        """Return `settings.count` captions an image, the likeliest first.

        A sample depends on the seed and the image's pixels, not on the images beside it (but
        for rounding, which a batch's shape may change in the last digits).
        """
        texts = max(settings.count, settings.num_beams if settings.decoding == "beam" else 1)
        limit = max(1, prompt_tree.MAX_LOGITS // (self.decoder.vocabulary * texts))
        captions: list[list[Caption]] = []
        # Of a few tokens each, so that more regions share a step, which reads all the weights.
        nodes = texts * settings.max_tokens
        for group in self.decoder.groups(self.prepare(images), limit, nodes):
            first = len(captions)
            pixels = images[first : first + len(group)]
            seeds = [[zlib.crc32(image.tobytes()), *image.shape] for image in pixels]
            for of_region in write_captions(self.decoder, group, settings, seeds):
                captions.append([Caption(self._text(tokens), value) for tokens, value in of_region])
        return captions

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    @torch.inference_mode()
    def self_check(self) -> float:
        """Return the largest difference of fast and plain scores, nats a token.

        A few prompts on two noise images of different shape, read together, each against one
        full forward; the end token is scored too, whatever the settings. With mode=questions
        so are questions about the same.
        """
        rng = np.random.default_rng(0)
        noise = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in CHECK_SHAPES]
        sequences = [[*s, self.decoder.end_id] for s in self.encode(CHECK_PROMPTS)]
        images = self.prepare(noise)
        fast = self.decoder.log_likelihoods(images, sequences)
        plain = torch.stack([self.decoder.reference(images, s) for s in sequences], dim=1)
        difference = _largest(fast, plain, sequences)
        if self.questions is not None:
            fast, plain = (
                answered(noise, CHECK_PROMPTS)
                for answered in (self.questions.log_odds, self.questions.reference)
            )
            questions = self.questions.encode(CHECK_PROMPTS)
            difference = max(difference, _largest(fast, plain, questions))
        return difference


def _largest(fast: Tensor, plain: Tensor, sequences: Sequence[TokenIds]) -> float:
    """Return the largest difference of scores (R, P), each over its number of tokens."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return float(((fast.cpu() - plain.cpu()).abs() / lengths).max())


def load_pretrained(config: TeacherConfig, folder: Path, device: str) -> TransformersCaptioner:
    """Load a checked model folder; ConfigError when it does not load or its scores are off.

    `device` is a torch device, or "auto" for accelerate to share the layers out among all GPUs. On
    "meta" it has no weights and is not checked: it can tokenize. Weights are converted to
    `config.dtype` whatever precision they are stored in.
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    # With a device map weights go from the file to their device one by one. No captioner reads
    # the poolers.
    named, kind = TeacherModel.of(config), "AutoModelForImageTextToText"
    if device == "meta":
        model = named.skeleton(kind, folder, trust_remote_code=config.trust_remote_code)
        return TransformersCaptioner(
            build_family(Loaded(config, folder, model)), append_eos=config.append_eos
        )
    model = named.load(
        kind,
        folder,
        lambda weight: "pooler" in weight,
        dtype=dtype,
        device_map="auto" if device == "auto" else {"": device},
        trust_remote_code=config.trust_remote_code,
    )
    loaded, flaws = Loaded(config, folder, model), []
    for way in range(ways(loaded)):
        captioner = TransformersCaptioner(build_family(loaded, way), append_eos=config.append_eos)
        captioner.decoder.workspace = _workspace(config, model.device)
        flaw = _flaw(captioner, TOLERANCE[dtype])
        if flaw is None:
            return captioner
        flaws.append(f"{flaw} ({captioner.decoder.method}, {config.dtype})")
    raise model_error(config, flaws[-1], _remedy(config))


def _flaw(captioner: TransformersCaptioner, tolerance: float) -> str | None:
    """Return what is wrong with a captioner's scores, None where they are as they should be."""
    try:
        difference = captioner.self_check()
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"does not score: {type(error).__name__}: {error}"
    if not difference <= tolerance:
        return f"prompt scores differ from plain forwards by {difference:.2g} nats a token"
    method = captioner.decoder.method
    logger.info("prompts are scored by %s: %.1g nats off plain forwards", method, difference)
    return None


def _workspace(config: TeacherConfig, device: torch.device) -> int:
    """Return the bytes that the forwards of a group of regions may take."""
    if config.workspace_mib is not None:
        return config.workspace_mib << 20
    if device.type != "cuda":
        return WORKSPACE
    # Large groups keep a GPU busy; what does not fit after all is halved by the caller.
    free, _ = torch.cuda.mem_get_info(device)
    return max(WORKSPACE, free // 4)


def _remedy(config: TeacherConfig) -> str:
    precise = "" if config.dtype == "float32" else "label.teacher.dtype=float32, or "
    return f"{precise}another model. {supported_families()}"
