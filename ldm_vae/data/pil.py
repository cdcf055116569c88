"""What PIL reads, and what it says of a file. No torch here."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from ldm_vae.data import boxes, deep
from ldm_vae.data.colour import from_inks
from ldm_vae.data.image_files import EXTENSIONS
from ldm_vae.data.images import ImageFile, Pixels, check_size, check_values, orient
from ldm_vae.data.large import HEAD
from ldm_vae.data.metadata import Metadata, stored_metadata
from ldm_vae.errors import BadImageError

MAX_TEXT = 1 << 24
"""Characters of a compressed text in a PNG: the workflows of generators are longer than PIL's limit."""
ORIENTATION = 274
LEVELS = {"L;2": 85, "L;4": 17}
"""By PIL's raw modes: what it multiplies grey of few bits with."""
CONVERTED = {"CMYK": "CMYK", "LAB": "CIELAB"}
"""By PIL's modes: colours that are converted, so that a profile describes the pixels no longer."""
GAIN_MAPS = (b"http://ns.adobe.com/hdr-gain-map/", b"urn:iso:std:iso:ts:21496:-1")
"""In the head of a JPEG that has one."""
GAIN_MAP_NOTE = "its gain map (HDR) was left out"


def read_pil(data: bytes, max_pixels: int) -> ImageFile:
    """A file of a kind that PIL knows, in its own colours; where PIL would cut its precision, by another decoder."""
    with limits_are_ours(), Image.open(io.BytesIO(data), formats=formats()) as image:
        check_size(*image.size, max_pixels)
        scale_transparency(image)
        notes = notes_of(image, data)
        image.load()
        metadata = stored_metadata(image, data)
        turned = orientation_of(image)
        kind = image.format
        if kind == "PNG" and data[24] == 16:  # bits, in IHDR; PIL would cut colours to 8
            return ImageFile(orient(deep.read_deep_png(data), turned), metadata, notes)
        if kind == "JPEG2000":
            bits = deep.jpeg_2000_bits(data, max_pixels)
            if bits not in (None, 8):
                return ImageFile(orient(deep.read_deep_jpeg_2000(data, bits), turned), metadata, notes)
        if kind == "AVIF":
            facts = boxes.facts_of(data)
            metadata, notes = with_facts(metadata, notes, facts)
            if facts.bits > 8:
                return ImageFile(orient(deep.read_deep_avif(data, facts.bits), turned), metadata, notes)
        if image.mode in CONVERTED:
            notes += (f"its {CONVERTED[image.mode]} colours were converted to sRGB",)
            metadata = replace(metadata, icc=b"")
        return ImageFile(pil_pixels(image), metadata, notes)


def with_facts(metadata: Metadata, notes: tuple[str, ...], facts: boxes.Facts) -> tuple[Metadata, tuple[str, ...]]:
    """Of an AVIF, what its boxes say; an ICC profile counts before code points (ISO/IEC 23000-22, 7.3.6.4)."""
    cicp = None if metadata.icc else facts.cicp
    return replace(metadata, cicp=cicp), notes + (GAIN_MAP_NOTE,) * facts.gain_map


def notes_of(image: Image.Image, data: bytes) -> tuple[str, ...]:
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
