"""The bytes of a compressed image: header, table of contents, sections, tiles. docs/file-format.md specifies them.

Nothing here imports torch, computes with floats, or allocates what a file asks for before it has been checked.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
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
"""Of the environment: the model where none is named."""
MAGIC = b"\x89LDI\r\n\x1a\n"
"""As PNG's: it shows when a transfer changed line ends, cut the eighth bit, or stopped at an end of file."""
VERSION = 1
FIXED = struct.Struct("<8s BBB II B H BB H 8s 8s B")
CRC = struct.Struct("<I")
ALPHA, METADATA = 1, 2
SECTIONS = {ALPHA: "alpha", METADATA: "metadata"}
MAX_LOG2_SYMBOLS = 17
"""Of a tile's symbols, for each lane: a lane's symbols are decoded one after the other."""
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
    """What a file says of itself, in the order of its bytes. A latent is `stride` pixels wide, a tile `tile` latents.

    Attributes:
        colours: channels of the image, without alpha.
        depth: bits of a value, 8 or 16.
        channels: latent channels that are coded.
        quality: fixed point, 256 is 1.
        tables, weights: the first 8 bytes of the sha256 of each.
    """

    colours: int
    depth: int
    width: int
    height: int
    log2_stride: int
    channels: int
    log2_tile: int
    log2_lanes: int
    quality: int
    tables: bytes
    weights: bytes

    @property
    def lanes(self) -> int:
        return 1 << self.log2_lanes

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
    head = FIXED.pack(MAGIC, VERSION, *astuple(header), len(sections))
    ordered = sorted(sections.items())
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
    if len(data) < FIXED.size:
        raise TruncatedError(f"the file ends within its header, after {len(data)} bytes")
    _, version, *fields, num_sections = FIXED.unpack_from(data)
    if version != VERSION:
        raise UnsupportedVersionError(f"format version {version}: this ldm-vae reads version {VERSION}")
    header = Header(*fields)
    check_fields(header)
    (limits or Limits()).check(header.width, header.height)
    rows, columns = header.grid
    height, width = (min(side, 1 << header.log2_tile) for side in header.latent_size)  # of the largest tile
    if header.channels * height * width > header.lanes << MAX_LOG2_SYMBOLS:
        raise CorruptError(f"the header is damaged: {header.lanes} lanes are too few for tiles of this size")
    if rows * columns * (1 + CRC.size) > len(data):
        raise TruncatedError(f"{len(data)} bytes cannot hold the contents of {rows * columns} tiles")
    entries = Varints(data, FIXED.size)
    try:
        sections, tiles, end = read_contents(entries, num_sections, rows * columns)
        if end > len(data) and not salvage:
            raise TruncatedError(f"the file ends after {len(data)} of {end} bytes")
    except CorruptError:
        if entries.position >= len(data):
            raise TruncatedError("the file ends within its table of contents") from None
        raise
    if end < len(data) and not salvage:
        raise CorruptError(f"{len(data) - end} bytes follow after the end of the image")
    return Contents(header=header, sections=sections, tiles=tiles, data=data)


def check_fields(header: Header) -> None:
    """Raises CorruptError for values that no encoder writes."""
    wrong = {
        "size": min(header.width, header.height) < 1,
        "colour": header.colours < 1,
        "depth": header.depth not in (8, 16),
        "stride": header.log2_stride > 8,
        "tile size": not 4 <= header.log2_tile <= 8,  # what decoding a tile takes is bounded by it
        "number of lanes": header.log2_lanes > 10,
        "quality": header.quality < 1,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise CorruptError(f"the header is damaged: its {name} cannot be")


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
