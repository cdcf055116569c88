"""What a denoising autoencoder is to undo: noise, missing pixels, compression and blemishes, on pixels as in files."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, map_coordinates

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


SMALLEST_BLEMISH, LARGEST_BLEMISH = 1.0, 0.4
"""Radii: in pixels, and as a share of the shorter side."""


def blemished(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W, C) in [0, 1] with a region that is of other brightness, or from another place and turned.

    An ellipse with a rough outline, its radius log-uniform, up to 7 times as long as wide. To undo it a network has to
    know what belongs there: the idea of CutPaste (Li et al. 2021) and DRAEM (Zavrtanik et al. 2021), without their
    textures of other images.
    """
    height, width = values.shape[:2]
    largest = max(LARGEST_BLEMISH * min(height, width), SMALLEST_BLEMISH)
    radius = math.exp(rng.uniform(math.log(SMALLEST_BLEMISH), math.log(largest)))
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
"""Of all blemishes that are to be found."""
VISIBLE = 3 / 255
"""Changes up to this are none."""


def with_blemishes(pixels: Pixels, rng: np.random.Generator, *, most: int = 3) -> tuple[Pixels, np.ndarray]:
    """Pixels (H, W, C) -> the same in another light and with up to `most` blemishes or scratches, and where these are.

    What is to be found as a map (H, W) of bool, as in DRAEM (Zavrtanik et al. 2021, section 3.2).
    """
    top = 1.0 if pixels.dtype == np.float32 else float(np.iinfo(pixels.dtype).max)
    values = relit(pixels.astype(np.float32) / top, rng)
    before = values.clip(0, 1)
    for _ in range(rng.integers(most + 1)):
        values = scratched(values, rng) if rng.random() < SCRATCHES else blemished(values, rng)
    values = values.clip(0, 1)
    found = values * top if pixels.dtype == np.float32 else (values * top).round()
    return found.astype(pixels.dtype), np.abs(values - before).max(axis=2) > VISIBLE


def relit(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W, C) in [0, 1] as a whole brighter or darker, and from place to place a little, smoothly."""
    sigma = math.exp(rng.uniform(math.log(6), math.log(30)))
    field = gaussian_filter(rng.standard_normal(values.shape[:2], dtype=np.float32), sigma, mode="reflect")
    field -= field.mean()
    field *= 0.2 * rng.random() / max(field.std(), 1e-6)
    return np.asarray(values * np.exp(rng.normal(0, 0.15) + field)[:, :, None], np.float32)


def scratched(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W, C) in [0, 1] with a thin line across it, straight or winding, darker or brighter."""
    height, width = values.shape[:2]
    scale = 4  # lines of half a pixel
    step = max(math.exp(rng.uniform(math.log(2), math.log(max(0.1 * min(height, width), 3)))), 1)
    bend, angle = abs(rng.normal(0, 0.4)), rng.uniform(0, 2 * math.pi)
    places = [rng.uniform(0, 1, 2) * [width, height]]
    for _ in range(rng.integers(3, 12)):
        angle += rng.normal(0, bend)
        places.append(places[-1] + step * np.array([math.cos(angle), math.sin(angle)]))
    picture = Image.new("L", (width * scale, height * scale))
    wide = round(scale * math.exp(rng.uniform(math.log(0.5), math.log(3))))
    ImageDraw.Draw(picture).line([tuple(scale * p) for p in places], fill=255, width=max(wide, 1))
    share = np.asarray(picture.resize((width, height), Image.Resampling.BOX), np.float32)[:, :, None] / 255
    share = gaussian_filter(share, (0.4, 0.4, 0))
    return np.asarray(values * (1 + share * (math.exp(rng.normal(0, 0.5)) - 1)), np.float32)


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
