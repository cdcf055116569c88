"""Grids of images to look at: originals, reconstructions and errors."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.images import centre_square
from ldm_vae.data.sources import Source, shuffled, usable
from ldm_vae.errors import nothing_usable

MAX_TRIES = 1000
ERROR_GAIN = 4
GAP = 4
LABEL_HEIGHT = 16


def validation_images(source: Source, *, side: int, count: int = 32, seed: int = 0) -> tuple[Tensor, dict[str, str]]:
    """Up to `count` images (N, C, side, side) in [-1, 1], always the same, and the bad ones: name -> reason.

    Raises:
        DataError: none of those tried is usable.
    """
    images: list[Tensor] = []
    bad: dict[str, str] = {}
    indices = islice(shuffled(source, seed), MAX_TRIES)
    for _, sample in islice(usable(source, bad, indices=indices), count):
        images.append(to_images(centre_square(sample.pixels, side)))
    if not images:
        raise nothing_usable(bad)
    return torch.stack(images), bad


def visible(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) -> uint8 (N, H, W, 3): grey repeated, of many channels the first three."""
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return to_pixels(shown)


def reconstruction_grid(images: Tensor, reconstructions: Tensor, inputs: Tensor | None = None) -> Image.Image:
    """A column an image, in rows: originals, reconstructions, and absolute errors times ERROR_GAIN.

    `inputs`, where they differ from the originals, have a row of their own.
    """
    errors = (images - reconstructions).abs() * ERROR_GAIN - 1
    rows = [
        ("originals", visible(images)),
        *([] if inputs is None else [("inputs", visible(inputs))]),
        ("reconstructions", visible(reconstructions)),
        (f"absolute errors x {ERROR_GAIN}", visible(errors)),
    ]
    return labelled_rows(rows)


def heat_map(image: Tensor, reconstruction: Tensor, values: np.ndarray, threshold: float) -> Image.Image:
    """Side by side: an image (C, H, W), its reconstruction, and the image with a map (H, W) over it.

    The map shows in red from half of the threshold on, fully from one and a half times the threshold on.
    """
    original, reconstructed = (visible(x[None])[0] for x in (image, reconstruction))
    strength = np.clip(values / max(threshold, 1e-12) - 0.5, 0, 1)[:, :, None]
    marked = original * (1 - 0.7 * strength) + np.array([255, 0, 0]) * 0.7 * strength
    gap = np.full((original.shape[0], GAP, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([original, gap, reconstructed, gap, marked.round().astype(np.uint8)], axis=1))


def labelled_rows(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Rows of pixels (N, H, W, 3) below their labels, as one grid."""
    count, height, width = rows[0][1].shape[:3]
    grid = Image.new("RGB", (count * (width + GAP) + GAP, len(rows) * (height + LABEL_HEIGHT + GAP)), "white")
    draw = ImageDraw.Draw(grid)
    for r, (label, pixels) in enumerate(rows):
        top = r * (height + LABEL_HEIGHT + GAP)
        draw.text((GAP, top + 2), label, fill="black")
        for c, tile in enumerate(pixels):
            grid.paste(Image.fromarray(tile), (GAP + c * (width + GAP), top + LABEL_HEIGHT))
    return grid


def middle(pixels: np.ndarray, side: int) -> np.ndarray:
    """The middle side x side of pixels (H, W, C), continued with black where the image is smaller."""
    y, x = (max((n - side) // 2, 0) for n in pixels.shape[:2])
    part = pixels[y : y + side, x : x + side]
    return np.pad(part, ((0, side - part.shape[0]), (0, side - part.shape[1]), (0, 0)))
