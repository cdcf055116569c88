"""Images of any size through an autoencoder: whole, or in tiles that give the same to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae.errors import ConfigError, ModelError
from ldm_vae.models.pretrained import encode_moments, stride_of

TILE = 64
"""Side of a tile, in latents."""


def encode_mean(vae: Any, images: Tensor, *, tile: int | None = None, noise_level: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W) of any size -> the posterior's mean (B, c, ceil(H/f), ceil(W/f)).

    What is missing to a multiple of the stride f is continued by the last row and column.

    Args:
        tile: see `tiled_encode_moments`; None: the whole at once.
        noise_level: (B,), for a VAE that takes it.
    """
    stride = stride_of(vae)
    down, right = -images.shape[-2] % stride, -images.shape[-1] % stride
    padded = nn.functional.pad(images, (0, right, 0, down), mode="replicate") if down or right else images
    if tile is None:
        moments = encode_moments(vae, padded, noise_level)
    else:
        moments = tiled_encode_moments(vae, padded, tile=tile, noise_level=noise_level)
    return moments.chunk(2, dim=1)[0]


def decode(vae: Any, latents: Tensor, *, tile: int | None = None) -> Tensor:
    """Latents (B, c, h, w) -> images (B, C, h*f, w*f), about [-1, 1] and not clamped; `tile` as above."""
    images: Tensor = vae.decode(latents).sample if tile is None else tiled_decode(vae, latents, tile=tile)
    return images


def reconstruct(vae: Any, images: Tensor, *, tile: int | None = None, noise_level: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W) of any size -> their reconstruction through the posterior's mean, same size, not clamped.

    Sizes that are not a multiple of the stride are continued by their last row and column. Arguments as in
    `encode_mean`.
    """
    height, width = images.shape[-2:]
    return decode(vae, encode_mean(vae, images, tile=tile, noise_level=noise_level), tile=tile)[..., :height, :width]


def denoise(vae: Any, images: Tensor, *, sigma: float | None = None, tile: int | None = None) -> Tensor:
    """Noisy images (B, C, H, W) in [-1, 1] of any size -> images without the noise, of the same size, not clamped.

    Args:
        vae: trained with a corruption (`train_vae.py denoise`).
        sigma: standard deviation of the noise in 0..255, for a VAE that takes it; None: it goes by what it sees.
        tile: as in `encode_mean`.

    Raises:
        ConfigError: a sigma for a VAE that takes none, or beyond what it was trained for.
    """
    check_noise_level(vae, sigma)
    level = None if sigma is None else torch.full((len(images),), float(sigma), device=images.device)
    return reconstruct(vae, images, tile=tile, noise_level=level)


def check_noise_level(vae: Any, sigma: float | None) -> None:
    """Raises ConfigError for a sigma that cannot be told to this autoencoder."""
    if sigma is None:
        return
    most = vae.config.get("noise_level")
    if most is None:
        raise ConfigError("this autoencoder cannot be told how much noise there is: leave out sigma")
    if not 0 <= sigma <= most:
        raise ConfigError(f"sigma is {sigma}: this autoencoder was trained for 0 to {most:g}")


def turn_on_tiling(vae: Any, tile: int = TILE) -> int | None:
    """The `tile` to hand to `encode_mean` and `decode`; None for a VAE that from now on cuts tiles by itself.

    Those (AutoencoderKL, for one) have normalisation and attention over the whole image: they blend overlapping tiles,
    which is near to the whole and not equal to it.

    Raises:
        ModelError: this autoencoder has neither way.
    """
    if hasattr(vae, "decoder_halo"):
        return tile
    try:
        vae.enable_tiling()
    except (AttributeError, NotImplementedError):
        raise ModelError(f"{type(vae).__name__} cannot be run in tiles: leave tiling off") from None
    return None


def tiled_decode(vae: Any, latents: Tensor, *, tile: int = TILE) -> Tensor:
    """What `vae.decode(latents).sample` gives, in memory for about one tile.

    A pixel depends on the latents at most `decoder_halo` away from its own, so a tile is decoded with that many around
    it, and they are cut off again. At the image's border there are none: there the tile ends as the image does, and
    convolutions pad it with the same zeros.

    Args:
        vae: with a `decoder_halo`, as PatchAutoencoderKL has.
        tile: side of the tiles, in latents.
    """
    return in_tiles(
        lambda z: vae.decode(z).sample, latents, tile=tile, halo=vae.decoder_halo, unit_in=1, unit_out=stride_of(vae)
    )


def tiled_encode_moments(vae: Any, images: Tensor, *, tile: int = TILE, noise_level: Tensor | None = None) -> Tensor:
    """What `encode_moments` gives, tile by tile of tile*f x tile*f pixels; sizes must be multiples of the stride f."""
    stride = stride_of(vae)
    halo = -(-vae.encoder_halo // stride)
    return in_tiles(
        lambda x: encode_moments(vae, x, noise_level), images, tile=tile, halo=halo, unit_in=stride, unit_out=1
    )


def in_tiles(
    function: Callable[[Tensor], Tensor], values: Tensor, *, tile: int, halo: int, unit_in: int, unit_out: int
) -> Tensor:
    """function(values) from tiles of `tile` x `tile` cells, each with `halo` cells around it.

    Args:
        values: (B, ., h * unit_in, w * unit_in) for h x w cells; the result is (B, ., h * unit_out, w * unit_out).
    """
    if tile < 1:
        raise ValueError(f"tile {tile} is too small: it must be at least 1")
    height, width = (n // unit_in for n in values.shape[-2:])
    rows = []
    for top, bottom, above, below in spans(height, tile, halo):
        row = []
        for left, right, before, behind in spans(width, tile, halo):
            outer = values[..., above * unit_in : below * unit_in, before * unit_in : behind * unit_in]
            done = function(outer)
            y, x = (top - above) * unit_out, (left - before) * unit_out
            row.append(done[..., y : y + (bottom - top) * unit_out, x : x + (right - left) * unit_out])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


def spans(length: int, tile: int, halo: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, stop, start with halo, stop with halo) of each tile along a side."""
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        yield start, stop, max(start - halo, 0), min(stop + halo, length)
