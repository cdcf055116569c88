"""The quality that reaches a rate or a fidelity."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldm_vae.codec import bitstream
from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.picture import Picture
from ldm_vae.codec.sections import pack_sections
from ldm_vae.codec.tables import Floats
from ldm_vae.codec.tiles import encode_tiles, window
from ldm_vae.data import large
from ldm_vae.data.images import Pixels
from ldm_vae.data.large import let_go
from ldm_vae.errors import ConfigError
from ldm_vae.models.tiles import spans


def compress_to(
    codec: LatentCodec,
    picture: Picture,
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
    if target is None or not 0 < target < math.inf:
        raise ConfigError(f"the target is {target}: it must be a number above 0")
    latents = latents_of(codec, picture, scratch)
    finest, coarsest = codec.tables.qualities[0], codec.tables.qualities[-1]
    if target_bpp is not None:
        quality = first(
            lambda q: bits_per_pixel(file_at(codec, picture, latents, q, strip), picture.pixels) <= target_bpp,
            finest,
            coarsest,
        )
        if quality is None:
            least = bits_per_pixel(file_at(codec, picture, latents, coarsest, strip), picture.pixels)
            raise ConfigError(f"{target_bpp:g} bits per pixel cannot be reached: the coarsest file has {least:.3f}")
        return file_at(codec, picture, latents, quality, strip)
    best = psnr_at(codec, picture, latents, finest)
    if best < target:
        raise ConfigError(f"{target:g} dB cannot be reached: the finest file has {best:.2f}")
    too_coarse = first(lambda q: psnr_at(codec, picture, latents, q) < target, finest, coarsest)
    return file_at(codec, picture, latents, coarsest if too_coarse is None else too_coarse - 1, strip)


def file_at(codec: LatentCodec, picture: Picture, latents: Floats, quality: int, strip: bool) -> bytes:
    """The file of a picture at a fixed-point quality, from all its latents (c, h, w)."""
    header, whole = codec.header_of(picture, quality), codec.network.box_of(picture.pixels)
    tiles = (window(latents, whole, box) for box in header.tile_boxes)
    symbols = (codec.tables.quantise(tile, quality) for tile in tiles)
    payloads = encode_tiles(symbols, header, codec.tables.contexts_of(quality), codec.workers)
    return bitstream.pack(header, pack_sections(picture, strip=strip), payloads)


def psnr_at(codec: LatentCodec, picture: Picture, latents: Floats, quality: int) -> float:
    """In dB, of the colours at a fixed-point quality."""
    header, whole = codec.header_of(picture, quality), codec.network.box_of(picture.pixels)
    error = 0.0
    for band in codec.network.bands(header, (0, 0, header.height, header.width)):
        symbols = codec.tables.quantise(window(latents, whole, band.latents), quality)
        decoded = codec.network.decode(codec.tables.dequantise(symbols, quality), band, header)
        error += squared_error(picture.pixels[band.pixels[0] : band.pixels[2]], decoded)
        let_go(picture.pixels)
        let_go(latents)
    return decibels(error / picture.pixels.size, picture.pixels.dtype)


def first(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least integer in low..high for which it holds, if it holds from somewhere on; None if not at `high`."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def bits_per_pixel(data: bytes, pixels: Pixels) -> float:
    """Of a whole file."""
    return 8 * len(data) / (pixels.shape[0] * pixels.shape[1])


def latents_of(codec: LatentCodec, picture: Picture, scratch: Path | None) -> Floats:
    """All latents (c, h, w); those of a large picture in a nameless file in `scratch`, for a finite receptive field."""
    pixels, whole = picture.pixels, codec.network.box_of(picture.pixels)
    if scratch is None or not codec.network.finite or pixels[:, :, 0].size <= large.LARGE:
        return next(codec.network.latents(pixels, [whole]))
    latents = large.on_disk((len(codec.tables.sigma), *whole[2:]), np.float32, scratch)
    rows = [(top, 0, bottom, whole[3]) for top, bottom, _, _ in spans(whole[2], 1 << codec.log2_tile, 0)]
    for row, values in zip(rows, codec.network.latents(pixels, rows), strict=True):
        window(latents, whole, row)[:] = values
        let_go(latents)
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
