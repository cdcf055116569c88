"""Between what people hold (PIL images, arrays, tensors) and what networks take: images (N, C, H, W) in [-1, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.data.images import Pixels, check_values, convert_channels, values_of
from ldm_vae.data.reader import from_pil

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def to_images(pixels: Pixels) -> Tensor:
    """Pixels (..., H, W, C) -> images (..., C, H, W), float32 in [-1, 1], with the precision that the file had."""
    return torch.from_numpy(values_of(pixels))


def to_pixels(images: Tensor, dtype: Any = np.uint8) -> Pixels:
    """Images (..., C, H, W), clamped to [-1, 1] -> pixels uint8 or uint16 (..., H, W, C), rounded to the nearest."""
    values = images.detach().float().clamp(-1, 1).add(1).mul(np.iinfo(dtype).max / 2).round()
    return np.moveaxis(values.cpu().numpy().astype(dtype), -3, -1)


def as_uint8(pixels: Pixels) -> Pixels:
    """Pixels of any type, rounded to 8 bits."""
    return pixels if pixels.dtype == np.uint8 else to_pixels(to_images(pixels))


def images_from(image: Any, *, channels: int) -> Tensor:
    """One image or several -> images (N, channels, H, W) in [-1, 1], float32, on the CPU unless a tensor was not.

    Args:
        image: a PIL image; an array (H, W), (H, W, C) or (N, H, W, C) of uint8, uint16 or floats in [0, 1]; a tensor
            (C, H, W) or (N, C, H, W) in [0, 1], as diffusers' pipelines take it; or a list of those, all of one size.

    Raises:
        ValueError: another type, shape or number of channels, or sizes that differ.
        BadImageError: values or channels that cannot be converted.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("an empty list of images was given")
        parts = [images_from(one, channels=channels) for one in image]
        sizes = {tuple(p.shape[-2:]) for p in parts}
        if len(sizes) > 1:
            raise ValueError(f"images of different sizes {sorted(sizes)} were given: call once for each size")
        return torch.cat(parts)
    if isinstance(image, Tensor):
        values = image[None] if image.ndim == 3 else image
        if values.ndim != 4 or values.shape[1] != channels or not values.is_floating_point():
            raise ValueError(
                f"a tensor of shape {tuple(image.shape)} and {image.dtype} was given: "
                f"floats in [0, 1] of shape ({channels}, H, W) or (N, {channels}, H, W) are needed"
            )
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("a tensor with values outside [0, 1] was given: of images in [-1, 1], give (x + 1) / 2")
        return 2 * values.float() - 1
    if isinstance(image, Image.Image):
        return to_images(convert_channels(from_pil(image).pixels, channels))[None]
    if isinstance(image, np.ndarray) and image.ndim in (2, 3, 4):
        arrays = image if image.ndim == 4 else np.atleast_3d(image)[None]
        return torch.stack([to_images(convert_channels(check_values(a), channels)) for a in arrays])
    raise ValueError(f"{describe(image)} was given: a PIL image, an array or a tensor is needed")


def mask_from(mask_image: Any) -> Tensor:
    """One mask or several -> bool (N, 1, H, W); what is at least half white is True.

    Args:
        mask_image: a PIL image; an array (H, W), (H, W, 1) or (N, H, W, 1) of bool, uint8 or floats in [0, 1]; a tensor
            (H, W), (1, H, W) or (N, 1, H, W) of bool or floats in [0, 1]; or a list of those, all of one size.

    Raises:
        ValueError: another type or shape.
    """
    if isinstance(mask_image, Tensor):
        mask = mask_image[(None,) * (4 - mask_image.ndim)]
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(f"a mask of shape {tuple(mask_image.shape)} was given: (N, 1, H, W) is needed")
        return mask >= 0.5 if mask.is_floating_point() else mask > 0
    if isinstance(mask_image, np.ndarray) and mask_image.dtype == bool:
        mask_image = mask_image.astype(np.uint8) * 255
    if isinstance(mask_image, (list, tuple)) and any(isinstance(one, Tensor) for one in mask_image):
        return torch.cat([mask_from(one) for one in mask_image])
    return images_from(mask_image, channels=1) >= 0


def images_to(images: Tensor, output_type: str) -> Any:
    """Images (N, C, H, W) -> what diffusers' pipelines give: a list of PIL images, or values clamped to [0, 1].

    Args:
        output_type: "pil"; "np", float32 (N, H, W, C); or "pt", float32 (N, C, H, W).

    Raises:
        ValueError: images with a number of channels that PIL does not have.
    """
    if output_type == "pil":
        check_viewable(images.shape[1])
        return [Image.fromarray(p[:, :, 0] if p.shape[2] == 1 else p) for p in to_pixels(images)]
    values = (images.float().clamp(-1, 1) + 1) / 2
    return values if output_type == "pt" else values.permute(0, 2, 3, 1).cpu().numpy()


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type {output_type} is not known: try {', '.join(OUTPUT_TYPES)}")


def check_viewable(channels: int) -> None:
    if channels not in (1, 3, 4):
        raise ValueError(f"images of {channels} channels cannot be PIL images or PNG: ask for output_type 'np' or 'pt'")


def describe(value: Any) -> str:
    return f"{type(value).__name__} of shape {value.shape}" if hasattr(value, "shape") else type(value).__name__
