"""JPEG XL, by libjxl; and what its header says that the decoder does not hand over (ISO/IEC 18181-1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import imagecodecs
import numpy as np

from ldm_vae.data.boxes import boxes
from ldm_vae.data.images import Pixels, check_size, check_values, full_scale
from ldm_vae.data.metadata import MAX_TEXT, Metadata
from ldm_vae.errors import BadImageError

CODESTREAM, CONTAINER = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
"""What a file begins with: the one, or the other."""
ALPHA, SPOT, CFA = 0, 2, 5
"""Kinds of extra channels (table D.9)."""
RGB, XYB = 0, 2
"""Colour spaces (E.2)."""
D65, CUSTOM, DCI, P3 = 1, 2, 11, 11
"""White points and primaries."""


@dataclass(frozen=True)
class Header:
    width: int
    height: int
    bits: int = 8
    is_float: bool = False
    animated: bool = False
    cicp: tuple[int, int, int, int] | None = None
    """None for sRGB, and for what only a profile tells."""
    others: bool = False
    """The pixels are in the colour space of an ICC profile, or of primaries of its own; neither is read."""


def read_jpeg_xl(data: bytes, max_pixels: int) -> tuple[Pixels, Metadata, tuple[str, ...]]:
    """Pixels as they are shown, upright; metadata; and notes. Raises BadImageError, or the decoder's error."""
    header = read_header(codestream_of(data))
    check_size(header.width, header.height, max_pixels)
    array = imagecodecs.jpegxl_decode(data, index=0, numthreads=1)
    pixels = np.atleast_3d(array)
    pixels = check_values(np.clip(pixels, 0, 1) if header.is_float else full_scale(pixels, header.bits))
    notes = ["the first of its frames"] if header.animated else []
    if header.others:
        notes.append("its colour profile is not read: taken as sRGB")
    parts = boxes_of(data) if data.startswith(CONTAINER) else {}
    metadata = Metadata(cicp=header.cicp, exif=parts.get(b"Exif", b"")[4:], xmp=parts.get(b"xml ", b""))
    return pixels, metadata, tuple(notes)


def boxes_of(data: bytes) -> dict[bytes, bytes]:
    """By kind; those in Brotli's compression (18181-2, `brob`) as they were before, but for damaged ones."""
    found = {}
    for kind, content in boxes(data):
        try:
            if kind == b"brob":
                kind, content = content[:4], bytes(imagecodecs.brotli_decode(content[4:], out=MAX_TEXT))
        except imagecodecs.BrotliError:
            continue
        found[kind] = content
    return found


def codestream_of(data: bytes) -> bytes:
    """Raises BadImageError where there is none."""
    if data.startswith(CONTAINER):
        for kind, content in boxes(data):
            if kind in (b"jxlc", b"jxlp"):
                data = content[4:] if kind == b"jxlp" else content
                break
    if not data.startswith(CODESTREAM):
        raise BadImageError("a JPEG XL without pixels")
    return data[2:4096]


class Bits:
    """Reads little-endian bit fields. Past the end there are zeros, which the decoder will refuse."""

    def __init__(self, data: bytes) -> None:
        self.number, self.place = int.from_bytes(data, "little"), 0

    def u(self, count: int) -> int:
        value = self.number >> self.place & ((1 << count) - 1)
        self.place += count
        return value

    def u32(self, *choices: tuple[int, int]) -> int:
        """One of four pairs of an offset and a number of bits (B.2.2)."""
        offset, count = choices[self.u(2)]
        return offset + self.u(count)

    def enum(self) -> int:
        return self.u32((0, 0), (1, 0), (2, 4), (18, 6))


def read_header(codestream: bytes) -> Header:
    """Size and image metadata (annex D), from behind the signature."""
    bits = Bits(codestream)
    width, height = read_size(bits)
    make = partial(Header, width, height)
    if bits.u(1):
        return make()
    animated = False
    if bits.u(1):
        turned = bits.u(3) >= 4
        width, height = (height, width) if turned else (width, height)
        make = partial(Header, width, height)
        if bits.u(1):
            read_size(bits)
        if bits.u(1):
            skip_preview(bits)
        animated = bool(bits.u(1))
        if animated:
            bits.u32((100, 0), (1000, 0), (1, 10), (1, 30))
            bits.u32((1, 0), (1001, 0), (1, 8), (1, 10))
            bits.u32((0, 0), (0, 3), (0, 16), (0, 32))
            bits.u(1)
    is_float, depth = read_depth(bits)
    bits.u(1)
    for _ in range(min(bits.u32((0, 0), (1, 0), (2, 4), (1, 12)), 256)):
        skip_extra_channel(bits)
    xyb = bool(bits.u(1))
    return make(depth, is_float, animated, *read_colours(bits, xyb=xyb))


def read_size(bits: Bits) -> tuple[int, int]:
    small = bits.u(1)
    sides = [(1, 9), (1, 13), (1, 18), (1, 30)]
    height = 8 * (bits.u(5) + 1) if small else bits.u32(*sides)
    ratio = bits.u(3)
    if ratio:
        across, down = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
        return height * across // down, height
    return 8 * (bits.u(5) + 1) if small else bits.u32(*sides), height


def skip_preview(bits: Bits) -> None:
    sides = [(16, 0), (32, 0), (1, 5), (33, 9)] if bits.u(1) else [(1, 6), (65, 8), (321, 10), (1345, 12)]
    bits.u32(*sides)
    if not bits.u(3):
        bits.u32(*sides)


def read_depth(bits: Bits) -> tuple[bool, int]:
    if bits.u(1):
        depth = bits.u32((32, 0), (16, 0), (24, 0), (1, 6))
        bits.u(4)
        return True, depth
    return False, bits.u32((8, 0), (10, 0), (12, 0), (1, 6))


def skip_extra_channel(bits: Bits) -> None:
    if bits.u(1):
        return
    kind = bits.enum()
    read_depth(bits)
    bits.u32((0, 0), (3, 0), (4, 0), (1, 3))
    bits.u(8 * bits.u32((0, 0), (0, 4), (16, 5), (48, 10)))
    if kind == ALPHA:
        bits.u(1)
    elif kind == SPOT:
        bits.u(64)
    elif kind == CFA:
        bits.u32((1, 0), (0, 2), (3, 4), (19, 8))


def read_colours(bits: Bits, *, xyb: bool) -> tuple[tuple[int, int, int, int] | None, bool]:
    """Code points as H.273 has them, None for sRGB; and whether the colours are others that are not told (E.2)."""
    if bits.u(1):
        return None, False
    if bits.u(1):
        return None, not xyb  # of XYB the decoder makes sRGB where there is a profile
    space = bits.enum()
    if space == XYB:
        return None, False
    white = bits.enum()
    skip_points(bits, white == CUSTOM)
    primaries = bits.enum() if space == RGB else 1
    skip_points(bits, 3 * (primaries == CUSTOM))
    if bits.u(1):
        gamma = bits.u(24) / 1e7
        transfer = 4 if abs(gamma - 1 / 2.2) < 0.001 else 8 if gamma == 1 else 0
    else:
        transfer = bits.enum()
    if (white, primaries) == (D65, P3):
        primaries = 12
    elif white not in (D65, DCI) or primaries == CUSTOM:
        return None, True
    return (None if (primaries, transfer) == (1, 13) else (primaries, transfer, 0, 1)), False


def skip_points(bits: Bits, count: int) -> None:
    for _ in range(2 * count):
        bits.u32((0, 19), (524288, 19), (1048576, 20), (2097152, 21))
