"""One image as an array: its channels, its size, and the two ranges of values. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ldm_vae.data.metadata import NO_METADATA, Metadata
from ldm_vae.errors import BadImageError

Pixels = np.ndarray[Any, Any]
"""(H, W, C) of uint8, uint16 or float32 in [0, 1]."""
BACKGROUND = 255
"""Images with transparency are composited on this grey level of 0..255: white."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601, what PIL's convert("L") uses."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image as it was stored: `pixels` (H, W, C), its label (None without one) and its name.

    What its file says beside the pixels, and what was noted at reading, as `ImageFile` has them.
    """

    pixels: Pixels
    label: int | None
    name: str
    metadata: Metadata = NO_METADATA
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageFile:
    """What a file holds: `pixels` (H, W, C), what is written beside them, and what whoever reads it should hear."""

    pixels: Pixels
    metadata: Metadata = NO_METADATA
    notes: tuple[str, ...] = ()


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(f"{width}x{height} is more than the limit of {max_pixels} pixels")
    if width < 1 or height < 1:
        raise BadImageError(f"{width}x{height} has no pixels")


def orient(array: Pixels, value: int) -> Pixels:
    """Turned and mirrored as the Orientation tag says, of TIFF and of EXIF (TIFF 6.0, tag 274)."""
    if value in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    if value in (3, 4, 7, 8):
        array = array[::-1]
    if value in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def white(pixels: Pixels) -> float:
    """The largest value of this type: 255, 65,535 or 1."""
    return 1.0 if pixels.dtype.kind == "f" else float(np.iinfo(pixels.dtype).max)


def check_values(array: np.ndarray, value_range: tuple[float, float] | None = None) -> Pixels:
    """uint8 and uint16 as they are, floats in [0, 1] as float32. Raises BadImageError for other values.

    Args:
        value_range: the values of black and of white, in arrays of anything but uint8: they become float32 in [0, 1],
            and what lies outside is clipped.
    """
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.uint8 or (array.dtype == np.uint16 and value_range is None):
        return array
    if array.dtype.kind not in "iuf":
        raise BadImageError(f"values of type {array.dtype}: numbers are read")
    if not np.isfinite(array).all():
        raise BadImageError("values outside of all ranges: NaN or infinity")
    if value_range is not None:
        low, high = value_range
        return np.clip((array.astype(np.float64) - low) / (high - low), 0, 1).astype(np.float32)
    least, most = array.min(), array.max()
    if array.dtype.kind != "f" or least < 0 or most > 1:
        raise BadImageError(
            f"values of type {array.dtype} from {least:g} to {most:g}: uint8, uint16 and floats are read that are not "
            "outside [0, 1]; --value-range LOW HIGH says which values are black and white in other files"
        )
    return array.astype(np.float32)


def full_scale(array: Pixels, bits: int) -> Pixels:
    """Integers of so many bits -> uint8 of up to 8 bits, uint16 of up to 16: the largest is white.

    Raises BadImageError for more bits.
    """
    top = (1 << bits) - 1
    if bits in (8, 16):
        return array
    if bits > 16:
        raise BadImageError(f"values of {bits} bits: up to 16 are read")
    dtype = np.uint8 if bits < 8 else np.uint16
    return ((array.astype(np.uint32) * np.iinfo(dtype).max + top // 2) // top).astype(dtype)


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
    top = white(pixels)
    colour = pixels[:, :, :1] if have < 3 else pixels[:, :, :3]
    alpha = pixels[:, :, -1:] if have in (2, 4) else None
    if alpha is not None and channels != 4:
        share = (alpha / top).astype(np.float32)
        colour = rounded(colour * share + BACKGROUND / 255 * top * (1 - share), pixels.dtype)
    if channels == 1:
        return colour if colour.shape[2] == 1 else rounded((colour @ LUMA)[:, :, None], pixels.dtype)
    colour = np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else colour
    if channels == 3:
        return colour
    return np.concatenate([colour, np.full_like(colour[:, :, :1], top) if alpha is None else alpha], axis=2)


def rounded(values: Pixels, dtype: Any) -> Pixels:
    """As another type, to the nearest if it is one of integers."""
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else np.rint(values).astype(dtype)


def resize(pixels: Pixels, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Pixels:
    """Antialiased bicubic resampling (PIL's) to `size` = (height, width), of `box` = (x0, y0, x1, y1) or of all."""
    height, width = size
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return np.atleast_3d(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box)))
    planes = [Image.fromarray(np.ascontiguousarray(p, np.float32)) for p in np.moveaxis(pixels, 2, 0)]
    resized = [np.asarray(p.resize((width, height), Image.Resampling.BICUBIC, box)) for p in planes]
    top = white(pixels)
    return rounded(np.clip(np.stack(resized, axis=2), 0, top), pixels.dtype)


def centre_square(pixels: Pixels, side: int) -> Pixels:
    """The largest centred square, resampled to side x side: the crop of every benchmark and picture grid."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    return resize(pixels, (side, side), (left, top, left + short, top + short))


def values_of(pixels: Pixels) -> np.ndarray:
    """Pixels (..., H, W, C) -> values of images (..., C, H, W), float32 in [-1, 1], as precise as the file."""
    values = np.moveaxis(pixels, -1, -3).astype(np.float32)
    values *= 2 / white(pixels)
    values -= 1
    return values


def pixels_of(values: np.ndarray, dtype: np.typing.DTypeLike) -> Pixels:
    """Values of images (..., C, H, W), clamped to [-1, 1] -> pixels uint8 or uint16 (..., H, W, C), rounded."""
    scaled = (np.clip(values, -1, 1) + np.float32(1)) * np.float32(np.iinfo(dtype).max / 2)
    return np.moveaxis(np.rint(scaled, out=scaled).astype(dtype), -3, -1)
