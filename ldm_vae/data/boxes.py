"""Boxes of ISO base media files, which AVIF, HEIC, JPEG XL and JPEG 2000 are made of (ISO/IEC 14496-12, 23008-12)."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass

Data = bytes | mmap.mmap
Box = tuple[bytes, bytes]
"""Kind and content."""
EXIF_UUID, XMP_UUID = b"JpgTiffExif->JP2", bytes.fromhex("BE7ACFCB97A942E89C71999491E3AFAC")
HDR_MARKS = (b"tmap", b"urn:com:apple:photo:2020:aux:hdrgainmap")
"""Somewhere in `meta` of a file with a gain map."""


def boxes(data: Data) -> Iterator[Box]:
    """One after another; what is damaged ends it."""
    place = 0
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        begin = place + 8
        if size == 1 and place + 16 <= len(data):
            size, begin = struct.unpack_from(">Q", data, begin)[0], place + 16
        end = len(data) if size == 0 else place + size
        if not begin <= end <= len(data):
            return
        yield kind, data[begin:end]
        place = end


def inside(data: Data, *kinds: bytes) -> bytes:
    """The content of the first box of these kinds within each other; empty without one."""
    found = b""
    for kind in kinds:
        data = found = next((content for name, content in boxes(data) if name == kind), b"")
    return found


@dataclass(frozen=True)
class Facts:
    """Of an AVIF or HEIC: bits of a value, code points of its colours once they are RGB, whether it has a gain map."""

    bits: int = 8
    cicp: tuple[int, int, int, int] | None = None
    gain_map: bool = False


def facts_of(data: Data) -> Facts:
    """Of the image that is shown, by its properties; what is damaged says nothing."""
    meta = inside(data, b"meta")[4:]
    try:
        bits, cicp = 8, None
        for kind, content in properties(meta):
            if kind == b"pixi":
                bits = max(content[5 : 5 + content[4]])
            elif kind == b"av1C" and bits == 8:
                bits = 8 + 2 * (content[2] >> 6 & 1) + 2 * (content[2] >> 5 & 1)
            elif kind == b"colr" and content[:4] == b"nclx":
                primaries, transfer = struct.unpack_from(">HH", content, 4)
                cicp = primaries, transfer, 0, 1
    except (IndexError, ValueError, struct.error):
        return Facts()
    return Facts(bits, cicp, any(mark in meta for mark in HDR_MARKS))


def properties(meta: bytes) -> list[Box]:
    """Those of the primary item (23008-12, 9.3)."""
    version, item = inside(meta, b"pitm")[:1], inside(meta, b"pitm")[4:]
    primary = int.from_bytes(item[: 2 if version == b"\0" else 4], "big")
    every = list(boxes(inside(meta, b"iprp", b"ipco")))
    ipma = inside(meta, b"iprp", b"ipma")
    long_items, wide = ipma[0] > 0, ipma[3] & 1
    place, found = 8, []
    for _ in range(int.from_bytes(ipma[4:8], "big")):
        size = 4 if long_items else 2
        number, count = int.from_bytes(ipma[place : place + size], "big"), ipma[place + size]
        place += size + 1
        for _ in range(count):
            index = int.from_bytes(ipma[place : place + 1 + wide], "big") & (0x7FFF if wide else 0x7F)
            place += 1 + wide
            if number == primary and 0 < index <= len(every):
                found.append(every[index - 1])
    return found


def jpeg_2000_blocks(data: Data) -> tuple[bytes, bytes]:
    """EXIF and XMP that others put into a JP2, each in a box `uuid`; empty without one."""
    found = dict.fromkeys((EXIF_UUID, XMP_UUID), b"")
    for kind, content in boxes(data):
        if kind == b"uuid" and content[:16] in found:
            found[content[:16]] = content[16:]
    return found[EXIF_UUID], found[XMP_UUID]


def jpeg_2000_colours(data: Data) -> tuple[bytes, int]:
    """The ICC profile, or the number of the colour space, that a JP2 names first (ISO/IEC 15444-1, I.5.3.3)."""
    content = inside(data, b"jp2h", b"colr")
    if content[:1] in (b"\2", b"\3"):
        return content[3:], 0
    return b"", int.from_bytes(content[3:7], "big")
