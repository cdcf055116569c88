from __future__ import annotations

import dataclasses
from zlib import crc32

import numpy as np
import pytest

from ldm_vae.codec.bitstream import ALPHA, METADATA, Header, Limits, Varints, pack, unpack, varint
from ldm_vae.errors import (
    CompressedFileError,
    CorruptError,
    LimitExceededError,
    NotThisFormatError,
    TruncatedError,
    UnsupportedVersionError,
)

HEADER = Header(
    width=700,
    height=300,
    colours=3,
    depth=8,
    log2_stride=3,
    channels=4,
    log2_tile=4,
    step=256,
    model=b"abcd",
)
TILES = [bytes([i]) * (i % 5) for i in range(18)]  # 38 x 88 latents: 3 x 6 tiles
FILE = pack(HEADER, {ALPHA: b"alpha", METADATA: b""}, TILES)


def with_header(**changes: int) -> bytes:
    return pack(dataclasses.replace(HEADER, **changes), {}, TILES)


def test_a_file_gives_back_what_was_packed() -> None:
    contents = unpack(FILE)
    assert contents.header == HEADER
    assert contents.header.grid == (3, 6)
    assert [contents.read(t) for t in contents.tiles] == TILES
    assert {k: contents.read(p) for k, p in contents.sections.items()} == {ALPHA: b"alpha", METADATA: b""}


def test_the_fields_lie_where_the_specification_says() -> None:
    """docs/file-format.md, by hand."""
    assert FILE[:6] == b"\x89LDI\x02" + bytes([2 << 1])
    assert FILE[6:11] == bytes([4 << 4 | 3]) + b"abcd"
    assert FILE[11:18] == bytes([3, 0xBC, 0x05, 0xAC, 0x02, 4, 0x80])
    assert FILE[18:25] == bytes([0x02, ALPHA, 5]) + crc32(b"alpha").to_bytes(4, "little")


def test_tiles_cover_the_latents_once() -> None:
    covered = np.zeros(HEADER.latent_size, int)
    for top, left, bottom, right in HEADER.tile_boxes:
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()


def test_a_cut_anywhere_is_an_error() -> None:
    for length in range(len(FILE)):
        with pytest.raises((TruncatedError, NotThisFormatError)):
            unpack(FILE[:length])


def read_all(data: bytes) -> list[bytes]:
    contents = unpack(data)
    return [contents.read(part) for part in (*contents.sections.values(), *contents.tiles)]


def test_any_flipped_bit_is_an_error() -> None:
    for bit in range(8 * len(FILE)):
        damaged = bytearray(FILE)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CompressedFileError):
            read_all(bytes(damaged))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", NotThisFormatError),
        (b"\xff\xd8\xff\xe0 JPEG", NotThisFormatError),
        (FILE[:4] + b"\x01" + FILE[5:], UnsupportedVersionError),
        (FILE[:5] + b"\x10" + FILE[6:], CorruptError),  # flags of a later version
        (FILE + b"\0", CorruptError),
        (with_header(width=2**15 + 1, height=1), LimitExceededError),
        (with_header(width=2**15, height=2**15), LimitExceededError),
        (with_header(width=2**32 - 1, height=2**32 - 1), LimitExceededError),
        (with_header(width=2**14, height=2**14), TruncatedError),  # thousands of tiles are announced, 18 are there
        (with_header(width=0), CorruptError),
        (with_header(channels=2**16), CorruptError),
        (with_header(colours=256), CorruptError),
        (with_header(log2_tile=3), CorruptError),
        (with_header(step=0), CorruptError),
        (with_header(step=2**16), CorruptError),
    ],
)
def test_what_is_wrong_is_named(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        unpack(data)


def test_limits_can_be_set() -> None:
    with pytest.raises(LimitExceededError, match="700x300"):
        unpack(FILE, limits=Limits(max_side=699))
    with pytest.raises(LimitExceededError, match="209999"):
        unpack(FILE, limits=Limits(max_pixels=209_999))


def test_a_lying_table_of_contents_is_an_error() -> None:
    """Lengths that contradict the file's, with a CRC that is right."""
    first = 19 + 2 * 6
    for length in (2, 4, 2**40):
        end = unpack(FILE).tiles[0].begin - 5  # the header's CRC and the sections' 5 bytes before the tiles
        head = FILE[:first] + varint(length) + FILE[first + 1 : end - 4]
        with pytest.raises((TruncatedError, CorruptError)):
            unpack(head + crc32(head).to_bytes(4, "little") + FILE[end:])


def test_salvage_reads_what_is_there() -> None:
    contents = unpack(FILE[:-3], salvage=True)
    assert [contents.read(t) for t in contents.tiles[:16]] == TILES[:16]
    with pytest.raises(TruncatedError, match="within"):
        contents.read(contents.tiles[17])


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**42 - 1])
def test_numbers_come_back(value: int) -> None:
    assert Varints(varint(value)).next() == value


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff" * 7, varint(2**42)])
def test_numbers_that_are_not_the_shortest_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptError):
        Varints(data).next()


def test_the_header_costs_little() -> None:
    one = dataclasses.replace(HEADER, width=768, height=512, log2_tile=7)
    assert len(pack(one, {}, [bytes(10_000)])) - 10_000 == 11 + 8 + 2 + 4 + 4
