"""Damaged and hostile bytes."""

from __future__ import annotations

import numpy as np

HEADER = 60
"""Bytes at the beginning that are mutated more often than others."""


def mutate(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Bits flipped, bytes set, parts cut out, doubled, moved, or taken from another file."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if not out:
            break
        at = int(rng.integers(len(out)))
        if rng.random() < 0.4:
            at = int(rng.integers(min(len(out), HEADER)))  # rarely reached otherwise
        length = int(rng.integers(1, 20))
        match rng.integers(7):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at] = int(rng.choice([0, 1, 127, 128, 255]))
            case 2:
                del out[at:]
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = out[at : at + length]
            case 5:
                out[at : at + length] = rng.bytes(length)
            case 6:
                other = others[int(rng.integers(len(others)))]
                out[at:] = other[at:]
    return bytes(out)
