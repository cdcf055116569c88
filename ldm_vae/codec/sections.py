"""What a file holds beside its pixels: transparency, ICC profile and EXIF, packed and unpacked."""

from __future__ import annotations

import struct
import zlib

import imagecodecs
import numpy as np

from ldm_vae.codec.bitstream import ALPHA, EXIF, ICC, SECTIONS, Contents, report
from ldm_vae.codec.picture import Picture
from ldm_vae.data import png
from ldm_vae.data.images import Pixels
from ldm_vae.errors import BadImageError, CompressedFileError, CorruptError

MAX_METADATA = 1 << 24
"""Bytes of an ICC profile or of EXIF."""


def pack_sections(picture: Picture, *, strip: bool) -> dict[int, bytes]:
    """By kind, as `bitstream.pack` takes them; with `strip`, neither ICC profile nor EXIF. Raises BadImageError."""
    sections = {}
    if picture.alpha is not None:
        sections[ALPHA] = bytes(imagecodecs.png_encode(picture.alpha, level=9))
    for kind, metadata in () if strip else ((ICC, picture.icc), (EXIF, picture.exif)):
        if len(metadata) > MAX_METADATA:
            size = f"{SECTIONS[kind]} of {len(metadata)} bytes"
            raise BadImageError(f"{size} is over {MAX_METADATA}: leave it out (strip)")
        if metadata:
            sections[kind] = zlib.compress(metadata, 9)
    return sections


def unpack_sections(contents: Contents, damage: list[str] | None) -> tuple[Pixels | None, bytes, bytes]:
    """Alpha (H, W), ICC profile and EXIF. `damage` takes a message for a damaged one; None: the first is raised."""
    header, alpha, metadata = contents.header, None, {}
    for kind, part in contents.sections.items():
        try:
            data = contents.read(part)
            if kind == ALPHA:
                dtype = np.dtype(np.uint16 if header.depth == 16 else np.uint8)
                alpha = unpack_alpha(data, header.height, header.width, dtype)
            elif kind in SECTIONS:
                metadata[kind] = inflate(data, limit=MAX_METADATA)
        except CompressedFileError as error:
            report(error, part.name, damage)
    return alpha, metadata.get(ICC, b""), metadata.get(EXIF, b"")


def unpack_alpha(data: bytes, height: int, width: int, dtype: np.dtype) -> Pixels:
    """Alpha (H, W) from a grey PNG. Raises CorruptError: for a wrong size before anything is allocated."""
    if data[:8] != png.SIGNATURE or struct.unpack_from(">II", data.ljust(24, b"\0"), 16) != (width, height):
        raise CorruptError("it is no PNG of the image's size")
    try:
        alpha = imagecodecs.png_decode(data)
    except Exception as error:  # the decoder raises its own kinds
        raise CorruptError(f"it is damaged: {error}") from None
    if alpha.shape != (height, width) or alpha.dtype != dtype:
        raise CorruptError("it has another size or depth than the image")
    return alpha


def inflate(data: bytes, *, limit: int) -> bytes:
    """What zlib compressed, of at most `limit` bytes. Raises CorruptError."""
    decompressor = zlib.decompressobj()
    try:
        content = decompressor.decompress(data, limit)
    except zlib.error as error:
        raise CorruptError(f"it is damaged: {error}") from None
    if not decompressor.eof or decompressor.unused_data:
        raise CorruptError(f"it is damaged, or has more than {limit} bytes")
    return content
