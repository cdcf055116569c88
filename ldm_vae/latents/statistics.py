"""The mean and deviation of latents per channel: measured over a data set, kept in the VAE's config, applied here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST_STD = 1e-6
"""A channel that never changes is not divided by zero."""


@dataclass(kw_only=True)
class Statistics:
    """Count, mean and sum of squared deviations per channel, in float64.

    Merged by the parallel form of Welford's algorithm (Chan, Golub & LeVeque 1979, equations 2.1), which does not
    cancel like a difference of sums, and gives the same however the latents are split, but for rounding.
    """

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, moments: Tensor) -> Statistics:
        """Of latents *sampled* from posteriors with these moments (B, 2c, h, w), in expectation.

        The variance of a sample is that of the means and, by the law of total variance, the mean of the variances.
        """
        mean, logvar = (m.transpose(0, 1).flatten(1).double().cpu() for m in moments.chunk(2, dim=1))  # (c, B*h*w)
        centre = mean.mean(dim=1)
        squares = (mean - centre[:, None]).square().sum(dim=1) + logvar.clamp(-30, 20).exp().sum(dim=1)
        return cls(count=mean.shape[1], mean=centre.numpy(), squares=squares.numpy())

    def __add__(self, other: Statistics) -> Statistics:
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        return Statistics(
            count=count,
            mean=self.mean + delta * other.count / count,
            squares=self.squares + other.squares + delta**2 * self.count * other.count / count,
        )

    @property
    def std(self) -> np.ndarray:
        return np.maximum(np.sqrt(self.squares / max(self.count, 1)), SMALLEST_STD)

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Statistics:
        return cls(count=int(record["count"]), mean=np.array(record["mean"]), squares=np.array(record["squares"]))


def put_statistics(vae: Any, statistics: Statistics) -> None:
    """Into the VAE's config, where `scale_latents` and `save_pretrained` find them; older factors are cleared."""
    vae.register_to_config(
        latents_mean=statistics.mean.tolist(), latents_std=statistics.std.tolist(), scaling_factor=1.0, shift_factor=0.0
    )


def has_scale(vae: Any) -> bool:
    """Whether the VAE says how its latents are scaled."""
    config = vae.config
    return config.get("latents_mean") is not None or (config.get("scaling_factor") or 1.0) != 1.0


def mean_and_std(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """What is subtracted from latents and what they are divided by, (c, 1, 1) or (1, 1, 1), as `like` is.

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
    """Made once, as a GPU would be waited for whenever numbers are sent there."""
    with torch.inference_mode(False):  # wherever the first call is
        made = [torch.tensor(v, dtype=dtype, device=device).view(-1, 1, 1) for v in (mean, std)]
    return made[0], made[1]


def scale_of(vae: Any) -> list[list[float]] | None:
    """What the VAE says of the mean and the deviation of its latents, as lists; None where it says nothing."""
    if not has_scale(vae):
        return None
    return [v.flatten().tolist() for v in mean_and_std(vae, torch.zeros(1, dtype=torch.float64))]


def scale_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, c, h, w) -> scaled latents of mean 0 and deviation 1 over the data that was measured."""
    mean, std = mean_and_std(vae, latents)
    return (latents - mean) / std


def unscale_latents(vae: Any, scaled_latents: Tensor) -> Tensor:
    """The inverse of `scale_latents`."""
    mean, std = mean_and_std(vae, scaled_latents)
    return scaled_latents * std + mean
