"""Parts of a picture or of its latents: what lies where, and what could not be decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_vae.data.images import Pixels

Box = tuple[int, int, int, int]
"""Top, left, bottom, right."""
MARK = (255, 0, 255)
"""Colour of the tiles that could not be decoded; grey pictures take its mean."""


def put(
    target: np.ndarray[Any, Any],
    target_box: Sequence[int],
    found: np.ndarray[Any, Any],
    box: Sequence[int],
    within: Sequence[int],
) -> None:
    """Writes what lies at `box` into a target that lies at `target_box`, as far as it is within both and a third."""
    top, left = (max(target_box[i], box[i], within[i]) for i in (0, 1))
    bottom, right = (min(target_box[i], box[i], within[i]) for i in (2, 3))
    shared = found[:, top - box[0] : bottom - box[0], left - box[1] : right - box[1]]
    y, x = target_box[:2]
    target[:, top - y : bottom - y, left - x : right - x] = shared


def mark(pixels: Pixels, box: Sequence[int]) -> None:
    """Paints what could not be decoded."""
    top, left, bottom, right = (max(i, 0) for i in box)
    colour = np.array(MARK if pixels.shape[2] == 3 else [sum(MARK) // 3]) * (257 if pixels.dtype == np.uint16 else 1)
    pixels[top:bottom, left:right] = colour
