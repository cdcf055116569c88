"""What an image file says beside its pixels: colours, EXIF, XMP, texts, resolution, time. No torch here."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
DIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop)
SIZE_TAGS = frozenset((4097, 4098, 40962, 40963))
"""Width and height within EXIF: of the file that was, before it was turned or resized."""
XMP_ORIENTATION = re.compile(
    rb"""tiff:Orientation\s*=\s*["'][0-9]["']|<tiff:Orientation>\s*[0-9]\s*</tiff:Orientation>"""
)
"""The orientation as XMP has it, of the file that was before it was turned."""
IPTC_TAG, IPTC_RESOURCE = 33723, 0x0404
"""Where IPTC is: in a TIFF, and among the resources of Photoshop that a JPEG holds."""
RAW_EXIF = "Raw profile type exif"
"""The text in which ImageMagick writes EXIF into a PNG."""
XMP_KEY = "XML:com.adobe.xmp"
MAX_TEXT = 1 << 24
"""Bytes of a compressed text, or profile, in a PNG: the workflows of generators are longer than PIL's limit."""


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
    """Without the orientation."""
    iptc: bytes = b""
    """Caption, keywords, copyright and more, as agencies write them (IPTC-IIM)."""
    text: tuple[tuple[str, str], ...] = ()
    """Keys and texts of a PNG; the comment of a JPEG or GIF has the key "Comment"."""
    resolution: tuple[float, float] | None = None
    """Dots per inch, across and down."""
    modified: bytes = b""
    """When a PNG was last changed: year (two bytes), month, day, hour, minute, second, in UTC."""


NO_METADATA = Metadata()


@contextmanager
def quiet() -> Iterator[None]:
    """PIL warns of every tag that it cannot read, and of more; what matters is raised, or noted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cleaned(metadata: Metadata) -> Metadata:
    """As `Metadata` has it, of one whose EXIF and XMP are as they were stored."""
    return replace(metadata, exif=without_layout(metadata.exif), xmp=XMP_ORIENTATION.sub(b"", metadata.xmp))


def iptc_segment(iptc: bytes) -> bytes:
    """IPTC as a JPEG holds it (APP13, with one of Photoshop's resources); empty if it is too long for one segment."""
    resource = struct.pack(">4sHHI", b"8BIM", IPTC_RESOURCE, 0, len(iptc)) + iptc + bytes(len(iptc) % 2)
    content = b"Photoshop 3.0\0" + resource
    return struct.pack(">BBH", 0xFF, 0xED, len(content) + 2) + content if iptc and len(content) < 65534 else b""


def plausible(across: float, down: float) -> tuple[float, float] | None:
    """A resolution, if it can be one."""
    return (across, down) if 0 < across < 1e6 and 0 < down < 1e6 else None


def as_bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value


@quiet()
def without_layout(exif: bytes) -> bytes:
    """EXIF without the prefix, and without what described the file that it comes from.

    A tag that cannot be read or written goes alone; of a damaged block nothing stays.
    """
    tags = Image.Exif()
    try:
        tags.load(exif)
        values = {tag: readable(tags, tag) for tag in sorted(set(tags) - LAYOUT_TAGS)}
    except Exception:  # damaged ones raise many kinds
        return b""
    values = {tag: value for tag, value in values.items() if value is not None}
    try:
        return written(values)
    except Exception:  # of the writer, too
        return written({tag: kept for tag, value in values.items() if (kept := writable(tag, value)) is not None})


def written(values: dict[int, Any]) -> bytes:
    tags = Image.Exif()
    for tag, value in values.items():
        tags[tag] = value
    return tags.tobytes().removeprefix(EXIF_PREFIX) if values else b""


def readable(tags: Image.Exif, tag: int) -> Any:
    """A tag's value, or a directory's as a dictionary; None where there is nothing."""
    try:
        if tag not in DIRECTORIES:
            return tags[tag]
        values = dict(tags.get_ifd(tag))
        if ExifTags.IFD.Interop in values:
            values[ExifTags.IFD.Interop] = readable(tags, ExifTags.IFD.Interop)
        return {t: value for t, value in values.items() if t not in SIZE_TAGS and value is not None} or None
    except Exception:
        return None


def writable(tag: int, value: Any) -> Any:
    """A value, or what of a dictionary can be written as EXIF; None where nothing can."""
    if isinstance(value, dict):
        value = {t: kept for t, v in value.items() if (kept := writable(t, v)) is not None}
    try:
        return value if written({tag: value}) else None
    except Exception:
        return None
