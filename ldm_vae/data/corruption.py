"""What a denoising autoencoder learns to undo: noise, missing pixels and compression, on pixels as files hold them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from PIL import Image

from ldm_vae.data.images import Pixels
from ldm_vae.errors import BadImageError, ConfigError

UNKNOWN_LEVEL = -1.0
RANGES = {
    "gaussian": (0.0, 255.0),
    "masking": (0.0, 1.0),
    "jpeg": (1.0, 100.0),
    "poisson": (1e-3, 1e6),
}
"""Kinds, with the least and the largest amount of each."""
FORM = "gaussian:SIGMA, masking:RATIO, jpeg:QUALITY or poisson:PEAK, or LOW-HIGH for a range"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What a network sees, and what it is to give for it: pixels (H, W, C) of any channels."""

    input: Pixels
    target: Pixels
    noise_level: float = UNKNOWN_LEVEL
    """Standard deviation of the noise in the input, in 0..255, where the network is told."""


Pairing: TypeAlias = Callable[[Pixels, np.random.Generator], Pair]
"""Pixels (H, W, C) of an image -> the pair made of them, at random."""


@dataclass(frozen=True)
class Corruption:
    """A kind of damage, and its amount: drawn uniformly from low to high for each image.

    gaussian: normal noise of that standard deviation, in 0..255. poisson: shot noise of so many counts at white.
    masking: that share of the pixels becomes mid-grey (masking noise, Vincent et al. 2008, section 2.3). jpeg: of that
    quality, for grey and colour. The result is clipped and rounded, as a file would hold it.
    """

    kind: str
    low: float
    high: float

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pair:
        """Pixels (H, W, C) with damaged pixels of the same type, and the noise level: -1 but for Gaussian noise.

        Raises:
            BadImageError: channels that JPEG does not have.
        """
        amount = self.low + (self.high - self.low) * rng.random()
        top = 1.0 if pixels.dtype == np.float32 else float(np.iinfo(pixels.dtype).max)
        values = pixels.astype(np.float32) / top  # in [0, 1]
        level = UNKNOWN_LEVEL
        match self.kind:
            case "gaussian":
                values = values + amount / 255 * rng.standard_normal(values.shape, dtype=np.float32)
                level = amount
            case "poisson":
                values = rng.poisson(values * amount).astype(np.float32) / amount
            case "masking":
                values = np.where(rng.random((*values.shape[:2], 1)) < amount, np.float32(0.5), values)
            case "jpeg":
                values = as_jpeg(values, round(amount))
        values = values.clip(0, 1) * top
        damaged = (values if pixels.dtype == np.float32 else values.round()).astype(pixels.dtype)
        return Pair(input=damaged, target=pixels, noise_level=level)

    def told_half_the_time(self, pixels: Pixels, rng: np.random.Generator) -> Pair:
        """The same for training: of every second image, drawn at random, the noise level stays unknown."""
        told = rng.random() < 0.5
        pair = self(pixels, rng)
        return pair if told else replace(pair, noise_level=UNKNOWN_LEVEL)


def as_jpeg(values: np.ndarray, quality: int) -> np.ndarray:
    channels = values.shape[2]
    if channels not in (1, 3):
        raise BadImageError(f"images of {channels} channels cannot be JPEG: choose another --corruption")
    pixels = (values * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(file, format="JPEG", quality=quality)
    return np.atleast_3d(np.asarray(Image.open(file))).astype(np.float32) / 255


def parse_corruption(text: str) -> Corruption:
    """`gaussian:25`, `gaussian:0-55`, `masking:0.5`, `jpeg:10-40`, `poisson:30` -> a Corruption.

    Raises:
        ConfigError: an unknown kind, or numbers outside its range.
    """
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"([a-z]+):{number}(?:-{number})?", text)
    if not match or match[1] not in RANGES:
        raise ConfigError(f"--corruption {text} is not known: try {FORM}")
    low = float(match[2])
    high = float(match[3] or low)
    least, most = RANGES[match[1]]
    if not least <= low <= high <= most or not math.isfinite(high):
        raise ConfigError(f"--corruption {text}: {match[1]} goes from {least:g} to {most:g}, the lower number first")
    return Corruption(match[1], low, high)
