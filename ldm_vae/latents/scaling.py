"""Latents as a diffusion model sees them: rounded as a cache stores them, and scaled as the VAE's config says."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ldm_vae.latents.statistics import Statistics
from ldm_vae.models.interface import patch_norm_of

STORED = torch.float16


def as_stored(moments: Tensor) -> Tensor:
    """Moments as a cache returns them: rounded to float16, in float32. Its relative error is at most 2^-11."""
    largest = torch.finfo(STORED).max
    return moments.float().clamp(-largest, largest).to(STORED).float()


def put_statistics(vae: Any, statistics: Statistics) -> None:
    """Puts them into the VAE's config, for `scale_latents` and `save_pretrained`; clears older factors.

    A VAE that has a scale in buffers keeps that one.
    """
    if scale_in_buffers(vae) is None:
        mean, std = statistics.mean.tolist(), statistics.std.tolist()
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=0.0)


def has_scale(vae: Any) -> bool:
    """Whether the VAE says how its latents are scaled."""
    config = vae.config
    in_config = config.get("latents_mean") is not None or (config.get("scaling_factor") or 1.0) != 1.0
    return in_config or scale_in_buffers(vae) is not None


def scale_in_buffers(vae: Any) -> tuple[Tensor, Tensor] | None:
    """The mean and deviation (c, p, p) of patches of p x p latents, which FLUX.2's VAE has in a batch norm.

    None for a VAE without one, or whose batch norm has seen nothing.
    """
    norm = patch_norm_of(vae)
    if norm is None or bool((norm.running_mean == 0).all() and (norm.running_var == 1).all()):
        return None
    shape = (-1, *vae.config.patch_size)  # in the order in which diffusers' Flux2Pipeline makes channels of a patch
    return norm.running_mean.view(shape), (norm.running_var + norm.eps).sqrt().view(shape)


def patch_scale(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """What latents are shifted and divided by, (c, p, p) for patches of p x p, (c, 1, 1) or (1, 1, 1).

    `latents_mean` and `latents_std` when the config has them; otherwise those in buffers; otherwise the scalars of
    older diffusers VAEs, for which scaled latents are (z - shift_factor) * scaling_factor (Rombach et al. 2022,
    appendix G). With the type and device of `like`.
    """
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = config["latents_mean"], config["latents_std"]
    elif (buffers := scale_in_buffers(vae)) is not None:
        return buffers[0].to(like), buffers[1].to(like)
    else:
        mean, std = [config.get("shift_factor") or 0.0], [1 / (config.get("scaling_factor") or 1.0)]
    return on_device(tuple(mean), tuple(std), like.dtype, like.device)


def mean_and_std(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """`patch_scale`, the patches repeated until they cover latents (..., c, h, w)."""
    mean, std = patch_scale(vae, latents)
    return covering(mean, *latents.shape[-2:]), covering(std, *latents.shape[-2:])


def covering(patch: Tensor, height: int, width: int) -> Tensor:
    """(c, p, q) -> (c, height, width); a patch of one value stays as it is."""
    rows, columns = patch.shape[1:]
    if rows == columns == 1:
        return patch
    return patch.repeat(1, -(-height // rows), -(-width // columns))[:, :height, :width]


@cache
def on_device(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cached, because sending numbers to a GPU waits for it."""
    with torch.inference_mode(False):  # wherever the first call is
        tensors = [torch.tensor(v, dtype=dtype, device=device).view(-1, 1, 1) for v in (mean, std)]
    return tensors[0], tensors[1]


def scale_of(vae: Any) -> list[list[float]]:
    """The mean and deviation of the latents by the VAE's config or buffers, as lists."""
    return [v.flatten().tolist() for v in patch_scale(vae, torch.zeros(1, dtype=torch.float64))]


def scale_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, c, h, w) -> scaled latents of mean 0 and deviation 1 over the data that was measured."""
    mean, std = mean_and_std(vae, latents)
    return (latents - mean) / std


def unscale_latents(vae: Any, scaled_latents: Tensor) -> Tensor:
    """The inverse of `scale_latents`."""
    mean, std = mean_and_std(vae, scaled_latents)
    return scaled_latents * std + mean
