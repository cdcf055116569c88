"""PNG files written strip by strip (W3C, PNG specification, third edition)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import IO

import numpy as np

from ldm_vae.data.images import Pixels
from ldm_vae.data.large import strips

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""By the number of channels: grey, grey with alpha, RGB, RGBA."""
FILTER_UP = 2
"""A row of bytes is stored as its difference from the row above (9.2)."""


def chunk(kind: bytes, data: bytes) -> bytes:
    """Length, type, data and checksum (5.3)."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def stream_png(
    out: IO[bytes],
    parts: Iterable[Pixels],
    shape: tuple[int, ...],
    *,
    icc: bytes = b"",
    exif: bytes = b"",
    text: Mapping[str, str] | None = None,
) -> None:
    """A PNG from parts of its pixels (h, W, C), 1 to 4 channels of uint8 or uint16, from top to bottom.

    Args:
        shape: (H, W, C) of the whole.
        exif: without a prefix.
        text: keyword -> text, in chunks of their own.

    Raises:
        OSError: it cannot be written.
    """
    height, width, channels = shape
    parts = iter(parts)
    first = next(parts)
    header = struct.pack(">IIBBBBB", width, height, 8 * first.dtype.itemsize, COLOUR_TYPES[channels], 0, 0, 0)
    out.write(SIGNATURE + chunk(b"IHDR", header))
    if icc:
        out.write(chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    if exif:
        out.write(chunk(b"eXIf", exif))
    for keyword, value in (text or {}).items():
        content = value.encode(errors="backslashreplace")  # names of files can be no text
        out.write(chunk(b"iTXt", keyword.encode("latin-1") + bytes(5) + content))
    deflate = zlib.compressobj()
    above = np.zeros((1, width * channels * first.dtype.itemsize), np.uint8)
    for part in chain([first], parts):
        for top, bottom in strips(len(part), width):
            big_endian = np.ascontiguousarray(part[top:bottom], part.dtype.newbyteorder(">"))
            rows = big_endian.view(np.uint8).reshape(bottom - top, -1)
            lines = np.full((len(rows), 1 + rows.shape[1]), FILTER_UP, np.uint8)
            np.subtract(rows, np.concatenate([above, rows[:-1]]), out=lines[:, 1:])
            above = rows[-1:]
            if data := deflate.compress(lines.data):
                out.write(chunk(b"IDAT", data))
    out.write(chunk(b"IDAT", deflate.flush()) + chunk(b"IEND", b""))
