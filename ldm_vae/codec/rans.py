"""Range asymmetric numeral systems on interleaved lanes: symbols to 16-bit words and back, in NumPy.

Duda 2014 ("Asymmetric numeral systems", arXiv:1311.2540, section 3), with lanes as in Giesen 2014 ("Interleaved entropy
coders", arXiv:1402.3392). Every lane has a 32-bit state in [2^16, 2^32) of its own, all read one stream of words.
docs/file-format.md specifies the bits. Nothing here imports torch or computes with floats.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from ldm_vae.errors import CorruptError

PRECISION = 12
"""A table's frequencies sum to 2^12."""
TOTAL = 1 << PRECISION
MAX_ALPHABET = 256
LOW = 1 << 16
"""The least state, and the one that every lane starts from."""

Integers = np.ndarray[Any, Any]


class Frequencies:
    """Tables of integer frequencies, ready for both directions.

    Args:
        frequencies: (T, S) of any integer type, S <= 256, each row with the sum 2^12. A symbol of frequency 0 cannot be
            coded by that table.

    Raises:
        ValueError: a shape, a negative frequency or a sum that cannot be.
    """

    def __init__(self, frequencies: Integers) -> None:
        f = np.asarray(frequencies).astype(np.int64)
        if f.ndim != 2 or not 1 <= f.shape[1] <= MAX_ALPHABET:
            raise ValueError(f"frequencies of shape {f.shape}: (tables, symbols <= {MAX_ALPHABET}) are needed")
        if f.min(initial=0) < 0 or (f.sum(axis=1) != TOTAL).any():
            raise ValueError(f"every table's frequencies must be at least 0 and have the sum {TOTAL}")
        self.frequency = f
        self.start = np.cumsum(f, axis=1) - f

    @cached_property
    def slots(self) -> Integers:
        """What each slot (T * 2^12,) means, in 32 bits: the symbol, its frequency less one, the slot's place in it."""
        tables, symbols = np.indices(self.frequency.shape)
        counts = self.frequency.ravel()
        packed = (symbols.ravel() << 24) | ((counts - 1) << 12)
        places = np.arange(len(self) * TOTAL) - np.repeat((self.start + tables * TOTAL).ravel(), counts)
        return (np.repeat(packed, counts) | places).astype(np.uint32)

    def __len__(self) -> int:
        return len(self.frequency)


def encode(symbols: Integers, tables: Integers, groups: Integers, frequencies: Frequencies, *, lanes: int) -> bytes:
    """Symbols -> the lanes' final states (uint32 each), then words (uint16), all little-endian.

    Args:
        symbols, tables: (N,), what to code and the table that codes it, in the order of decoding.
        groups: how many of them the decoder will ask for at a time, in order; the sum is N. Symbol i of a group goes to
            lane i mod `lanes`.

    Raises:
        ValueError: a symbol of frequency 0.
    """
    f = frequencies.frequency[tables, symbols]
    start = frequencies.start[tables, symbols]
    if not (f > 0).all():
        raise ValueError("a symbol has frequency 0 in its table: it must be escaped")
    limit = f << (32 - PRECISION)
    states = np.full(lanes, LOW, np.int64)
    words = []
    for begin, end in reversed(list(steps(groups, lanes))):  # a decoder undoes the last step first
        count = end - begin
        x = states[:count]
        full = x >= limit[begin:end]
        words.append(x[full] & 0xFFFF)
        x = np.where(full, x >> 16, x)
        quotient, rest = np.divmod(x, f[begin:end])
        states[:count] = (quotient << PRECISION) + start[begin:end] + rest
    stream = np.concatenate(words[::-1]) if words else np.zeros(0, np.int64)
    return states.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


def steps(groups: Integers, lanes: int) -> list[tuple[int, int]]:
    """Begin and end of what is coded at once: at most a symbol a lane, never across groups."""
    bounds = []
    begin = 0
    for size in groups.tolist():
        bounds += [(i, min(i + lanes, begin + size)) for i in range(begin, begin + size, lanes)]
        begin += size
    return bounds


class RansDecoder:
    """Undoes `encode`, a group at a time, so that what was decoded may choose the tables of what comes next.

    Raises:
        CorruptError: too short for the lanes' states, or a state that no encoder leaves.
    """

    def __init__(self, payload: bytes, *, lanes: int) -> None:
        if len(payload) < 4 * lanes or len(payload) % 2:
            raise CorruptError(f"{len(payload)} bytes cannot hold the states of {lanes} lanes and whole words")
        self.states = np.frombuffer(payload, "<u4", lanes).astype(np.int64)
        self.words = np.frombuffer(payload, "<u2", offset=4 * lanes).astype(np.int64)
        self.position = 0
        if (self.states < LOW).any():
            raise CorruptError("a lane's state is too small")

    def decode(self, tables: Integers, frequencies: Frequencies) -> Integers:
        """The next group of symbols (n,), given their tables (n,). Raises CorruptError when the words run out."""
        rows = tables.astype(np.int64) << PRECISION
        symbols = np.empty(len(rows), np.int64)
        lanes = len(self.states)
        for begin in range(0, len(rows), lanes):
            row = rows[begin : begin + lanes]
            x = self.states[: len(row)]
            slot = frequencies.slots[row + (x & (TOTAL - 1))].astype(np.int64)
            x = (((slot >> 12) & 0xFFF) + 1) * (x >> PRECISION) + (slot & 0xFFF)
            (low,) = np.nonzero(x < LOW)
            if len(low):
                end = self.position + len(low)
                if end > len(self.words):
                    raise CorruptError("the coded words end too early")
                x[low] = (x[low] << 16) | self.words[self.position : end]
                self.position = end
            self.states[: len(row)] = x
            symbols[begin : begin + lanes] = slot >> 24
        return symbols

    def finish(self) -> None:
        """Raises CorruptError unless every word was used and every lane is back at its first state."""
        if self.position != len(self.words) or (self.states != LOW).any():
            raise CorruptError("what was decoded does not end where the coded words do")
