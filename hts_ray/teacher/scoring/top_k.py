"""A region's best classes without scoring the others, exact by bounds.

A prompt's log-likelihood is a sum of log-probabilities, so what is known of it after some
tokens can only fall. A class whose bound lies below the k-th best of the complete classes is
left out with its branch of the prompt tree; the classes that remain have the scores that
scoring everything would give them. Every region walks the tree on its own: its scores do not
depend on the other regions of the batch.

Shape legend: R regions, P prompts, C classes, N nodes of the prompt tree (0 the root), L tokens
of the longest prompt, W nodes fed at a time, D hidden width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hts_ray.store.aliases import FloatArray
from hts_ray.teacher.captioner import Reduction, TopSearch
from hts_ray.teacher.scoring import trie as prompt_tree
from hts_ray.teacher.scoring.decoders import Decoder, Prefix, select_regions
from hts_ray.teacher.scoring.trie import TokenIds

# Nodes a region feeds at a time, the most promising first. Few, because every complete class
# raises the bar for those that wait; more from time to time, for models that prefer nothing.
BEAM = 16
GROW_EVERY = 4
# A node is fed together with its children while no more than so many of them can still matter:
# a chain of tokens costs one forward.
AHEAD = 1
# Once no more than this share of the regions is unfinished, the others leave the batch.
GOES_ON = 0.5
# Bounds are compared with room for rounding, in nats: a class too many costs little.
MARGIN = 1e-4


@dataclass(frozen=True, eq=False)
class SearchStats:
    """What a search cost.

    `nodes_fed` (R,) int64 counts each region's own nodes, `padded` (R,) what it was padded to
    beside the others; scoring everything feeds `full_nodes`. `forwards` of the language model
    follow the encoding of the images. `completed` (R,) int64 classes got an exact score.
    """

    nodes_fed: npt.NDArray[np.int64]
    padded: npt.NDArray[np.int64]
    full_nodes: int
    forwards: int
    completed: npt.NDArray[np.int64]


@torch.inference_mode()
def score_top(
    decoder: Decoder,
    images: Any,
    sequences: Sequence[TokenIds],
    counts: Sequence[int],
    search: TopSearch,
) -> tuple[FloatArray, SearchStats]:
    """Return class log-likelihoods (R, C) float32, -inf for the classes left out, and the cost.

    `images` is what the family's preprocessing made of R regions; `sequences` are P prompts
    class by class, `counts` (C,) of them each. A region for which the model gives NaN is NaN
    throughout. Raises ValueError for shapes that do not fit, offsets that are not finite, or a
    `top_k` below 1.
    """
    _check(sequences, counts, search)
    offsets_C = search.offsets_C
    prefix = decoder.encode(images)
    device = prefix.root.device
    offsets = torch.zeros(len(counts), dtype=torch.float64, device=device)
    if offsets_C is not None:
        offsets = torch.as_tensor(offsets_C, device=device).double()
    tree = _tree(tuple(tuple(sequence) for sequence in sequences), str(device))
    walk = _Walk(decoder, prefix, tree)
    scores = _search(walk, _Classes(counts, search.reduction, device), offsets, search.top_k)
    stats = SearchStats(
        nodes_fed=walk.nodes_fed.cpu().numpy(),
        padded=walk.padded.cpu().numpy(),
        full_nodes=tree.full_nodes,
        forwards=walk.forwards,
        completed=(scores > -torch.inf).sum(1).cpu().numpy(),
    )
    return search.keep(scores.float().cpu().numpy()), stats


def _check(
    sequences: Sequence[TokenIds],
    counts: Sequence[int],
    search: TopSearch,
) -> None:
    offsets_C = search.offsets_C
    if not counts or min(counts) < 1 or sum(counts) != len(sequences):
        raise ValueError(f"{len(sequences)} prompts, but counts of {len(counts)} classes")
    if not all(sequences):
        raise ValueError("every prompt must have at least one token")
    if search.top_k < 1:
        raise ValueError(f"top_k={search.top_k}: at least one class must be kept")
    if offsets_C is not None:
        if offsets_C.shape != (len(counts),):
            raise ValueError(f"offsets of shape {offsets_C.shape} for {len(counts)} classes")
        if not np.isfinite(offsets_C).all():
            raise ValueError("offsets must be finite")


@dataclass(frozen=True, eq=False)
class _Tree:
    """The tree of all prompts, numbered level by level from the root, 0.

    Arrays over nodes have one entry more, N, for padding. `preorder` (N + 1,) ranks nodes so
    that a branch is contiguous and parents come first; `of_rank` is its inverse. `ancestors`
    (N + 1, L) holds the node above at depth 1, 2, ..., itself included, then N. The children of
    a node are numbered from `first_child`. `ends` (P,) are the nodes where prompts end,
    `levels` the ranges of nodes at depth 1, 2, ...
    """

    tokens: Tensor
    depths: Tensor
    parent: Tensor
    preorder: Tensor
    of_rank: Tensor
    ancestors: Tensor
    first_child: Tensor
    num_children: Tensor
    ends: Tensor
    levels: tuple[slice, ...]

    def __len__(self) -> int:
        return len(self.tokens) - 1

    @property
    def full_nodes(self) -> int:
        """How many nodes scoring everything feeds: those with children, but for the root."""
        return int((self.num_children > 0).sum()) - 1


@functools.lru_cache(maxsize=8)
def _tree(sequences: tuple[tuple[int, ...], ...], device: str) -> _Tree:
    parent, token, depth, paths = prompt_tree.breadth_first(sequences)
    count, longest = len(parent), paths.shape[1]
    num_children = np.bincount(parent[1:], minlength=count + 1)
    # Nodes are numbered by parent, so that a node's children follow those of the node before.
    first_child = 1 + np.cumsum(num_children) - num_children
    ancestors = np.full((count + 1, longest), count)
    bounds = np.searchsorted(depth, np.arange(1, longest + 2))
    levels = tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(bounds))
    for level, nodes in enumerate(levels):
        ancestors[nodes] = ancestors[parent[nodes]]
        ancestors[nodes, level] = np.arange(nodes.start, nodes.stop)
    # Rows of ancestors in lexicographic order, a parent before its children.
    keys = np.where(ancestors[:count] == count, -1, ancestors[:count])
    order = np.append(np.lexsort(keys.T[::-1]), count)
    arrays = {
        "tokens": np.append(np.maximum(token, 0), 0),
        "depths": np.append(np.maximum(depth, 1), 1),
        "parent": np.append(np.maximum(parent, 0), 0),
        "preorder": np.argsort(order),
        "of_rank": order,
        "ancestors": ancestors,
        "first_child": first_child,
        "num_children": num_children,
        "ends": paths[np.arange(len(paths)), (paths >= 0).sum(1) - 1],
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return _Tree(**tensors, levels=levels)


class _Classes:
    """How prompts make classes: `of_prompt` (P,) is the class of each."""

    def __init__(self, counts: Sequence[int], reduction: Reduction, device: torch.device) -> None:
        sizes = np.asarray(counts)
        slots = np.arange(sizes.max())
        prompts = (np.cumsum(sizes) - sizes)[:, None] + slots
        table = np.where(slots < sizes[:, None], prompts, sizes.sum())
        self.reduction = reduction
        self.prompts = torch.from_numpy(table).to(device)  # (C, most), P where there is none
        self.sizes = torch.from_numpy(sizes).to(device)
        self.of_prompt = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device)

    def _gather(self, values_RP: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values_RP, (0, 1), value=fill)[:, self.prompts]

    def reduce(self, values_RP: Tensor) -> Tensor:
        """Make class scores (R, C) of prompt scores, as `reduce_templates` does."""
        if self.prompts.shape[1] == 1:
            return values_RP
        if self.reduction == "max":
            return self._gather(values_RP, -torch.inf).amax(2)
        if self.reduction == "mean":
            return self._gather(values_RP, 0.0).sum(2) / self.sizes
        return self._gather(values_RP, -torch.inf).logsumexp(2) - self.sizes.log()

    def settled(self, upper_RP: Tensor, complete_RP: Tensor, lower_RC: Tensor) -> Tensor:
        """Return the prompts (R, P) that cannot change their class's score any more."""
        if self.reduction != "max":
            return complete_RP
        return upper_RP <= lower_RC[:, self.of_prompt]

    def all_of(self, flags_RP: Tensor) -> Tensor:
        """Return the classes (R, C) all of whose prompts are flagged."""
        if self.prompts.shape[1] == 1:
            return flags_RP
        return self._gather(flags_RP.float(), 1.0).amin(2) > 0


def _search(walk: _Walk, classes: _Classes, offsets_C: Tensor, top_k: int) -> Tensor:
    """Walk until no class left out can matter: scores (R, C) float64, -inf where not known."""
    shape, device = (len(walk.rows), len(offsets_C)), offsets_C.device
    result = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
    while True:
        upper_RP, complete_RP = walk.bounds()
        upper = classes.reduce(upper_RP)
        lower = classes.reduce(upper_RP.masked_fill(~complete_RP, -torch.inf))
        settled_RP = classes.settled(upper_RP, complete_RP, lower)
        done = classes.all_of(settled_RP)
        key = (upper + offsets_C).masked_fill(done, -torch.inf)
        threshold = (lower + offsets_C).topk(min(top_k, len(offsets_C)), dim=1).values[:, -1:]
        # NaN compares as false: it is not followed.
        key = torch.where(key >= threshold - MARGIN, key, -torch.inf)
        best_RN = _best_below(
            walk.tree, key[:, classes.of_prompt].masked_fill(settled_RP, -torch.inf)
        )
        wanted = (best_RN > -torch.inf) & walk.unfed
        goes_on = wanted.any(1)
        count = int(goes_on.sum())
        if count == 0 or count <= GOES_ON * len(goes_on):
            exact = lower.masked_fill(~done, -torch.inf)
            result[walk.rows] = exact.masked_fill(walk.broken[:, None], torch.nan)
            if count == 0:
                return result
            walk.keep(goes_on)
            best_RN, wanted = best_RN[goes_on], wanted[goes_on]
        walk.feed(_choose(walk, best_RN, wanted, BEAM << (walk.forwards // GROW_EVERY)))


def _choose(walk: _Walk, best_RN: Tensor, wanted: Tensor, width: int) -> Tensor:
    """Pick the nodes (R, N) to feed next: their parents are fed, or chosen too."""
    tree = walk.tree
    frontier = wanted & walk.known
    rank = best_RN.masked_fill(~frontier, -torch.inf)
    best = rank.topk(min(width, rank.shape[1]), dim=1)
    chosen = torch.zeros_like(frontier).scatter_(1, best.indices, best.values > -torch.inf)
    children = torch.zeros(wanted.shape, dtype=torch.int32, device=wanted.device)
    children.index_add_(1, tree.parent[1:-1], wanted[:, 1:].int())
    narrow = children <= AHEAD
    for nodes in tree.levels:
        above = tree.parent[nodes]
        chosen[:, nodes] |= wanted[:, nodes] & (chosen & narrow)[:, above]
    return chosen


def _best_below(tree: _Tree, keys_RP: Tensor) -> Tensor:
    """Return the best key of the prompts at or below every node, (R, N)."""
    best = torch.full(
        (len(keys_RP), len(tree)), -torch.inf, dtype=keys_RP.dtype, device=keys_RP.device
    )
    best.scatter_reduce_(1, tree.ends.expand(len(keys_RP), -1), keys_RP, "amax")
    for nodes in reversed(tree.levels[1:]):
        above = tree.parent[nodes].expand(len(keys_RP), -1)
        best.scatter_reduce_(1, above, best[:, nodes].clone(), "amax")
    return best


class _Walk:
    """What R regions know of the tree, and the decoder's cache behind it.

    `edge_scores` (R, N) float32 are log P(node | parent, region), 0 until `known`; `unfed`
    (R, N) marks the nodes with children whose log-probabilities are not known yet. `rows` are
    the regions that are still walking; `nodes_fed` and `padded` count for all there were.
    """

    def __init__(self, decoder: Decoder, prefix: Prefix, tree: _Tree) -> None:
        self.decoder = decoder
        self.prefix = prefix
        self.tree = tree
        regions, nodes, device = len(prefix), len(tree), prefix.root.device
        self.edge_scores = torch.zeros(regions, nodes, device=device)
        self.known = torch.zeros(regions, nodes, dtype=torch.bool, device=device)
        self.unfed = (tree.num_children[:-1] > 0).repeat(regions, 1)
        # The column of every node in the cache, -1 where it is not; the last is the padding's.
        self.column = torch.full((regions, nodes + 1), -1, device=device)
        self.rows = torch.arange(regions, device=device)
        self.nodes_fed = torch.zeros(regions, dtype=torch.int64, device=device)
        self.padded = torch.zeros_like(self.nodes_fed)
        self.forwards = 0
        self.limit = max(prompt_tree.MAX_NODES, len(tree.levels))
        self._score(torch.zeros(regions, 1, dtype=torch.int64, device=device), prefix.root)

    @property
    def broken(self) -> Tensor:
        """Which regions (R,) the model gave NaN for."""
        return self.edge_scores.isnan().any(1)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return upper bounds (R, P) float64 of the prompts, and which of them are complete."""
        total = torch.zeros_like(self.edge_scores)
        for nodes in self.tree.levels:
            total[:, nodes] = total[:, self.tree.parent[nodes]] + self.edge_scores[:, nodes]
        return total[:, self.tree.ends].double(), self.known[:, self.tree.ends]

    def feed(self, chosen: Tensor) -> None:
        """Feed the chosen nodes (R, N), as many as fit.

        The cache holds no more nodes than scoring everything would put there; when it is full it
        is emptied, and only the branches that are walked on are read again.
        """
        needed = self._with_ancestors(chosen)
        columns = min(int(needed.sum(1).max()), self.limit)
        if self.prefix.fed + columns > self.limit:
            self.decoder.rewind(self.prefix)
            self.column.fill_(-1)
            needed = self._with_ancestors(chosen)
            columns = min(int(needed.sum(1).max()), self.limit)
        # In preorder, so that a branch is whole wherever the limit cuts.
        tree = self.tree
        rank = tree.preorder[:-1].expand_as(needed).masked_fill(~needed, len(tree))
        nodes = tree.of_rank[rank.sort(dim=1).values[:, :columns]]
        first, fed = self.prefix.fed, self.prefix.fed + columns
        at = torch.arange(first, fed, device=nodes.device)
        self.column.scatter_(1, nodes, at.expand_as(nodes))
        self.column[:, -1] = -1
        seen = self.column.gather(1, tree.ancestors[nodes].flatten(1)).view(*nodes.shape, -1)
        visible = torch.zeros(*nodes.shape, fed + 1, dtype=torch.bool, device=nodes.device)
        visible.scatter_(2, seen.masked_fill(seen < 0, fed), True)
        # Padding sees itself: no node may attend to nothing.
        visible[:, at - first, at] = True
        hidden = self.decoder.feed(
            self.prefix, tree.tokens[nodes], tree.depths[nodes], visible[..., :-1]
        )
        self.nodes_fed[self.rows] += (nodes < len(tree)).sum(1)
        self.padded[self.rows] += columns
        self.forwards += 1
        self._score(nodes, hidden)

    def keep(self, flags: Tensor) -> None:
        """Go on with the flagged (R,) of the regions."""
        chosen = flags.nonzero()[:, 0]
        self.prefix = select_regions(self.prefix, chosen.tolist())
        self.edge_scores, self.known = self.edge_scores[chosen], self.known[chosen]
        self.unfed, self.column = self.unfed[chosen], self.column[chosen]
        self.rows = self.rows[chosen]

    def _with_ancestors(self, chosen: Tensor) -> Tensor:
        """Add the nodes above that the cache does not hold, and take off those it holds."""
        tree, absent = self.tree, self.column[:, :-1] < 0
        below = chosen.int()
        for nodes in reversed(tree.levels[1:]):
            below.index_add_(1, tree.parent[nodes], below[:, nodes].clone())
        return (below > 0) & absent

    def _score(self, nodes: Tensor, hidden: Tensor) -> None:
        """Score the children of the nodes (R, W) whose hidden states (R, W, D) came out."""
        tree = self.tree
        unfed = torch.nn.functional.pad(self.unfed, (0, 1)).gather(1, nodes)
        regions, places = unfed.nonzero(as_tuple=True)
        parents = nodes[regions, places]
        counts = tree.num_children[parents]
        row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        nth = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        child = tree.first_child[parents][row] + nth
        if len(row):
            of_parents = hidden[regions, places]
            scores = self.decoder.token_log_probs(of_parents, row, tree.tokens[child])
            self.edge_scores[regions[row], child] = scores
            self.known[regions[row], child] = True
        self.unfed[regions, parents] = False
