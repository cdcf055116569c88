"""The one reader of images: what a file, its bytes or a PIL image holds, as pixels. No torch here."""

from __future__ import annotations

import io
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ldm_vae.data import deep
from ldm_vae.data.colour import fitting, in_srgb
from ldm_vae.data.image_files import HEAD_BYTES, HEIC, JPEG_XL, NUMPY, TIFF, kind_of, reason_of
from ldm_vae.data.images import (
    ImageFile,
    Pixels,
    Sample,
    convert_channels,
    exact_channels,
    orient,
)
from ldm_vae.data.large import HEAD, head_of, mapped, read_large
from ldm_vae.data.metadata import NO_METADATA, Metadata, cleaned, quiet
from ldm_vae.data.pil import (
    CONVERTED,
    beside,
    formats,
    limits_are_ours,
    metadata_of_opened,
    orientation_in,
    pil_pixels,
    read_pil,
)
from ldm_vae.errors import BadImageError, ConfigError

MAX_PIXELS = 100_000_000
NOTED: set[str] = set()
"""Kinds of notes that this process has said."""
MAX_JUNK = 1024
"""Bytes before the start of a JPEG that are skipped."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files are understood, where there is more than one way."""

    keep_colour: bool = False
    """Leave the pixels in the file's colour space; without it they are converted to sRGB."""
    pages_as_channels: bool = False
    """The pages of a TIFF are its channels; without it the first page is the image."""
    value_range: tuple[float, float] | None = None
    """Values of black and of white, in files of floats and of more than 8 bits; what lies outside is clipped."""

    def __post_init__(self) -> None:
        low, high = self.value_range or (0.0, 1.0)
        if not (low < high and math.isfinite(high - low)):
            raise ConfigError(f"--value-range {low:g} {high:g}: black, then white, which is more; both finite")

    def __str__(self) -> str:
        words = ["colours as they are" if self.keep_colour else "sRGB"]
        if self.pages_as_channels:
            words.append("pages are channels")
        if self.value_range:
            words.append(f"values from {self.value_range[0]:g} to {self.value_range[1]:g}")
        return ", ".join(words)


USUAL = ReadOptions()


def read_image(
    file: bytes | Path,
    *,
    channels: int = 3,
    keep_alpha: bool = False,
    max_pixels: int = MAX_PIXELS,
    options: ReadOptions = USUAL,
    scratch: Path | None = None,
) -> ImageFile:
    """A file, or its bytes -> pixels (H, W, channels): uint8, uint16 of deeper integers, or float32 in [0, 1].

    `docs/files.md` says what is read, at which depth, and what is noted. The orientation that EXIF names is applied.

    Args:
        keep_alpha: as the file is: with as many channels as it has, and with its metadata. Unless they are `channels`,
            the last of 2 and of 4 is transparency.
        scratch: a folder where large images are kept (`read_large`), in the colour space of the file.

    Raises:
        BadImageError: empty, truncated, not an image, more than `max_pixels`, or channels that do not fit.
        OSError: the file cannot be read, or `scratch` has no room.
    """
    if scratch is not None:
        found = read_large_image(
            file, scratch, channels=None if keep_alpha else channels, max_pixels=max_pixels, options=options
        )
        if found is not None:
            return found
    data = file.read_bytes() if isinstance(file, Path) else file
    if not data:
        raise BadImageError("empty file")
    try:
        with quiet():
            found = decode(data, channels, max_pixels, options)
            if kind_of(data[:HEAD_BYTES]) == NUMPY:
                return found if keep_alpha else replace(found, pixels=exact_channels(found.pixels, channels))
            found = in_its_colours(found, options)
            if keep_alpha:
                return replace(found, metadata=cleaned(found.metadata))
            return ImageFile(convert_channels(found.pixels, channels), notes=found.notes)
    except BadImageError:
        raise
    except MemoryError:
        raise BadImageError("not enough memory to decode it") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise BadImageError(reason_of(error, data)) from None


def read_pixels(data: bytes, *, channels: int = 3, keep_alpha: bool = False, max_pixels: int = MAX_PIXELS) -> Pixels:
    """What `read_image` gives of a file's bytes, without what is said beside the pixels. Raises BadImageError."""
    return read_image(data, channels=channels, keep_alpha=keep_alpha, max_pixels=max_pixels).pixels


def in_its_colours(found: ImageFile, options: ReadOptions) -> ImageFile:
    """In sRGB, unless the file's colour space is to stay: then with the profile that describes it."""
    metadata, dropped = fitting(found.metadata, found.pixels.shape[2])
    if options.keep_colour:
        return replace(found, metadata=metadata, notes=(*found.notes, *dropped))
    pixels, metadata, notes = in_srgb(found.pixels, metadata)
    return ImageFile(pixels, metadata, (*found.notes, *dropped, *notes))


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """How a source reads its files: the arguments of `read_image`."""

    channels: int = 3
    keep_alpha: bool = False
    max_pixels: int = MAX_PIXELS
    options: ReadOptions = USUAL
    scratch: Path | None = None

    def __str__(self) -> str:
        """For fingerprints of sources."""
        return f"{self.channels} channels, at most {self.max_pixels} pixels, {self.options}"

    def __call__(self, data: bytes) -> ImageFile:
        """Raises BadImageError."""
        return read_image(
            data,
            channels=self.channels,
            keep_alpha=self.keep_alpha,
            max_pixels=self.max_pixels,
            options=self.options,
        )

    def sample(self, found: ImageFile, *, label: int | None, name: str) -> Sample:
        """Notes of images that are read for their pixels alone are said here, each kind once a process."""
        if not self.keep_alpha:
            for note in found.notes:
                kind = re.sub("[0-9]+", "", note)
                if kind not in NOTED:
                    NOTED.add(kind)
                    print(f"{name}: {note} (the first of such images; no others are named)", file=sys.stderr)
        return Sample(pixels=found.pixels, label=label, name=name, metadata=found.metadata, notes=found.notes)

    def large(self, file: bytes | Path) -> ImageFile | None:
        """By way of the disk, where there is a folder for it and the image is large. Raises BadImageError, OSError."""
        if self.scratch is None:
            return None
        channels = None if self.keep_alpha else self.channels
        return read_large_image(file, self.scratch, channels=channels, max_pixels=self.max_pixels, options=self.options)


def read_large_image(
    file: bytes | Path, folder: Path, *, channels: int | None, max_pixels: int, options: ReadOptions
) -> ImageFile | None:
    """What `read_image` gives of a large image, in the colour space of the file, by `read_large`.

    None for what that leaves to the other reader, and for pages that are channels, or a range of values.
    """
    if options.pages_as_channels or options.value_range:
        return None
    head = file[:HEAD] if isinstance(file, bytes) else head_of(file)
    if deep.is_deep_jpeg(head) or (head.startswith(deep.START_OF_IMAGE) and not has_end(file)):
        return None
    if kind_of(head[:HEAD_BYTES]) == TIFF:
        from ldm_vae.data.tiff import is_plain

        if not is_plain(file):
            return None
    pixels = read_large(file, folder, channels=channels, max_pixels=max_pixels)
    if pixels is None:
        return None
    metadata, notes = large_metadata(file, head)
    metadata, dropped = fitting(metadata, pixels.shape[2])
    return ImageFile(pixels, metadata, (*notes, *dropped))


def has_end(file: bytes | Path) -> bool:
    """Whether a JPEG's end marker is there, perhaps with something behind it."""
    if isinstance(file, bytes):
        return deep.END_OF_IMAGE in file[-HEAD:]
    with open(file, "rb") as opened:
        opened.seek(max(file.stat().st_size - HEAD, 0))
        return deep.END_OF_IMAGE in opened.read()


def large_metadata(file: bytes | Path, head: bytes) -> tuple[Metadata, tuple[str, ...]]:
    """Metadata and notes of a file that `read_large` reads, without decoding it."""
    try:
        if kind_of(head[:HEAD_BYTES]) == TIFF:
            from ldm_vae.data.tiff import beside_pages

            metadata, notes = beside_pages(file)
            return cleaned(metadata), notes
        opened = io.BytesIO(file) if isinstance(file, bytes) else file
        with quiet(), limits_are_ours(), mapped(file) as data, Image.open(opened, formats=formats()) as image:
            metadata, notes = beside(image, data)
            return cleaned(metadata), notes
    except Exception:  # the pixels are what counts
        return NO_METADATA, ("what its file says beside the pixels is damaged: left out",)


# Decoders: a file as it is, in its own colours, with as many channels as it has -------------------------------------


def decode(data: bytes, channels: int, max_pixels: int, options: ReadOptions) -> ImageFile:
    """By the content's kind; what it is called does not matter."""
    kind = kind_of(data[:HEAD_BYTES])
    if kind == NUMPY:
        return ImageFile(deep.read_npy(data, max_pixels, options.value_range))
    if kind == JPEG_XL:
        from ldm_vae.data.jpeg_xl import read_jpeg_xl

        return ImageFile(*read_jpeg_xl(data, max_pixels))
    if kind == HEIC:
        from ldm_vae.data.heif import read_heif

        return ImageFile(*read_heif(data, max_pixels))
    if kind == TIFF:
        return decode_tiff(data, channels, max_pixels, options)
    if deep.is_deep_jpeg(data):
        pixels, metadata = deep.read_deep_jpeg(data, max_pixels, options.value_range)
        return ImageFile(orient(pixels, orientation_in(metadata.exif)), metadata)
    pnm = deep.read_pnm(data, max_pixels, options.value_range)
    return decode_pil(data, max_pixels) if pnm is None else ImageFile(pnm)


def decode_tiff(data: bytes, channels: int, max_pixels: int, options: ReadOptions) -> ImageFile:
    from ldm_vae.data.tiff import read_tiff

    tiff = read_tiff(
        data,
        channels,
        max_pixels,
        pages_as_channels=options.pages_as_channels,
        value_range=options.value_range,
    )
    if tiff.pixels is not None:
        return ImageFile(tiff.pixels, tiff.metadata, tiff.notes)
    found = decode_pil(data, max_pixels)
    return replace(found, notes=(*tiff.notes, *found.notes))


def decode_pil(data: bytes, max_pixels: int) -> ImageFile:
    """A JPEG is read past what stands before its start, and without its end marker if all pixels are there."""
    try:
        return read_pil(data, max_pixels)
    except UnidentifiedImageError:
        start = data.find(deep.START_OF_IMAGE, 1, MAX_JUNK + len(deep.START_OF_IMAGE))
        if start < 0:
            raise
        found = decode(data[start:], 3, max_pixels, USUAL)
        return replace(found, notes=(f"{start} bytes before the start of the JPEG were skipped", *found.notes))
    except OSError:
        whole = data + deep.END_OF_IMAGE
        if not data.startswith(deep.START_OF_IMAGE) or not deep.is_whole_jpeg(whole):
            raise
        found = read_pil(whole, max_pixels)
        return replace(found, notes=(*found.notes, "the JPEG has no end marker; its pixels are whole"))


def from_pil(image: Image.Image, options: ReadOptions = USUAL) -> ImageFile:
    """What `read_image` gives, as the image is, of one that PIL has opened or made."""
    metadata = metadata_of_opened(image)
    if image.mode in CONVERTED:
        metadata = replace(metadata, icc=b"")
    return in_its_colours(ImageFile(pil_pixels(image), metadata), options)
