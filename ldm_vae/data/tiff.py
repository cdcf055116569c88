"""TIFF of scientific instruments: pages or bands as channels, more than 8 bits."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import tifffile

from ldm_vae.data.images import Pixels, check_size, check_values, orient, rounded, white
from ldm_vae.errors import BadImageError

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # of a damaged file it says a line for every tag
LARGEST_TILE = 1 << 22
"""Pixels of a TIFF's tile: one may be larger than the image, and is decoded as a whole."""


def read_tiff(data: bytes, channels: int, max_pixels: int) -> Pixels | None:
    """TIFF that PIL would cut short: pages or bands as channels, over 8 bits; None for any other.

    Several pages, or more than four samples, must be exactly the `channels` asked for. Of two or four samples the last
    is transparency when the file says so, and otherwise a band: kept if four are asked for, dropped if not.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages[0]
        num_pages = pages_of_image(tiff)
        samples = page.samplesperpixel
        if page.is_tiled and page.tilewidth * page.tilelength > max(max_pixels, LARGEST_TILE):
            raise BadImageError(f"tiles of {page.tilewidth}x{page.tilelength} are more than {max_pixels} pixels")
        in_order = page.planarconfig != tifffile.PLANARCONFIG.SEPARATE
        colours = samples == 3 and in_order and page.photometric != tifffile.PHOTOMETRIC.MINISBLACK
        transparent = samples in (2, 4) and in_order and page.extrasamples and page.extrasamples[-1] in (1, 2)
        pil_knows = samples == 1 or colours or transparent
        simple = num_pages == 1 and pil_knows and page.dtype is not None and page.dtype.itemsize == 1
        if simple or page.photometric in (tifffile.PHOTOMETRIC.PALETTE, tifffile.PHOTOMETRIC.SEPARATED):
            return None
        check_size(page.imagewidth, page.imagelength, max_pixels)
        if (num_pages > 1 or samples > 4) and num_pages * samples != channels:
            raise BadImageError(f"{num_pages} pages of {samples} channels, the model has {channels}")
        array = np.concatenate([channels_last(p) for p in tiff.pages[:num_pages]], axis=2)
        array = check_values(array)
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            array = np.asarray(white(array) - array, array.dtype)
        if num_pages == 1 and samples in (2, 4) and 1 in page.extrasamples:  # colours multiplied with transparency
            colour, alpha = array[:, :, :-1].astype(np.float32), array[:, :, -1:]
            top = white(array)
            plain = rounded(np.clip(colour * top / np.maximum(alpha, top / 65535), 0, top), array.dtype)
            array = np.concatenate([plain, alpha], axis=2)
        elif num_pages == 1 and samples in (2, 4) and samples != channels and 2 not in page.extrasamples:
            array = array[:, :, :-1]  # a band that is not asked for
        tag = page.tags.get(274)
        return orient(array, int(tag.value) if tag else 1)


def channels_last(page: tifffile.TiffPage) -> Pixels:
    array = page.asarray()
    planar = array.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    return np.moveaxis(array, 0, 2) if planar else np.atleast_3d(array)


def pages_of_image(tiff: tifffile.TiffFile) -> int:
    """Pages that are channels; 1 where they are unlike, previews for instance: then the first is the image."""
    alike = len({page.shape + (page.dtype,) for page in tiff.pages}) == 1
    return len(tiff.pages) if alike else 1


def is_plain(image_file: bytes | Path) -> bool:
    """Whether the first page of a TIFF is the image, and what it has beside colours is transparency."""
    try:
        with tifffile.TiffFile(io.BytesIO(image_file) if isinstance(image_file, bytes) else image_file) as tiff:
            page = tiff.pages[0]
            return pages_of_image(tiff) == 1 and (page.samplesperpixel not in (2, 4) or 2 in page.extrasamples)
    except Exception:  # damaged files raise many kinds; who reads it in its place will say so
        return False
