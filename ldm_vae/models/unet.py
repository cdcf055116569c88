"""The denoiser: diffusers' UNet2DModel in five sizes, for latents of any size and channel count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

CONVOLUTIONAL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
ATTENTIVE: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 64,
}
DENOISERS: dict[str, dict[str, Any]] = {
    "demo": {"block_out_channels": (64, 128), **CONVOLUTIONAL},
    "tiny": {"block_out_channels": (128, 256), **CONVOLUTIONAL},
    "tiny-256": {
        "patch_size": 2,
        "block_out_channels": (64, 128),
        **CONVOLUTIONAL,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "small": {"block_out_channels": (128, 256, 384), **ATTENTIVE},
    "base": {"block_out_channels": (256, 512, 768), **ATTENTIVE},
}
"""Keywords of UNet2DModel for each preset. `patch_size` p: the network sees p x p latents as one, of p^2 times the
channels, which is that much cheaper."""
TIME_BIAS = "time_embedding.linear_2.bias"


def make_denoiser(preset: str, *, latent_channels: int, sample_size: tuple[int, int], num_classes: int) -> UNet2DModel:
    """An untrained denoiser of scaled latents.

    Args:
        sample_size: height and width of the latents that it will be trained on; any other size works, too.
        num_classes: K; the embedding has K + 1 rows, of which the last one, class K, stands for "no class"
            (Ho & Salimans 2022). 0: unconditional.
    """
    keywords = dict(DENOISERS[preset])
    channels = latent_channels * keywords.pop("patch_size", 1) ** 2
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=num_classes + 1 if num_classes else None,
        **keywords,
    )


def with_classes(unet: UNet2DModel, *, sample_size: tuple[int, int], classes: Sequence[int | None]) -> UNet2DModel:
    """A copy of a denoiser for other classes.

    Args:
        sample_size: as in `make_denoiser`.
        classes: which of the denoiser's classes each is; None for a new one, which begins as "no class". Without
            classes the copy is unconditional.
    """
    rows = len(classes) + 1 if classes else None
    copy = UNet2DModel.from_config({**unet.config, "sample_size": sample_size, "num_class_embeds": rows})
    weights = unet.state_dict()
    known = weights.pop("class_embedding.weight", torch.zeros_like(weights[TIME_BIAS])[None])
    if classes:
        weights["class_embedding.weight"] = known[[-1 if c is None else c for c in (*classes, None)]]
    else:
        weights[TIME_BIAS] = weights[TIME_BIAS] + known[-1]  # the network adds the two embeddings
    copy.load_state_dict(weights)
    return copy


def patch_size_of(unet: Any, latent_channels: int) -> int:
    """Side of the patches of latents that a denoiser folds into its channels.

    Raises:
        ValueError: it does not fit these latents.
    """
    patch = math.isqrt(unet.config.in_channels // latent_channels)
    if latent_channels * patch**2 != unet.config.in_channels or not patch:
        raise ValueError(
            f"the denoiser takes {unet.config.in_channels} channels, the autoencoder's latents have "
            f"{latent_channels}: use the autoencoder that it was trained on"
        )
    return patch


def num_classes_of(unet: Any) -> int:
    """K of K classes; 0 for an unconditional denoiser."""
    rows = unet.config.num_class_embeds
    return rows - 1 if rows else 0


def denoiser_output(denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, labels: Tensor | None, bare: Any) -> Tensor:
    """The network's output for noisy scaled latents (B, c, h, w) of any h and w, same shape, in float32.

    Latents are padded to the next multiple that the network can halve, by repeating the last row and column, and the
    output is cropped.

    Args:
        denoiser: a UNet2DModel, or its wrapper under DDP.
        timesteps: (B,), in [0, 1000].
        labels: (B,) in 0..K, K for no class; None for an unconditional denoiser.
        bare: the UNet2DModel without a wrapper.
    """
    height, width = noisy.shape[-2:]
    patch = patch_size_of(bare, noisy.shape[1])
    multiple = patch * 2 ** (len(bare.config.block_out_channels) - 1)
    down, right = -height % multiple, -width % multiple
    if down or right:
        noisy = nn.functional.pad(noisy, (0, right, 0, down), mode="replicate")
    patches = nn.functional.pixel_unshuffle(noisy, patch)
    output: Tensor = denoiser(patches, timesteps, class_labels=labels).sample
    return nn.functional.pixel_shuffle(output, patch)[..., :height, :width].float()
