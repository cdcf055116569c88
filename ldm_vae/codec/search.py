"""The quality that reaches a rate or a fidelity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from ldm_vae.codec.codec import LatentCodec, cut
from ldm_vae.codec.picture import Picture
from ldm_vae.data.images import Pixels
from ldm_vae.errors import ConfigError


def compress_to(
    codec: LatentCodec,
    given: Picture,
    *,
    target_bpp: float | None = None,
    target_psnr: float | None = None,
    strip: bool = False,
) -> bytes:
    """The best file of at most `target_bpp` bits per pixel, or the smallest of at least `target_psnr` dB.

    Found by bisection between the finest and the coarsest quality that the tables were fitted at. The PSNR is that of
    the colours, over all values, after rounding; the rate is that of the whole file.

    Raises:
        ConfigError: a target out of reach, or not exactly one of the two.
    """
    if (target_bpp is None) == (target_psnr is None):
        raise ConfigError("give one target: bits per pixel, or PSNR")
    target = target_psnr if target_bpp is None else target_bpp
    if not 0 < target < math.inf:  # type: ignore[operator]
        raise ConfigError(f"the target is {target}: it must be a number above 0")
    latents = codec.latents_of(given)
    finest, coarsest = codec.tables.qualities[0], codec.tables.qualities[-1]

    def made(quality: int) -> bytes:
        return codec.pack(given, partial(cut, latents), quality, strip=strip)

    if target_bpp is not None:
        quality = first(lambda q: bits_per_pixel(made(q), given) <= target_bpp, finest, coarsest)
        if quality is None:
            least = bits_per_pixel(made(coarsest), given)
            raise ConfigError(f"{target_bpp:g} bits per pixel cannot be reached: the coarsest file has {least:.3f}")
        return made(quality)

    header = codec.header_of(given, finest)
    height, width = given.pixels.shape[:2]
    whole = (0, 0, *header.latent_size)

    def fidelity(quality: int) -> float:
        symbols = codec.quantise(latents, quality)
        decoded = codec.pixels_of(symbols, replace(header, quality=quality), whole, whole)
        return psnr_of(given.pixels, decoded[:height, :width])

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


def psnr_of(pixels: Pixels, others: Pixels) -> float:
    """In dB, over all values, for 8 or 16 bits; infinite for equal ones."""
    error = float(np.square(pixels.astype(np.float64) - others.astype(np.float64)).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(np.iinfo(pixels.dtype).max ** 2 / error))
