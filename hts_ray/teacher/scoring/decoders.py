"""How prompts are scored behind a region: as a tree in one forward, or as a padded batch.

A decoder reads R regions and the text in front of every prompt once (`encode`); its keys and values
stay in a cache. Families whose attention takes a tree mask then score by trie, the others by
batches of prompts. Every family also has a slow plain forward, `reference`, that the fast
path is checked against when a model loads. How each family is fed:
`hts_ray.teacher.models.architectures`.

Shape legend: R regions, P prompts, N nodes fed at a time, L tokens of the longest prompt, V
vocabulary, D hidden width.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hts_ray.engine.compat import select_cache
from hts_ray.errors import DataError
from hts_ray.teacher.scoring import trie as prompt_tree
from hts_ray.teacher.scoring.memory import WORKSPACE, Footprint, footprint
from hts_ray.teacher.scoring.trie import PromptTrie, TokenIds, edge_log_probs, split_tries

# Lists of prompts whose tries are kept.
_KEPT = 4
# Regions in a group on a GPU where others are prepared meanwhile: it waits for the first group.
_BESIDE = 16


def capture_hidden(head: nn.Module, call: Callable[[], Any]) -> tuple[Tensor, Any]:
    """Run `call` and return what entered `head`, (R, N, D), along with the call's result.

    The head itself then sees no position: logits of R x N x V are never made.
    """
    captured: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(inputs[0])
        return (inputs[0][:, :0], *inputs[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        result = call()
    finally:
        handle.remove()
    return captured[0], result


@dataclass
class Prefix:
    """What a decoder has read of R regions before any prompt token, and of the tree since.

    `root` (R, 1, D) is the hidden state that predicts the first prompt token. `first_position`
    (R,) int64 is the position id of that token. `visible` (R, past) bool is False for
    padding in the cache; None where none is. `features` is what a decoder with
    cross-attention looks at: tensors with R entries. `fed` counts the tokens in the cache behind
    the prefix.
    """

    cache: Any
    root: Tensor
    first_position: Tensor
    visible: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    fed: int = 0

    def __len__(self) -> int:
        return len(self.root)

    @cached_property
    def start(self) -> int:
        """The highest position of any region's first prompt token."""
        return int(self.first_position.max())

    @property
    def past(self) -> int:
        """How many positions the cache holds in front of the tree."""
        return int(self.cache.get_seq_length()) - self.fed


def select_regions(prefix: Prefix, regions: Sequence[int]) -> Prefix:
    """Return a prefix whose n-th entry is region `regions[n]`; the given one stays as it is.

    Where all are one region its keys and values are not copied but seen through views.
    """
    first, count = regions[0], len(regions)
    same = all(region == first for region in regions)

    def pick(tensor: Tensor) -> Tensor:
        if same:
            return tensor[first : first + 1].expand(count, *tensor.shape[1:])
        return tensor[torch.tensor(regions, device=tensor.device)]

    return replace(
        prefix,
        cache=select_cache(prefix.cache, pick),
        root=pick(prefix.root),
        first_position=pick(prefix.first_position),
        visible=None if prefix.visible is None else pick(prefix.visible),
        features=tuple(pick(feature) for feature in prefix.features),
    )


def additive_mask(prefix: Prefix, visible: Tensor) -> Tensor:
    """Return the attention mask (R, 1, N, past + fed + N): 0 to see, the dtype's minimum not to.

    `visible`, (N, fed + N) or (R, N, fed + N) bool, is about the tree; of the prefix everything
    but padding is seen. Additive, because eager attention adds whatever it gets: a boolean mask
    would be added too, silently.
    """
    nodes, tree = visible.shape[-2:]
    regions, past = len(prefix), prefix.past
    dtype, device = prefix.root.dtype, prefix.root.device
    mask = torch.zeros(regions, 1, nodes, past + tree, dtype=dtype, device=device)
    if prefix.visible is not None:
        mask[..., :past].masked_fill_(~prefix.visible[:, None, None], torch.finfo(dtype).min)
    hidden = ~visible.to(device).expand(regions, nodes, tree)
    mask[..., past:].masked_fill_(hidden[:, None], torch.finfo(dtype).min)
    return mask


class Decoder(ABC):
    """One family of captioners: how images and prompts are fed to it.

    `head` is the module that makes logits (R, N, V) of hidden states. `start_ids` are the tokens
    in front of every caption, where they are not part of the prepared inputs; `end_id` ends one,
    as do all of `end_ids`. `positions` is how many positions the text model has, those in front
    of the prompt included; None where nothing limits them.

    `by_trie` says how prompts are scored:
    - True, for a text model whose attention takes a tree mask: as a tree in one forward or a few.
    - False, for any causal one: `prompt_batch` prompts at a time, padded on the right, behind the
      region's cache. Padding needs no mask, since no prompt token looks to its right.
    """

    # Bytes that the forwards of one group of regions may take; see `groups`.
    workspace: int = WORKSPACE

    def __init__(
        self,
        model: Any,
        head: nn.Module,
        *,
        end_ids: Sequence[int],
        start_ids: Sequence[int] = (),
        positions: int | None = None,
        by_trie: bool = True,
        prompt_batch: int = 64,
    ) -> None:
        self.model = model
        self.head = head
        self.start_ids = tuple(start_ids)
        self.positions = positions
        self.end_id = end_ids[0]
        self.end_ids = tuple(end_ids)
        self.by_trie = by_trie
        self.prompt_batch = prompt_batch
        self.split = functools.lru_cache(_KEPT)(split_tries)

    @property
    def method(self) -> str:
        """How prompts are scored, for people."""
        return "trie" if self.by_trie else "batched"

    @cached_property
    def footprint(self) -> Footprint:
        """What regions and prompts take in memory, from the model's config."""
        return footprint(self.model)

    @property
    def vocabulary(self) -> int:
        """The number of logits a position, V."""
        return int(getattr(self.head, "out_features", 0)) or 50_000

    @abstractmethod
    def encode(self, images: Any) -> Prefix:
        """Read R prepared regions and the text in front of every prompt."""

    @abstractmethod
    def forward(
        self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Any:
        """Run the language model on N more tokens behind the prefix and its fed tokens.

        `tokens` and `positions` are (R, N) int64. `mask` is additive, (R, 1, N, past + fed + N);
        None means that each token sees all before it.
        """

    @abstractmethod
    def reference(self, images: Any, sequence: TokenIds) -> Tensor:
        """Return the log-likelihood of one prompt on R regions by full forwards: (R,) float32.

        No tree, no cache, no padding: slow, and what `log_likelihoods` is checked against.
        """

    def context(self, image: Any) -> tuple[int, int]:
        """Return a prepared region's tokens in front of the prompts, and its features."""
        return len(image["input_ids"][0]), 0

    def taken(self, image: Any) -> int:
        """Return how many positions come before the prompt of a prepared region."""
        return len(self.start_ids)

    def region_bytes(self, image: Any, nodes: int | None = None) -> int:
        """Return about how many bytes one prepared region takes, an item of those given.

        `nodes` are the tokens that are fed behind it, those of scoring if not given.
        """
        pixels = image if isinstance(image, Tensor) else image["pixel_values"]
        context, features = self.context(image)
        if nodes is None:
            nodes = prompt_tree.MAX_NODES if self.by_trie else 1
        held = pixels.numel() * pixels.element_size()
        return held + self.footprint.region(
            context, nodes, features=features, pixels=pixels.numel() // 3
        )

    def joins(self, first: Any, image: Any) -> bool:
        """Return whether two prepared regions can be read in one forward."""
        return True

    def groups(
        self, images: Any, limit: int | None = None, nodes: int | None = None
    ) -> Iterator[Any]:
        """Cut prepared regions, in order, into groups that fit in `workspace`, or of one.

        No group has more than `limit` regions. `nodes` are the tokens fed behind each, those of
        scoring if not given. Every group can be given to `encode`.
        """
        if limit is None and not isinstance(images, Tensor) and self.model.device.type == "cuda":
            limit = _BESIDE
        group: list[Any] = []
        used = 0
        for image in images:
            needed = self.region_bytes(image, nodes)
            full = used + needed > self.workspace or len(group) == limit
            if group and (full or not self.joins(group[0], image)):
                yield _joined(images, group)
                group, used = [], 0
            group.append(image)
            used += needed
        if group:
            yield _joined(images, group)

    def log_likelihoods(self, images: Any, sequences: Sequence[TokenIds]) -> Tensor:
        """Return sums of token log-probabilities (R, P) float32 of R prepared regions."""
        score = self._by_trie if self.by_trie else self._by_batches
        return torch.cat([score(self.encode(group), sequences) for group in self.groups(images)])

    def project(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) float32 of hidden states (..., D)."""
        logits: Tensor = self.head(hidden.contiguous())
        return logits.float()

    def feed(
        self,
        prefix: Prefix,
        tokens: Tensor,
        depths: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Feed N tokens and return their hidden states (R, N, D) in front of the head.

        `tokens` is (N,) or (R, N). Each sees all before it, or, of a tree, what `visible` says,
        (N, fed + N) or (R, N, fed + N) bool, itself included; `depths` (1 below the root) has the
        shape of the tokens. Raises DataError behind the model's last position.
        """
        regions, nodes = len(prefix), tokens.shape[-1]
        device = prefix.root.device
        if depths is None:
            depths = torch.arange(1, nodes + 1) + prefix.fed
        last = prefix.start + int(depths.max()) - 1
        if self.positions is not None and last >= self.positions:
            raise DataError(
                f"image, instruction and prompt have {last + 1} tokens or more,"
                f" the model has {self.positions} positions"
            )
        tokens = tokens.to(device).expand(regions, nodes)
        positions = depths.to(device).expand(regions, nodes) - 1 + prefix.first_position[:, None]
        mask = None if visible is None else additive_mask(prefix, visible)
        hidden, _ = capture_hidden(self.head, lambda: self.forward(prefix, tokens, positions, mask))
        prefix.fed += nodes
        return hidden

    def rewind(self, prefix: Prefix) -> None:
        """Forget the fed nodes; the prefix stays."""
        if prefix.fed:
            cache = getattr(prefix.cache, "self_attention_cache", prefix.cache)
            cache.crop(-prefix.fed)
            prefix.fed = 0

    def tries(self, sequences: Sequence[TokenIds]) -> Sequence[tuple[PromptTrie, list[int]]]:
        """Return `split_tries` of the prompts, made once for a run's."""
        return self.split(tuple(map(tuple, sequences)))

    def _by_trie(self, prefix: Prefix, sequences: Sequence[TokenIds]) -> Tensor:
        scores = torch.empty(len(prefix), len(sequences), device=prefix.root.device)
        for trie, prompts in self.tries(sequences):
            hidden = self._read_trie(prefix, trie)
            scores[:, prompts] = trie.sum_paths(edge_log_probs(self.head, hidden, trie))
        return scores

    def _read_trie(self, prefix: Prefix, trie: PromptTrie) -> Tensor:
        """Return the hidden states (R, T, D) of a trie's fed nodes, the root first."""
        if len(trie) == 1:
            return prefix.root
        fed = self.feed(prefix, trie.tokens[1:], trie.depths[1:], trie.ancestors[1:, 1:])
        self.rewind(prefix)
        return torch.cat([prefix.root, fed], dim=1)

    def _by_batches(self, prefix: Prefix, sequences: Sequence[TokenIds]) -> Tensor:
        scores = torch.empty(len(prefix), len(sequences), device=prefix.root.device)
        for region, chosen, batch in self._batches(prefix, sequences):
            scores[region, chosen] = self._batch(batch, [sequences[i] for i in chosen])
        return scores

    def _batches(
        self, prefix: Prefix, sequences: Sequence[TokenIds]
    ) -> Iterator[tuple[int, list[int], Prefix]]:
        """Yield a region, the numbers of some prompts, and a copy of its prefix for each."""
        # Prompts of equal length share a batch, for less padding.
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        longest = len(sequences[order[-1]])
        rows = max(1, min(self.prompt_batch, self.workspace // self.row_bytes(prefix, longest)))
        for region in range(len(prefix)):
            for first in range(0, len(order), rows):
                chosen = order[first : first + rows]
                yield region, chosen, select_regions(prefix, [region] * len(chosen))

    def row_bytes(self, prefix: Prefix, longest: int) -> int:
        """Return about how many bytes one prompt of `longest` tokens takes behind a prefix."""
        features = prefix.features[0].shape[1] if prefix.features else 0
        return self.footprint.region(prefix.past, longest, features=features)

    def _batch(self, prefix: Prefix, sequences: Sequence[TokenIds]) -> Tensor:
        """Return the sums (P,) of P prompts behind P copies of a region."""
        device = prefix.root.device
        ids, lengths = _padded(sequences, device)
        real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        hidden = prefix.root
        if ids.shape[1] > 1:
            hidden = torch.cat([hidden, self.feed(prefix, ids[:, :-1])], dim=1)
        scores = torch.zeros(ids.shape, device=device)
        rows = torch.arange(int(lengths.sum()), device=device)
        scores[real] = self.token_log_probs(hidden[real], rows, ids[real])
        return scores.sum(1)

    def answer_logits(
        self, images: Any, sequences: Sequence[TokenIds], answers: TokenIds
    ) -> Tensor:
        """Return logits (R, P, A) float32 of A tokens, each the next one behind a sequence.

        Logits of one position differ as log-probabilities do.
        """
        read = self._trie_ends if self.by_trie else self._batch_ends
        parts = []
        for group in self.groups(images):
            prefix = self.encode(group)
            logits = torch.empty(len(prefix), len(sequences), len(answers))
            for regions, prompts, hidden in read(prefix, sequences):
                logits[regions, prompts] = self.next_logits(hidden, answers).cpu()
            parts.append(logits)
        return torch.cat(parts)

    def next_logits(self, hidden: Tensor, tokens: TokenIds) -> Tensor:
        """Return logits (..., A) of A tokens behind hidden states (..., D), a few at a time."""
        chunk = max(1, prompt_tree.MAX_LOGITS // self.vocabulary)
        rows = torch.split(hidden.flatten(0, -2), chunk)
        logits = torch.cat([self.project(part[None])[0][:, list(tokens)] for part in rows])
        return logits.view(*hidden.shape[:-1], len(tokens))

    def _trie_ends(
        self, prefix: Prefix, sequences: Sequence[TokenIds]
    ) -> Iterator[tuple[Any, list[int], Tensor]]:
        """Yield all regions, the numbers of some sequences, and the states (R, P, D) behind."""
        # A trie feeds all of a sequence but its last token, here one more than there is.
        for trie, prompts in self.tries([[*sequence, -1] for sequence in sequences]):
            yield slice(None), prompts, self._read_trie(prefix, trie)[:, trie.last_fed]

    def _batch_ends(
        self, prefix: Prefix, sequences: Sequence[TokenIds]
    ) -> Iterator[tuple[Any, list[int], Tensor]]:
        """Yield a region, the numbers of some sequences, and the states (P, D) behind."""
        for region, prompts, batch in self._batches(prefix, sequences):
            ids, lengths = _padded([sequences[i] for i in prompts], batch.root.device)
            hidden = self.feed(batch, ids)
            yield region, prompts, hidden[torch.arange(len(prompts)), lengths.cpu() - 1]

    def token_log_probs(self, hidden: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return log P(token) float32 (E,) behind rows, ascending, of hidden states (N, D).

        The vocabulary projection runs over some rows at a time.
        """
        chunk = max(1, prompt_tree.MAX_LOGITS // self.vocabulary)
        parts = []
        for first in range(0, len(hidden), chunk):
            logits = self.project(hidden[None, first : first + chunk])[0]
            within = (rows >= first) & (rows < first + chunk)
            row, token = (rows[within] - first).to(logits.device), tokens[within].to(logits.device)
            parts.append(logits[row, token] - logits.logsumexp(-1)[row])
        return torch.cat(parts).to(hidden.device)


def _padded(sequences: Sequence[TokenIds], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens (P, L), filled up behind, and the lengths (P,) of the sequences."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    return ids, torch.tensor([len(row) for row in rows], device=device)


def _joined(images: Any, group: list[Any]) -> Any:
    return torch.stack(group) if isinstance(images, Tensor) else group


def sequence_log_likelihood(logits: Tensor, sequence: TokenIds) -> Tensor:
    """Sum log P(token) over a sequence: logits (R, L, V) that predict its L tokens, to (R,)."""
    target = torch.tensor(sequence, device=logits.device)
    positions = torch.arange(len(sequence), device=logits.device)
    return logits.float().log_softmax(-1)[:, positions, target].sum(1)
