"""The bytes of a compressed image: header, table of contents, sections, tiles. docs/file-format.md specifies them.

Nothing here imports torch, computes with floats, or allocates what a file asks for before it has been checked.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

from ldm_vae.errors import (
    CompressedFileError,
    CorruptError,
    LimitExceededError,
    NotThisFormatError,
    TruncatedError,
    UnsupportedVersionError,
)

EXTENSION = ".ldi"
MODEL_VARIABLE = "LDM_VAE_MODEL"
DEFAULT_MODEL = "box:codec"
"""Of the environment: the model where none is named."""
MAGIC = b"\x89LDI"
VERSION = 2
FIXED = struct.Struct("<4sBBB4s")
"""What begins a file: magic, version, flags, stride and tile, model. Varints follow."""
MODEL_BYTES = 4
MAX_SECTIONS = 7
CRC = struct.Struct("<I")
TUNINGS = ("visual", "psnr")
"""The networks that one model may hold, by the number that files have: the model's own, and another for the PSNR."""
ALPHA, METADATA = 1, 2
SECTIONS = {ALPHA: "alpha", METADATA: "metadata"}
Box = tuple[int, int, int, int]
"""Top, left, bottom, right."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may ask for before anything is allocated."""

    max_pixels: int = 1 << 28
    max_side: int = 1 << 15

    def check(self, width: int, height: int) -> None:
        """Raises LimitExceededError."""
        if max(width, height) > self.max_side:
            raise LimitExceededError(f"{width}x{height} pixels: a side is over the limit of {self.max_side}")
        if width * height > self.max_pixels:
            raise LimitExceededError(f"{width}x{height} pixels: more than the limit of {self.max_pixels}")


@dataclass(frozen=True)
class Header:
    """What a file says of itself. A latent is `stride` pixels wide, a tile `tile` latents.

    Attributes:
        colours: channels of the image, without alpha.
        depth: bits of a value, 8 or 16.
        channels: latent channels that are coded.
        step: fixed point, 256 is 1.
        model: the first bytes of `Tables.digest`.
        tuning: which of `TUNINGS` wrote it.
    """

    colours: int
    depth: int
    width: int
    height: int
    log2_stride: int
    channels: int
    log2_tile: int
    step: int
    model: bytes
    tuning: int = 0

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width in latents."""
        stride = 1 << self.log2_stride
        return -(-self.height // stride), -(-self.width // stride)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        height, width = self.latent_size
        side = 1 << self.log2_tile
        return -(-height // side), -(-width // side)

    @cached_property
    def tile_boxes(self) -> list[Box]:
        """Of each tile, in latents; tiles are counted along rows."""
        side, (height, width) = 1 << self.log2_tile, self.latent_size
        return [
            (top, left, min(top + side, height), min(left + side, width))
            for top in range(0, height, side)
            for left in range(0, width, side)
        ]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where a section or tile lies in the file, and its CRC-32."""

    name: str
    begin: int
    end: int
    crc: int

    def checked(self, content: bytes) -> bytes:
        """Its bytes, if they are. Raises TruncatedError or CorruptError, which leave its name to the caller."""
        if len(content) < self.end - self.begin:
            raise TruncatedError("the file ends within it")
        if crc32(content) != self.crc:
            raise CorruptError("it is damaged: its CRC-32 differs")
        return content


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A file whose header was found whole."""

    header: Header
    sections: dict[int, Part]
    tiles: list[Part]
    data: bytes

    def read(self, part: Part) -> bytes:
        """The bytes of a part, `checked`."""
        return part.checked(self.data[part.begin : part.end])


def report(error: CompressedFileError, name: str, damage: list[str] | None) -> None:
    """Adds what is wrong with a part of a file to `damage`, or raises it where that is None."""
    if damage is None:
        raise type(error)(f"{name}: {error}") from None
    damage.append(f"{name}: {error}")


def pack(header: Header, sections: dict[int, bytes], tiles: list[bytes]) -> bytes:
    """A whole file. `tiles` are in the order of `Header.tile_boxes`, sections keyed by ALPHA or METADATA."""
    ordered = sorted(sections.items())
    shape = header.log2_stride | header.log2_tile << 4
    flags = int(header.depth == 16) | len(ordered) << 1 | header.tuning << 4
    head = FIXED.pack(MAGIC, VERSION, flags, shape, header.model)
    numbers = (header.colours, header.width, header.height, header.channels, header.step)
    head += b"".join(varint(n) for n in numbers)
    contents = b"".join(bytes([kind]) + varint(len(d)) + CRC.pack(crc32(d)) for kind, d in ordered)
    contents += b"".join(varint(len(t)) + CRC.pack(crc32(t)) for t in tiles)
    head += contents
    return b"".join([head, CRC.pack(crc32(head)), *(d for _, d in ordered), *tiles])


def unpack(data: bytes, *, limits: Limits | None = None, salvage: bool = False) -> Contents:
    """What `pack` made.

    Args:
        limits: Limits() unless given.
        salvage: accept a file that ends too early or too late; reading its parts will tell which are good.

    Raises:
        CompressedFileError: NotThisFormat, UnsupportedVersion, LimitExceeded, Truncated or Corrupt.
    """
    if not data:
        raise NotThisFormatError("the file is empty")
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise NotThisFormatError("not a compressed image of this format: it begins otherwise")
    entries = Varints(data)
    try:
        header, num_sections = read_header(entries)
        (limits or Limits()).check(header.width, header.height)
        num_tiles = header.grid[0] * header.grid[1]
        if num_tiles * (1 + CRC.size) > len(data):
            raise TruncatedError(f"{len(data)} bytes cannot hold the contents of {num_tiles} tiles")
        sections, tiles, end = read_contents(entries, num_sections, num_tiles)
        if end > len(data) and not salvage:
            raise TruncatedError(f"the file ends after {len(data)} of {end} bytes")
    except CorruptError:
        if entries.position >= len(data):
            raise TruncatedError(f"the file ends within its header, after {len(data)} bytes") from None
        raise
    if end < len(data) and not salvage:
        raise CorruptError(f"{len(data) - end} bytes follow after the end of the image")
    return Contents(header=header, sections=sections, tiles=tiles, data=data)


def read_header(entries: Varints) -> tuple[Header, int]:
    """The header and the number of sections. Raises UnsupportedVersionError or CorruptError."""
    _, version, flags, shape, model = FIXED.unpack(entries.take(FIXED.size))
    if version != VERSION:
        raise UnsupportedVersionError(f"format version {version}: this ldm-vae reads version {VERSION}")
    colours, width, height, channels, step = (entries.next() for _ in range(5))
    header = Header(
        colours=colours,
        depth=16 if flags & 1 else 8,
        width=width,
        height=height,
        log2_stride=shape & 15,
        channels=channels,
        log2_tile=shape >> 4,
        step=step,
        model=model,
        tuning=flags >> 4,
    )
    wrong = {
        "tuning": header.tuning >= len(TUNINGS),
        "colours": not 1 <= colours < 1 << 8,
        "size": min(width, height) < 1,
        "stride": header.log2_stride > 8,
        "channels": channels >= 1 << 16,
        "tile size": not 4 <= header.log2_tile <= 8,  # what decoding a tile takes is bounded by it
        "step": not 1 <= step < 1 << 16,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise CorruptError(f"the header is damaged: its {name} cannot be")
    return header, flags >> 1 & MAX_SECTIONS


def read_contents(entries: Varints, num_sections: int, num_tiles: int) -> tuple[dict[int, Part], list[Part], int]:
    """Sections, tiles, and where the file should end. Checks the header's CRC before it believes a length."""
    entries_read = []
    for i in range(num_sections + num_tiles):
        kind = entries.take(1)[0] if i < num_sections else None
        name = f"tile {i - num_sections}" if kind is None else SECTIONS.get(kind, f"section {kind}")
        entries_read.append((kind, name, entries.next(), entries.crc()))
    end = entries.position
    if entries.crc() != crc32(entries.data[:end]):
        raise CorruptError("the header is damaged: its CRC-32 differs")
    begin = entries.position
    sections: dict[int, Part] = {}
    tiles: list[Part] = []
    for kind, name, length, crc in entries_read:
        part = Part(name=name, begin=begin, end=begin + length, crc=crc)
        begin += length
        if kind is None:
            tiles.append(part)
        elif kind <= max(sections, default=-1):
            raise CorruptError(f"the header is damaged: {name} is out of order, or there twice")
        else:
            sections[kind] = part
    return sections, tiles, begin


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow (LEB128)."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class Varints:
    """Reads numbers one after another. Raises CorruptError past the end, and for a number that is not the shortest."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data, self.position = data, position

    def take(self, count: int) -> bytes:
        content = self.data[self.position : self.position + count]
        self.position += len(content)
        if len(content) < count:
            raise CorruptError("a number is cut short")
        return content

    def next(self) -> int:
        """A varint of at most six bytes, 42 bits."""
        value = 0
        for i in range(6):
            (byte,) = self.take(1)
            value |= (byte & 127) << 7 * i
            if byte < 128:
                if byte == 0 and i > 0:
                    break
                return value
        raise CorruptError("a number is longer than it may be")

    def crc(self) -> int:
        return int(CRC.unpack(self.take(CRC.size))[0])
