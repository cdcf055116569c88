"""What the library asks of any diffusers autoencoder: its sizes, its moments, its fingerprint."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm_vae.errors import ConfigError, ModelError
from ldm_vae.models.digest import canonical, digest_of
from ldm_vae.models.patch_network import DETERMINISTIC_LOGVAR

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

SCALE = {"latents_mean": None, "latents_std": None, "scaling_factor": 1.0, "shift_factor": 0.0}
"""Entries of a VAE's config on the scale of its latents, and the values that mean no scaling."""


def fingerprint(model: Any) -> str:
    """sha256 of a model's class, configuration and tensors: equal for models that compute the same.

    The scale of the latents is left out: it is measured after training, and changes no output. So are defaults: a
    later version of diffusers may have more of them.
    """
    defaults = {name: p.default for name, p in inspect.signature(type(model).__init__).parameters.items()}
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_") and k not in SCALE}
    changed = {k: v for k, v in config.items() if canonical(v) != canonical(defaults.get(k))}
    tensors = (
        (
            name,
            str(tensor.dtype),
            tensor.shape,
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in sorted(model.state_dict().items())
    )
    return digest_of(model.config.get("_class_name", type(model).__name__), changed, tensors)


def encode_moments(vae: Any, images: Tensor, noise_level: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W) -> mean and log-variance of the latents (B, 2c, H/f, W/f).

    For a deterministic autoencoder (AutoencoderTiny, AutoencoderDC) the log-variance is -30. `noise_level` (B,) is for
    those that take one.
    """
    encoded = vae.encode(images) if noise_level is None else vae.encode(images, noise_level=noise_level)
    if hasattr(encoded, "latent_dist"):
        moments: Tensor = encoded.latent_dist.parameters
        return moments
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return torch.cat([latents, torch.full_like(latents, DETERMINISTIC_LOGVAR)], dim=1)


def is_variational(vae: Any) -> bool:
    """Whether it has a posterior: AutoencoderTiny and AutoencoderDC have none, nor has a plain autoencoder."""
    return "KL" in type(vae).__name__ and not vae.config.get("deterministic", False)


def stride_of(vae: Any) -> int:
    """Pixels a latent, each way: f."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    for key in ("block_out_channels", "down_block_out_channels"):
        if ratio is None and key in vae.config:
            ratio = 2 ** (len(vae.config[key]) - 1)
    if ratio is None:
        raise ModelError(f"{type(vae).__name__} does not say its stride")
    return int(ratio)


def check_resolution(resolution: int, vae: Any) -> None:
    """Raises ConfigError for a side that is not a multiple of the VAE's stride, or not that of its one vector."""
    stride = stride_of(vae)
    if has_vector(vae) and resolution != stride:
        raise ConfigError(f"this autoencoder's vector is of {stride} pixels each way: add --resolution {stride}")
    if resolution % stride:
        nearest = max(resolution // stride, 1) * stride
        raise ConfigError(f"--resolution {resolution} is not a multiple of {stride}: try {nearest}")


def has_vector(vae: Any) -> bool:
    """Whether the latent is one vector an image, not a map."""
    return int(vae.config.get("pool", 1)) > 1


def side_for(vae: Any, resolution: int | None) -> int | None:
    """The side of the squares that images are resized to; None: they keep their size.

    Raises:
        ConfigError: a global latent needs another side.
    """
    if not has_vector(vae):
        return resolution
    if resolution not in (None, stride_of(vae)):
        raise ConfigError(f"this autoencoder's vector is of {stride_of(vae)} pixels each way: leave --resolution out")
    return stride_of(vae)


def channels_of(vae: Any) -> int:
    """Channels of the images."""
    return int(vae.config.in_channels)


def latent_channels_of(vae: Any) -> int:
    return int(vae.config.latent_channels)


def patch_norm_of(vae: Any) -> Any:
    """The batch norm over patches of latents that FLUX.2's VAE has, and its forward pass does not use; or None."""
    norm = getattr(vae, "bn", None)
    return norm if isinstance(norm, nn.BatchNorm2d) else None


def last_layer(vae: Any) -> nn.Parameter:
    """The weights of the decoder's last convolution, where the adaptive weight compares gradients."""
    convolutions = [m for m in vae.decoder.modules() if isinstance(m, nn.Conv2d)]
    last: nn.Conv2d = getattr(vae.decoder, "conv_out", convolutions[-1])
    weight: nn.Parameter = last.weight  # type: ignore[assignment]
    return weight


def posterior_of(moments: Tensor) -> DiagonalGaussianDistribution:
    """Computed in float32: the KL of a sharp posterior is a small difference of large numbers."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # late: it takes seconds

    return DiagonalGaussianDistribution(moments.float())
