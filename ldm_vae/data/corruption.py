"""What a denoising autoencoder is to undo: noise, missing pixels, compression and blemishes, on pixels as in files."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldm_vae.data.blemishes import blemished
from ldm_vae.data.images import Pixels
from ldm_vae.errors import BadImageError, ConfigError

UNKNOWN_LEVEL = -1.0
RANGES = {
    "gaussian": (0.0, 255.0),
    "masking": (0.0, 1.0),
    "jpeg": (1.0, 100.0),
    "poisson": (1e-3, 1e6),
    "blemishes": (0.0, 100.0),
}
"""Kinds, and the least and the largest of what each is given."""
FORM = "gaussian:SIGMA, masking:RATIO, jpeg:QUALITY, poisson:PEAK or blemishes:COUNT, or LOW-HIGH for a range"


@dataclass(frozen=True)
class Corruption:
    """A kind of damage, and how much: drawn evenly from low to high for each image.

    gaussian: normal noise of that standard deviation, in 0..255. poisson: shot noise of so many counts at white.
    masking: that share of the pixels becomes mid-grey (masking noise, Vincent et al. 2008, section 2.3). jpeg: of that
    quality, for grey and colour. blemishes: so many regions that do not belong there, see `blemished`.
    What comes out is clipped and rounded, as a file would hold it.
    """

    kind: str
    low: float
    high: float

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> tuple[Pixels, float]:
        """Pixels (H, W, C) -> damaged pixels of the same type, and the noise level: -1 where there is none to tell.

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
            case "blemishes":
                for _ in range(round(amount)):
                    values = blemished(values, rng)
        values = values.clip(0, 1) * top
        return (values if pixels.dtype == np.float32 else values.round()).astype(pixels.dtype), level


def as_jpeg(values: np.ndarray, quality: int) -> np.ndarray:
    channels = values.shape[2]
    if channels not in (1, 3):
        raise BadImageError(f"images of {channels} channels cannot be JPEG: choose another --corruption")
    pixels = (values * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(file, format="JPEG", quality=quality)
    return np.atleast_3d(np.asarray(Image.open(file))).astype(np.float32) / 255


def parse_corruption(text: str) -> Corruption:
    """`gaussian:25`, `gaussian:0-55`, `masking:0.5`, `jpeg:10-40`, `poisson:30`, `blemishes:0-3` -> a Corruption.

    Raises:
        ConfigError: another kind, or numbers out of its range.
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
