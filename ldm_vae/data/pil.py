"""What PIL reads, and what it says of a file. No torch here."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from PIL import ImageFile as PILFile

from ldm_vae.data import boxes, deep
from ldm_vae.data.colour import from_inks, profile_of
from ldm_vae.data.image_files import EXTENSIONS
from ldm_vae.data.images import ImageFile, Pixels, check_size, check_values, orient
from ldm_vae.data.large import HEAD
from ldm_vae.data.metadata import (
    IPTC_RESOURCE,
    IPTC_TAG,
    MAX_TEXT,
    XMP_KEY,
    Metadata,
    as_bytes,
    cleaned,
    plausible,
    quiet,
)
from ldm_vae.data.png_metadata import png_metadata
from ldm_vae.errors import BadImageError

ORIENTATION, X_RESOLUTION = 274, 282
LEVELS = {"L;2": 85, "L;4": 17}
"""By PIL's raw modes: what it multiplies grey of few bits with."""
CONVERTED = {"CMYK": "CMYK", "LAB": "CIELAB"}
"""By PIL's modes: colours that are converted, so that a profile describes the pixels no longer."""
JP2_SPACES = frozenset((0, 12, 16, 17, 18))
"""Colour spaces of a JP2 that are read: none named, CMYK, sRGB, grey, and sYCC, of which decoders make sRGB."""
GAIN_MAPS = (b"http://ns.adobe.com/hdr-gain-map/", b"urn:iso:std:iso:ts:21496:-1")
"""In the head of a JPEG that has one."""
GAIN_MAP_NOTE = "its gain map (HDR) was left out"


def read_pil(data: bytes, max_pixels: int) -> ImageFile:
    """A file of a kind that PIL knows, in its own colours; where PIL would cut its precision, by another decoder."""
    with limits_are_ours(), Image.open(io.BytesIO(data), formats=formats()) as image:
        check_size(*image.size, max_pixels)
        scale_transparency(image)
        metadata, notes = beside(image, data)
        image.load()
        turned = orientation_of(image)
        kind = image.format
        if kind == "PNG" and data[24] == 16:  # bits, in IHDR; PIL would cut colours to 8
            return ImageFile(orient(deep.read_deep_png(data), turned), metadata, notes)
        if kind == "JPEG2000":
            bits = deep.jpeg_2000_bits(data, max_pixels)
            if bits not in (None, 8):
                return ImageFile(orient(deep.read_deep_jpeg_2000(data, bits), turned), metadata, notes)
        if kind == "AVIF":
            bits = boxes.facts_of(data).bits
            if bits > 8:
                return ImageFile(orient(deep.read_deep_avif(data, bits), turned), metadata, notes)
        if image.mode in CONVERTED:
            notes += (f"its {CONVERTED[image.mode]} colours were converted to sRGB",)
            metadata = replace(metadata, icc=b"")
        return ImageFile(pil_pixels(image), metadata, notes)


def beside(image: Image.Image, data: boxes.Data) -> tuple[Metadata, tuple[str, ...]]:
    """Of a file that PIL has opened, without decoding it, and of its bytes: metadata, and what is to be said.

    EXIF is as it is stored there: to clean it takes longer.
    """
    notes = notes_of(image, data)
    if image.format == "PNG":
        return png_metadata(data), notes
    metadata = metadata_in(image)
    if image.format == "TIFF":
        return replace(metadata, exif=bytes(data)), notes
    if image.format == "JPEG2000":
        icc, space = boxes.jpeg_2000_colours(data)
        strange = () if space in JP2_SPACES else (f"colours of JPEG 2000's space {space} were read as sRGB",)
        exif, xmp = boxes.jpeg_2000_blocks(data)
        return replace(metadata, icc=icc, exif=exif, xmp=xmp), notes + strange
    if image.format != "AVIF":
        return metadata, notes
    facts = boxes.facts_of(data)
    cicp = None if metadata.icc else facts.cicp  # ISO/IEC 23000-22, 7.3.6.4
    return replace(metadata, cicp=cicp), notes + (GAIN_MAP_NOTE,) * facts.gain_map


def keep_code_points(stream: PngImagePlugin.PngStream, pos: int, length: int) -> bytes:
    """What PIL is to do with a PNG's cICP, which it does not know: `info["cicp"]` has it, in the image's copies too."""
    assert stream.fp is not None
    content = PILFile._safe_read(stream.fp, length)
    if len(content) == 4:
        stream.im_info["cicp"] = tuple(content)
    return content


PngImagePlugin.PngStream.chunk_cICP = keep_code_points  # type: ignore[attr-defined]


def metadata_in(image: Image.Image) -> Metadata:
    """What PIL keeps with an image, EXIF as it was stored."""
    info = image.info
    icc, cicp = info.get("icc_profile") or b"", info.get("cicp")
    if not icc and not cicp and "srgb" not in info and ("gamma" in info or "chromaticity" in info):
        grey = image.mode in ("1", "L", "LA", "I;16", "I")
        icc = profile_of(gamma=info.get("gamma"), points=info.get("chromaticity"), grey=grey)
    return Metadata(
        icc=icc,
        cicp=cicp,
        exif=info.get("exif") or b"",
        xmp=as_bytes(info.get("xmp") or info.get(XMP_KEY) or b""),
        iptc=iptc_of(image),
        text=texts_of(image),
        resolution=resolution_of(image),
    )


def metadata_of(image: Image.Image) -> Metadata:
    """Of any image of PIL's; nothing for what cannot be read: the pixels are what counts."""
    metadata = metadata_in(image)
    with quiet():
        try:
            exif = image.getexif().tobytes()  # a copy: the image's own stays as it is
        except Exception:
            exif = metadata.exif
        return cleaned(replace(metadata, exif=exif))


def metadata_of_opened(image: Image.Image) -> Metadata:
    """`metadata_of` an image that somebody opened with PIL, with the code points of an AVIF, which PIL does not keep.

    Once its pixels are loaded and its file is closed, nobody knows them: a warning says so.
    """
    metadata = metadata_of(image)
    if image.format != "AVIF" or metadata.icc:
        return metadata
    head = head_of_opened(image)
    if head[4:8] != b"ftyp":
        warnings.warn(
            "Pillow keeps no code points (nclx) of an AVIF that it has loaded: its colours are taken for sRGB",
            stacklevel=2,
        )
    return replace(metadata, cicp=boxes.facts_of(head).cicp)


def head_of_opened(image: Image.Image) -> bytes:
    """What the file of an image that is not loaded begins with; empty once it is closed."""
    try:
        file = image.fp  # type: ignore[attr-defined]
        place = file.tell()
        file.seek(0)
        head: bytes = file.read(HEAD)
        file.seek(place)
    except (AttributeError, OSError, ValueError):
        return b""
    return head


def texts_of(image: Image.Image) -> tuple[tuple[str, str], ...]:
    """Texts of a PNG, or the comment of a JPEG, GIF or WebP."""
    texts = getattr(image, "text", {}) if image.format == "PNG" else {}
    pairs = [(str(key), str(text)) for key, text in texts.items() if key != XMP_KEY]
    comment = image.info.get("comment")
    if comment and image.format != "PNG":
        pairs.append(("Comment", comment if isinstance(comment, str) else comment.decode("utf-8", "replace")))
    return tuple(pairs)


def iptc_of(image: Image.Image) -> bytes:
    """By a TIFF's tag, or by the resources of Photoshop; a PNG may have a text of that name."""
    resources = image.info.get("photoshop")
    found = resources.get(IPTC_RESOURCE) if isinstance(resources, dict) else None
    if image.format == "TIFF":
        found = image.tag_v2.get(IPTC_TAG)  # type: ignore[attr-defined]
    return found if isinstance(found, bytes) else b""


def resolution_of(image: Image.Image) -> tuple[float, float] | None:
    """What the file itself says: of a JPEG or TIFF that has none PIL makes one up, and that of EXIF stays there."""
    if image.format in ("JPEG", "MPO") and image.info.get("jfif_unit") not in (1, 2):
        return None
    if image.format == "TIFF" and X_RESOLUTION not in image.tag_v2:  # type: ignore[attr-defined]
        return None
    try:
        across, down = (float(dots) for dots in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return plausible(across, down)


def notes_of(image: Image.Image, data: boxes.Data) -> tuple[str, ...]:
    """What of a file is not in its first image. TIFF's pages are counted elsewhere."""
    try:
        count = 1 if image.format == "TIFF" else getattr(image, "n_frames", 1)
    except Exception:  # the others are damaged
        count = 1
    if image.format in ("JPEG", "MPO"):
        if any(mark in data[:HEAD] for mark in GAIN_MAPS):
            return (GAIN_MAP_NOTE,)
        return (f"image 1 of {count}",) if count > 1 else ()
    return (f"1 of {count} frames",) if count > 1 else ()


def orientation_of(image: Image.Image) -> int:
    """By EXIF, 1 to 8; 1 where it says nothing."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged
        return 1


def orientation_in(exif: bytes) -> int:
    tags = Image.Exif()
    try:
        tags.load(exif)
        return int(tags.get(ORIENTATION, 1))
    except Exception:  # damaged
        return 1


@contextmanager
def limits_are_ours() -> Iterator[None]:
    """In here PIL opens images of any size. It is PIL's global, so not for two threads at once."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    text, PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_CHUNK, MAX_TEXT
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = limit, text


@cache
def formats() -> list[str]:
    """PIL's names of what our extensions say: of its other decoders one, PostScript's, runs a program."""
    return sorted(
        {kind for ending, kind in Image.registered_extensions().items() if ending in EXTENSIONS} & set(Image.OPEN)
    )


def scale_transparency(image: Image.Image) -> None:
    """Of a PNG of 2, 4 or 16 bits that is not loaded yet: PIL scales its values to 8 and not the transparent one."""
    tiles = getattr(image, "tile", []) if image.format == "PNG" else []
    raw = str(tiles[0].args) if tiles else ""
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and raw in LEVELS:
        image.info["transparency"] = min(transparent * LEVELS[raw], 255)
    elif isinstance(transparent, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def pil_pixels(image: Image.Image) -> Pixels:
    """A PIL image, upright, with as many channels as it has: uint8, uint16, or float32 in [0, 1]."""
    scale_transparency(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "CMYK":
        return from_inks(np.asarray(upright), image.info.get("icc_profile") or b"")
    if upright.mode.startswith("I"):  # 16 bits, or 32 that hold 16
        values = np.asarray(upright)[:, :, None]
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError(f"integers from {values.min()} to {values.max()}: at most 16 bits are read")
        return values.astype(np.uint16)
    if upright.mode == "F":
        return check_values(np.asarray(upright)[:, :, None])
    transparent = upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info
    if upright.mode in ("1", "L", "LA", "La"):
        return np.atleast_3d(np.asarray(upright.convert("LA" if transparent else "L")))
    return np.asarray(upright.convert("RGBA" if transparent else "RGB"))
