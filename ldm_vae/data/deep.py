"""Files of more than 8 bits that PIL would cut or refuse: PNG, PNM, JPEG, JPEG 2000, AVIF, arrays. No torch here."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator

import imagecodecs
import numpy as np
import pyvips

from ldm_vae.data.boxes import jpeg_2000_colours
from ldm_vae.data.image_files import reason_of
from ldm_vae.data.images import Pixels, check_size, check_values, full_scale
from ldm_vae.data.large import DTYPES, open_with_vips
from ldm_vae.data.metadata import EXIF_PREFIX, Metadata, plausible
from ldm_vae.errors import BadImageError

START_OF_IMAGE, END_OF_IMAGE = b"\xff\xd8\xff", b"\xff\xd9"
FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
"""Markers of a JPEG's start of frame: its process (ISO/IEC 10918-1, table B.1)."""
SCAN, APP0, APP1, APP2, COMMENT, LOSSLESS = 0xDA, 0xE0, 0xE1, 0xE2, 0xFE, 0xC3
JFIF_NAME, ICC_NAME, XMP_NAME = b"JFIF\0", b"ICC_PROFILE\0", b"http://ns.adobe.com/xap/1.0/\0"
TO_INCHES = {b"\1": 1.0, b"\2": 2.54}
"""By the unit of JFIF's density."""
SIZ = b"\xff\x4f\xff\x51"
"""What the codestream of JPEG 2000 begins with (ISO/IEC 15444-1, A.5.1)."""
JP2_SRGB, JP2_GREY = 16, 17
"""Colour spaces of a JP2."""
NPY_VERSIONS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,
}
"""Readers of the header; that of version 3 differs in the names of fields alone, which images do not have."""
PNM = re.compile(rb"P([2356])((?:\s|#[^\n]*\n)+)(\d+)((?:\s|#[^\n]*\n)+)(\d+)((?:\s|#[^\n]*\n)+)(\d+)\s")
Value = tuple[float, float] | None


def read_npy(data: bytes, max_pixels: int, value_range: Value) -> Pixels:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in NPY_VERSIONS:
        raise BadImageError(f".npy of version {version[0]}.{version[1]} is not read")
    try:
        shape, _, dtype = NPY_VERSIONS[version](file)
    except Exception:  # NumPy has it parsed as Python
        raise BadImageError("the header of the .npy is damaged") from None
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadImageError(f"an array of shape {shape}: (H, W) or (H, W, C) is needed")
    check_size(shape[1], shape[0], max_pixels)
    if np.prod(shape, dtype=object) * dtype.itemsize > len(data) - file.tell():
        raise BadImageError("truncated array")
    file.seek(0)
    return check_values(np.atleast_3d(np.load(file, allow_pickle=False)), value_range)


def read_deep_png(data: bytes) -> Pixels:
    """A PNG of 16 bits as it is stored, with as many channels as it has. Raises BadImageError."""
    try:
        image = open_with_vips(data)
        stored = image.write_to_memory()
    except pyvips.Error:  # whose text has those of files before this one
        raise BadImageError(reason_of(None, data)) from None
    return np.frombuffer(stored, DTYPES[image.format]).reshape(image.height, image.width, image.bands)


def read_pnm(data: bytes, max_pixels: int, value_range: Value) -> Pixels | None:
    """A grey or RGB PNM with values over 255, by netpbm's definition; None for any other file."""
    match = PNM.match(data)
    if not match or not 255 < int(match[7]) < 65536:
        return None
    width, height, top = int(match[3]), int(match[5]), int(match[7])
    check_size(width, height, max_pixels)
    shape = height, width, 3 if match[1] in b"36" else 1
    count = height * width * shape[2]
    if match[1] in b"56":
        if len(data) - match.end() < 2 * count:
            raise BadImageError("truncated")
        values = np.frombuffer(data, ">u2", count, match.end()).astype(np.uint16)
    else:
        words = re.sub(rb"#[^\n]*\n", b" ", data[match.end() :]).split(maxsplit=count)[:count]
        if len(words) < count:
            raise BadImageError("truncated")
        values = np.array(words).astype(np.uint32)
    if values.max() > top:
        raise BadImageError(f"values of up to {values.max()}, where it says {top}")
    if value_range is not None:
        return check_values(values.reshape(shape), value_range)
    return ((values.astype(np.uint32) * 65535 + top // 2) // top).astype(np.uint16).reshape(shape)


# JPEG -----------------------------------------------------------------------------------------------------------------


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and content of each segment before the first scan (ISO/IEC 10918-1, annex B)."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == SCAN:
            return
        if marker == 0xFF or 0xD0 <= marker <= 0xD8:  # fill, or a marker on its own
            place += 1 if marker == 0xFF else 2
            continue
        size = struct.unpack_from(">H", data, place + 2)[0]
        yield marker, data[place + 4 : place + 2 + size]
        place += 2 + size


def is_deep_jpeg(data: bytes) -> bool:
    """Whether it has other than 8 bits, or is lossless: neither PIL nor libvips read those."""
    for marker, content in segments(data) if data.startswith(START_OF_IMAGE) else ():
        if marker in FRAMES:
            return marker == LOSSLESS or content[:1] != b"\x08"
    return False


def read_deep_jpeg(data: bytes, max_pixels: int, value_range: Value) -> tuple[Pixels, Metadata]:
    """Pixels, not turned, and metadata. Raises BadImageError, also for one without its end: the decoder fills it up."""
    bits, icc, exif, xmp, comment, resolution = 8, b"", b"", b"", b"", None
    for marker, content in segments(data):
        if marker in FRAMES:
            bits, height, width = struct.unpack_from(">BHH", content)
            check_size(width, height, max_pixels)
        elif marker == APP2 and content.startswith(ICC_NAME):
            icc += content[len(ICC_NAME) + 2 :]  # behind the number of the part, and that of all
        elif marker == APP1 and content.startswith(EXIF_PREFIX):
            exif = content
        elif marker == APP1 and content.startswith(XMP_NAME):
            xmp = content[len(XMP_NAME) :]
        elif marker == COMMENT:
            comment = content
        elif marker == APP0 and content.startswith(JFIF_NAME) and content[7:8] in TO_INCHES:
            across, down = struct.unpack_from(">HH", content, 8)
            resolution = plausible(*(dots * TO_INCHES[content[7:8]] for dots in (across, down)))
    if data.rfind(END_OF_IMAGE) < data.rfind(bytes((0xFF, SCAN))):
        raise BadImageError("cannot be decoded: truncated JPEG")
    stored = np.atleast_3d(imagecodecs.jpeg8_decode(data))
    pixels = check_values(stored, value_range) if value_range and bits > 8 else full_scale(stored, bits)
    text = (("Comment", comment.decode("utf-8", "replace")),) if comment else ()
    return pixels, Metadata(icc=icc, exif=exif, xmp=xmp, text=text, resolution=resolution)


def is_whole_jpeg(data: bytes) -> bool:
    """Whether all pixels are there; the end marker has to be, too."""
    try:
        pyvips.Image.new_from_buffer(data, "", access="sequential", fail_on="warning").avg()
    except pyvips.Error:
        return False
    return True


# JPEG 2000 and AVIF ---------------------------------------------------------------------------------------------------


def jpeg_2000_bits(data: bytes, max_pixels: int) -> int | None:
    """Bits of its values, where all components have as many and no sign; None for others. Raises BadImageError."""
    place = data.find(SIZ)
    if place < 0 or place + 42 > len(data):
        return None
    right, bottom, left, top = struct.unpack_from(">4I", data, place + 8)
    check_size(right - left, bottom - top, max_pixels)
    count = struct.unpack_from(">H", data, place + 40)[0]
    depths = {data[place + 42 + 3 * i] for i in range(min(count, (len(data) - place - 42) // 3))}
    return min(depths) + 1 if len(depths) == 1 and min(depths) < 38 else None


def read_deep_jpeg_2000(data: bytes, bits: int) -> Pixels:
    """In the colours of the file: where there is an ICC profile, the decoder would convert them, so it is not told."""
    icc, _ = jpeg_2000_colours(data)
    if icc:
        place = data.index(icc) - 3
        space = JP2_GREY if icc[16:20] == b"GRAY" else JP2_SRGB
        data = data[:place] + struct.pack(">BBBI", 1, 0, 0, space) + data[place + 7 :]
    return full_scale(np.atleast_3d(imagecodecs.jpeg2k_decode(data, numthreads=1)), bits)


def read_deep_avif(data: bytes, bits: int) -> Pixels:
    """The first image, not turned as the file says."""
    return full_scale(np.atleast_3d(imagecodecs.avif_decode(data, index=0, numthreads=1)), bits)
