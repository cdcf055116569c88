"""Grow a channel's tree: greedily by the length of the code, then cut back where held-out symbols gain nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ldm_vae.codec.contexts import MAX_DEPTH
from ldm_vae.codec.loops import MAX_TOKENS, NUM_FEATURES, Integers, compiled

MAX_LEAVES = 64
NUM_BINS = 64
"""Thresholds are chosen among so many quantiles of a feature; a power of two."""
EDGE_SYMBOLS = 1 << 16
"""The quantiles are those of so many symbols."""
LEAST_SYMBOLS = 64
"""On either side of a split."""
SPLIT_BITS = 60.0
"""What a split must save where it is grown."""
FINE_TOKENS, COARSE, NUM_CLASSES = 12, 8, 18
"""Splits are judged by classes of tokens: the first ones alone, then eight at a time."""
PRIOR_COUNT = 4.0
"""Times the channel's distribution, added to a leaf's counts."""


@dataclass(eq=False)
class Leaf:
    """A part of the symbols, and how to divide it further.

    Attributes:
        index: which of the symbols.
        histogram: (NUM_FEATURES, NUM_BINS, NUM_CLASSES) counts of those that trees are grown on.
        split: bits that the best one saves, its feature and bin.
        grown, held: (MAX_TOKENS + 1,) counts of tokens that it was grown on and that were held out, once it is grown.
        children: once it is divided: at most, and above.
    """

    index: Integers
    histogram: Integers
    depth: int
    split: tuple[float, int, int] = (0.0, 0, 0)
    children: list[Leaf] = field(default_factory=list)
    grown: Integers = field(default_factory=lambda: np.empty(0))
    held: Integers = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        if self.depth < MAX_DEPTH:
            self.split = best_split(self.histogram)


def grow_tree(features: Integers, tokens: Integers, held: Integers) -> tuple[Integers, Integers]:
    """Nodes (N, 3) as in `Contexts`, leaves numbered from 0, and each leaf's counts of tokens (L, MAX_TOKENS + 1).

    Args:
        features: (n, NUM_FEATURES) int32.
        tokens: (n,) uint8.
        held: (n,) bool, the symbols that only say which splits are worth keeping.
    """
    edges = [edges_of(column) for column in features[:: max(len(features) // EDGE_SYMBOLS, 1)].T]
    bins = binned(features, padded_edges(edges))
    classes = np.where(tokens < FINE_TOKENS, tokens, FINE_TOKENS + (tokens - FINE_TOKENS) // COARSE).astype(np.uint8)
    everything = np.arange(len(tokens))
    root = Leaf(everything, histogram_of(bins, classes, held, everything), 0)
    leaves = [root]
    while len(leaves) < MAX_LEAVES:
        best = max(leaves, key=lambda leaf: leaf.split[0])
        if best.split[0] < SPLIT_BITS:
            break
        divide(best, bins, classes, held)
        leaves.remove(best)
        leaves += best.children
    count(root, tokens, held)
    prune(root, (root.grown + 1e-3) / (root.grown + 1e-3).sum())
    nodes: list[tuple[int, int, int]] = []
    counts: list[Integers] = []
    write(root, edges, nodes, counts)
    return np.array(nodes, np.int32), np.stack(counts)


def divide(leaf: Leaf, bins: Integers, classes: Integers, held: Integers) -> None:
    """By its best split; counts the smaller side, and takes the other's counts as the rest."""
    _, feature, cut = leaf.split
    parts = parted(bins[feature], leaf.index, cut)
    small = int(len(parts[1]) < len(parts[0]))
    histogram = histogram_of(bins, classes, held, parts[small])
    histograms = [histogram, leaf.histogram - histogram]
    leaf.children = [Leaf(part, histograms[i ^ small], leaf.depth + 1) for i, part in enumerate(parts)]
    leaf.histogram = np.empty(0)


def count(leaf: Leaf, tokens: Integers, held: Integers) -> None:
    """Sets the counts of a leaf and of all below."""
    for child in leaf.children:
        count(child, tokens, held)
    if leaf.children:
        leaf.grown, leaf.held = (
            np.sum([getattr(c, name) for c in leaf.children], axis=0) for name in ("grown", "held")
        )
    else:
        leaf.grown, leaf.held = counts_of(tokens, held, leaf.index)


def prune(leaf: Leaf, share: Integers) -> float:
    """Takes back splits that cost held-out bits; the bits of what remains. `share` is the channel's distribution."""
    p = (leaf.grown + PRIOR_COUNT * share) / (leaf.grown.sum() + PRIOR_COUNT)
    alone = float(-(leaf.held * np.log2(p)).sum())
    divided = sum(prune(child, share) for child in leaf.children)
    if divided > alone:
        leaf.children = []
    return divided if leaf.children else alone


def write(leaf: Leaf, edges: list[Integers], nodes: list[tuple[int, int, int]], counts: list[Integers]) -> None:
    """Appends a tree's nodes, each before what is below it, and the counts of its leaves."""
    place = len(nodes)
    if not leaf.children:
        nodes.append((-1, len(counts), 0))
        counts.append(leaf.grown + leaf.held)
        return
    nodes.append((0, 0, 0))
    write(leaf.children[0], edges, nodes, counts)
    _, feature, cut = leaf.split
    nodes[place] = (feature, int(edges[feature][cut]), len(nodes))
    write(leaf.children[1], edges, nodes, counts)


def edges_of(column: Integers) -> Integers:
    """At most NUM_BINS - 1 ascending values among which thresholds are chosen."""
    return np.unique(np.quantile(column, np.linspace(0, 1, NUM_BINS + 1)[1:-1], method="lower"))


def padded_edges(edges: list[Integers]) -> Integers:
    """(NUM_FEATURES, NUM_BINS - 1), filled with the largest number."""
    out = np.full((len(edges), NUM_BINS - 1), np.iinfo(np.int32).max, np.int32)
    for row, values in zip(out, edges, strict=True):
        row[: len(values)] = values
    return out


@compiled
def binned(features: Integers, edges: Integers) -> Integers:
    """Values (n, F) -> (F, n) uint8: how many of a feature's edges are below each."""
    out = np.empty((features.shape[1], len(features)), np.uint8)
    for i in range(len(features)):
        for f in range(features.shape[1]):
            low, value = 0, features[i, f]
            step = NUM_BINS // 2
            while step:
                if edges[f, low + step - 1] < value:
                    low += step
                step //= 2
            out[f, i] = low
    return out


@compiled
def parted(column: Integers, index: Integers, cut: int) -> tuple[Integers, Integers]:
    """Of an index into a column, what is at most `cut` there, and the others."""
    low, high = np.empty(len(index), np.int64), np.empty(len(index), np.int64)
    a = b = 0
    for i in index:
        if column[i] <= cut:
            low[a] = i
            a += 1
        else:
            high[b] = i
            b += 1
    return low[:a].copy(), high[:b].copy()


@compiled
def counts_of(tokens: Integers, held: Integers, index: Integers) -> Integers:
    """(2, MAX_TOKENS + 1), of those at `index`: how often each token comes, in what is not and what is held out."""
    out = np.zeros((2, MAX_TOKENS + 1), np.int64)
    for i in index:
        out[int(held[i]), tokens[i]] += 1
    return out


@compiled
def histogram_of(bins: Integers, classes: Integers, held: Integers, index: Integers) -> Integers:
    """Counts of the classes in each bin of each feature, of those at `index` that are not held out."""
    out = np.zeros((NUM_FEATURES, NUM_BINS, NUM_CLASSES), np.int32)
    for f in range(NUM_FEATURES):
        for i in index:
            if not held[i]:
                out[f, bins[f, i], classes[i]] += 1
    return out


@compiled
def best_split(histogram: Integers) -> tuple[float, int, int]:
    """Bits that the best split saves, its feature, and the last bin of its lower side."""
    whole = histogram[0].sum(axis=0)
    best = (0.0, 0, 0)
    for f in range(NUM_FEATURES):
        below = np.zeros(NUM_CLASSES, np.int64)
        for cut in range(NUM_BINS - 1):
            if not histogram[f, cut].any():
                continue
            below += histogram[f, cut]
            above = whole - below
            if min(below.sum(), above.sum()) < LEAST_SYMBOLS:
                continue
            saved = bits(whole) - bits(below) - bits(above)
            if saved > best[0]:
                best = (saved, f, cut)
    return best


@compiled
def bits(counts: Integers) -> float:
    """What counts of classes take in an ideal code."""
    total = np.float64(counts.sum())
    out = 0.0
    for n in counts:
        if n > 0:
            out += n * np.log2(total / n)
    return out
