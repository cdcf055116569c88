"""Images of any size through an autoencoder: to the posterior's mean, and back."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae.errors import ConfigError, ModelError
from ldm_vae.models.interface import encode_moments, stride_of


def exact_float32() -> None:
    """Turns TF32 off for the whole process: a GPU would round to 10 bits, and other tiles would round otherwise."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def encode_mean(vae: Any, images: Tensor, *, noise_level: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W) of any size -> the posterior's mean (B, c, ceil(H/f), ceil(W/f)).

    The last row and column are repeated up to a multiple of the stride f. `noise_level` (B,) is for a VAE that takes
    it.
    """
    stride = stride_of(vae)
    down, right = -images.shape[-2] % stride, -images.shape[-1] % stride
    padded = nn.functional.pad(images, (0, right, 0, down), mode="replicate") if down or right else images
    return encode_moments(vae, padded, noise_level).chunk(2, dim=1)[0]


def reconstruct(vae: Any, images: Tensor, *, noise_level: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W) of any size -> their reconstruction through `encode_mean`, same size, not clamped."""
    height, width = images.shape[-2:]
    images = vae.decode(encode_mean(vae, images, noise_level=noise_level)).sample
    return images[..., :height, :width]


def denoise(vae: Any, images: Tensor, *, sigma: float | None = None) -> Tensor:
    """Noisy images (B, C, H, W) in [-1, 1] of any size -> images without the noise, of the same size, not clamped.

    Args:
        vae: trained with a corruption (`train_autoencoder.py denoise`).
        sigma: standard deviation of the noise in 0..255, for a VAE that takes it; None: it estimates the noise itself.

    Raises:
        ConfigError: a sigma for a VAE that takes none, or beyond what it was trained for.
    """
    check_noise_level(vae, sigma)
    level = None if sigma is None else torch.full((len(images),), float(sigma), device=images.device)
    return reconstruct(vae, images, noise_level=level)


def check_noise_level(vae: Any, sigma: float | None) -> None:
    """Raises ConfigError for a sigma that cannot be told to this autoencoder."""
    if sigma is None:
        return
    most = vae.config.get("noise_level")
    if most is None:
        raise ConfigError("this autoencoder cannot be told how much noise there is: leave out sigma")
    if not 0 <= sigma <= most:
        raise ConfigError(f"sigma is {sigma}: this autoencoder can be told 0 to {most:g}")


def reach_of(vae: Any) -> tuple[int, int] | None:
    """Receptive radius of a reconstructed pixel, in pixels, and the stride; None where it is the whole image."""
    if not hasattr(vae, "decoder_halo"):
        return None
    stride = stride_of(vae)
    return stride * (vae.decoder_halo - (-vae.encoder_halo // stride)), stride


def turn_on_tiling(vae: Any) -> bool:
    """Makes an autoencoder work on tiles; returns whether the result equals that of the whole image, to rounding.

    It does where the receptive field is finite. Others (AutoencoderKL, for one) have normalisation and attention over
    the whole image: they blend overlapping tiles, which only comes near, and a warning says so.

    Raises:
        ModelError: this autoencoder cannot do it.
    """
    try:
        vae.enable_tiling()
    except (AttributeError, NotImplementedError):
        raise ModelError(f"{type(vae).__name__} cannot be run in tiles: leave tiling off") from None
    exact = hasattr(vae, "decoder_halo")
    if not exact:
        warnings.warn(
            f"{type(vae).__name__} sees the whole image at once: its tiles are blended, and come near to the result of "
            "the whole image without being equal to it",
            stacklevel=2,
        )
    return exact
