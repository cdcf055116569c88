"""One image between a file and an array: decoding, channels, resizing, and the two ranges of values. No torch here."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, ImageOps

from ldm_vae.data.image_files import EXTENSIONS
from ldm_vae.data.large import Pixels, read_deep, read_large
from ldm_vae.errors import BadImageError

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # of a damaged file it says a line for every tag
MAX_PIXELS = 100_000_000
LARGEST_TILE = 1 << 22
"""Pixels of a TIFF's tile: one may be larger than the image, and is decoded as a whole."""
BACKGROUND = 255
"""Images with transparency are composited on this grey level of 0..255: white."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image as it was stored: `pixels` (H, W, C), its label (None without one) and its name."""

    pixels: Pixels
    label: int | None
    name: str


LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601, what PIL's convert("L") uses."""


def read_pixels(data: bytes, *, channels: int = 3, keep_alpha: bool = False, max_pixels: int = MAX_PIXELS) -> Pixels:
    """A file's bytes -> pixels (H, W, channels): uint8, uint16 if the file has 16 bits, or float32 in [0, 1].

    `keep_alpha`: as many channels as the file has. Unless they are `channels`, the last of 2 and of 4 is transparency.

    Reads the formats that `EXTENSIONS` names, by PIL (an animation's first frame; the orientation that EXIF names is
    applied), 16-bit PNG and TIFF at full precision, TIFF with several pages or more than four channels, and NumPy's
    .npy.

    Raises:
        BadImageError: empty, truncated, not an image, more than `max_pixels`, or channels that do not fit.
    """
    if not data:
        raise BadImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if data[:6] == b"\x93NUMPY":
                array = read_npy(data, max_pixels)
                return array if keep_alpha else exact_channels(array, channels)
            if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                pixels = read_scientific_tiff(data, channels, max_pixels)
                if pixels is not None:
                    return pixels if keep_alpha else convert_channels(pixels, channels)
            pixels = read_pil(data, max_pixels)
            return pixels if keep_alpha else convert_channels(pixels, channels)
    except BadImageError:
        raise
    except MemoryError:
        raise BadImageError("not enough memory to decode it") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadImageError(f"cannot be decoded: {reason}") from None


def large_pixels(
    given: bytes | Path, *, channels: int = 3, keep_alpha: bool = False, max_pixels: int, scratch: Path
) -> Pixels | None:
    """What `read_pixels` gives of a file, or its bytes, that is large: on disk, in `scratch`; None for any other."""
    convert = (lambda p: p) if keep_alpha else partial(convert_channels, channels=channels)
    return read_large(given, scratch, max_pixels=max_pixels, convert=convert)


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(f"{width}x{height} is more than the limit of {max_pixels} pixels")
    if width < 1 or height < 1:
        raise BadImageError(f"{width}x{height} has no pixels")


def read_pil(data: bytes, max_pixels: int) -> Pixels:
    with limits_are_ours(), Image.open(io.BytesIO(data), formats=formats()) as image:
        check_size(*image.size, max_pixels)
        if image.format == "PNG" and data[24] == 16:  # PIL would cut 16-bit colour to 8: bit depth is byte 24 of IHDR
            return orient(*read_deep(data))
        return pil_pixels(image)


@contextmanager
def limits_are_ours() -> Iterator[None]:
    """In here PIL opens images of any size. It is PIL's global, so not for two threads at once."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@cache
def formats() -> list[str]:
    """PIL's names of what our extensions say: of its other decoders one, PostScript's, runs a program."""
    return sorted({kind for ending, kind in Image.registered_extensions().items() if ending in EXTENSIONS})


def pil_pixels(image: Image.Image) -> Pixels:
    """PIL's image, upright, with as many channels as it has: uint8, uint16, or float32 in [0, 1]."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits, or 32 that hold 16
        values = np.asarray(upright)[:, :, None]
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError(f"integers from {values.min()} to {values.max()}: at most 16 bits are read")
        return values.astype(np.uint16)
    if upright.mode == "F":
        return check_float(np.asarray(upright)[:, :, None])
    transparent = upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info
    if upright.mode in ("1", "L", "LA", "La"):
        return np.atleast_3d(np.asarray(upright.convert("LA" if transparent else "L")))
    return np.asarray(upright.convert("RGBA" if transparent else "RGB"))


def read_npy(data: bytes, max_pixels: int) -> Pixels:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = read_header(file)
    if len(shape) not in (2, 3):
        raise BadImageError(f"an array of shape {shape}: (H, W) or (H, W, C) is needed")
    check_size(shape[1], shape[0], max_pixels)
    if np.prod(shape, dtype=object) * dtype.itemsize > len(data) - file.tell():
        raise BadImageError("truncated array")
    file.seek(0)
    array = np.atleast_3d(np.load(file, allow_pickle=False))
    return array if array.dtype in (np.uint8, np.uint16) else check_float(array)


def read_scientific_tiff(data: bytes, channels: int, max_pixels: int) -> Pixels | None:
    """TIFF that PIL would cut short: pages or bands as channels, over 8 bits; None for any other.

    Several pages, or more than four samples, must be exactly the `channels` asked for. Of two or four samples the last
    is transparency when the file says so, and otherwise a band: kept if four are asked for, dropped if not.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages[0]
        alike = len(tiff.pages) > 1 and len({p.shape + (p.dtype,) for p in tiff.pages}) == 1
        num_pages = len(tiff.pages) if alike else 1  # of unlike pages, previews for instance, the first is the image
        samples = page.samplesperpixel
        if page.is_tiled and page.tilewidth * page.tilelength > max(max_pixels, LARGEST_TILE):
            raise BadImageError(f"tiles of {page.tilewidth}x{page.tilelength} are more than {max_pixels} pixels")
        in_order = page.planarconfig != tifffile.PLANARCONFIG.SEPARATE
        colours = samples == 3 and in_order and page.photometric != tifffile.PHOTOMETRIC.MINISBLACK
        transparent = samples in (2, 4) and in_order and page.extrasamples and page.extrasamples[-1] in (1, 2)
        pil_knows = samples == 1 or colours or transparent
        simple = num_pages == 1 and pil_knows and page.dtype is not None and page.dtype.itemsize == 1
        if simple or page.photometric in (tifffile.PHOTOMETRIC.PALETTE, tifffile.PHOTOMETRIC.SEPARATED):
            return None
        check_size(page.imagewidth, page.imagelength, max_pixels)
        if (num_pages > 1 or samples > 4) and num_pages * samples != channels:
            raise BadImageError(f"{num_pages} pages of {samples} channels, the model has {channels}")
        array = np.concatenate([channels_last(p) for p in tiff.pages[:num_pages]], axis=2)
        array = array if array.dtype in (np.uint8, np.uint16) else check_float(array)
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            array = (1.0 if array.dtype == np.float32 else np.iinfo(array.dtype).max) - array
        if num_pages == 1 and samples in (2, 4) and 1 in page.extrasamples:  # colours multiplied with transparency
            colour, alpha = array[:, :, :-1].astype(np.float32), array[:, :, -1:]
            top = 1.0 if array.dtype == np.float32 else np.iinfo(array.dtype).max
            plain = store(np.clip(colour * top / np.maximum(alpha, top / 65535), 0, top), array.dtype)
            array = np.concatenate([plain, alpha], axis=2)
        elif num_pages == 1 and samples in (2, 4) and samples != channels and 2 not in page.extrasamples:
            array = array[:, :, :-1]  # a band that is not asked for
        tag = page.tags.get(274)
        return orient(array, int(tag.value) if tag else 1)


def channels_last(page: tifffile.TiffPage) -> Pixels:
    array = page.asarray()
    planar = array.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    return np.moveaxis(array, 0, 2) if planar else np.atleast_3d(array)


def orient(array: Pixels, value: int) -> Pixels:
    """Turned and mirrored as the Orientation tag says, of TIFF and of EXIF (TIFF 6.0, tag 274)."""
    if value in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    if value in (3, 4, 7, 8):
        array = array[::-1]
    if value in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def check_float(array: Pixels) -> Pixels:
    if array.dtype.kind != "f":
        raise BadImageError(f"values of type {array.dtype}: uint8, uint16 or floats in [0, 1] are read")
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise BadImageError("float values outside [0, 1]")
    return array.astype(np.float32)


def exact_channels(pixels: Pixels, channels: int) -> Pixels:
    if pixels.shape[2] != channels:
        raise BadImageError(f"{pixels.shape[2]} channels, the model has {channels}")
    return pixels


def convert_channels(pixels: Pixels, channels: int) -> Pixels:
    """Grey (1), grey with alpha (2), RGB (3) or RGBA (4) -> the `channels` asked for, 1, 3 or 4."""
    have = pixels.shape[2]
    if have == channels:
        return pixels
    if have > 4 or channels not in (1, 3, 4):
        return exact_channels(pixels, channels)
    top = 1.0 if pixels.dtype == np.float32 else np.iinfo(pixels.dtype).max
    colour = pixels[:, :, :1] if have < 3 else pixels[:, :, :3]
    alpha = pixels[:, :, -1:] if have in (2, 4) else None
    if alpha is not None and channels != 4:
        share = (alpha / top).astype(np.float32)
        colour = store(colour * share + BACKGROUND / 255 * top * (1 - share), pixels.dtype)
    if channels == 1:
        return colour if colour.shape[2] == 1 else store((colour @ LUMA)[:, :, None], pixels.dtype)
    colour = np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else colour
    if channels == 3:
        return colour
    return np.concatenate([colour, np.full_like(colour[:, :, :1], top) if alpha is None else alpha], axis=2)


def store(values: Pixels, dtype: Any) -> Pixels:
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else np.rint(values).astype(dtype)


def resize(pixels: Pixels, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Pixels:
    """Antialiased bicubic resampling (PIL's) to `size` = (height, width), of `box` = (x0, y0, x1, y1) or of all."""
    height, width = size
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return np.atleast_3d(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box)))
    planes = [Image.fromarray(np.ascontiguousarray(p, np.float32)) for p in np.moveaxis(pixels, 2, 0)]
    resized = [np.asarray(p.resize((width, height), Image.Resampling.BICUBIC, box)) for p in planes]
    top = 1.0 if pixels.dtype == np.float32 else np.iinfo(pixels.dtype).max
    return store(np.clip(np.stack(resized, axis=2), 0, top), pixels.dtype)


def centre_square(pixels: Pixels, side: int) -> Pixels:
    """The largest centred square, resampled to side x side: the crop of every benchmark and picture grid."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    return resize(pixels, (side, side), (left, top, left + short, top + short))


def values_of(pixels: Pixels) -> np.ndarray:
    """Pixels (..., H, W, C) -> values of images (..., C, H, W), float32 in [-1, 1], as precise as the file."""
    top = 1.0 if pixels.dtype == np.float32 else float(np.iinfo(pixels.dtype).max)
    values = np.moveaxis(pixels, -1, -3).astype(np.float32)
    values *= 2 / top
    values -= 1
    return values
