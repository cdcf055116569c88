"""The step of the quantiser that reaches a rate or a fidelity."""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import partial
from pathlib import Path

import numpy as np

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.picture import Picture
from ldm_vae.codec.tables import Floats
from ldm_vae.codec.tiles import window
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
    target_size: int | None = None,
    strip: bool = False,
    scratch: Path | None = None,
) -> bytes:
    """The best file of at most `target_bpp` bits per pixel or `target_size` bytes, or the smallest of `target_psnr` dB.

    Found by bisection between the finest and the coarsest step that the tables were fitted at. The PSNR is that of
    the colours, over all values, after rounding; the rate is that of the whole file. `scratch` is a folder for the
    latents of a large picture, which then do not lie in memory.

    Raises:
        ConfigError: a target out of reach, or not exactly one of the three.
    """
    targets = [target for target in (target_bpp, target_psnr, target_size) if target is not None]
    if len(targets) != 1:
        raise ConfigError("give one target: bits per pixel, bytes, or PSNR")
    (target,) = targets
    if not 0 < target < math.inf:
        raise ConfigError(f"the target is {target}: it must be a number above 0")
    latents, whole = latents_of(codec, picture, scratch), codec.network.box_of(picture.pixels)

    def file_at(step: int) -> bytes:
        header = codec.header_of(picture, step)
        return codec.file_of(picture, header, (window(latents, whole, box) for box in header.tile_boxes), strip)

    def rate_at(step: int) -> float:
        """In bytes or bits per pixel, as the target is."""
        file = file_at(step)
        return bits_per_pixel(file, picture.pixels) if target_size is None else len(file)

    psnr_at = partial(psnr_of, codec, picture, latents)
    finest, coarsest = codec.tables.steps[0], codec.tables.steps[-1]
    between = range(finest, coarsest)
    if target_psnr is None:
        least = rate_at(coarsest)
        if least > target:
            unit = "bits per pixel" if target_size is None else "bytes"
            raise ConfigError(f"{target:g} {unit} cannot be reached: the coarsest file has {least:.6g}")
        return file_at(finest + bisect_left(between, True, key=lambda step: rate_at(step) <= target))
    best = psnr_at(finest)
    if best < target:
        raise ConfigError(f"{target:g} dB cannot be reached: the finest file has {best:.2f}")
    if psnr_at(coarsest) >= target:
        return file_at(coarsest)
    return file_at(finest - 1 + bisect_left(between, True, key=lambda step: psnr_at(step) < target))


def psnr_of(codec: LatentCodec, picture: Picture, latents: Floats, step: int) -> float:
    """In dB, of the colours at a fixed-point step."""
    header, whole = codec.header_of(picture, step), codec.network.box_of(picture.pixels)
    error = 0.0
    for band in codec.network.bands(header, (0, 0, header.height, header.width)):
        symbols = codec.tables.quantise(window(latents, whole, band.latents), step)
        decoded = codec.network.decode(codec.tables.dequantise(symbols, step), band, header)
        rows = picture.pixels[band.pixels[0] : band.pixels[2]]
        difference = np.subtract(rows, decoded, dtype=np.float64).ravel()
        error += float(difference @ difference)
        let_go(picture.pixels)
        let_go(latents)
    error /= picture.pixels.size
    return 10 * math.log10(np.iinfo(decoded.dtype).max ** 2 / error) if error else math.inf


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
