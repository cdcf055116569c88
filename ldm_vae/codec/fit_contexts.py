"""Fit the integers of `contexts` to symbols of many images: taps, weights, trees, frequencies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
from scipy.optimize import nnls

from ldm_vae.codec import loops
from ldm_vae.codec.contexts import Contexts, padded
from ldm_vae.codec.fit_trees import PRIOR_COUNT, grow_tree
from ldm_vae.codec.loops import BORDER, NUM_FEATURES, TOTAL, WEIGHT_BITS, Integers
from ldm_vae.codec.tables import Floats

OWN = ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0))
"""(y, x) of the taps in a symbol's own channel: W, N, NW, NE, WW, NN."""
BEFORE = tuple(product((-1, 0, 1), repeat=2))
"""In the channels before: the 3x3 around."""
PLACES = ((0, 0), *OWN, *(p for p in BEFORE if p not in OWN and p != (0, 0)))
MEAN_TAPS, ACTIVITY_TAPS = 16, 24
FARTHEST = 127
"""Channels back: offsets are stored in 8 bits."""
TAP_SYMBOLS = 1 << 24
"""Taps are chosen on the first images with so many symbols, at stride 8 and 32 channels 64 of 768 x 768 pixels."""
TREE_SYMBOLS = 1 << 20
"""A channel's tree is grown on so many symbols, drawn from all images."""
HELD_OUT = 8
"""Of so many images the symbols of one prune the trees."""
LARGEST_MEAN_WEIGHT, LARGEST_ACTIVITY_WEIGHT = 16383, 4095
RIDGE = 1e-3
ESCAPE_BITS = 32


def fit_contexts(volumes: Sequence[Integers], *, taps: bool = True) -> Contexts:
    """Contexts for symbols like these, (C, h, w) each of one C; without `taps`, one static table a channel."""
    channels = len(volumes[0])
    chosen = choose_taps(first(volumes, TAP_SYMBOLS)) if taps else []
    width = max((len(t) for t, _, _ in chosen), default=0)
    offsets, weights = np.zeros((channels, width, 3), np.int8), np.zeros((2, channels, width), np.int16)
    for c, (places, mean, activity) in enumerate(chosen):
        offsets[c, : len(places)], weights[0, c, : len(places)], weights[1, c, : len(places)] = places, mean, activity
    borders = [(np.ascontiguousarray(v, np.int32), padded(v)) for v in volumes]

    def fit(c: int) -> tuple[Integers, Integers]:
        features, tokens, held = measured(borders, c, offsets, weights)
        return grow_tree(features if taps else np.zeros_like(features), tokens, held)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        trees = list(pool.map(fit, range(channels)))
    roots = np.cumsum([0, *(len(nodes) for nodes, _ in trees[:-1])], dtype=np.int32)
    tables = np.cumsum([0, *(len(counts) for _, counts in trees[:-1])])
    nodes = np.concatenate(
        [moved(tree, root, table) for (tree, _), root, table in zip(trees, roots, tables, strict=True)]
    )
    frequencies = normalise([counts for _, counts in trees])
    return Contexts(taps=offsets, weights=weights, roots=roots, nodes=nodes, frequencies=frequencies)


def first(volumes: Sequence[Integers], num_symbols: int) -> Sequence[Integers]:
    """As many volumes as have so many symbols together, at least one."""
    ends = np.cumsum([v.size for v in volumes])
    return volumes[: max(int(np.searchsorted(ends, num_symbols)), 1)]


def measured(
    borders: Sequence[tuple[Integers, Integers]], c: int, taps: Integers, weights: Integers
) -> tuple[Integers, Integers, Integers]:
    """Features (n, NUM_FEATURES), tokens (n,) and which are held out (n,), of a sample of channel c's symbols."""
    share = TREE_SYMBOLS / sum(symbols[c].size for symbols, _ in borders)
    rng = np.random.default_rng(c)
    parts = []
    for i, (symbols, near) in enumerate(borders):
        kept = rng.random(symbols[c].shape, np.float32) < share
        count = int(kept.sum())
        features, tokens = np.empty((count + 1, NUM_FEATURES), np.int32), np.empty(count, np.uint8)
        loops.measure(symbols, near, c, taps, weights, kept, features, tokens)
        parts.append((features[:-1], tokens, np.full(count, i % HELD_OUT == HELD_OUT - 1)))
    features, tokens, held = (np.concatenate(part) for part in zip(*parts, strict=True))
    return features, tokens, held


def moved(tree: Integers, root: int, table: int) -> Integers:
    """A tree's nodes (N, 3), counted from 0, behind those of other trees and their tables."""
    leaf = tree[:, [0]] < 0
    return np.where(leaf, tree + [0, table, 0], tree + [0, 0, root]).astype(np.int32)


def shifted(values: Floats) -> Floats:
    """(C, h, w) -> what each place in PLACES holds, zero beyond the border: (C, len(PLACES), h * w)."""
    channels, height, width = values.shape
    volume = padded(values).astype(np.float32)
    rows = [
        volume[:, BORDER + y : BORDER + y + height, BORDER + x : BORDER + x + width].reshape(channels, -1)
        for y, x in PLACES
    ]
    return np.stack(rows, axis=1)


def candidates(channel: int) -> tuple[Integers, Integers]:
    """Every tap that a channel may have, as offsets (channel, y, x), and its row among all channels' PLACES."""
    before = range(1, min(channel, FARTHEST) + 1)
    taps = [(0, y, x) for y, x in OWN] + [(-d, y, x) for d in before for y, x in BEFORE]
    return np.array(taps), np.array([(channel + d) * len(PLACES) + PLACES.index((y, x)) for d, y, x in taps])


def choose_taps(volumes: Sequence[Integers]) -> list[tuple[Integers, Integers, Integers]]:
    """For each channel, taps (K, 3) with their weights of the mean and of the activity.

    Least squares on all candidates, then again on those that matter most: for the mean, of the symbol; for the
    activity, of the distance from that mean, with weights of at least 0 (Lawson & Hanson 1974).
    """
    channels, width = len(volumes[0]), len(PLACES)
    gram = np.zeros((channels * width, channels * width))
    for volume in volumes:
        rows = shifted(volume).reshape(channels * width, -1)
        gram += rows @ rows.T
    means = []
    for c in range(channels):
        taps, index = candidates(c)
        weights = solve(gram, index, c * width)
        best = np.argsort(-np.abs(weights) * np.sqrt(gram[index, index]), kind="stable")[:MEAN_TAPS]
        means.append((taps[best], index[best], solve(gram, index[best], c * width)))
    magnitudes = np.zeros((channels * width + 1, channels * width + 1))
    distances = np.zeros((channels * width + 1, channels))
    for volume in volumes:
        rows = shifted(volume)
        flat = rows.reshape(channels * width, -1)
        off = np.stack([weights.astype(np.float32) @ flat[index] for _, index, weights in means]) - rows[:, 0]
        large = np.concatenate([np.abs(flat), np.ones((1, rows.shape[-1]), np.float32)])
        magnitudes += large @ large.T
        distances += large @ np.abs(off).T
    chosen = []
    for c, (mean_taps, _, mean_weights) in enumerate(means):
        taps, index = candidates(c)
        index = np.append(index, channels * width)  # and a constant
        weights = solve_nonnegative(magnitudes, index, distances[:, c])[:-1]
        best = np.argsort(-weights * np.sqrt(magnitudes[index[:-1], index[:-1]]), kind="stable")[:ACTIVITY_TAPS]
        kept = np.append(index[best], channels * width)
        weights = solve_nonnegative(magnitudes, kept, distances[:, c])[:-1]
        both, rows = np.unique(np.concatenate([mean_taps, taps[best]]), axis=0, return_inverse=True)
        mean, activity = (np.zeros(len(both), np.int64) for _ in range(2))
        scale = LARGEST_ACTIVITY_WEIGHT / max(weights.max(), 1e-9)
        limit = LARGEST_MEAN_WEIGHT
        mean[rows.ravel()[: len(mean_taps)]] = np.clip(np.rint(mean_weights * 2**WEIGHT_BITS), -limit, limit)
        activity[rows.ravel()[len(mean_taps) :]] = np.rint(weights * scale)
        chosen.append((both, mean, activity))
    return chosen


def solve(gram: Floats, index: Integers, target: int) -> Floats:
    """Least squares with a little ridge, from sums of products."""
    solution: Floats = np.linalg.solve(ridged(gram, index), gram[index, target])
    return solution


def ridged(gram: Floats, index: Integers) -> Floats:
    part = gram[np.ix_(index, index)]
    ridge: Floats = part + (RIDGE * np.trace(part) / len(part) + 1e-6) * np.eye(len(part))
    return ridge


def solve_nonnegative(gram: Floats, index: Integers, products: Floats) -> Floats:
    lower = np.linalg.cholesky(ridged(gram, index))
    solution: Floats = nnls(lower.T, np.linalg.solve(lower, products[index]))[0]
    return solution


def normalise(counts: Sequence[Integers]) -> Integers:
    """Counts (L, MAX_TOKENS + 1) of each channel's leaves -> frequencies (T, S) with the sum 2^14, the escape last.

    S is as small as the tokens let it be. A token is left to the escape where that takes fewer bits on average than a
    frequency of 1 takes from the others.
    """
    smooth = np.concatenate([c + PRIOR_COUNT * c.sum(axis=0) / max(c.sum(), 1) for c in counts])
    shares = smooth / smooth.sum(axis=1, keepdims=True)
    rare = shares * TOTAL * ESCAPE_BITS < 1 / np.log(2)
    rare[:, -1] = True
    escaped = np.where(rare, shares, 0).sum(axis=1, keepdims=True)
    used = int(np.flatnonzero(~rare.all(axis=0)).max(initial=-1)) + 1
    rows = np.concatenate([np.where(rare, 0, shares)[:, :used], escaped], axis=1)
    return np.stack([to_total(row) for row in rows]).astype(np.uint16)


def to_total(shares: Floats) -> Integers:
    """Shares -> frequencies with the sum 2^14: at least 1 for the escape (the last) and for what has a share."""
    frequencies = np.where(shares > 0, np.maximum(np.rint(shares * TOTAL), 1), 0).astype(np.int64)
    frequencies[-1] = max(frequencies[-1], 1)
    while (missing := TOTAL - int(frequencies.sum())) != 0:
        step = 1 if missing > 0 else -1
        open_ = frequencies > (0 if step > 0 else 1)
        gain = np.where(open_, step * shares / np.maximum(frequencies, 1), -np.inf)
        best = np.argsort(-gain, kind="stable")[: min(abs(missing), int(open_.sum()))]
        frequencies[best] += step
    return frequencies
