"""What a PNG says beside its pixels (W3C, PNG specification, third edition, 11.3). No torch here."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from ldm_vae.data.boxes import Data
from ldm_vae.data.colour import Cicp, profile_of
from ldm_vae.data.metadata import MAX_TEXT, RAW_EXIF, SIGNATURE, XMP_KEY, Metadata, plausible

PIXELS = frozenset((b"IDAT", b"fdAT"))
TEXTS = frozenset((b"tEXt", b"zTXt", b"iTXt"))
GREY = frozenset((0, 4))
"""Types of colour in IHDR."""


def png_chunks(data: Data) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of a PNG's chunks, without the content of those that hold pixels; none of another file."""
    place = len(SIGNATURE) if data[: len(SIGNATURE)] == SIGNATURE else len(data)
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        yield kind, b"" if kind in PIXELS else data[place + 8 : place + 8 + size]
        place += size + 12


def png_metadata(data: Data) -> Metadata:
    """EXIF as it is stored. What is damaged says nothing; colours, and resolution, only before the pixels."""
    before: dict[bytes, bytes] = {}
    anywhere: dict[bytes, bytes] = {}
    texts: list[tuple[str, str]] = []
    for kind, content in png_chunks(data):
        if kind in TEXTS:
            texts += text_in(kind, content)
        elif b"IDAT" in anywhere:
            anywhere.setdefault(kind, content)
        else:
            before.setdefault(kind, content)
            anywhere.setdefault(kind, content)
    by_keyword = dict(texts)
    cicp = code_points(before)
    modified = anywhere.get(b"tIME", b"")
    return Metadata(
        icc=icc_in(before) if cicp is None else profile_in(before),
        cicp=cicp,
        exif=anywhere.get(b"eXIf", b"") or raw_exif(by_keyword.get(RAW_EXIF, "")),
        xmp=by_keyword.get(XMP_KEY, "").encode(errors="replace"),
        text=tuple((keyword, text) for keyword, text in texts if keyword != XMP_KEY),
        resolution=dots_per_inch(before.get(b"pHYs", b"")),
        modified=modified if len(modified) == 7 else b"",
    )


def code_points(chunks: dict[bytes, bytes]) -> Cicp | None:
    content = chunks.get(b"cICP", b"")
    return (content[0], content[1], content[2], content[3]) if len(content) == 4 else None


def icc_in(chunks: dict[bytes, bytes]) -> bytes:
    """The profile in iCCP, or one that says what gAMA and cHRM do where there is neither iCCP nor sRGB (4.3)."""
    if icc := profile_in(chunks):
        return icc
    if b"sRGB" in chunks:
        return b""
    gamma, points = chunks.get(b"gAMA", b""), chunks.get(b"cHRM", b"")
    return profile_of(
        gamma=struct.unpack(">I", gamma)[0] / 100_000 if len(gamma) == 4 else None,
        points=tuple(value / 100_000 for value in struct.unpack(">8I", points)) if len(points) == 32 else None,
        grey=chunks.get(b"IHDR", bytes(13))[9] in GREY,
    )


def profile_in(chunks: dict[bytes, bytes]) -> bytes:
    return inflated(chunks.get(b"iCCP", b"").partition(b"\0")[2][1:])


def inflated(content: bytes) -> bytes:
    """Nothing for what is damaged, or longer than MAX_TEXT."""
    decompressor = zlib.decompressobj()
    try:
        whole = decompressor.decompress(content, MAX_TEXT)
    except zlib.error:
        return b""
    return whole if decompressor.eof else b""


def text_in(kind: bytes, content: bytes) -> list[tuple[str, str]]:
    """Keyword and text; nothing for a text that is damaged."""
    keyword, end, rest = content.partition(b"\0")
    if not end:
        return []
    if kind == b"tEXt":
        text = rest.decode("latin-1")
    elif kind == b"zTXt":
        text = inflated(rest[1:]).decode("latin-1")
    else:
        *_, content = rest[2:].split(b"\0", 2)  # behind the language, and the keyword in it
        text = (inflated(content) if rest[:1] == b"\1" else content).decode(errors="replace")
    return [(keyword.decode("latin-1"), text)]


def raw_exif(text: str) -> bytes:
    """EXIF as ImageMagick writes it into a text: three lines, then hexadecimal digits."""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return b""


def dots_per_inch(content: bytes) -> tuple[float, float] | None:
    """Dots per inch that pHYs says."""
    if len(content) != 9 or content[8] != 1:
        return None
    across, down = struct.unpack_from(">II", content)
    return plausible(across * 0.0254, down * 0.0254)
