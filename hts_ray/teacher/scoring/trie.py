"""Exact log-likelihoods of many prompts at once by sharing their prefixes.

Class prompts ("a person riding a horse", "a person riding a bicycle", ...) share most of
their tokens. All prompts together form a trie; a decoder reads the trie's inner nodes as
one sequence in which every node sees its ancestors only, and what it predicts at a node
is scored against that node's children. The sums along the paths are exactly the sums
that one forward a prompt would give, for a fraction of the tokens.

How a model is fed differs by family: see `hts_ray.teacher.scoring.decoders`.

Shape legend: R regions, P prompts, T fed nodes, E edges (= nodes but the root), L tokens
of the longest prompt, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        last_fed: (P,) int64, the fed node that predicts a prompt's last token.
    """

    def __init__(self, sequences: Sequence[TokenIds]) -> None:
        if not sequences or any(len(sequence) == 0 for sequence in sequences):
            raise ValueError("every prompt must have at least one token")
        parent, token, depth, node_paths = breadth_first(sequences)
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
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        self.last_fed = self.edge_source[self.paths.gather(1, lengths[:, None] - 1)[:, 0]]
        fed_parent = fed_index[parent[fed[1:]]]
        self.ancestors = torch.from_numpy(_ancestors(fed_parent, depth[fed]))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_edges(self) -> int:
        """E, the number of scored tokens after sharing."""
        return len(self.edge_target)

    def sum_paths(self, edge_scores: Tensor) -> Tensor:
        """Sum edge scores (R, E) along every prompt's path, depth by depth, to (R, P)."""
        padded = torch.nn.functional.pad(edge_scores, (0, 1))
        paths = self.paths.to(edge_scores.device)
        total = padded[:, paths[:, 0]]
        for depth in range(1, paths.shape[1]):
            total = total + padded[:, paths[:, depth]]
        return total


def breadth_first(
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
    sequences: Sequence[TokenIds], max_nodes: int | None = None
) -> list[tuple[PromptTrie, list[int]]]:
    """Return tries of about `max_nodes` (MAX_NODES) fed nodes, with the indices of their prompts.

    Prompts are sorted by their tokens first, so that the ones that share a prefix meet. A
    prompt longer than `max_nodes` gets a trie of its own.
    """
    max_nodes = MAX_NODES if max_nodes is None else max_nodes
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
        # Of a strided input torch's CPU kernels copy the weights once a region (bfloat16).
        logits = head(hidden[:, first:last].contiguous()).float()
        normalizer = logits.logsumexp(-1)
        local = source[edges] - first
        scores[:, edges] = logits[:, local, target[edges]] - normalizer[:, local]
    return scores
