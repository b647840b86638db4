"""How each family of captioners is fed: images once, then prompts as a tree or in batches.

Families whose attention takes a tree mask score by trie, the others by batches of padded
prompts. Every family also has a slow plain forward, `reference`, that the fast path is
checked against when a model loads.

Shape legend: R regions, P prompts, N nodes fed at a time, L tokens of the longest prompt, V
vocabulary, D hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hts_ray.teacher.trie import PromptTrie, TokenIds, edge_log_probs, split_tries


def capture_hidden(head: nn.Module, call: Callable[[], Any]) -> tuple[Tensor, Any]:
    """Run `call` and return what entered `head`, (R, N, D), along with the call's result.

    The head itself then sees one position only: logits of R x N x V are never made.
    """
    captured: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(inputs[0])
        return (inputs[0][:, :1], *inputs[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        result = call()
    finally:
        handle.remove()
    return captured[0], result


class Decoder(ABC):
    """One family of captioners: how images and prompts are fed to it.

    `start_id` is the token in front of every caption (None where the image prefix itself
    plays that part), `end_id` the token that ends one. `method` names how prompts are
    scored, for the run's provenance.
    """

    model: Any
    start_id: int | None
    end_id: int
    method: str
    # What `model.generate` must be told besides the images.
    generation: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def log_likelihoods(self, images: Any, sequences: Sequence[TokenIds]) -> Tensor:
        """Return sums of token log-probabilities: (R, P) float32.

        `images` is what the family's preprocessing made of R regions.
        """

    @abstractmethod
    def reference(self, images: Any, sequence: TokenIds) -> Tensor:
        """Return the same sum for one prompt and R regions by one full forward: (R,) float32.

        No tree, no cache, no padding: slow, and what `log_likelihoods` is checked against.
        """


@dataclass
class Prefix:
    """What a decoder has read of R regions before any prompt token, and of the tree since.

    `root` (R, 1, D) is the hidden state that predicts the first prompt token. `first_position`
    (R,) int64 is the position id of that token. `visible` (R, past) bool tells the cached
    positions that are not padding; None where none is. `features` is what a decoder with
    cross-attention looks at. `fed` counts the tree's nodes in the cache behind the prefix.
    """

    cache: Any
    root: Tensor
    first_position: Tensor
    visible: Tensor | None = None
    features: Any = None
    fed: int = 0

    def __len__(self) -> int:
        return len(self.root)

    @property
    def past(self) -> int:
        """How many positions the cache holds in front of the tree."""
        return int(self.cache.get_seq_length()) - self.fed


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


class TrieDecoder(Decoder):
    """A family whose attention takes a tree mask.

    The image is encoded once. Tree nodes are fed in any order that puts parents first, in one
    forward or in several: their keys and values stay in the cache until `rewind`.
    """

    method = "trie"

    def __init__(self, model: Any, head: nn.Module, start_id: int | None, end_id: int) -> None:
        self.model = model
        self.head = head
        self.start_id = start_id
        self.end_id = end_id
        self._key: tuple[tuple[int, ...], ...] = ()
        self._tries: list[tuple[PromptTrie, list[int]]] = []

    @abstractmethod
    def encode(self, images: Any) -> Prefix:
        """Read R images, and whatever stands before every prompt, once."""

    @abstractmethod
    def forward(self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor) -> Any:
        """Run the language model on N more tokens behind the prefix and its fed nodes.

        `tokens` and `positions` are (R, N) int64, `mask` is additive, (R, 1, N, past + fed + N).
        """

    def feed(self, prefix: Prefix, tokens: Tensor, depths: Tensor, visible: Tensor) -> Tensor:
        """Feed N tree nodes and return their hidden states (R, N, D) in front of the head.

        `tokens` and `depths` (1 below the root) are (N,) or (R, N); `visible`, (N, fed + N) or
        (R, N, fed + N) bool, tells which fed nodes each one sees, itself included.
        """
        regions, nodes = len(prefix), tokens.shape[-1]
        device = prefix.root.device
        tokens = tokens.to(device).expand(regions, nodes)
        positions = depths.to(device).expand(regions, nodes) - 1 + prefix.first_position[:, None]
        mask = additive_mask(prefix, visible)
        hidden, _ = capture_hidden(self.head, lambda: self.forward(prefix, tokens, positions, mask))
        prefix.fed += nodes
        return hidden

    def rewind(self, prefix: Prefix) -> None:
        """Forget the fed nodes; the prefix stays."""
        if prefix.fed:
            cache = getattr(prefix.cache, "self_attention_cache", prefix.cache)
            cache.crop(-prefix.fed)
            prefix.fed = 0

    def tries(self, sequences: Sequence[TokenIds]) -> list[tuple[PromptTrie, list[int]]]:
        """Return `split_tries` of the prompts, made once for a run's."""
        key = tuple(tuple(sequence) for sequence in sequences)
        if key != self._key:
            self._tries, self._key = split_tries(sequences), key
        return self._tries

    def log_likelihoods(self, images: Any, sequences: Sequence[TokenIds]) -> Tensor:
        """Return sums of token log-probabilities (R, P) float32 of R prepared images."""
        tries = self.tries(sequences)
        prefix = self.encode(images)
        scores = torch.empty(len(prefix), len(sequences), device=prefix.root.device)
        for trie, prompts in tries:
            hidden = prefix.root
            if len(trie) > 1:
                seen = trie.ancestors[1:, 1:]
                fed = self.feed(prefix, trie.tokens[1:], trie.depths[1:], seen)
                hidden = torch.cat([hidden, fed], dim=1)
                self.rewind(prefix)
            scores[:, prompts] = trie.sum_paths(edge_log_probs(self.head, hidden, trie))
        return scores


class CrossAttentionDecoder(TrieDecoder):
    """Captioners whose text decoder attends to the image's features: BLIP, VisionEncoderDecoder.

    `features` turns pixels (R, 3, H, W) into the decoder's encoder_hidden_states;
    `first_position` is the position id of the start token.
    """

    start_id: int

    def __init__(
        self,
        model: Any,
        language_model: Any,
        features: Callable[[Tensor], Tensor],
        *,
        start_id: int,
        end_id: int,
        first_position: int = 0,
    ) -> None:
        super().__init__(model, language_model.get_output_embeddings(), start_id, end_id)
        self.language_model = language_model
        self.features = features
        self.first_position = first_position

    def encode(self, images: Tensor) -> Prefix:
        """Compute the image features (R, patches, D) and read the start token."""
        from transformers import DynamicCache, EncoderDecoderCache

        features = self.features(images)
        regions, device = len(features), features.device
        # The cross-attention's keys and values are kept too: they are the same for every node.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        prefix = Prefix(
            cache,
            root=features[:, :1],
            first_position=torch.full((regions,), self.first_position + 1, device=device),
            features=features,
        )
        start = torch.full((regions, 1), self.start_id, device=device)
        mask = torch.zeros(regions, 1, 1, 1, dtype=features.dtype, device=device)
        positions = torch.full_like(start, self.first_position)
        prefix.root, _ = capture_hidden(
            self.head, lambda: self.forward(prefix, start, positions, mask)
        )
        return prefix

    def forward(self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor) -> Any:
        """Run the text decoder with its caches of both attentions."""
        return self.language_model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            encoder_hidden_states=prefix.features,
            past_key_values=prefix.cache,
            use_cache=True,
        )

    def reference(self, images: Tensor, sequence: TokenIds) -> Tensor:
        """Return the sum (R,) by the decoder's own causal mask and positions."""
        ids = torch.tensor([[self.start_id, *sequence]], device=images.device)
        logits = self.language_model(
            input_ids=ids.expand(len(images), -1),
            encoder_hidden_states=self.features(images),
            use_cache=False,
        ).logits
        return sequence_log_likelihood(logits[:, :-1], sequence)


class GitDecoder(TrieDecoder):
    """GIT: the image is a prefix of the text, held with the start token in the cache."""

    start_id: int

    def __init__(self, model: Any, start_id: int, end_id: int) -> None:
        super().__init__(model, model.get_output_embeddings(), start_id, end_id)

    def encode(self, images: Tensor) -> Prefix:
        """Read image and start token."""
        start = torch.full((len(images), 1), self.start_id, device=images.device)
        hidden, output = capture_hidden(
            self.head, lambda: self.model(pixel_values=images, input_ids=start, use_cache=True)
        )
        # GIT counts text positions from its own start; left to itself with a cache it would
        # count the image's tokens too.
        first = torch.ones(len(images), dtype=torch.long, device=images.device)
        return Prefix(output.past_key_values, hidden[:, -1:], first)

    def forward(self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor) -> Any:
        """Run the decoder behind the cached image and start token."""
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=prefix.cache,
            attention_mask=mask,
        )

    def reference(self, images: Tensor, sequence: TokenIds) -> Tensor:
        """Return the sum (R,) of one full forward, image included."""
        ids = torch.tensor([[self.start_id, *sequence]], device=images.device)
        logits = self.model(
            pixel_values=images, input_ids=ids.expand(len(images), -1), use_cache=False
        ).logits
        return sequence_log_likelihood(logits[:, -len(sequence) - 1 : -1], sequence)


class BatchedDecoder(Decoder):
    """Any causal model: prompts padded on the right, `prompt_batch` of them in one forward.

    Padding needs no mask of its own, since no prompt token looks to its right; one is
    passed all the same because some models count positions with it. The image is encoded
    again for every batch of prompts.
    """

    method = "batched"

    def __init__(
        self, model: Any, end_id: int, prompt_batch: int, start_id: int | None = None
    ) -> None:
        self.model = model
        self.start_id = start_id
        self.end_id = end_id
        self.prompt_batch = prompt_batch

    def forward(self, image: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits whose last L + 1 positions start at the token before the prompts.

        `image` is one entry of the prepared images, ids and mask are (P, L).
        """
        count = len(ids)
        inputs = {
            name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in image.items()
        }
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
        if "mm_token_type_ids" in inputs:  # 0 means text
            inputs["mm_token_type_ids"] = torch.cat(
                [inputs["mm_token_type_ids"], torch.zeros_like(ids)], dim=1
            )
        return self.model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]

    def log_likelihoods(self, images: Any, sequences: Sequence[TokenIds]) -> Tensor:
        """Return sums of token log-probabilities (R, P) float32, R = len(images)."""
        rows = []
        for image in images:
            batches = [
                self._batch(image, sequences[first : first + self.prompt_batch])
                for first in range(0, len(sequences), self.prompt_batch)
            ]
            rows.append(torch.cat(batches))
        return torch.stack(rows)

    def _batch(self, image: Any, sequences: Sequence[TokenIds]) -> Tensor:
        device = self.model.device
        longest = max(len(sequence) for sequence in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        ids, mask = ids.to(device), mask.to(device)
        logits = self.forward(image, ids, mask)[:, -longest - 1 : -1]
        scores = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0]
        return (scores * mask).sum(1)

    def reference(self, images: Any, sequence: TokenIds) -> Tensor:
        """Return the sum (R,) with no other prompt in the batch, hence no padding."""
        return torch.cat([self._batch(image, [sequence]) for image in images])


class BatchedCrossAttentionDecoder(BatchedDecoder):
    """VisionEncoderDecoder with a text decoder that takes no position ids, such as TrOCR's.

    Images are pixels (R, 3, H, W); their features are computed once.
    """

    def __init__(
        self,
        model: Any,
        language_model: Any,
        features: Callable[[Tensor], Tensor],
        *,
        start_id: int,
        end_id: int,
        prompt_batch: int,
    ) -> None:
        super().__init__(model, end_id, prompt_batch, start_id)
        self.language_model = language_model
        self.features = features

    def log_likelihoods(self, images: Tensor, sequences: Sequence[TokenIds]) -> Tensor:
        """Return sums of token log-probabilities (R, P) float32 of images (R, 3, H, W)."""
        return super().log_likelihoods(self.features(images), sequences)

    def reference(self, images: Tensor, sequence: TokenIds) -> Tensor:
        """Return the sum (R,) with no other prompt in the batch, hence no padding."""
        return super().reference(self.features(images), sequence)

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the decoder's logits (P, 1 + L, V) behind the start token."""
        start = torch.full_like(ids[:, :1], self.start_id or 0)
        return self.language_model(  # type: ignore[no-any-return]
            input_ids=torch.cat([start, ids], dim=1),
            attention_mask=torch.cat([torch.ones_like(start), mask], dim=1),
            encoder_hidden_states=image.expand(len(ids), -1, -1),
            use_cache=False,
        ).logits


def sequence_log_likelihood(logits: Tensor, sequence: TokenIds) -> Tensor:
    """Sum log P(token) over a sequence: logits (R, L, V) that predict its L tokens, to (R,)."""
    target = torch.tensor(sequence, device=logits.device)
    positions = torch.arange(len(sequence), device=logits.device)
    return logits.float().log_softmax(-1)[:, positions, target].sum(1)
