"""Fit the integers of `contexts` to symbols of many images: taps, weights, thresholds, frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from scipy.optimize import nnls

from ldm_vae.codec.contexts import BORDER, MAGNITUDE, NUM_PHASES, WEIGHT_BITS, Contexts, padded, split_mean, wavefronts
from ldm_vae.codec.rans import MAX_ALPHABET, TOTAL, Frequencies, Integers
from ldm_vae.codec.tables import Floats

OWN = ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0))
"""(y, x) of the taps in a symbol's own channel: W, N, NW, NE, WW, NN."""
BEFORE = tuple(product((-1, 0, 1), repeat=2))
"""In the channels before: the 3x3 around."""
PLACES = ((0, 0), *OWN, *(p for p in BEFORE if p not in OWN and p != (0, 0)))
MEAN_TAPS, ACTIVITY_TAPS = 8, 16
FARTHEST = 127
"""Channels back: offsets are stored in 8 bits."""
FINE_BINS = 64
NUM_ACTIVITIES = 12
EDGE_IMAGES = 64
"""The fine bins' edges are quantiles of the activity in so many images."""
LARGEST_ACTIVITY_WEIGHT = 4095
RIDGE = 1e-3
MAX_REACH = MAX_ALPHABET // 2 - 1
TAIL = 1e-5
"""At most this share of the rests is beyond the reach of the tables, where their size allows."""
PRIOR_COUNT = 4.0
"""Times the channel's distribution, added to each table's counts."""


def fit_contexts(volumes: Sequence[Integers], *, taps: bool = True) -> Contexts:
    """Contexts for symbols like these, (C, h, w) each of one C; without `taps`, one static table a channel."""
    channels = len(volumes[0])
    chosen = choose_taps(volumes) if taps else []
    width = max((len(t) for t, _, _ in chosen), default=0)
    offsets = np.zeros((channels, width, 3), np.int64)
    means, activities = (np.zeros((channels, width), np.int64) for _ in range(2))
    for c, (places, mean, activity) in enumerate(chosen):
        offsets[c, : len(places)], means[c, : len(places)], activities[c, : len(places)] = places, mean, activity
    bare = Contexts(
        taps=offsets,
        mean_weights=means,
        activity_weights=activities,
        thresholds=np.zeros((channels, 0), np.int64),
        frequencies=Frequencies(np.tile([[1, TOTAL - 1]], (channels * NUM_PHASES, 1))),
    )
    counts, edges = count(volumes, bare)  # (C, FINE_BINS, phases, 2 reach + 3), rests beyond the reach at both ends
    edges_kept, tables = [], []
    for c in range(channels):
        groups = merge(counts[c].sum(axis=1), NUM_ACTIVITIES if taps else 1)
        edges_kept.append([edges[c][g[0] - 1] for g in groups[1:]])
        tables += [counts[c, g].sum(axis=0) for g in groups]
    frequencies = np.concatenate(
        [normalise(t, counts[i // len(groups)].sum(axis=(0, 1))) for i, t in enumerate(tables)]
    )
    thresholds = np.array(edges_kept, np.int64).reshape(channels, -1)
    return replace(bare, thresholds=thresholds, frequencies=Frequencies(frequencies))


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
        rows = shifted(np.clip(volume, -MAGNITUDE, MAGNITUDE)).reshape(channels * width, -1)
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
        rows = shifted(np.clip(volume, -MAGNITUDE, MAGNITUDE))
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
        mean[rows.ravel()[: len(mean_taps)]] = np.clip(np.rint(mean_weights * 2**WEIGHT_BITS), -MAGNITUDE, MAGNITUDE)
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


def measured(values: Integers, contexts: Contexts) -> tuple[Integers, Integers, Integers, Integers]:
    """Channel, activity, phase and rest of every symbol of an image."""
    volume = padded(values)
    places, channels, _ = wavefronts(*values.shape)
    mean, activity = contexts.predict(volume, places, channels)
    prediction, sign, phase = split_mean(mean)
    return channels, activity, phase, (volume.reshape(-1)[places] - prediction) * sign


def count(volumes: Sequence[Integers], contexts: Contexts) -> tuple[Integers, list[Integers]]:
    """How often each rest comes, by channel, fine bin of the activity, and phase; and the bins' edges a channel.

    Rests beyond a reach, which most do not need, are counted together at either end.
    """
    by_channel = []
    for values in volumes[:EDGE_IMAGES]:
        channels, activity, _, _ = measured(values, contexts)
        by_channel.append([activity[channels == c] for c in range(contexts.num_channels)])
    edges = [edges_of(np.concatenate(activities)) for activities in zip(*by_channel, strict=True)]
    shape = (contexts.num_channels, FINE_BINS, NUM_PHASES, 2 * MAX_REACH + 3)
    counts = np.zeros(int(np.prod(shape)), np.int64)
    for values in volumes:
        channels, activity, phase, rest = measured(values, contexts)
        bins = np.zeros_like(activity)
        for c, cuts in enumerate(edges):
            here = channels == c
            bins[here] = np.searchsorted(cuts, activity[here], side="right")
        symbol = np.clip(rest, -MAX_REACH - 1, MAX_REACH + 1) + MAX_REACH + 1
        flat = np.ravel_multi_index((channels, bins, phase, symbol), shape)
        counts += np.bincount(flat, minlength=len(counts))
    return within_reach(counts.reshape(shape)), edges


def edges_of(activity: Integers) -> Integers:
    """FINE_BINS - 1 ascending edges above 0, at the quantiles; equal ones leave bins empty."""
    cuts = np.unique(np.quantile(activity, np.linspace(0, 1, FINE_BINS + 1)[1:-1], method="higher"))
    cuts = cuts[cuts > 0].astype(np.int64)
    return np.append(cuts, np.full(FINE_BINS - 1 - len(cuts), cuts[-1] if len(cuts) else 1))


def within_reach(counts: Integers) -> Integers:
    """The same counts with the smallest reach that leaves at most a share of TAIL beyond it."""
    by_rest = counts.sum(axis=(0, 1, 2))
    beyond = [
        int(by_rest[: MAX_REACH + 1 - r].sum() + by_rest[MAX_REACH + 2 + r :].sum()) for r in range(MAX_REACH + 1)
    ]
    reach = next((r for r in range(1, MAX_REACH) if beyond[r] <= TAIL * by_rest.sum()), MAX_REACH)
    cut = MAX_REACH - reach
    inner = counts[..., cut : counts.shape[-1] - cut].copy()
    inner[..., 0] = counts[..., : cut + 1].sum(axis=-1)
    inner[..., -1] = counts[..., -cut - 1 :].sum(axis=-1)
    return inner


def merge(counts: Integers, groups: int) -> list[list[int]]:
    """Neighbouring bins, with their counts (bins, S), put together until few are left, at the least cost in bits."""

    def bits(rows: Integers) -> float:
        total = rows.sum()
        some = rows[rows > 0]
        return float((some * np.log2(total / some)).sum()) if total else 0.0

    def cost(i: int) -> float:
        return bits(sums[i] + sums[i + 1]) - alone[i] - alone[i + 1]

    parts = [[i] for i in range(len(counts))]
    sums = list(counts)
    alone = [bits(s) for s in sums]
    costs = [cost(i) for i in range(len(sums) - 1)]
    while len(parts) > groups:
        i = int(np.argmin(costs))
        parts[i] += parts.pop(i + 1)
        sums[i] = sums[i] + sums.pop(i + 1)
        alone[i] = bits(sums[i])
        alone.pop(i + 1)
        costs.pop(i)
        for changed in range(max(i - 1, 0), min(i + 1, len(costs))):
            costs[changed] = cost(changed)
    return parts


def normalise(counts: Integers, channel: Integers) -> Integers:
    """Counts of a table by phase (phases, 2 reach + 3), and those of its whole channel -> frequencies, escape first.

    A rest that is too rare for a frequency of 1 is left to the escape.
    """
    smooth = counts + PRIOR_COUNT * channel / max(channel.sum(), 1)
    escape = smooth[:, [0]] + smooth[:, [-1]]
    rows = np.concatenate([escape, smooth[:, 1:-1]], axis=1)
    rows /= rows.sum(axis=1, keepdims=True)
    rare = rows * TOTAL < 0.5
    rare[:, 0] = False
    rows[:, 0] += np.where(rare, rows, 0).sum(axis=1)
    rows[rare] = 0
    return np.stack([to_total(row) for row in rows])


def to_total(shares: Floats) -> Integers:
    """Shares -> frequencies with the sum 2^12: at least 1 for the escape (the first) and for what has a share."""
    frequencies = np.where(shares > 0, np.maximum(np.rint(shares * TOTAL), 1), 0).astype(np.int64)
    frequencies[0] = max(frequencies[0], 1)
    while (missing := TOTAL - int(frequencies.sum())) != 0:
        step = 1 if missing > 0 else -1
        open_ = frequencies > (0 if step > 0 else 1)
        gain = np.where(open_, step * shares / np.maximum(frequencies, 1), -np.inf)
        best = np.argsort(-gain, kind="stable")[: min(abs(missing), int(open_.sum()))]
        frequencies[best] += step
    return frequencies
