"""Colours for fully transparent pixels: nobody sees them, and noise there would cost bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ldm_vae.codec.picture import Picture
from ldm_vae.data.images import Pixels, resize, rounded, white
from ldm_vae.data.large import STRIP, let_go, strips

CELL = 8
"""Pixels: the side of the squares whose mean colours are spread over those that have none."""


def smooth_transparent(picture: Picture) -> Picture:
    """The picture with smooth colours under its fully transparent pixels, and all others as they are.

    The pixels of a picture on disk are changed in place.
    """
    pixels, alpha = picture.pixels, picture.alpha
    if alpha is None or alpha.all():
        return picture
    colours = spread(*cells(pixels, alpha))
    filled = pixels if isinstance(pixels, np.memmap) else pixels.copy()
    height, width = alpha.shape
    for top, bottom in strips(height, width):
        hidden = alpha[top:bottom] == 0
        smooth = resize(colours, (bottom - top, width), (0, top / CELL, width / CELL, bottom / CELL))
        filled[top:bottom][hidden] = rounded(smooth[hidden] * white(pixels), pixels.dtype)
        let_go(filled)
    return replace(picture, pixels=filled)


def cells(pixels: Pixels, alpha: Pixels) -> tuple[Pixels, Pixels]:
    """Of each cell: the sum (h, w, C) of the visible pixels' colours in 0..1, and their number (h, w, 1); float32."""
    height, width = alpha.shape
    rows = max(STRIP // width // CELL, 1) * CELL
    sums, counts = [], []
    for top in range(0, height, rows):
        visible = (alpha[top : top + rows] > 0)[:, :, None].astype(np.float32)
        sums.append(summed(pixels[top : top + rows] * visible, CELL) / white(pixels))
        counts.append(summed(visible, CELL))
        let_go(pixels)
    return np.concatenate(sums), np.concatenate(counts)


def summed(values: Pixels, side: int) -> Pixels:
    """Of squares of so many values (H, W, C); those of the last row and column may be smaller."""
    for axis in (0, 1):
        values = np.add.reduceat(values, np.arange(0, values.shape[axis], side), axis=axis)
    return values


def spread(sums: Pixels, counts: Pixels) -> Pixels:
    """Means (h, w, C); where there is nothing to take one of, that of a wider neighbourhood."""
    means = sums / np.maximum(counts, 1)
    height, width = means.shape[:2]
    if counts.all() or height * width == 1:
        return means
    wider = spread(summed(sums, 2), summed(counts, 2))
    return np.where(counts > 0, means, resize(wider, (height, width), (0, 0, width / 2, height / 2)))
