"""The quality that reaches a rate or a fidelity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm_vae.codec.codec import Floats, LatentCodec, cut
from ldm_vae.codec.picture import Picture
from ldm_vae.data import large
from ldm_vae.data.large import Pixels, let_go
from ldm_vae.errors import ConfigError
from ldm_vae.models.tiles import spans


def compress_to(
    codec: LatentCodec,
    given: Picture,
    *,
    target_bpp: float | None = None,
    target_psnr: float | None = None,
    strip: bool = False,
    scratch: Path | None = None,
) -> bytes:
    """The best file of at most `target_bpp` bits per pixel, or the smallest of at least `target_psnr` dB.

    Found by bisection between the finest and the coarsest quality that the tables were fitted at. The PSNR is that of
    the colours, over all values, after rounding; the rate is that of the whole file.

    `scratch`: a folder for the latents of a large picture, which then do not lie in memory.

    Raises:
        ConfigError: a target out of reach, or not exactly one of the two.
    """
    if (target_bpp is None) == (target_psnr is None):
        raise ConfigError("give one target: bits per pixel, or PSNR")
    target = target_psnr if target_bpp is None else target_bpp
    if not 0 < target < math.inf:  # type: ignore[operator]
        raise ConfigError(f"the target is {target}: it must be a number above 0")
    latents = latents_for(codec, given, scratch)
    finest, coarsest = codec.tables.qualities[0], codec.tables.qualities[-1]

    def made(quality: int) -> bytes:
        return codec.pack(given, partial(cut, latents), quality, strip=strip)

    if target_bpp is not None:
        quality = first(lambda q: bits_per_pixel(made(q), given) <= target_bpp, finest, coarsest)
        if quality is None:
            least = bits_per_pixel(made(coarsest), given)
            raise ConfigError(f"{target_bpp:g} bits per pixel cannot be reached: the coarsest file has {least:.3f}")
        return made(quality)

    finest_header = codec.header_of(given, finest)
    height, width = given.pixels.shape[:2]

    def fidelity(quality: int) -> float:
        header, error = replace(finest_header, quality=quality), 0.0
        for top, bottom in codec.rows_of_tiles(header, 0, height):
            cells = (top // codec.stride, 0, -(-bottom // codec.stride), header.latent_size[1])
            box = codec.latents_for(header, cells)
            symbols = codec.quantise(cut(latents, box), quality)
            decoded = codec.pixels_of(symbols, header, box, cells if codec.exact else box)[: bottom - top, :width]
            error += squared_error(given.pixels[top:bottom], decoded)
            let_go(given.pixels)
            let_go(latents)
        return decibels(error / given.pixels.size, given.pixels.dtype)

    if fidelity(finest) < target_psnr:  # type: ignore[operator]
        raise ConfigError(f"{target_psnr:g} dB cannot be reached: the finest file has {fidelity(finest):.2f}")
    too_coarse = first(lambda q: fidelity(q) < target_psnr, finest, coarsest)  # type: ignore[operator]
    return made(coarsest if too_coarse is None else too_coarse - 1)


def first(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least integer in low..high for which it holds, if it holds from somewhere on; None if not at `high`."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def bits_per_pixel(data: bytes, given: Picture) -> float:
    """Of a whole file."""
    return 8 * len(data) / (given.pixels.shape[0] * given.pixels.shape[1])


def latents_for(codec: LatentCodec, given: Picture, scratch: Path | None) -> Floats:
    """(c, h, w); of a large picture in a file without a name, where there is a folder for it and a codec of tiles."""
    if scratch is None or not codec.exact or given.pixels[:, :, 0].size <= large.LARGE:
        return codec.latents_of(given)
    height, width = codec.size_in_latents(given)
    latents = large.on_disk((len(codec.tables.sigma), height, width), np.float32, scratch)
    for top, bottom, _, _ in spans(height, 1 << codec.log2_tile, 0):
        latents[:, top:bottom] = codec.latents_in(given, (top, 0, bottom, width))
        let_go(latents)
        let_go(given.pixels)
    return latents


def squared_error(pixels: Pixels, others: Pixels) -> float:
    """Summed over all values."""
    difference = np.subtract(pixels, others, dtype=np.float64).ravel()
    return float(difference @ difference)


def psnr_of(pixels: Pixels, others: Pixels) -> float:
    """In dB, over all values, for 8 or 16 bits; infinite for equal ones."""
    return decibels(squared_error(pixels, others) / pixels.size, pixels.dtype)


def decibels(error: float, dtype: Any) -> float:
    """The PSNR of a mean squared error of 8 or 16 bits; infinite for none."""
    return math.inf if error == 0 else 10 * math.log10(np.iinfo(dtype).max ** 2 / error)
