"""Latents as a diffusion model sees them: rounded as a cache stores them, and scaled as the VAE's config says."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ldm_vae.latents.statistics import Statistics

STORED = torch.float16


def as_stored(moments: Tensor) -> Tensor:
    """Moments as a cache returns them: rounded to float16, in float32. Its relative error is at most 2^-11."""
    largest = torch.finfo(STORED).max
    return moments.float().clamp(-largest, largest).to(STORED).float()


def put_statistics(vae: Any, statistics: Statistics) -> None:
    """Puts them into the VAE's config, for `scale_latents` and `save_pretrained`; clears older factors."""
    vae.register_to_config(
        latents_mean=statistics.mean.tolist(), latents_std=statistics.std.tolist(), scaling_factor=1.0, shift_factor=0.0
    )


def has_scale(vae: Any) -> bool:
    """Whether the VAE says how its latents are scaled."""
    config = vae.config
    return config.get("latents_mean") is not None or (config.get("scaling_factor") or 1.0) != 1.0


def mean_and_std(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """What latents are shifted and divided by, (c, 1, 1) or (1, 1, 1), with the type and device of `like`.

    `latents_mean` and `latents_std` when the config has them; otherwise the scalars of older diffusers VAEs, for which
    scaled latents are (z - shift_factor) * scaling_factor (Rombach et al. 2022, appendix G).
    """
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = config["latents_mean"], config["latents_std"]
    else:
        mean, std = [config.get("shift_factor") or 0.0], [1 / (config.get("scaling_factor") or 1.0)]
    return on_device(tuple(mean), tuple(std), like.dtype, like.device)


@cache
def on_device(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cached, because sending numbers to a GPU waits for it."""
    with torch.inference_mode(False):  # wherever the first call is
        tensors = [torch.tensor(v, dtype=dtype, device=device).view(-1, 1, 1) for v in (mean, std)]
    return tensors[0], tensors[1]


def scale_of(vae: Any) -> list[list[float]]:
    """The mean and deviation of the latents by the VAE's config, as lists."""
    return [v.flatten().tolist() for v in mean_and_std(vae, torch.zeros(1, dtype=torch.float64))]


def scale_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, c, h, w) -> scaled latents of mean 0 and deviation 1 over the data that was measured."""
    mean, std = mean_and_std(vae, latents)
    return (latents - mean) / std


def unscale_latents(vae: Any, scaled_latents: Tensor) -> Tensor:
    """The inverse of `scale_latents`."""
    mean, std = mean_and_std(vae, scaled_latents)
    return scaled_latents * std + mean
