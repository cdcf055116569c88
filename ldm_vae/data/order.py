"""The order of samples: pure functions of (seed, position), so that resuming and splitting change nothing."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

MASK = 2**64 - 1
ROUNDS = 6


class Stream(IntEnum):
    """What a random number is for. Different streams of one position are independent."""

    CROP = 1
    POSTERIOR = 2
    PROCEDURAL = 3
    TIME = 4
    NOISE = 5
    FLIP = 6
    LABEL = 7
    VALIDATION = 8
    QUANTISER = 9
    CORRUPTION = 10


def mix(value: int) -> int:
    """A bijection of 64-bit integers that scatters them (SplitMix64's finaliser, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def permute(offset: int, size: int, key: int) -> int:
    """Where a keyed permutation of range(size) sends `offset`: a Feistel network with cycle walking, no memory.

    Black & Rogaway 2002, section 4 ("Ciphers with Arbitrary Finite Domains").
    """
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    low = (1 << half) - 1
    while True:
        left, right = offset >> half, offset & low
        for i in range(ROUNDS):
            left, right = right, left ^ (mix(right ^ mix(key + i)) & low)
        offset = left << half | right
        if offset < size:
            return offset


def index_at(position: int, *, size: int, seed: int) -> int:
    """The sample at `position` of the endless sequence: each of `size` samples exactly once an epoch."""
    epoch, offset = divmod(position, size)
    return permute(offset, size, mix(mix(seed) ^ epoch))


def generator_at(seed: int, position: int, stream: Stream) -> np.random.Generator:
    """The random numbers of one position: a counter-based generator (Philox, Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed & MASK, position & MASK], counter=[0, 0, 0, int(stream)]))


def noise_at(seed: int, positions: list[int], shape: tuple[int, ...], stream: Stream) -> np.ndarray:
    """Standard normal float32 (B, *shape); row b depends on (seed, positions[b], stream) alone."""
    rows = [generator_at(seed, p, stream).standard_normal(shape, dtype=np.float32) for p in positions]
    return np.stack(rows)


def positions_of(step: int, *, batch_size: int, rank: int = 0, num_processes: int = 1) -> range:
    """The positions that one process takes of global batch `step`, which is [step * B, (step + 1) * B)."""
    share = batch_size // num_processes
    start = step * batch_size + rank * share
    return range(start, start + share)
