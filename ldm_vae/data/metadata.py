"""What an image file says beside its pixels: colour profile, EXIF, XMP, texts, resolution. No torch here."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
"""What a PNG begins with."""
EXIF_PREFIX = b"Exif\0\0"
"""Before EXIF in JPEG, and where PIL hands it over; PNG and our files go without."""
LAYOUT_TAGS = frozenset(
    [*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 318, 319, *range(320, 326), 330, 332]
    + [*range(338, 342), 347, *range(512, 522), *range(529, 533), 700, 33723, 34377, 34675]
)
"""What a TIFF says of how it is stored, with orientation (274) and metadata in other formats: not the image's."""
SIZE_TAGS = frozenset((4097, 4098, 40962, 40963))
"""Width and height within EXIF: of the file that was, before it was turned or resized."""
XMP_KEY = "XML:com.adobe.xmp"


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Beside the pixels of a file; empty where it says nothing."""

    icc: bytes = b""
    """ICC profile of the pixels."""
    cicp: tuple[int, int, int, int] | None = None
    """Primaries, transfer, matrix and full range, by the numbers of ITU-T H.273."""
    exif: bytes = b""
    """Without prefix, and without what described how the file was stored."""
    xmp: bytes = b""
    text: tuple[tuple[str, str], ...] = ()
    """Keys and texts of a PNG; the comment of a JPEG or GIF has the key "Comment"."""
    resolution: tuple[float, float] | None = None
    """Dots per inch, across and down."""


NO_METADATA = Metadata()


def metadata_of(image: Image.Image, data: bytes = b"") -> Metadata:
    """Of PIL's image, and of the file that it was read from; nothing for what cannot be read.

    Args:
        data: the file's bytes, for what PIL passes over: the cICP of a PNG.
    """
    info = image.info
    try:
        exif = image.getexif().tobytes()  # a copy: the image's own stays as it is
    except Exception:
        exif = info.get("exif") or b""
    return Metadata(
        icc=info.get("icc_profile") or b"",
        cicp=png_cicp(data),
        exif=without_layout(exif),
        xmp=as_bytes(info.get("xmp") or info.get(XMP_KEY) or b""),
        text=texts_of(image),
        resolution=resolution_of(image),
    )


def texts_of(image: Image.Image) -> tuple[tuple[str, str], ...]:
    """Texts of a PNG, or the comment of a JPEG, GIF or WebP."""
    texts = getattr(image, "text", {}) if image.format == "PNG" else {}
    pairs = [(str(key), str(text)) for key, text in texts.items() if key != XMP_KEY]
    comment = image.info.get("comment")
    if comment and image.format != "PNG":
        pairs.append(("Comment", comment if isinstance(comment, str) else comment.decode("utf-8", "replace")))
    return tuple(pairs)


def resolution_of(image: Image.Image) -> tuple[float, float] | None:
    """What the file itself says: of a JPEG that has none PIL makes one up, and that of EXIF stays there."""
    if image.format in ("JPEG", "MPO") and image.info.get("jfif_unit") not in (1, 2):
        return None
    try:
        across, down = (float(dots) for dots in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if 0 < across < 1e6 and 0 < down < 1e6 else None


def as_bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value


def without_layout(exif: bytes) -> bytes:
    """EXIF without the prefix, and without what described the file that it comes from.

    A tag that cannot be read or written goes alone; of a damaged block nothing stays.
    """
    tags, kept = Image.Exif(), Image.Exif()
    try:
        tags.load(exif)
        numbers = sorted(set(tags) - LAYOUT_TAGS)
    except Exception:  # damaged ones raise many kinds
        return b""
    for tag in numbers:
        value = readable(tags, tag)
        if value is not None:
            kept[tag] = value
    return kept.tobytes().removeprefix(EXIF_PREFIX) if len(kept) else b""


def readable(tags: Image.Exif, tag: int) -> Any:
    """A tag's value, or a directory's as a dictionary of its readable ones; None where there is nothing."""
    try:
        if tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop):
            values = dict(tags.get_ifd(tag))
            if ExifTags.IFD.Interop in values:
                values[ExifTags.IFD.Interop] = readable(tags, ExifTags.IFD.Interop)
            kept = {t: v for t, v in values.items() if t not in SIZE_TAGS and v is not None and is_writable(t, v)}
            return kept or None
        return tags[tag] if is_writable(tag, tags[tag]) else None
    except Exception:
        return None


def is_writable(tag: int, value: Any) -> bool:
    alone = Image.Exif()
    alone[tag] = value
    try:
        return len(alone.tobytes()) > 0
    except Exception:
        return False


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of a PNG's chunks; none of another file."""
    place = len(SIGNATURE) if data.startswith(SIGNATURE) else len(data)
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        yield kind, data[place + 8 : place + 8 + size]
        place += size + 12


def chunk_before_pixels(data: bytes, name: bytes) -> bytes:
    """The content of a PNG's first chunk of that name; empty without one."""
    for kind, content in png_chunks(data):
        if kind in (name, b"IDAT"):
            return content if kind == name else b""
    return b""


def png_cicp(data: bytes) -> tuple[int, int, int, int] | None:
    """What the cICP chunk of a PNG says (PNG, third edition, 11.3.2.6)."""
    content = chunk_before_pixels(data, b"cICP")
    return (content[0], content[1], content[2], content[3]) if len(content) == 4 else None


def png_resolution(data: bytes) -> tuple[float, float] | None:
    """Dots per inch that the pHYs chunk of a PNG says (11.3.4.3)."""
    content = chunk_before_pixels(data, b"pHYs")
    if len(content) != 9 or content[8] != 1:
        return None
    across, down = struct.unpack_from(">II", content)
    return across * 0.0254, down * 0.0254
