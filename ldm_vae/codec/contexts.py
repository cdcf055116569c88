"""Which table codes a symbol: decided by the symbols before it, in integers, so that every machine decides alike.

A symbol is predicted by a linear combination of its taps, decoded neighbours in its own channel and in those before it;
a second combination, of their magnitudes, says how far off the prediction may be (the idea of CALIC, Wu & Memon 1997).
What is coded is the rest, by the table of (channel, activity, phase of the prediction). docs/file-format.md has it all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ldm_vae.codec import rans
from ldm_vae.codec.bitstream import Varints, varint
from ldm_vae.codec.rans import Integers
from ldm_vae.errors import CorruptError

BORDER = 2
"""Zeros around each channel: how far a tap may reach within a row or a column."""
CHANNEL_DELAY = 4
"""In wavefronts: a channel is this far ahead of the next, so that all 3x3 neighbours there are decoded."""
MAGNITUDE = (1 << 15) - 1
"""Taps are clipped to this either way: no sum overflows, whatever the symbols are."""
WEIGHT_BITS = 12
NUM_PHASES = 3
PHASES = (1 << (WEIGHT_BITS - 3), 3 << (WEIGHT_BITS - 3))
"""Distances of a prediction from the nearest integer, 1/8 and 3/8, that part the phases."""
ESCAPE = 0
INT32 = (-(1 << 31), (1 << 31) - 1)


@dataclass(frozen=True)
class Contexts:
    """The integers that choose tables, for C channels with K taps each. Those of one quality; see `tables.Tables`.

    Attributes:
        taps: (C, K, 3) offsets (channel, y, x), channel <= 0: (0, 0, -1) is the left neighbour. At most BORDER away in
            each way, and decoded before by the order of `wavefronts`.
        mean_weights: (C, K), in units of 2^-12, within int16.
        activity_weights: (C, K), at least 0, within int16.
        thresholds: (C, A - 1) ascending: the activity is the number of them that it reaches.
        frequencies: (C * A * NUM_PHASES, S), tables by channel, activity and phase. Symbol 0 is the escape, and symbol
            s stands for the rest s - 1 - `reach`.
    """

    taps: Integers
    mean_weights: Integers
    activity_weights: Integers
    thresholds: Integers
    frequencies: rans.Frequencies

    def __post_init__(self) -> None:
        channels, _, _ = self.taps.shape
        dc, dy, dx = np.moveaxis(self.taps, 2, 0)
        decoded = dx + 2 * dy + CHANNEL_DELAY * dc < 0
        inside = (dc <= 0) & (dc >= -np.arange(channels)[:, None]) & (np.abs(dy) <= BORDER) & (np.abs(dx) <= BORDER)
        unused = (self.mean_weights == 0) & (self.activity_weights == 0)
        if not (inside & (decoded | unused)).all():
            raise ValueError("a tap reaches for a symbol that is not decoded yet")
        weights = np.stack([self.mean_weights, self.activity_weights])
        if np.abs(weights).max(initial=0) > MAGNITUDE or self.activity_weights.min(initial=0) < 0:
            raise ValueError("a weight does not fit into 16 bits, or is negative where it must not be")
        if len(self.frequencies) != channels * self.num_activities * NUM_PHASES:
            raise ValueError(f"{len(self.frequencies)} tables for {channels} channels")

    @property
    def num_channels(self) -> int:
        return len(self.taps)

    @property
    def num_activities(self) -> int:
        return self.thresholds.shape[1] + 1

    @property
    def reach(self) -> int:
        """The largest rest, either way, that has a symbol of its own."""
        return self.frequencies.frequency.shape[1] // 2 - 1

    def predict(self, volume: Integers, places: Integers, channels: Integers) -> tuple[Integers, Integers]:
        """Mean in units of 2^-12 (n,) and activity (n,), from what is decoded around flat places of the volume."""
        _, height, width = volume.shape
        offsets = self.taps @ np.array([height * width, width, 1])  # (C, K)
        near = volume.reshape(-1)[places[:, None] + offsets[channels]]
        near = np.clip(near, -MAGNITUDE, MAGNITUDE)  # (n, K)
        mean = (near * self.mean_weights[channels]).sum(axis=1)
        return mean, (np.abs(near) * self.activity_weights[channels]).sum(axis=1)

    def at(self, volume: Integers, places: Integers, channels: Integers) -> tuple[Integers, Integers, Integers]:
        """Prediction, sign of what is off, and table (n,) at flat `places` of the padded volume."""
        mean, activity = self.predict(volume, places, channels)
        prediction, sign, phase = split_mean(mean)
        bins = (activity[:, None] >= self.thresholds[channels]).sum(axis=1)
        return prediction, sign, (channels * self.num_activities + bins) * NUM_PHASES + phase


def split_mean(mean: Integers) -> tuple[Integers, Integers, Integers]:
    """A mean in units of 2^-12 -> the nearest integer, the side on which it lies of it (-1 or 1), and its phase."""
    prediction = (mean + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS
    off = mean - (prediction << WEIGHT_BITS)  # in [-2^11, 2^11)
    return prediction, np.where(off < 0, -1, 1), (np.abs(off)[:, None] >= PHASES).sum(axis=1)


@lru_cache(maxsize=8)
def wavefronts(channels: int, height: int, width: int) -> tuple[Integers, Integers, Integers]:
    """The order of decoding: flat places in the padded volume, their channels, and the wavefronts' sizes.

    Wavefront t holds the symbols with x + 2 y + 4 c = t, sorted by channel, then by row. Within one, no symbol is
    another's tap.
    """
    c, y, x = (i.ravel() for i in np.indices((channels, height, width)))
    time = x + 2 * y + CHANNEL_DELAY * c
    order = np.argsort(time, kind="stable")  # of equal times, the lower channel and row come first
    places = (c * (height + 2 * BORDER) + y + BORDER) * (width + 2 * BORDER) + x + BORDER
    return places[order], c[order], np.bincount(time)


def padded(symbols: Integers) -> Integers:
    """Symbols (C, h, w) with zeros around each channel, as int64: the volume in which taps reach."""
    return np.pad(symbols.astype(np.int64), ((0, 0), (BORDER, BORDER), (BORDER, BORDER)))


def rests_of(symbols: Integers, contexts: Contexts) -> tuple[Integers, Integers]:
    """What is coded of int32 symbols (C, h, w), and by which table, in the order of decoding: (N,) each."""
    volume = padded(symbols)
    places, channels, _ = wavefronts(*symbols.shape)
    rests, tables = (np.empty(len(places), np.int64) for _ in range(2))
    for begin in range(0, len(places), 1 << 15):  # in parts, as the taps of all would fill the memory
        part = slice(begin, begin + (1 << 15))
        prediction, sign, tables[part] = contexts.at(volume, places[part], channels[part])
        rests[part] = (volume.reshape(-1)[places[part]] - prediction) * sign
    return rests, tables


def encode_symbols(symbols: Integers, contexts: Contexts, *, lanes: int) -> bytes:
    """int32 symbols (C, h, w) -> bytes: the length of the escapes (varint), the escapes, and the lanes' words.

    Raises:
        ValueError: another number of channels than the contexts', or values outside int32.
    """
    if symbols.ndim != 3 or len(symbols) != contexts.num_channels:
        raise ValueError(f"symbols of shape {symbols.shape}: ({contexts.num_channels}, h, w) are needed")
    if symbols.min(initial=0) < INT32[0] or symbols.max(initial=0) > INT32[1]:
        raise ValueError("a symbol does not fit into 32 bits")
    rests, tables = rests_of(symbols, contexts)
    coded = np.where(np.abs(rests) <= contexts.reach, rests + contexts.reach + 1, ESCAPE)
    coded[contexts.frequencies.frequency[tables, coded] == 0] = ESCAPE
    escaped = rests[coded == ESCAPE]
    zigzag = np.where(escaped < 0, -2 * escaped - 1, 2 * escaped)
    escapes = b"".join(varint(v) for v in zigzag.tolist())
    _, _, groups = wavefronts(*symbols.shape)
    words = rans.encode(coded, tables, groups, contexts.frequencies, lanes=lanes)
    return varint(len(escapes)) + escapes + words


def decode_symbols(payload: bytes, shape: tuple[int, int, int], contexts: Contexts, *, lanes: int) -> Integers:
    """The int32 symbols (C, h, w) that `encode_symbols` was given. Raises CorruptError."""
    escapes = Varints(payload)
    length = escapes.next()
    begin = escapes.position
    decoder = rans.RansDecoder(payload[begin + length :], lanes=lanes)
    volume = padded(np.zeros(shape, np.int64))
    flat = volume.reshape(-1)
    places, channels, groups = wavefronts(*shape)
    end = 0
    for size in groups.tolist():
        part = slice(end, end := end + size)
        prediction, sign, tables = contexts.at(volume, places[part], channels[part])
        coded = decoder.decode(tables, contexts.frequencies)
        rests = coded - contexts.reach - 1
        for i in np.nonzero(coded == ESCAPE)[0]:
            zigzag = escapes.next()
            rests[i] = -(zigzag + 1 >> 1) if zigzag & 1 else zigzag >> 1
        flat[places[part]] = prediction + rests * sign
    decoder.finish()
    if escapes.position != begin + length:
        raise CorruptError("the escaped symbols do not end where they should")
    symbols = volume[:, BORDER:-BORDER, BORDER:-BORDER]
    if symbols.min(initial=0) < INT32[0] or symbols.max(initial=0) > INT32[1]:
        raise CorruptError("a symbol does not fit into 32 bits")
    return symbols.astype(np.int32)
