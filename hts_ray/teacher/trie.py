"""Exact log-likelihoods of many prompts at once by sharing their prefixes.

Class prompts ("a person riding a horse", "a person riding a bicycle", ...) share most of
their tokens. All prompts together form a trie; a decoder reads the trie's inner nodes as
one sequence in which every node sees its ancestors only, and what it predicts at a node
is scored against that node's children. The sums along the paths are exactly the sums
that one forward a prompt would give, for a fraction of the tokens.

How a model is fed differs by family; a family implements `Decoder`. Families whose
attention takes a tree mask score by trie, the others by batches of padded prompts.

Shape legend: R regions, P prompts, T fed nodes, E edges (= nodes but the root), L tokens
of the longest prompt, V vocabulary, D hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

TokenIds = Sequence[int]

# Fed nodes in one forward. Attention costs T^2, shared prefixes save less and less: on the
# 600 HICO prompts three forwards of about 330 nodes were cheaper than one of 996.
MAX_NODES = 384
# Logits held at once, in numbers: 64 MiB of float32.
MAX_LOGITS = 1 << 24


class PromptTrie:
    """The trie of P token sequences, laid out for one decoder forward.

    Nodes are numbered breadth first, fed nodes (those with children) likewise; node 0 is
    the root, which stands for the decoder's start token or for an image prefix.

    Attributes, all on the CPU:
        tokens: (T,) int64, the token of every fed node; the root's is -1.
        depths: (T,) int64, tokens between the root and the node.
        ancestors: (T, T) bool, whether the row's node descends from the column's or is it.
        edge_source: (E,) int64, fed index of the node that predicts an edge, ascending.
        edge_target: (E,) int64, the token predicted.
        paths: (P, L) int64, the edges of every prompt in order, padded with E.
    """

    def __init__(self, sequences: Sequence[TokenIds]) -> None:
        if not sequences or any(len(sequence) == 0 for sequence in sequences):
            raise ValueError("every prompt must have at least one token")
        parent, token, depth, node_paths = _breadth_first(sequences)
        fed = np.unique(parent[1:])
        fed_index = np.full(len(parent), -1)
        fed_index[fed] = np.arange(len(fed))
        self.tokens = torch.from_numpy(token[fed])
        self.depths = torch.from_numpy(depth[fed])
        self.edge_source = torch.from_numpy(fed_index[parent[1:]])
        self.edge_target = torch.from_numpy(token[1:])
        # Node n > 0 is the end of edge n - 1; the pad index E points one past the last edge.
        num_edges = len(parent) - 1
        self.paths = torch.from_numpy(np.where(node_paths < 0, num_edges, node_paths - 1))
        fed_parent = fed_index[parent[fed[1:]]]
        self.ancestors = torch.from_numpy(_ancestors(fed_parent, depth[fed]))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_edges(self) -> int:
        """E, the number of scored tokens after sharing."""
        return len(self.edge_target)

    def mask(self, past: int, dtype: torch.dtype, device: torch.device, start: int = 0) -> Tensor:
        """Return the additive attention mask (1, 1, T - start, past + T - start).

        0 where a node may look (all of the `past` cached positions and its ancestors), the
        dtype's minimum elsewhere. Additive because eager attention adds whatever it gets: a
        boolean mask would be added too, silently. `start` = 1 leaves out the root, for
        decoders that hold it in the cache.
        """
        size = len(self) - start
        mask = torch.zeros(1, 1, size, past + size, dtype=dtype, device=device)
        hidden = ~self.ancestors[start:, start:].to(device)
        mask[..., past:].masked_fill_(hidden, torch.finfo(dtype).min)
        return mask

    def sum_paths(self, edge_scores: Tensor) -> Tensor:
        """Sum edge scores (R, E) along every prompt's path, depth by depth, to (R, P)."""
        padded = torch.nn.functional.pad(edge_scores, (0, 1))
        paths = self.paths.to(edge_scores.device)
        total = padded[:, paths[:, 0]]
        for depth in range(1, paths.shape[1]):
            total = total + padded[:, paths[:, depth]]
        return total


def _breadth_first(
    sequences: Sequence[TokenIds],
) -> tuple[npt.NDArray[np.int64], ...]:
    """Return parent, token and depth (N,) of the nodes, level by level, and node paths (P, L)."""
    longest = max(len(sequence) for sequence in sequences)
    children: dict[tuple[int, int], int] = {}
    parent, token, depth = [-1], [-1], [0]
    paths = np.full((len(sequences), longest), -1, dtype=np.int64)
    at = [0] * len(sequences)
    for level in range(longest):
        reached = sorted(
            {(at[i], seq[level]) for i, seq in enumerate(sequences) if level < len(seq)}
        )
        for key in reached:
            children[key] = len(parent)
            parent.append(key[0])
            token.append(key[1])
            depth.append(level + 1)
        for i, sequence in enumerate(sequences):
            if level < len(sequence):
                at[i] = paths[i, level] = children[at[i], sequence[level]]
    as_array = [np.array(values, dtype=np.int64) for values in (parent, token, depth)]
    return (*as_array, paths)


def _ancestors(
    fed_parent: npt.NDArray[np.int64], depth: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return the (T, T) descent matrix from the parents of fed nodes 1..T-1."""
    ancestors = np.eye(len(depth), dtype=np.bool_)
    for level in range(1, int(depth[-1]) + 1):
        nodes = np.flatnonzero(depth == level)
        ancestors[nodes] |= ancestors[fed_parent[nodes - 1]]
    return ancestors


def split_tries(
    sequences: Sequence[TokenIds], max_nodes: int
) -> list[tuple[PromptTrie, list[int]]]:
    """Return tries of about `max_nodes` fed nodes, each with the indices of its prompts.

    Prompts are sorted by their tokens first, so that the ones that share a prefix meet. A
    prompt longer than `max_nodes` gets a trie of its own.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    groups: list[list[int]] = [[]]
    size = 0
    previous: tuple[int, ...] = ()
    for index in order:
        current = tuple(sequences[index])
        shared = 0
        limit = min(len(previous), len(current)) - 1  # the last token of a prompt is not fed
        while shared < limit and previous[shared] == current[shared]:
            shared += 1
        added = len(current) - 1 - shared
        if groups[-1] and size + added > max_nodes:
            groups.append([])
            size, added = 0, len(current) - 1
        groups[-1].append(index)
        size += added
        previous = current
    return [(PromptTrie([sequences[i] for i in group]), group) for group in groups]


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


def edge_log_probs(head: nn.Module, hidden: Tensor, trie: PromptTrie) -> Tensor:
    """Return log P(child | node, region) of every edge: (R, T, D) hidden states to (R, E) float32.

    The vocabulary projection runs over a few nodes at a time.
    """
    regions, nodes, _ = hidden.shape
    source, target = trie.edge_source.to(hidden.device), trie.edge_target.to(hidden.device)
    bounds = torch.searchsorted(trie.edge_source, torch.arange(nodes + 1)).tolist()
    vocabulary = int(getattr(head, "out_features", 0)) or 50_000
    chunk = max(1, MAX_LOGITS // (regions * vocabulary))
    scores = torch.empty(regions, trie.num_edges, dtype=torch.float32, device=hidden.device)
    for first in range(0, nodes, chunk):
        last = min(first + chunk, nodes)
        edges = slice(bounds[first], bounds[last])
        logits = head(hidden[:, first:last]).float()
        normalizer = logits.logsumexp(-1)
        local = source[edges] - first
        scores[:, edges] = logits[:, local, target[edges]] - normalizer[:, local]
    return scores


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


class TrieDecoder(Decoder):
    """A family whose attention takes a tree mask."""

    method = "trie"

    def __init__(self, model: Any, head: nn.Module, start_id: int, end_id: int) -> None:
        self.model = model
        self.head = head
        self.start_id: int = start_id
        self.end_id = end_id
        self._key: tuple[tuple[int, ...], ...] = ()
        self._tries: list[tuple[PromptTrie, list[int]]] = []

    @abstractmethod
    def encode(self, pixels: Tensor) -> Any:
        """Return what the decoder needs to know of the images (R, 3, H, W), computed once."""

    @abstractmethod
    def hidden_states(self, state: Any, trie: PromptTrie) -> Tensor:
        """Return the hidden states (R, T, D) in front of the vocabulary projection."""

    def log_likelihoods(self, images: Tensor, sequences: Sequence[TokenIds]) -> Tensor:
        """Return sums of token log-probabilities (R, P) float32 of images (R, 3, H, W)."""
        key = tuple(tuple(sequence) for sequence in sequences)
        if key != self._key:  # the prompts of a run are always the same
            self._tries, self._key = split_tries(sequences, MAX_NODES), key
        state = self.encode(images)
        scores = torch.empty(len(images), len(sequences), device=images.device)
        for trie, prompts in self._tries:
            edges = edge_log_probs(self.head, self.hidden_states(state, trie), trie)
            scores[:, prompts] = trie.sum_paths(edges)
        return scores

    def _token_ids(self, trie: PromptTrie, device: torch.device) -> Tensor:
        ids = trie.tokens.to(device, copy=True)
        ids[0] = self.start_id
        return ids


class CrossAttentionDecoder(TrieDecoder):
    """Captioners whose text decoder attends to the image's features: BLIP, VisionEncoderDecoder.

    `features` turns pixels (R, 3, H, W) into the decoder's encoder_hidden_states;
    `first_position` is the position id of the start token.
    """

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

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the image features (R, patches, D)."""
        return self.features(pixels)

    def hidden_states(self, state: Tensor, trie: PromptTrie) -> Tensor:
        """Feed the whole tree, root included; there is no prefix to cache."""
        regions, device = len(state), state.device
        mask = trie.mask(0, state.dtype, device)
        positions = trie.depths.to(device) + self.first_position
        hidden, _ = capture_hidden(
            self.head,
            lambda: self.language_model(
                input_ids=self._token_ids(trie, device).expand(regions, -1),
                position_ids=positions.expand(regions, -1),
                attention_mask=mask.expand(regions, -1, -1, -1),
                encoder_hidden_states=state,
                use_cache=False,
            ),
        )
        return hidden

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

    def __init__(self, model: Any, start_id: int, end_id: int) -> None:
        super().__init__(model, model.get_output_embeddings(), start_id, end_id)

    def encode(self, pixels: Tensor) -> tuple[Any, Tensor]:
        """Return the cache of image and start token, and the start's hidden state (R, 1, D)."""
        start = torch.full((len(pixels), 1), self.start_id, device=pixels.device)
        hidden, output = capture_hidden(
            self.head, lambda: self.model(pixel_values=pixels, input_ids=start, use_cache=True)
        )
        return output.past_key_values, hidden[:, -1:]

    def hidden_states(self, state: tuple[Any, Tensor], trie: PromptTrie) -> Tensor:
        """Feed all nodes but the root after the cached prefix, then cut the cache back."""
        cache, root = state
        added = len(trie) - 1
        if added == 0:
            return root
        regions, device = len(root), root.device
        mask = trie.mask(cache.get_seq_length(), root.dtype, device, start=1)
        # GIT counts text positions from its own start; left to itself with a cache it would
        # count the image's tokens too.
        hidden, _ = capture_hidden(
            self.head,
            lambda: self.model(
                input_ids=self._token_ids(trie, device)[1:].expand(regions, -1),
                position_ids=trie.depths[1:].to(device).expand(regions, -1),
                past_key_values=cache,
                attention_mask=mask.expand(regions, -1, -1, -1),
            ),
        )
        cache.crop(-added)
        return torch.cat([root, hidden], dim=1)

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
