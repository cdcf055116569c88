"""One picture as a file holds it: colours, transparency, and what is written beside them."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_vae.codec.bitstream import EXTENSION
from ldm_vae.data import large
from ldm_vae.data.colour import fitting
from ldm_vae.data.images import Pixels, check_values
from ldm_vae.data.metadata import EXIF_PREFIX, IPTC_RESOURCE, IPTC_TAG, NO_METADATA, Metadata, iptc_segment
from ldm_vae.data.pil import limits_are_ours, metadata_of, metadata_of_opened, pil_pixels
from ldm_vae.data.png import stream_png
from ldm_vae.data.reader import MAX_PIXELS, ReadOptions, read_image
from ldm_vae.errors import BadImageError, ConfigError

FINEST: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}
"""Options of PIL's writers whose defaults lose what can be seen."""
OWN_COLOURS = ReadOptions(keep_colour=True)
BLOCKS = {
    **{"icc": "ICC profile", "cicp": "cICP", "exif": "EXIF", "xmp": "XMP", "iptc": "IPTC"},
    **{"resolution": "resolution", "modified": "time of the last change"},
}
"""What people call the fields of `Metadata`."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """`pixels` (H, W, C) of uint8 or uint16, `alpha` (H, W) of the same type or None, and what is written beside.

    Raises:
        BadImageError: other types or shapes.
    """

    pixels: Pixels
    alpha: Pixels | None = None
    metadata: Metadata = NO_METADATA

    def __post_init__(self) -> None:
        values, alpha = self.pixels, self.alpha
        if values.ndim != 3 or values.dtype not in (np.uint8, np.uint16) or 0 in values.shape:
            raise BadImageError(f"{values.dtype} of shape {values.shape}: uint8 or uint16 (H, W, C) can be compressed")
        if alpha is not None and (alpha.shape != values.shape[:2] or alpha.dtype != values.dtype):
            raise BadImageError(f"alpha is {alpha.dtype} {alpha.shape}, the picture {values.dtype} {values.shape[:2]}")

    def whole(self) -> Pixels:
        """Colours and alpha together: (H, W, C or C + 1)."""
        return self.pixels if self.alpha is None else np.concatenate([self.pixels, self.alpha[:, :, None]], axis=2)

    def to_pil(self) -> Image.Image:
        """L, LA, RGB, RGBA, or I;16. Raises ConfigError for what PIL has no mode for: then take `whole()`."""
        values = self.whole()
        channels = values.shape[2]
        if (values.dtype == np.uint16 and channels > 1) or channels not in (1, 2, 3, 4) or self.pixels.shape[2] == 2:
            raise ConfigError(f"PIL has no images of {channels} channels with {values.dtype.itemsize * 8} bits")
        image = Image.fromarray(values[:, :, 0] if channels == 1 else values)
        image.info.update(dict(self.metadata.text) | pil_info(self.metadata))
        return image


def pil_info(metadata: Metadata) -> dict[str, Any]:
    """What PIL has a name for, as PIL names and wants it; and cICP, as `metadata_of` finds it again."""
    exif, comment = EXIF_PREFIX + metadata.exif if metadata.exif else b"", dict(metadata.text).get("Comment")
    found = {"icc_profile": metadata.icc, "exif": exif, "xmp": metadata.xmp, "dpi": metadata.resolution}
    photoshop = {IPTC_RESOURCE: metadata.iptc} if metadata.iptc else {}
    return {k: v for k, v in (found | {"comment": comment, "cicp": metadata.cicp, "photoshop": photoshop}).items() if v}


def named(metadata: Metadata) -> list[str]:
    """What there is, in people's words."""
    blocks = [name for field, name in BLOCKS.items() if getattr(metadata, field)]
    return blocks + [f'text "{keyword}"' for keyword, _ in metadata.text]


def as_picture(image: Image.Image | Pixels | Picture, *, channels: int = 3) -> Picture:
    """From PIL's image, upright; or pixels (H, W) or (H, W, C) of uint8 or uint16.

    The last of 2 or 4 channels is alpha, unless they are as many as the `channels` of the model.
    """
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        metadata = metadata_of_opened(image)
        pixels = pil_pixels(image)
        metadata, dropped = fitting(metadata, pixels.shape[2])
        for note in dropped:
            warnings.warn(note, stacklevel=2)
        return from_pixels(pixels, channels=channels, metadata=metadata)
    return from_pixels(np.atleast_3d(image), channels=channels)


def from_pixels(values: Pixels, *, channels: int = 3, metadata: Metadata = NO_METADATA) -> Picture:
    """Pixels (H, W, C); floats in [0, 1] get 16 bits."""
    if values.dtype == np.float32:
        values = np.rint(check_values(values) * 65535).astype(np.uint16)
    if values.ndim == 3 and values.shape[2] in (2, 4) and values.shape[2] != channels:
        return Picture(pixels=values[:, :, :-1], alpha=last_channel(values), metadata=metadata)
    return Picture(pixels=values, metadata=metadata)


def fill(picture: Picture, bands: Iterable[Pixels]) -> Picture:
    """The picture, its pixels filled by bands (h, W, C) from top to bottom."""
    row = 0
    for band in bands:
        picture.pixels[row : row + len(band)] = band
        row += len(band)
    return picture


def with_alpha(bands: Iterable[Pixels], alpha: Pixels | None) -> Iterator[Pixels]:
    """Bands (h, W, C) from top to bottom with the rows of alpha (H, W), where there is one, as their last channel."""
    row = 0
    for band in bands:
        row += len(band)
        yield band if alpha is None else np.concatenate([band, alpha[row - len(band) : row, :, None]], axis=2)


def last_channel(values: Pixels) -> Pixels:
    """A copy of it, (H, W); of what lies on disk, no more than a strip is in memory beside."""
    copy = np.empty(values.shape[:2], values.dtype)
    for top, bottom in large.strips(*values.shape[:2]):
        copy[top:bottom] = values[top:bottom, :, -1]
        large.let_go(values)
    return copy


def read_picture(
    file: bytes | Path,
    *,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    options: ReadOptions = OWN_COLOURS,
    scratch: Path | None = None,
    notes: list[str] | None = None,
) -> Picture:
    """From a file or its bytes, in its own colours unless `options` say otherwise, and upright.

    Args:
        scratch: `read_large`'s folder.
        notes: takes what is not as one might expect: pages, frames or precision left out.

    Raises:
        BadImageError: there is none in them.
        OSError: the file cannot be read.
    """
    found = read_image(
        file, channels=channels, keep_alpha=True, max_pixels=max_pixels, options=options, scratch=scratch
    )
    if notes is not None:
        notes += found.notes
    return from_pixels(found.pixels, channels=channels, metadata=found.metadata)


def encode_picture(picture: Picture, extension: str, notes: list[str] | None = None) -> bytes:
    """A file's bytes for an extension: .png and .npy hold all values, others what PIL makes of 8 bits.

    Lossless where a format can be, and next to it where not. `notes` takes a line on metadata that had to stay behind.

    Raises:
        ConfigError: an extension that is not known, or cannot hold this picture: its alpha, or its colours.
    """
    check_extension(extension)
    file = io.BytesIO()
    kept = NO_METADATA
    if extension == ".npy":
        np.save(file, picture.whole())
    elif extension == ".png":
        values = picture.whole()
        if values.shape[2] > 4 or picture.pixels.shape[2] == 2:
            raise ConfigError(f"a PNG has no {values.shape[2]} channels: write .npy")
        stream_png(file, [values], values.shape, metadata=picture.metadata)
        kept = picture.metadata
    else:
        kept = save_by_pil(picture, file, extension)
    missing = list((Counter(named(picture.metadata)) - Counter(named(kept))).elements())
    if missing and notes is not None:
        notes.append(f"{extension} holds no {', '.join(missing)}: left out")
    return file.getvalue()


def save_by_pil(picture: Picture, file: io.BytesIO, extension: str) -> Metadata:
    """Writes the picture, and reads it again: what it has kept of the metadata. Raises ConfigError."""
    try:
        image = picture.to_pil()
    except ConfigError as error:
        raise ConfigError(f"{extension} cannot hold this picture ({error}): write .png") from None
    kind = Image.registered_extensions()[extension]
    try:
        with limits_are_ours(), warnings.catch_warnings(action="ignore"):  # of PIL, about odd metadata
            image.save(file, kind, **FINEST.get(kind, {}), **pil_info(picture.metadata), **iptc_for(kind, picture))
            with Image.open(file) as again:
                size, mode, kept = again.size, again.mode, metadata_of(again)
    except Exception as error:  # writers raise many kinds, for metadata that they cannot read, too
        raise ConfigError(f"{extension} cannot hold this picture ({error}): write .png") from None
    if (size, mode) != (image.size, image.mode):
        raise ConfigError(f"{extension} cannot hold this picture ({image.mode} became {mode}): write .png")
    return kept


def iptc_for(kind: str, picture: Picture) -> dict[str, Any]:
    """What PIL's writers of JPEG and TIFF are told, so that they write IPTC; of others none does."""
    iptc = picture.metadata.iptc
    options: dict[str, dict[str, Any]] = {"JPEG": {"extra": iptc_segment(iptc)}, "TIFF": {"tiffinfo": {IPTC_TAG: iptc}}}
    return options.get(kind, {}) if iptc else {}


def check_extension(extension: str) -> None:
    """Raises ConfigError for one that no picture can be written as."""
    if extension not in {*Image.registered_extensions(), ".png", ".npy"} or extension == EXTENSION:
        raise ConfigError(f"{extension or 'no extension'}: name an image file, such as .png")
