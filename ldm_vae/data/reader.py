"""The one reader of images: what a file, its bytes or a PIL image holds, as pixels. No torch here."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pyvips
from PIL import Image, ImageOps

from ldm_vae.data.image_files import EXTENSIONS
from ldm_vae.data.images import Pixels, check_size, check_values, convert_channels, exact_channels, orient
from ldm_vae.data.large import DTYPES, open_with_vips, read_large
from ldm_vae.data.metadata import SIGNATURE, Metadata, head_of, large_png_metadata, metadata_of
from ldm_vae.errors import BadImageError

MAX_PIXELS = 100_000_000
NUMPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""What files of these kinds begin with."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files are understood, where there is more than one way."""

    keep_colour: bool = False
    """Leave the pixels in the file's colour space; without it they are converted to sRGB."""
    pages_as_channels: bool = False
    """The pages of a TIFF are its channels; without it the first page is the image."""
    value_range: tuple[float, float] | None = None
    """Values of black and of white, in files of floats and of more than 8 bits; what lies outside is clipped."""


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """What a file holds: `pixels` (H, W, C), what is written beside them, and what whoever reads it should hear."""

    pixels: Pixels
    metadata: Metadata = field(default_factory=Metadata)
    notes: tuple[str, ...] = ()


def read_image(
    file: bytes | Path,
    *,
    channels: int = 3,
    keep_alpha: bool = False,
    max_pixels: int = MAX_PIXELS,
    options: ReadOptions = ReadOptions(),
    scratch: Path | None = None,
) -> ImageFile:
    """A file, or its bytes -> pixels (H, W, channels): uint8, uint16 of deeper integers, or float32 in [0, 1].

    `docs/files.md` says what is read, at which depth, and what is noted. The orientation that EXIF names is applied.

    Args:
        keep_alpha: as many channels as the file has. Unless they are `channels`, the last of 2 and of 4 is
            transparency.
        scratch: a folder where large images are kept (`read_large`); only with `options.keep_colour`.

    Raises:
        BadImageError: empty, truncated, not an image, more than `max_pixels`, or channels that do not fit.
        OSError: the file cannot be read, or `scratch` has no room.
    """
    if scratch is not None:
        pixels = read_large(file, scratch, channels=None if keep_alpha else channels, max_pixels=max_pixels)
        if pixels is not None:
            return ImageFile(pixels=pixels, metadata=large_metadata(file))
    data = file.read_bytes() if isinstance(file, Path) else file
    pixels = read_pixels(data, channels=channels, keep_alpha=keep_alpha, max_pixels=max_pixels)
    try:
        with limits_are_ours(), Image.open(io.BytesIO(data), formats=formats()) as image:
            image.load()
            metadata = metadata_of(image, data)
    except Exception:  # not a kind of file that PIL knows
        metadata = Metadata()
    return ImageFile(pixels=pixels, metadata=metadata)


def large_metadata(file: bytes | Path) -> Metadata:
    """Of a file that `read_large` reads, without decoding it; nothing where it cannot be read."""
    try:
        head = file[:8] if isinstance(file, bytes) else head_of(file)[:8]
        if head == SIGNATURE:
            return large_png_metadata(file)
        source = io.BytesIO(file) if isinstance(file, bytes) else file
        with limits_are_ours(), Image.open(source, formats=formats()) as image:
            return metadata_of(image)
    except Exception:  # the pixels are what counts
        return Metadata()


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
            if data.startswith(NUMPY):
                array = read_npy(data, max_pixels)
                return array if keep_alpha else exact_channels(array, channels)
            pixels = None
            if data.startswith(TIFF):
                from ldm_vae.data.tiff import read_tiff

                pixels = read_tiff(data, channels, max_pixels)
            if pixels is None:
                pixels = read_pil(data, max_pixels)
            return pixels if keep_alpha else convert_channels(pixels, channels)
    except BadImageError:
        raise
    except MemoryError:
        raise BadImageError("not enough memory to decode it") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadImageError(f"cannot be decoded: {reason}") from None


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """How a source reads its files: the arguments of `read_pixels`, and a folder for large images.

    With `scratch`, images that would not fit into memory are kept on disk there (`read_large`).
    """

    channels: int = 3
    max_pixels: int = MAX_PIXELS
    scratch: Path | None = None

    def __str__(self) -> str:
        """For fingerprints of sources."""
        return f"{self.channels} channels, at most {self.max_pixels} pixels"

    def __call__(self, data: bytes) -> Pixels:
        """Raises BadImageError."""
        return read_pixels(data, channels=self.channels, max_pixels=self.max_pixels)


def read_pil(data: bytes, max_pixels: int) -> Pixels:
    with limits_are_ours(), Image.open(io.BytesIO(data), formats=formats()) as image:
        check_size(*image.size, max_pixels)
        if image.format == "PNG" and data[24] == 16:  # PIL would cut 16-bit colour to 8: bit depth is byte 24 of IHDR
            return orient(*read_deep_png(data))
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
    """A PIL image, upright, with as many channels as it has: uint8, uint16, or float32 in [0, 1]."""
    upright = ImageOps.exif_transpose(image)
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
    return check_values(array)


def read_deep_png(data: bytes) -> tuple[Pixels, int]:
    """A PNG of 16 bits as it is stored, with as many channels as it has, and what EXIF says of its orientation.

    Raises:
        BadImageError: it is damaged.
    """
    try:
        image = open_with_vips(data)
        stored = image.write_to_memory()
    except pyvips.Error as error:
        raise BadImageError(f"cannot be decoded: {' '.join(error.detail.split())[:200] or 'damaged'}") from None
    pixels = np.frombuffer(stored, DTYPES[image.format]).reshape(image.height, image.width, image.bands)
    return pixels, image.get("orientation") if image.get_typeof("orientation") else 1
