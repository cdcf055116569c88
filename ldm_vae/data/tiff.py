"""TIFF beyond what PIL reads whole: other depths and layouts, bands, pages, CIELAB, inks. No torch here."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, TiffImagePlugin
from tifffile import COMPRESSION, PHOTOMETRIC

from ldm_vae.data.colour import from_inks, from_lab
from ldm_vae.data.images import Pixels, check_size, check_values, full_scale, orient, rounded, white
from ldm_vae.data.metadata import IPTC_TAG, Metadata, as_bytes
from ldm_vae.errors import BadImageError

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # of a damaged file it says a line for every tag
LARGEST_TILE = 1 << 22
"""Pixels of a TIFF's tile: one may be larger than the image, and is decoded as a whole."""
COLOURS = {
    **{PHOTOMETRIC.MINISWHITE: 1, PHOTOMETRIC.MINISBLACK: 1, PHOTOMETRIC.PALETTE: 1, PHOTOMETRIC.RGB: 3},
    **{PHOTOMETRIC.YCBCR: 3, PHOTOMETRIC.CIELAB: 3, PHOTOMETRIC.ICCLAB: 3, PHOTOMETRIC.SEPARATED: 4},
}
"""Samples that are colours, by photometric interpretation; others are refused by name."""
ONLY_8_BITS = frozenset((PHOTOMETRIC.PALETTE, PHOTOMETRIC.YCBCR))
CONVERTED = {
    PHOTOMETRIC.CIELAB: "CIELAB",
    PHOTOMETRIC.ICCLAB: "CIELAB",
    PHOTOMETRIC.SEPARATED: "CMYK",
}
SAMPLE_FORMAT, UNSIGNED = 339, 1
"""A tag, and what it says of integers without a sign."""
LIBTIFF_COMPRESSIONS = frozenset(TiffImagePlugin.COMPRESSION_INFO) - {COMPRESSION.WEBP}
"""What PIL and libvips have; of others libvips makes black pixels. Their libtiff has no WebP."""
REDUCED, MASK = 1, 4
"""Bits of NewSubfileType."""
ASSOCIATED, UNASSOCIATED = 1, 2
"""Kinds of ExtraSamples that are transparency: colours are multiplied with it, or not."""
ICC_TAG = 34675
BLOCKS = {"icc": ICC_TAG, "xmp": 700, "iptc": IPTC_TAG}
TO_INCHES = {2: 1.0, 3: 2.54}
"""By ResolutionUnit."""


@dataclass(frozen=True)
class Tiff:
    """`pixels` as `read_tiff` makes them, None where PIL reads them whole; what is beside them; and notes."""

    pixels: Pixels | None
    metadata: Metadata
    notes: tuple[str, ...]


def read_tiff(
    data: bytes,
    channels: int,
    max_pixels: int,
    *,
    pages_as_channels: bool = False,
    value_range: tuple[float, float] | None = None,
) -> Tiff:
    """The first page, or with `pages_as_channels` all of them if they are alike.

    Pages, and more samples than colours and one of transparency, must be exactly the `channels` asked for. Of two or
    four samples the last is transparency when the file says so, and otherwise a band: kept if four are asked for,
    dropped if not.

    Raises:
        BadImageError: its colours or values are of a kind that is not read, or channels that do not fit.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        pages = pages_of(tiff)
        page = pages[0]
        if page.is_tiled and page.tilewidth * page.tilelength > max(max_pixels, LARGEST_TILE):
            raise BadImageError(f"tiles of {page.tilewidth}x{page.tilelength} are more than {max_pixels} pixels")
        check_colours(page)
        stacked = pages if pages_as_channels and are_alike(pages) else pages[:1]
        notes = pages_note(pages) if len(stacked) < len(pages) else ()
        metadata = tiff_metadata(data, page)
        many = len(stacked) > 1 or page.samplesperpixel > 4 + (page.photometric == PHOTOMETRIC.SEPARATED)
        if (many or channels not in (1, 3, 4)) and len(stacked) * page.samplesperpixel != channels:
            raise BadImageError(unfit(len(stacked), page.samplesperpixel, channels, len(pages)))
        check_size(page.imagewidth, page.imagelength, max_pixels)
        if len(stacked) == 1 and page is tiff.pages[0] and is_for_pil(page):
            return Tiff(None, metadata, notes)
        if page.photometric in ONLY_8_BITS and not is_plain_ycbcr(page):
            raise BadImageError(f"TIFF of {page.photometric.name} colours in this layout is not read")
        array = np.concatenate([read_page(p, channels, value_range) for p in stacked], axis=2)
        if page.photometric in CONVERTED:
            notes += (f"its {CONVERTED[page.photometric]} colours were converted to sRGB",)
            metadata = replace(metadata, icc=b"")
        tag = page.tags.get(274)
        return Tiff(orient(array, int(tag.value) if tag else 1), metadata, notes)


def unfit(pages: int, samples: int, channels: int, all_pages: int) -> str:
    have = f"{pages} pages of {samples} channels" if pages > 1 else f"{samples} channels"
    hint = f": --pages-as-channels takes its {all_pages} pages" if all_pages > pages else ""
    return f"{have}, the model has {channels}{hint}"


def pages_of(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """Its images, without what the file says to be previews of them, or masks; all where it says so of all."""
    pages = list(tiff.pages)
    return [p for p in pages if not getattr(p, "subfiletype", 0) & (REDUCED | MASK)] or pages


def pages_note(pages: Sequence[tifffile.TiffPage]) -> tuple[str, ...]:
    return (f"page 1 of {len(pages)}",) if len(pages) > 1 else ()


def are_alike(pages: Sequence[tifffile.TiffPage]) -> bool:
    return len({page.shape + (page.dtype,) for page in pages}) == 1


def check_colours(page: tifffile.TiffPage) -> None:
    """Raises BadImageError for colours that are not read."""
    name = getattr(page.photometric, "name", page.photometric)
    if page.photometric not in COLOURS:
        raise BadImageError(f"TIFF of {name} colours is not read")
    if page.samplesperpixel < COLOURS[page.photometric]:
        raise BadImageError(f"TIFF of {name} colours in {page.samplesperpixel} channels is not read")
    if isinstance(page.bitspersample, tuple):
        raise BadImageError(f"TIFF whose samples have {', '.join(map(str, page.bitspersample))} bits is not read")
    if page.photometric in ONLY_8_BITS and page.bitspersample > 8:
        raise BadImageError(f"TIFF of {name} colours with {page.bitspersample} bits is not read")
    if page.dtype is None:
        raise BadImageError(f"TIFF of {page.bitspersample} bits in values of kind {page.sampleformat} is not read")


def is_for_pil(page: tifffile.TiffPage) -> bool:
    """Whether PIL reads it whole: up to 8 bits, and colours with nothing but transparency beside them."""
    kinds = np.unique(page.tags.valueof(SAMPLE_FORMAT, default=UNSIGNED)).tolist()
    layout = (
        *(TiffImagePlugin.II, int(page.photometric), tuple(kinds), page.fillorder),
        *((page.bitspersample,) * page.samplesperpixel, tuple(map(int, page.extrasamples))),
    )
    in_order = page.planarconfig != tifffile.PLANARCONFIG.SEPARATE or page.samplesperpixel == 1
    bands = page.samplesperpixel > COLOURS[page.photometric] and not transparency_of(page)
    known = layout in TiffImagePlugin.OPEN_INFO and page.compression in LIBTIFF_COMPRESSIONS
    usual = page.bitspersample <= 8 and kinds == [UNSIGNED] and not is_plain_ycbcr(page)
    return known and in_order and not bands and usual


def is_plain_ycbcr(page: tifffile.TiffPage) -> bool:
    """Whether it is YCbCr without compression or subsampling, which Pillow reads from version 13 only."""
    plain = page.compression == COMPRESSION.NONE and page.subsampling in (None, (1, 1))
    return bool(page.photometric == PHOTOMETRIC.YCBCR and plain and page.samplesperpixel == 3)


def transparency_of(page: tifffile.TiffPage) -> int:
    """Kind of the last extra sample; 0 without one, or when nothing is said of it."""
    return int(page.extrasamples[-1]) if page.extrasamples else 0


def read_page(page: tifffile.TiffPage, channels: int, value_range: tuple[float, float] | None) -> Pixels:
    """Grey, RGB or bands, as pixels are; transparency behind the colours, which are not multiplied with it.

    Of CIELAB the colours alone.
    """
    array = page.asarray()
    planar = array.ndim == 3 and page.axes.startswith("S")
    stored = np.moveaxis(array, 0, 2) if planar else np.atleast_3d(array)
    if page.photometric in (PHOTOMETRIC.CIELAB, PHOTOMETRIC.ICCLAB):
        return full_scale_lab(stored[:, :, :3], page.photometric)
    if page.photometric == PHOTOMETRIC.YCBCR:
        return np.asarray(Image.fromarray(np.ascontiguousarray(stored), "YCbCr").convert("RGB"))
    values = in_scale(stored, page, value_range)
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        values[:, :, 0] = white(values) - values[:, :, 0]
    extra = values.shape[2] - COLOURS[page.photometric]
    if extra == 1 and transparency_of(page) == ASSOCIATED:
        values = without_multiplication(values)
    if page.photometric == PHOTOMETRIC.SEPARATED:
        icc = page.tags.get(ICC_TAG)
        rgb = from_inks(np.ascontiguousarray(values[:, :, :4]), icc.value if icc else b"")
        values = np.concatenate([rgb, values[:, :, 4:]], axis=2)
    if extra and values.shape[2] in (2, 4) and values.shape[2] != channels and not transparency_of(page):
        return values[:, :, :-1]  # a band that is not asked for
    return values


def in_scale(stored: np.ndarray, page: tifffile.TiffPage, value_range: tuple[float, float] | None) -> Pixels:
    """Values of black and white as pixels have them; those of more than 16 bits are counts, of which nobody knows."""
    bits = page.bitspersample
    stored = stored.astype(np.uint8) if stored.dtype == bool else stored
    if stored.dtype.kind == "u" and (bits <= 8 or (value_range is None and bits <= 16)):
        return full_scale(stored, bits)
    return check_values(stored, value_range)


def full_scale_lab(stored: np.ndarray, photometric: int) -> Pixels:
    """CIELAB (H, W, 3) as it is stored -> sRGB: uint8 of 8 bits, else uint16.

    In CIELAB a and b have a sign (TIFF 6.0, section 23; 16 bits: Adobe's TIFF technical notes). In ICCLAB they begin
    at -128. Floats are L, a and b.
    """
    if stored.dtype.kind == "f":
        lab = stored.astype(np.float32)
    else:
        per_unit = 1 << (8 * stored.dtype.itemsize - 8)  # of a and b
        signed = stored.view(f"i{stored.dtype.itemsize}")
        if photometric == PHOTOMETRIC.CIELAB:
            whole, a_b = np.iinfo(signed.dtype).max * 2 + 1, signed[:, :, 1:] / np.float32(per_unit)
        else:
            whole, a_b = 255 * per_unit, stored[:, :, 1:] / np.float32(per_unit) - 128
        lightness = stored.view(f"u{stored.dtype.itemsize}")[:, :, :1] * np.float32(100 / whole)
        lab = np.concatenate([lightness, a_b], axis=2)
    dtype = np.uint8 if stored.dtype.itemsize == 1 else np.uint16
    return rounded(from_lab(lab) * np.iinfo(dtype).max, dtype)


def without_multiplication(values: Pixels) -> Pixels:
    """Colours that were multiplied with the transparency behind them, as they were before."""
    colours, alpha = values[:, :, :-1].astype(np.float32), values[:, :, -1:]
    top = white(values)
    plain = rounded(np.clip(colours * top / np.maximum(alpha, top / 65535), 0, top), values.dtype)
    return np.concatenate([plain, alpha], axis=2)


def tiff_metadata(data: bytes, page: tifffile.TiffPage) -> Metadata:
    """A TIFF's tags are EXIF themselves."""
    values = {name: tag.value if (tag := page.tags.get(number)) else b"" for name, number in BLOCKS.items()}
    try:
        (x, x_per), (y, y_per) = page.tags[282].value, page.tags[283].value
        unit = TO_INCHES[int(page.tags.valueof(296, default=2))]
        resolution = x / x_per * unit, y / y_per * unit
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        resolution = None
    xmp, iptc = as_bytes(values["xmp"]), as_bytes(values["iptc"])
    return Metadata(icc=bytes(values["icc"]), exif=data, xmp=xmp, iptc=iptc, resolution=resolution)


def beside_pages(image_file: bytes | Path) -> tuple[Metadata, tuple[str, ...]]:
    """Metadata, and notes, without decoding it or reading all of it. Raises the library's errors for a damaged one."""
    with tifffile.TiffFile(io.BytesIO(image_file) if isinstance(image_file, bytes) else image_file) as tiff:
        pages, tags = pages_of(tiff), Image.Exif()
        metadata = tiff_metadata(b"", pages[0])
        try:
            tiff.filehandle.seek(0)
            tags.load_from_fp(tiff.filehandle)
            metadata = replace(metadata, exif=tags.tobytes())
        except Exception:  # damaged ones raise many kinds
            pass
        return metadata, pages_note(pages)


def is_plain(image_file: bytes | Path) -> bool:
    """Whether libvips reads it: the first page is the image, and what it has beside colours is transparency."""
    try:
        with tifffile.TiffFile(io.BytesIO(image_file) if isinstance(image_file, bytes) else image_file) as tiff:
            page = pages_of(tiff)[0]
            alpha = page.samplesperpixel not in (2, 4) or UNASSOCIATED in page.extrasamples
            usual = page.photometric != PHOTOMETRIC.YCBCR  # of which libvips makes RGBA
            return page is tiff.pages[0] and alpha and usual and page.compression in LIBTIFF_COMPRESSIONS
    except Exception:  # damaged files raise many kinds; who reads it in its place will say so
        return False
