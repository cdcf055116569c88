"""What a file holds beside its pixels: transparency and metadata, packed and unpacked."""

from __future__ import annotations

import struct
import zlib

import imagecodecs
import numpy as np

from ldm_vae.codec.bitstream import ALPHA, METADATA, Contents, Varints, report, varint
from ldm_vae.codec.picture import Picture
from ldm_vae.data.images import Pixels
from ldm_vae.data.metadata import NO_METADATA, SIGNATURE, Metadata
from ldm_vae.errors import BadImageError, CompressedFileError, CorruptError

MAX_METADATA = 1 << 24
"""Bytes of all metadata of a file, before they are deflated."""
MAX_ITEMS = 1 << 12
"""In the section of metadata."""
ICC, EXIF, XMP, CICP, RESOLUTION, TEXT, MODIFIED, IPTC = 1, 2, 3, 4, 5, 6, 7, 8
"""Kinds of items in the section of metadata."""
RAW = -15
"""zlib's name for a deflate stream without header and checksum: the section has its own."""


def pack_sections(picture: Picture, *, strip: bool) -> dict[int, bytes]:
    """By kind, as `bitstream.pack` takes them; with `strip`, no metadata. Raises BadImageError."""
    sections = {}
    if picture.alpha is not None:
        sections[ALPHA] = bytes(imagecodecs.png_encode(picture.alpha, level=9))
    if not strip and picture.metadata != NO_METADATA:
        sections[METADATA] = pack_metadata(picture.metadata)
    return sections


def unpack_sections(contents: Contents, damage: list[str] | None) -> tuple[Pixels | None, Metadata]:
    """Alpha (H, W) and metadata. `damage` takes a message for a damaged one; None: the first is raised."""
    header, alpha, metadata = contents.header, None, NO_METADATA
    for kind, part in contents.sections.items():
        try:
            data = contents.read(part)
            if kind == ALPHA:
                dtype = np.dtype(np.uint16 if header.depth == 16 else np.uint8)
                alpha = unpack_alpha(data, header.height, header.width, dtype)
            elif kind == METADATA:
                metadata = unpack_metadata(data)
        except CompressedFileError as error:
            report(error, part.name, damage)
    return alpha, metadata


def pack_metadata(metadata: Metadata) -> bytes:
    """Items `kind | length (varint) | bytes`, deflated together. Raises BadImageError for too much of it."""
    items = [
        *((ICC, metadata.icc), (EXIF, metadata.exif), (XMP, metadata.xmp), (CICP, bytes(metadata.cicp or ()))),
        (RESOLUTION, b"".join(varint(max(round(1000 * dots), 1)) for dots in metadata.resolution or ())),
        *((MODIFIED, metadata.modified), (IPTC, metadata.iptc)),
        *((TEXT, f"{keyword}\0{text}".encode(errors="backslashreplace")) for keyword, text in metadata.text),
    ]
    content = b"".join(bytes([kind]) + varint(len(data)) + data for kind, data in items if data)
    if len(content) > MAX_METADATA or len(items) > MAX_ITEMS:
        size = f"{len(content)} bytes in {len(items)} items"
        raise BadImageError(f"metadata of {size}, more than {MAX_METADATA} or {MAX_ITEMS}: leave it out (strip)")
    return zlib.compress(content, 9, RAW)


def unpack_metadata(data: bytes) -> Metadata:
    """What `pack_metadata` made; kinds of items that are not known are skipped. Raises CorruptError."""
    content = inflate(data, limit=MAX_METADATA)
    items, blocks, texts, count = Varints(content), dict[int, bytes](), list[tuple[str, str]](), 0
    while items.position < len(content):
        if (count := count + 1) > MAX_ITEMS:
            raise CorruptError(f"it has more than {MAX_ITEMS} items")
        (kind,) = items.take(1)
        item = items.take(items.next())
        if kind == TEXT:
            keyword, _, text = item.decode(errors="replace").partition("\0")
            texts.append((keyword, text))
        else:
            blocks[kind] = item
    return Metadata(
        icc=blocks.get(ICC, b""),
        cicp=cicp_in(blocks[CICP]) if CICP in blocks else None,
        exif=blocks.get(EXIF, b""),
        xmp=blocks.get(XMP, b""),
        iptc=blocks.get(IPTC, b""),
        text=tuple(texts),
        resolution=resolution_in(blocks[RESOLUTION]) if RESOLUTION in blocks else None,
        modified=time_in(blocks[MODIFIED]) if MODIFIED in blocks else b"",
    )


def cicp_in(item: bytes) -> tuple[int, int, int, int]:
    if len(item) != 4:
        raise CorruptError(f"a cICP of {len(item)} bytes instead of 4")
    return item[0], item[1], item[2], item[3]


def time_in(item: bytes) -> bytes:
    if len(item) != 7:
        raise CorruptError(f"a time of {len(item)} bytes instead of 7")
    return item


def resolution_in(item: bytes) -> tuple[float, float]:
    """Dots per inch, from thousandths."""
    numbers = Varints(item)
    across, down = numbers.next(), numbers.next()
    if not (0 < across < 10**9 and 0 < down < 10**9) or numbers.position < len(item):
        raise CorruptError("its resolution cannot be")
    return across / 1000, down / 1000


def unpack_alpha(data: bytes, height: int, width: int, dtype: np.dtype) -> Pixels:
    """Alpha (H, W) from a grey PNG. Raises CorruptError: for a wrong size before anything is allocated."""
    if data[:8] != SIGNATURE or struct.unpack_from(">II", data.ljust(24, b"\0"), 16) != (width, height):
        raise CorruptError("it is no PNG of the image's size")
    try:
        alpha = imagecodecs.png_decode(data)
    except Exception as error:  # the decoder raises its own kinds
        raise CorruptError(f"it is damaged: {error}") from None
    if alpha.shape != (height, width) or alpha.dtype != dtype:
        raise CorruptError("it has another size or depth than the image")
    return alpha


def inflate(data: bytes, *, limit: int) -> bytes:
    """What was deflated, of at most `limit` bytes. Raises CorruptError."""
    decompressor = zlib.decompressobj(RAW)
    try:
        content = decompressor.decompress(data, limit)
    except zlib.error as error:
        raise CorruptError(f"it is damaged: {error}") from None
    if not decompressor.eof or decompressor.unused_data:
        raise CorruptError(f"it is damaged, or has more than {limit} bytes")
    return content
