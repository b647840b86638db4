"""Captions of regions: greedy, by beam search, or sampled, over the decoders that score prompts.

Nothing but the model's own probabilities is used: penalties and the like that a checkpoint's
generation settings ask for are left out, so that a caption's log-probability is what scoring its
text with an end token gives.

Shape legend: R regions, B captions a region that are written side by side, V vocabulary, S
candidates, T tokens so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hts_ray.config import CaptionConfig
from hts_ray.teacher.scoring.decoders import Decoder, Prefix, select_regions

Written = tuple[list[int], float]
_LOOK = 4  # tokens between two looks at whether all texts have ended: the host waits for the device


class Continuation:
    """B texts behind each of R regions, that grow by a token at a time.

    By trie, texts are branches of a tree in the cache: taking up another branch moves nothing.
    Otherwise they are rows of a batch, each with its copy of the region's cache.

    `log_probs` (R, B, V) float32 are the log-probabilities of each text's next token.
    """

    def __init__(self, decoder: Decoder, prefix: Prefix, texts: int) -> None:
        self.decoder = decoder
        self.log_probs = self._of(prefix.root).expand(-1, texts, -1)
        regions, device = len(prefix), prefix.root.device
        rows = [region for region in range(regions) for _ in range(texts)]
        self.prefix = prefix if decoder.by_trie else select_regions(prefix, rows)
        self.lineage = torch.zeros(regions, texts, 0, dtype=torch.bool, device=device)

    def _of(self, hidden: Tensor) -> Tensor:
        return self.decoder.project(hidden).log_softmax(-1)

    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> None:
        """Put tokens (R, B) behind the texts numbered `parents` (R, B), or each behind its own."""
        feed = self._feed_level if self.decoder.by_trie else self._feed_rows
        self.log_probs = self._of(feed(tokens, parents)).view(*tokens.shape, -1)

    def _feed_level(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        regions, texts, fed = self.lineage.shape
        if parents is not None:
            self.lineage = self.lineage.gather(1, parents[..., None].expand(-1, -1, fed))
        itself = torch.eye(texts, dtype=torch.bool, device=tokens.device)
        self.lineage = torch.cat([self.lineage, itself.expand(regions, -1, -1)], dim=2)
        depths = torch.full((texts,), fed // texts + 1)
        return self.decoder.feed(self.prefix, tokens, depths, self.lineage)

    def _feed_rows(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        regions, texts = tokens.shape
        if parents is not None:
            offsets = torch.arange(regions, device=parents.device)[:, None] * texts
            order = (parents + offsets).flatten().tolist()
            if order != list(range(len(order))):
                self.prefix = select_regions(self.prefix, order)
        return self.decoder.feed(self.prefix, tokens.reshape(-1, 1))


def write_captions(
    decoder: Decoder, regions: object, settings: CaptionConfig, seeds: Sequence[Sequence[int]]
) -> list[list[Written]]:
    """Return `settings.count` token sequences and log-probabilities a region, likeliest first.

    `regions` is a group that `Decoder.encode` takes. The end token is counted in the
    log-probability and left out of the tokens. `seeds` start each region's random numbers. A
    caption ends where the model has no further position.
    """
    prefix = decoder.encode(regions)
    if decoder.positions is not None:
        longest = max(1, min(settings.max_tokens, decoder.positions - prefix.start))
        settings = settings.model_copy(update={"max_tokens": longest})
    texts = settings.num_beams if settings.decoding == "beam" else settings.count
    state = Continuation(decoder, prefix, texts)
    if settings.decoding == "beam":
        return _beam_search(state, decoder.end_ids, settings)
    pick = None if settings.decoding == "greedy" else _sampler(settings, seeds)
    return _one_by_one(state, decoder.end_ids, settings.max_tokens, pick)


def _one_by_one(
    state: Continuation,
    end_ids: Sequence[int],
    max_tokens: int,
    pick: Callable[[Tensor, int], Tensor] | None,
) -> list[list[Written]]:
    """Write every text on its own, of the tokens (R, B) that `pick` chooses or the likeliest."""
    regions, texts, _ = state.log_probs.shape
    ends = torch.tensor(end_ids, device=state.log_probs.device)
    going = torch.ones(regions, texts, dtype=torch.bool, device=ends.device)
    total = torch.zeros(regions, texts, dtype=torch.float64, device=ends.device)
    chosen, counted = [], []
    for step in range(max_tokens):
        tokens = pick(state.log_probs, step) if pick else state.log_probs.argmax(-1)
        gained = state.log_probs.gather(2, tokens[..., None])[..., 0].double()
        total += torch.where(going, gained, 0.0)
        going = going & ~torch.isin(tokens, ends)
        chosen.append(tokens)
        counted.append(going)
        if step + 1 == max_tokens or (step % _LOOK == _LOOK - 1 and not bool(going.any())):
            break
        state.extend(tokens)
    tokens_RBT = torch.stack(chosen, dim=2).tolist()
    lengths = torch.stack(counted, dim=2).sum(2).tolist()
    written = [
        [(tokens[:length], float(value)) for tokens, length, value in zip(*of_region, strict=True)]
        for of_region in zip(tokens_RBT, lengths, total.tolist(), strict=True)
    ]
    return [sorted(of_region, key=lambda text: -text[1]) for of_region in written]


def _sampler(
    settings: CaptionConfig, seeds: Sequence[Sequence[int]]
) -> Callable[[Tensor, int], Tensor]:
    """Return a nucleus sampler whose random numbers depend on a region's seed alone."""
    draws: npt.NDArray[np.float64] = np.stack(
        [
            np.random.default_rng([settings.seed, *seed]).random(
                (settings.max_tokens, settings.count)
            )
            for seed in seeds
        ]
    )

    def pick(log_probs: Tensor, step: int) -> Tensor:
        probabilities = (log_probs / settings.temperature).softmax(-1)
        values, tokens = probabilities.sort(dim=-1, descending=True)
        mass = values.double().cumsum(-1)
        # The nucleus: the likeliest tokens up to the one with which top_p is reached.
        size = 1 + (mass < settings.top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
        within = mass.gather(-1, size - 1)
        drawn = torch.from_numpy(draws[:, step]).to(mass.device)[..., None] * within
        place = torch.minimum((mass <= drawn).sum(-1, keepdim=True), size - 1)
        return tokens.gather(-1, place)[..., 0]

    return pick


@dataclass
class _Finished:
    """The B best texts of each region that have ended.

    `rank` (R, B) is their mean log-probability a token, -inf where there is none yet; `total`
    the sum; `tokens` (R, B, T).
    """

    rank: Tensor
    total: Tensor
    tokens: Tensor

    def add(self, rank: Tensor, total: Tensor, tokens: Tensor) -> None:
        """Take up candidates (R, S), tokens (R, S, T), where they are better."""
        texts, longest = self.rank.shape[1], tokens.shape[2]
        grown = torch.nn.functional.pad(self.tokens, (0, longest - self.tokens.shape[2]), value=-1)
        self.rank, order = torch.cat([self.rank, rank], 1).topk(texts, dim=1)
        self.total = torch.cat([self.total, total], 1).gather(1, order)
        both = torch.cat([grown, tokens], 1)
        self.tokens = both.gather(1, order[..., None].expand(-1, -1, longest))


def _beam_search(
    state: Continuation, end_ids: Sequence[int], settings: CaptionConfig
) -> list[list[Written]]:
    """Search as `generate` of transformers does with a length penalty of 1.

    Texts that have ended compete by their mean log-probability a token: by sums, the shortest
    would nearly always win. What is returned is sorted by sums all the same.
    """
    regions, beams, vocabulary = state.log_probs.shape
    device = state.log_probs.device
    ends = torch.tensor(end_ids, device=device)
    live = torch.full((regions, beams), -math.inf, device=device)
    live[:, 0] = 0.0  # at first all beams are the same empty text
    tokens = torch.empty(regions, beams, 0, dtype=torch.long, device=device)
    nothing = torch.full((regions, beams), -math.inf, device=device)
    finished = _Finished(nothing, nothing.clone(), tokens)
    stopped = torch.zeros(regions, 1, dtype=torch.bool, device=device)
    kept = min((1 + len(end_ids)) * beams, beams * vocabulary)
    for step in range(1, settings.max_tokens + 1):
        scores, index = (live[..., None] + state.log_probs).flatten(1).topk(kept, dim=1)
        parents, new = index // vocabulary, index % vocabulary
        texts = tokens.gather(1, parents[..., None].expand(-1, -1, step - 1))
        texts = torch.cat([texts, new[..., None]], dim=2)
        ended = torch.isin(new, ends) | (step == settings.max_tokens)
        # A text that ends outside the best B would not have lived on either.
        taken = ended & (torch.arange(kept, device=device) < beams) & ~stopped
        finished.add((scores / step).masked_fill(~taken, -math.inf), scores, texts)
        live, places = scores.masked_fill(ended, -math.inf).topk(beams, dim=1)
        best = live[:, :1] / step
        stopped = stopped | (best <= finished.rank.amin(1, keepdim=True))
        if step == settings.max_tokens or (step % _LOOK == 0 and bool(stopped.all())):
            break
        tokens = texts.gather(1, places[..., None].expand(-1, -1, step))
        state.extend(new.gather(1, places), parents.gather(1, places))
    return _texts(finished, set(end_ids), settings.count)


def _texts(finished: _Finished, end_ids: set[int], count: int) -> list[list[Written]]:
    """Return the best `count` of the finished texts without their ends, likeliest first."""
    written = []
    for totals, rows in zip(finished.total.tolist(), finished.tokens.tolist(), strict=True):
        of_region = [
            ([token for token in row if token >= 0 and token not in end_ids], total)
            for total, row in zip(totals[:count], rows[:count], strict=True)
            if total > -math.inf
        ]
        written.append(sorted(of_region, key=lambda text: -text[1]))
    return written
