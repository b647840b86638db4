"""How a family is asked about classes: what it reads once a region, and what of every question.

Text that is read from left to right (chat models, BLIP-2 with OPT) is split at the class: image
and words in front of it are read once a region, and each question adds the class, the words behind
it and how the answer begins, by the decoder's trie or batches. Where image and question are read
together (PaliGemma, a Q-Former with instructions, T5's encoder) every question is a forward of its
own, behind an image encoder that runs once a region.

Source: VQAScore (Lin et al. 2024, section 3), which takes P(yes) where this takes log odds.
Shape legend: R regions, P phrases, A answer tokens, D hidden width.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hts_ray.store.aliases import Pixels
from hts_ray.teacher.captioner import ANSWERS
from hts_ray.teacher.scoring.decoders import Decoder
from hts_ray.teacher.scoring.trie import TokenIds

# Lists of phrases whose questions are kept as tokens.
_KEPT = 4
Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class AnswerTokens:
    """The tokens that mean yes, and those that mean no: the answer's first and only one."""

    yes: tuple[int, ...]
    no: tuple[int, ...]

    @classmethod
    def of(cls, *encoders: Encode) -> AnswerTokens | None:
        """Find the tokens as each encoder writes them; None where yes or no has none of its own."""
        found = {
            word: {ids[0] for encode in encoders for ids in encode(said) if len(ids) == 1}
            for word, said in ANSWERS.items()
        }
        yes, no = found["yes"], found["no"]
        return cls(tuple(sorted(yes)), tuple(sorted(no))) if yes and no and not yes & no else None

    @property
    def both(self) -> tuple[int, ...]:
        """Those of yes, then those of no."""
        return (*self.yes, *self.no)

    def log_odds(self, logits: Tensor) -> Tensor:
        """Return log P(yes) - log P(no) (...) of logits (..., A) of `both`, up to a constant."""
        count = len(self.yes)
        return logits[..., :count].logsumexp(-1) - logits[..., count:].logsumexp(-1)


class Questions(ABC):
    """What a loaded captioner is asked.

    `encode` makes the tokens that are fed for each of P questions.
    """

    def __init__(self, decoder: Decoder, answers: AnswerTokens, encode: Encode) -> None:
        self.decoder = decoder
        self.answers = answers
        self.encode = encode

    @abstractmethod
    def prepare(self, images: Sequence[Pixels]) -> Any:
        """Make what a decoder reads of R images once for all questions, or with an empty one."""

    @abstractmethod
    def log_odds(self, images: Sequence[Pixels], phrases: Sequence[str]) -> Tensor:
        """Return log P(yes) - log P(no) (R, P) float32."""

    @abstractmethod
    def reference(self, images: Sequence[Pixels], phrases: Sequence[str]) -> Tensor:
        """Return the same by a full forward for each region, question and answer."""

    def _plain(self, prepared: Any, sequence: TokenIds) -> Tensor:
        """Return the log odds (R,) behind a sequence on prepared regions by full forwards."""
        both = [self.decoder.reference(prepared, [*sequence, a]) for a in self.answers.both]
        return self.answers.log_odds(torch.stack(both, dim=-1))


class SplitQuestions(Questions):
    """Questions whose words in front of the class are read once a region, with the image."""

    def __init__(self, front: Callable[[Sequence[Pixels]], Any], *parts: Any) -> None:
        super().__init__(*parts)
        self.front = front

    def prepare(self, images: Sequence[Pixels]) -> Any:
        """See `Questions`."""
        return self.front(images)

    def log_odds(self, images: Sequence[Pixels], phrases: Sequence[str]) -> Tensor:
        """See `Questions`."""
        sequences = self.encode(phrases)
        logits = self.decoder.answer_logits(self.prepare(images), sequences, self.answers.both)
        return self.answers.log_odds(logits)

    def reference(self, images: Sequence[Pixels], phrases: Sequence[str]) -> Tensor:
        """See `Questions`."""
        prepared = self.prepare(images)
        return torch.stack([self._plain(prepared, s) for s in self.encode(phrases)], dim=1)


class WholeQuestions(Questions):
    """Questions that are read together with the image.

    `process` makes a model's inputs of an image and a phrase; `vision` is its image encoder.
    """

    def __init__(
        self, process: Callable[[Pixels, str], dict[str, Tensor]], vision: nn.Module, *parts: Any
    ) -> None:
        super().__init__(*parts)
        self.process = process
        self.vision = vision
        self._texts = functools.lru_cache(_KEPT)(self._without_image)

    def prepare(self, images: Sequence[Pixels]) -> Any:
        """See `Questions`."""
        return [self.process(image, "") for image in images]

    def _without_image(self, phrases: tuple[str, ...]) -> list[dict[str, Tensor]]:
        """Return the inputs of P questions but for the pixels: an image takes as many tokens."""
        blank = np.zeros((32, 32, 3), dtype=np.uint8)
        processed = [self.process(blank, phrase) for phrase in phrases]
        return [{k: v for k, v in one.items() if k != "pixel_values"} for one in processed]

    def log_odds(self, images: Sequence[Pixels], phrases: Sequence[str]) -> Tensor:
        """See `Questions`."""
        texts = self._texts(tuple(phrases))
        # Questions of one length share a forward.
        order = sorted(range(len(texts)), key=lambda i: [v.shape[1] for v in texts[i].values()])
        odds = torch.empty(len(images), len(texts))
        for region, image in enumerate(images):
            pixels = self.process(image, phrases[0])["pixel_values"]
            asked = [{**texts[i], "pixel_values": pixels} for i in order]
            done = 0
            with _seen_once(self.vision):
                for group in self.decoder.groups(asked):
                    root = self.decoder.encode(group).root[:, 0]
                    found = self.answers.log_odds(self.decoder.next_logits(root, self.answers.both))
                    odds[region, order[done : done + len(group)]] = found.cpu()
                    done += len(group)
        return odds

    def reference(self, images: Sequence[Pixels], phrases: Sequence[str]) -> Tensor:
        """See `Questions`."""
        return torch.stack(
            [self._plain([self.process(i, p) for i in images], []) for p in phrases], dim=1
        )


@contextmanager
def _seen_once(vision: nn.Module) -> Iterator[None]:
    """Make an image encoder run once for images (R, ...) that are all the same one."""
    forward, seen = vision.forward, list[Any]()

    def once(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.append(forward(pixel_values[:1], *args, **kwargs))
        output: Mapping[str, Any] = seen[0]
        count = len(pixel_values)
        tensors = {k: v for k, v in output.items() if isinstance(v, Tensor)}
        return type(output)(**{k: v.expand(count, *v.shape[1:]) for k, v in tensors.items()})

    vision.forward = once
    try:
        yield
    finally:
        vision.forward = forward
