"""Other codecs, as Pillow writes them, to compare with."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, features

from ldm_vae.data.images import Pixels
from ldm_vae.errors import ConfigError

JPEG, AVIF = (5, 8, 12, 17, 23, 30, 40, 50, 60, 70, 80), (20, 30, 38, 45, 52, 60, 68, 76)
RATIOS = tuple(24 / rate for rate in (0.07, 0.1, 0.15, 0.22, 0.32, 0.46, 0.68, 1.0))
PILLOW: dict[str, tuple[str, Sequence[float], dict[str, Any]]] = {
    "jpeg-420": ("JPEG", JPEG, {"optimize": True, "subsampling": 2}),
    "jpeg-444": ("JPEG", JPEG, {"optimize": True, "subsampling": 0}),
    "webp": ("WEBP", (0, 5, 12, 22, 35, 50, 65, 78, 86), {"method": 6}),
    "avif-420": ("AVIF", AVIF, {"speed": 6, "subsampling": "4:2:0"}),
    "avif-444": ("AVIF", AVIF, {"speed": 6, "subsampling": "4:4:4"}),
    "avif-420-slowest": ("AVIF", AVIF, {"speed": 0, "subsampling": "4:2:0"}),
    "avif-444-slowest": ("AVIF", AVIF, {"speed": 0, "subsampling": "4:4:4"}),
    "jpeg2000": ("JPEG2000", RATIOS, {"quality_mode": "rates", "irreversible": True, "mct": 1}),
    "jpeg-xl": ("JXL", (15, 25, 35, 45, 55, 65, 75, 85), {"effort": 7}),
}
"""Pillow's name of the format, qualities (JPEG 2000: compression ratios), and the other options of `Image.save`."""
QUALITIES = range(1, 101)


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Compresses pixels (H, W, 3) to bytes, and back, at several settings."""

    name: str
    settings: Sequence[float]
    encode: Callable[[Pixels, float], bytes]
    decode: Callable[[bytes], Pixels]


def pillow_codec(name: str) -> Codec | None:
    """None when this Pillow cannot write the format. Raises ConfigError for an unknown name."""
    if name not in PILLOW:
        raise ConfigError(f"--others {name} is not known: try {', '.join(PILLOW)}")
    file_format, settings, options = PILLOW[name]
    feature = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}.get(file_format)
    try:
        if file_format == "JXL":
            import pillow_jxl  # noqa: F401  # registers itself
    except ImportError:
        return None
    if feature and not features.check(feature):
        return None

    def encode(pixels: Pixels, setting: float) -> bytes:
        file = io.BytesIO()
        quality = {"quality_layers": [setting]} if file_format == "JPEG2000" else {"quality": setting}
        Image.fromarray(pixels).save(file, file_format, **quality, **options)
        return file.getvalue()

    def decode(data: bytes) -> Pixels:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    return Codec(name=name, settings=settings, encode=encode, decode=decode)


def installed(names: Sequence[str]) -> list[Codec]:
    """Each codec once; prints those that are not there. Raises ConfigError for an unknown name."""
    found = {name: pillow_codec(name) for name in names}
    for name in (name for name, codec in found.items() if codec is None):
        print(f"left out: {name} is not installed")
    return [codec for codec in found.values() if codec is not None]


def best_within(codec: Codec, pixels: Pixels, size: int) -> bytes:
    """The file of the best quality, of QUALITIES, within so many bytes; of the worst, where none is that small.

    Files are taken to grow with quality, which WebP's do but for a few bytes.
    """
    count = bisect_right(QUALITIES, size, key=lambda quality: len(codec.encode(pixels, quality)))
    return codec.encode(pixels, QUALITIES[max(count - 1, 0)])
