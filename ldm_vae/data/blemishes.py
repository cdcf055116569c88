"""Blemishes made on good images, for networks that learn to find them."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, map_coordinates

from ldm_vae.data.corruption import Pair
from ldm_vae.data.images import Pixels

SMALLEST_BLEMISH, LARGEST_BLEMISH = 1.0, 0.4
"""Radii: in pixels, and as a share of the shorter side."""


def blemished(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W, C) in [0, 1] with one region brighter or darker, or copied from another place and rotated.

    The region is an ellipse with a rough outline, up to 7 times as long as wide, of log-uniform radius. To find it, a
    network has to know what belongs there: the idea of CutPaste (Li et al. 2021) and DRAEM (Zavrtanik et al. 2021),
    without their textures of other images.
    """
    height, width = values.shape[:2]
    radius = log_uniform(SMALLEST_BLEMISH, LARGEST_BLEMISH * min(height, width), rng)
    longer = math.exp(rng.uniform(0, 1))
    angle = rng.uniform(0, math.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32) - rng.uniform(0, 1, (2, 1, 1)) * [[[height]], [[width]]]
    along, across = (x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle))
    rough = gaussian_filter(rng.standard_normal((height, width), dtype=np.float32), max(radius / 2, 0.6))
    outline = (along / (radius * longer)) ** 2 + (across * longer / radius) ** 2 + 0.5 * rough / rough.std()
    share = gaussian_filter((outline < 1).astype(np.float32), 0.5)[:, :, None]
    if rng.random() < 0.5:
        other = values * math.exp(rng.normal(0, 0.35))
    else:
        turn, shift = rng.uniform(0, 2 * math.pi), rng.uniform(0, 1, 2) * [height, width]
        places = (
            y * math.cos(turn) - x * math.sin(turn) + shift[0],
            y * math.sin(turn) + x * math.cos(turn) + shift[1],
        )
        turned = [map_coordinates(values[:, :, c], places, order=1, mode="mirror") for c in range(values.shape[2])]
        other = np.stack(turned, axis=2) + rng.normal(0, 0.05)
    return np.asarray(values + share * (other - values), np.float32)


SCRATCHES = 0.35
"""Their share of all blemishes."""
VISIBLE = 3 / 255
"""The least change that counts as one."""


def with_blemishes(pixels: Pixels, rng: np.random.Generator, *, most: int = 3) -> Pair:
    """Pixels (H, W, C) -> the same in another light with up to `most` blemishes or scratches, and a map of these.

    The map (H, W, 1), uint8, is 255 on them and 0 elsewhere, as in DRAEM (Zavrtanik et al. 2021, section 3.2).
    """
    top = 1.0 if pixels.dtype == np.float32 else float(np.iinfo(pixels.dtype).max)
    values = relit(pixels.astype(np.float32) / top, rng)
    before = values.clip(0, 1)
    for _ in range(rng.integers(most + 1)):
        values = scratched(values, rng) if rng.random() < SCRATCHES else blemished(values, rng)
    values = values.clip(0, 1)
    scaled = values * top if pixels.dtype == np.float32 else (values * top).round()
    changed = np.abs(values - before).max(axis=2, keepdims=True) > VISIBLE
    return Pair(input=scaled.astype(pixels.dtype), target=255 * changed.astype(np.uint8))


def relit(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W, C) in [0, 1] with another overall brightness, which also varies smoothly across it."""
    sigma = log_uniform(6, 30, rng)
    field = gaussian_filter(rng.standard_normal(values.shape[:2], dtype=np.float32), sigma, mode="reflect")
    field -= field.mean()
    field *= 0.2 * rng.random() / max(field.std(), 1e-6)
    return np.asarray(values * np.exp(rng.normal(0, 0.15) + field)[:, :, None], np.float32)


def scratched(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W, C) in [0, 1] with a thin line across it, straight or winding, darker or brighter."""
    height, width = values.shape[:2]
    scale = 4  # lines of half a pixel
    step = log_uniform(2, max(0.1 * min(height, width), 3), rng)
    bend, angle = abs(rng.normal(0, 0.4)), rng.uniform(0, 2 * math.pi)
    places = [rng.uniform(0, 1, 2) * [width, height]]
    for _ in range(rng.integers(3, 12)):
        angle += rng.normal(0, bend)
        places.append(places[-1] + step * np.array([math.cos(angle), math.sin(angle)]))
    mask = Image.new("L", (width * scale, height * scale))
    wide = round(scale * log_uniform(0.5, 3, rng))
    ImageDraw.Draw(mask).line([tuple(scale * p) for p in places], fill=255, width=max(wide, 1))
    share = np.asarray(mask.resize((width, height), Image.Resampling.BOX), np.float32)[:, :, None] / 255
    share = gaussian_filter(share, (0.4, 0.4, 0))
    return np.asarray(values * (1 + share * (math.exp(rng.normal(0, 0.5)) - 1)), np.float32)


def log_uniform(low: float, high: float, rng: np.random.Generator) -> float:
    """A number whose logarithm is uniform; `low` where `high` is less."""
    return math.exp(rng.uniform(math.log(low), math.log(max(low, high))))
