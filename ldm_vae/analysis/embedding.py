"""One vector an image, from an autoencoder's latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm_vae.data.conversion import to_images
from ldm_vae.data.images import centre_square
from ldm_vae.data.sources import BadImages, Source, usable
from ldm_vae.errors import ConfigError, nothing_usable
from ldm_vae.models.interface import side_for
from ldm_vae.models.reconstruction import encode_mean
from ldm_vae.progress import progress

Pooling = Literal["mean", "flatten"]


def embed(vae: Any, images: Tensor, *, pooling: Pooling = "mean") -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> vectors (B, D), float32: the posterior's mean, without gradients.

    Args:
        pooling: of a map of latents (c, h, w): "mean" over the places, D = c; or "flatten", D = c * h * w. An
            autoencoder with a global latent gives its vector either way, of images of the side that it was made for.
    """
    with torch.inference_mode():
        latents = encode_mean(vae, images).float()
    return latents.mean(dim=(2, 3)) if pooling == "mean" else latents.flatten(1)


@dataclass(frozen=True)
class Embedding:
    """One vector an image: vectors (N, D), and each image's name and label."""

    vectors: np.ndarray
    names: list[str]
    labels: list[int | None]


def embed_source(
    vae: Any,
    source: Source,
    bad_images: BadImages,
    *,
    resolution: int | None = None,
    pooling: Pooling = "mean",
    num_images: int | None = None,
) -> Embedding:
    """The images of a source, one at a time; those that cannot be used are put into `bad_images`.

    Args:
        resolution: the centred square of each image is resized to this side; for "flatten" it is needed unless all
            images are of one size.
        num_images: only the first so many.

    Raises:
        DataError: nothing usable.
        ConfigError: vectors of different lengths.
    """
    side = side_for(vae, resolution)
    device = next(vae.parameters()).device
    vectors: list[np.ndarray] = []
    names: list[str] = []
    labels: list[int | None] = []
    indices = progress(range(len(source))[:num_images], unit="image")
    for _, sample in usable(source, bad_images, indices=indices):
        pixels = sample.pixels if side is None else centre_square(sample.pixels, side)
        vector = embed(vae, to_images(pixels)[None].to(device), pooling=pooling)[0].cpu().numpy()
        if vectors and len(vector) != len(vectors[0]):
            raise ConfigError(
                f"{sample.name} has {len(vector)} numbers and {names[0]} {len(vectors[0])}: "
                "add --resolution, or choose --pooling mean"
            )
        vectors.append(vector)
        names.append(sample.name)
        labels.append(sample.label)
    if not vectors:
        raise nothing_usable(bad_images)
    return Embedding(np.stack(vectors), names, labels)
