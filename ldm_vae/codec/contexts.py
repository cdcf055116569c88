"""What decides the probabilities of a symbol: a prediction from the symbols before it, a tree, and the tree's tables.

A symbol is predicted by a linear combination of its taps, decoded neighbours in its own channel and in those before it;
a second combination, of their magnitudes, says how far off the prediction may be (the idea of CALIC, Wu & Memon 1997).
From these, from the errors around and from the place, its channel's tree chooses the table of what is off. All of it is
in integers, so that every machine decides alike. docs/file-format.md specifies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ldm_vae.codec import loops
from ldm_vae.codec.loops import BORDER, LN2, LOW, MAGNITUDE, MAX_TOKENS, NUM_FEATURES, TOTAL, Integers
from ldm_vae.errors import CorruptError

MAX_WEIGHTS = 1 << 17
"""The sum of a channel's weights, either kind: no feature outgrows 32 bits."""
MAX_DEPTH = 32
INT32 = (-(1 << 31), (1 << 31) - 1)
Floats = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Contexts:
    """The integers that choose tables, and the tables, for C channels with K taps each. Those of one step.

    Attributes:
        taps: (C, K, 3) int8 offsets (channel, y, x), channel <= 0: (0, 0, -1) is the left neighbour. At most BORDER
            away in each way, and decoded before: channels come one after the other, each row by row.
        weights: (2, C, K) int16 of the mean, in units of 2^-12, and of the activity, at least 0.
        roots: (C,) int32, the node where a channel's tree begins.
        nodes: (N, 3) int32: (feature, threshold, node) goes on at the next node if the feature is at most the
            threshold, else at the node it names, which lies behind; (-1, table, 0) is a leaf.
        frequencies: (T, S) uint16, tables with the sum 2^14 each. The last token is the escape.

    Raises:
        ValueError: a tap, weight, node or table that cannot be.
    """

    taps: Integers
    weights: Integers
    roots: Integers
    nodes: Integers
    frequencies: Integers

    def __post_init__(self) -> None:
        check_frequencies(self.frequencies)
        check_taps(self.taps, self.weights)
        check_trees(self.roots, self.nodes, num_tables=len(self.frequencies))
        if len(self.roots) != self.num_channels:
            raise ValueError(f"{len(self.roots)} trees for {self.num_channels} channels")

    @property
    def num_channels(self) -> int:
        return len(self.taps)

    @cached_property
    def starts(self) -> Integers:
        """(T, S + 1) cumulated frequencies."""
        return np.pad(np.cumsum(self.frequencies, axis=1, dtype=np.int32), ((0, 0), (1, 0)))

    @cached_property
    def nats(self) -> Floats:
        """(T, S) float32: what each token costs; one that its table does not have costs an escape."""
        escapes = np.log(TOTAL / self.frequencies[:, -1:]) + 32 * LN2
        nats = np.log(TOTAL / np.maximum(self.frequencies, 1))
        nats[:, -1:] = escapes
        return np.where(self.frequencies == 0, escapes, nats).astype(np.float32)


def check_taps(taps: Integers, weights: Integers) -> None:
    """Raises ValueError for a tap that is not decoded yet, and for weights that are too large."""
    if taps.ndim != 3 or taps.shape[2] != 3 or weights.shape != (2, *taps.shape[:2]):
        raise ValueError(f"taps of shape {taps.shape} with weights of shape {weights.shape}")
    dc, dy, dx = np.moveaxis(taps.astype(int), 2, 0)
    before = (dc < 0) | (dc == 0) & ((dy < 0) | (dy == 0) & (dx < 0))
    inside = (dc >= -np.arange(len(taps))[:, None]) & (np.abs(dy) <= BORDER) & (np.abs(dx) <= BORDER)
    unused = (weights == 0).all(axis=0)
    if not (before & inside | unused).all():
        raise ValueError("a tap reaches for a symbol that is not decoded yet")
    if np.abs(weights.astype(int)).sum(axis=2).max(initial=0) > MAX_WEIGHTS or weights[1].min(initial=0) < 0:
        raise ValueError("weights are too large, or negative where they must not be")


def check_trees(roots: Integers, nodes: Integers, *, num_tables: int) -> None:
    """Raises ValueError for a feature, node or table that is not there, a cycle, or a tree that is too deep."""
    if roots.ndim != 1 or nodes.ndim != 2 or nodes.shape[1:] != (3,) or not len(nodes):
        raise ValueError(f"trees of shapes {roots.shape} and {nodes.shape}")
    feature, value, above = nodes.astype(int).T
    leaf = feature == -1
    if (feature < -1).any() or (feature >= NUM_FEATURES).any():
        raise ValueError("a tree asks for a feature that is not there")
    if (value[leaf] < 0).any() or (value[leaf] >= num_tables).any():
        raise ValueError("a tree names a table that is not there")
    index = np.arange(len(nodes))
    if (roots < 0).any() or (roots >= len(nodes)).any() or (above[~leaf] >= len(nodes)).any():
        raise ValueError("a tree names a node that is not there")
    if (above[~leaf] <= index[~leaf] + 1).any():  # so that each step of a walk leads on
        raise ValueError("a tree leads back, or not to two nodes")
    level = np.unique(roots)
    for _ in range(MAX_DEPTH + 1):
        inner = level[~leaf[level]]
        if not len(inner):
            return
        level = np.unique(np.concatenate([inner + 1, above[inner]]))
    raise ValueError(f"a tree is deeper than {MAX_DEPTH}")


def check_frequencies(frequencies: Integers) -> None:
    """Raises ValueError for tables of another shape or sum, or without an escape."""
    if frequencies.ndim != 2 or not 1 <= frequencies.shape[1] <= MAX_TOKENS + 1:
        raise ValueError(f"frequencies of shape {frequencies.shape}: (tables, tokens <= {MAX_TOKENS + 1}) are needed")
    f = frequencies.astype(int)
    if f.min(initial=0) < 0 or (f.sum(axis=1) != TOTAL).any() or (f[:, -1] < 1).any():
        raise ValueError(f"every table's frequencies must be at least 0, with an escape, and have the sum {TOTAL}")


def padded(symbols: Integers) -> Integers:
    """Symbols (C, h, w), clipped, with zeros around each channel, as int32: the volume in which taps reach."""
    return np.pad(
        np.clip(symbols, -MAGNITUDE, MAGNITUDE).astype(np.int32), ((0, 0), (BORDER, BORDER), (BORDER, BORDER))
    )


def slots_of(symbols: Integers, contexts: Contexts) -> Integers:
    """Start and frequency, 16 bits each (n,), of what is coded of symbols (C, h, w), in the order of decoding."""
    slots = np.empty(5 * symbols.size, np.uint32)  # an escape and four bytes are the most of a symbol
    c = contexts
    count = loops.encode(symbols, padded(symbols), c.taps, c.weights, c.roots, c.nodes, c.starts, slots)
    return slots[:count]


def nats_of(symbols: Integers, contexts: Contexts) -> float:
    """The length of the code of int32 symbols (C, h, w)."""
    return float(np.log(TOTAL / (slots_of(symbols, contexts) & 0xFFFF)).sum())


def rate_slopes(values: Floats, contexts: Contexts) -> Floats:
    """By how many nats the code of values (C, h, w), once rounded, grows with each of them: float32, as their shape.

    In the contexts of the rounded values: what a value does to the contexts of later ones is left out.
    """
    symbols = np.clip(np.rint(values.astype(np.float64)), *INT32).astype(np.int32)
    slopes, c = np.empty(values.shape, np.float32), contexts
    near = padded(symbols)
    loops.rate_slopes(values, symbols, near, c.taps, c.weights, c.roots, c.nodes, c.nats, slopes)
    return slopes


def encode_symbols(symbols: Integers, contexts: Contexts) -> bytes:
    """int32 symbols (C, h, w) -> bytes: the last state of rANS and its words.

    Raises:
        ValueError: another number of channels than the contexts', or values outside int32.
    """
    if symbols.ndim != 3 or len(symbols) != contexts.num_channels:
        raise ValueError(f"symbols of shape {symbols.shape}: ({contexts.num_channels}, h, w) are needed")
    if symbols.min(initial=0) < INT32[0] or symbols.max(initial=0) > INT32[1]:
        raise ValueError("a symbol does not fit into 32 bits")
    return push(slots_of(np.ascontiguousarray(symbols, np.int32), contexts))


def push(slots: Integers) -> bytes:
    """rANS: starts and frequencies -> its last state (uint32), then words (uint16), little-endian."""
    words = np.empty(len(slots), np.uint16)
    state, begin = loops.push(slots, words)
    return state.to_bytes(4, "little") + words[begin:].astype("<u2").tobytes()


def decode_symbols(payload: bytes, shape: tuple[int, int, int], contexts: Contexts) -> Integers:
    """The int32 symbols (C, h, w) that `encode_symbols` was given. Raises CorruptError."""
    if len(payload) < 4 or len(payload) % 2:
        raise CorruptError(f"{len(payload)} bytes cannot hold a state and whole words")
    state, words = int.from_bytes(payload[:4], "little"), np.frombuffer(payload[4:], "<u2").astype(np.uint16)
    if state < LOW:
        raise CorruptError("the coder's state is too small")
    symbols = np.zeros(shape, np.int32)
    c = contexts
    state, end = loops.decode(
        symbols, padded(symbols), c.taps, c.weights, c.roots, c.nodes, c.starts, np.int64(state), words
    )
    if end < 0:
        raise CorruptError("the coded words end too early")
    if end != len(words) or state != LOW:
        raise CorruptError("what was decoded does not end where the coded words do")
    return symbols
