"""PNG files written strip by strip (W3C, PNG specification, third edition)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import IO

import numpy as np

from ldm_vae.data.images import Pixels
from ldm_vae.data.large import strips
from ldm_vae.data.metadata import NO_METADATA, SIGNATURE, XMP_KEY, Metadata

RAW_IPTC = "Raw profile type iptc"
"""The text in which ImageMagick and ExifTool write IPTC into a PNG."""
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
    metadata: Metadata = NO_METADATA,
    text: Mapping[str, str] | None = None,
) -> None:
    """A PNG from parts of its pixels (h, W, C), 1 to 4 channels of uint8 or uint16, from top to bottom.

    Args:
        shape: (H, W, C) of the whole.
        text: keyword -> text, in place of the metadata's of the same keywords.

    Raises:
        OSError: it cannot be written.
    """
    height, width, channels = shape
    parts = iter(parts)
    first = next(parts)
    header = struct.pack(">IIBBBBB", width, height, 8 * first.dtype.itemsize, COLOUR_TYPES[channels], 0, 0, 0)
    out.write(SIGNATURE + chunk(b"IHDR", header))
    for kind, content in metadata_chunks(metadata, text or {}):
        out.write(chunk(kind, content))
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


def metadata_chunks(metadata: Metadata, text: Mapping[str, str]) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of the chunks that stand before the pixels (11.3)."""
    if metadata.cicp:
        yield b"cICP", bytes(metadata.cicp)
    if metadata.icc:
        yield b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc)
    if metadata.resolution:
        across, down = (round(dots / 0.0254) for dots in metadata.resolution)  # dots per metre
        yield b"pHYs", struct.pack(">IIB", across, down, 1)
    if metadata.modified:
        yield b"tIME", metadata.modified
    if metadata.exif:
        yield b"eXIf", metadata.exif
    if metadata.iptc:
        yield (
            b"tEXt",
            RAW_IPTC.encode() + b"\0\niptc\n%8d\n" % len(metadata.iptc) + metadata.iptc.hex("\n", 36).encode(),
        )
    kept = [(keyword, value) for keyword, value in metadata.text if keyword not in text]
    for keyword, value in [*kept, *text.items()]:
        yield b"iTXt", international_text(keyword, value.encode(errors="backslashreplace"))  # names can be no text
    if metadata.xmp:
        yield b"iTXt", international_text(XMP_KEY, metadata.xmp)


def international_text(keyword: str, content: bytes) -> bytes:
    """The content of an iTXt chunk, not compressed (11.3.3.4)."""
    return keyword.encode("latin-1", "replace")[:79] + bytes(5) + content
