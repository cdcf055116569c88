"""Images too large to lie in memory as a whole: libvips reads them strip by strip, into files without a name."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyvips

from ldm_vae.data.boxes import Data
from ldm_vae.data.image_files import HEAD_BYTES, reason_of
from ldm_vae.data.images import Pixels, check_size, convert_channels
from ldm_vae.errors import BadImageError

LARGE = 1 << 25
"""Pixels: images with more go by way of the disk."""
STRIP = 1 << 22
"""Pixels at a time."""
MAX_LARGE_PIXELS = 1 << 28
"""16,384 x 16,384, unless somebody asks for more."""
HEAD = 1 << 20
"""Bytes in which is looked for what stands before the pixels."""
DTYPES = {"uchar": np.uint8, "ushort": np.uint16}
pyvips.block_untrusted_set(True)  # of its decoders only those that libvips calls fit for files from anywhere
pyvips.cache_set_max(0)


def strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    """(top, bottom) of parts of about STRIP pixels."""
    rows = max(STRIP // width, 1)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def read_large(image_file: bytes | Path, folder: Path, *, channels: int | None, max_pixels: int) -> Pixels | None:
    """What `read_pixels` gives of a large image, on disk: (H, W, C) of uint8 or uint16.

    None for what is not large, and for what is left to the other reader: floats, inks, GIF, what EXIF turns.

    Args:
        image_file: a file's bytes or, so that these do not lie in memory either, its path.
        folder: where the pixels are kept, in a file without a name.
        channels: to convert to; None: as many as the file has.

    Raises:
        BadImageError: it is damaged, or has too many pixels.
        OSError: the folder has no room for it.
    """
    try:
        image = open_with_vips(image_file)
    except (pyvips.Error, OSError):
        return None
    if image.width * image.height <= LARGE:
        return None
    check_size(image.width, image.height, max_pixels)
    plain = image.interpretation in ("b-w", "srgb", "grey16", "rgb16") and image.bands in (1, 2, 3, 4)
    turned = image.get_typeof("orientation") and image.get("orientation") != 1
    if image.format not in DTYPES or not plain or turned:
        return None
    loader = image.get("vips-loader")
    if loader.startswith("gif") or (loader.startswith("heif") and image.format == "ushort"):
        return None  # it makes opaque animations transparent; its white is no white
    region, whole = pyvips.Region.new(image), None
    for top, bottom in strips(image.height, image.width):
        try:
            content = region.fetch(0, top, image.width, bottom - top)
        except pyvips.Error:  # whose text has those of files before this one
            if loader.startswith("tiff"):  # of which a tag may be damaged, and no pixel
                return None
            head = image_file[:HEAD_BYTES] if isinstance(image_file, bytes) else head_of(image_file)
            raise BadImageError(reason_of(None, head)) from None
        strip = np.frombuffer(content, DTYPES[image.format]).reshape(bottom - top, image.width, image.bands)
        strip = strip if channels is None else convert_channels(strip, channels)
        if whole is None:
            whole = on_disk((image.height, *strip.shape[1:]), strip.dtype, folder)
        whole[top:bottom] = strip
        let_go(whole)
    return whole


def open_with_vips(image_file: bytes | Path) -> Any:
    """libvips' image, to be read from top to bottom. Raises pyvips.Error, or OSError."""
    options = {"access": "sequential", "fail_on": "error"}
    if isinstance(image_file, Path):
        try:
            return pyvips.Image.new_from_file(str(image_file.absolute()), **options)
        except UnicodeEncodeError:  # a name that is no text
            image_file = image_file.read_bytes()
    return pyvips.Image.new_from_buffer(image_file, "", **options)


@contextmanager
def mapped(image_file: bytes | Path) -> Iterator[Data]:
    """A file's bytes, which need not lie in memory."""
    if isinstance(image_file, bytes):
        yield image_file
        return
    with open(image_file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def head_of(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(HEAD)


def on_disk(shape: tuple[int, ...], dtype: Any, folder: Path) -> Pixels:
    """Room for an array, reserved: a mapped page that the disk has no place for would end the process."""
    with tempfile.TemporaryFile(dir=folder) as file:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype, "r+", shape=shape)


def let_go(pixels: Pixels) -> None:
    """Takes what was read or written so far of an array on disk out of this process's memory; the file keeps it."""
    if isinstance(pixels, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        pixels._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
