"""The rate of a codec in training: what its latents cost, and the weight that steers it to a target."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae.data.order import Stream, generator_at
from ldm_vae.models.interface import encode_moments, latent_channels_of
from ldm_vae.models.prior import STEP_LOGVAR, CausalPrior

STEERING = 0.001
"""How much the rate's weight changes in a step, at most. The network takes some hundred steps to follow."""


class TrainableCodec(nn.Module):
    """The forward pass that DDP wraps: encode, quantise, decode, and the rate.

    The posterior's deviation is fixed to that of uniform noise of width 1, so that a latent's scale says how exactly it
    is kept. Noise replaces rounding in the rate alone: the decoder sees rounded latents, with a straight-through
    gradient (Minnen & Singh 2020, "Channel-wise autoregressive entropy models", section 3.3).
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        channels = latent_channels_of(vae)
        self.vae: Any = vae
        self.prior = CausalPrior(channels)
        last = [vae.encoder.conv_out] + ([vae.encoder.linear.conv] if vae.encoder.linear is not None else [])
        with torch.no_grad():  # no gradient reaches them, as only the mean is used
            for layer in last:
                layer.weight[channels:] = 0
                layer.bias[channels:] = 0
            vae.encoder.conv_out.bias[channels:] = STEP_LOGVAR

    def forward(self, images: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W), normal noise (B, c, h, w), the quantiser's steps (B,) -> reconstruction, moments, rate.

        The rate (B,) is in nats per pixel: what the prior says of the symbols.
        """
        moments = encode_moments(self.vae, images)
        mean = moments.float().chunk(2, dim=1)[0]
        step = steps[:, None, None, None]
        symbols = mean / step
        uniform = 0.5 * torch.erf(noise / math.sqrt(2))  # in -1/2..1/2
        nats = self.prior(symbols + uniform, steps).sum(dim=(1, 2, 3)) / (images.shape[-2] * images.shape[-1])
        latents = mean + step * (symbols.round() - symbols).detach()
        return self.vae.decode(latents).sample, moments, nats


def steps_at(positions: list[int], seed: int, step_range: tuple[float, float]) -> Tensor:
    """A step of the quantiser for each position (B,), log-uniform in the range, from (seed, position)."""
    low, high = (math.log(step) for step in step_range)
    shares = [generator_at(seed, position, Stream.QUANTISER).random() for position in positions]
    return torch.tensor([math.exp(low + (high - low) * share) for share in shares])


def steering(rate: Tensor, target: float) -> Tensor:
    """The factor for the rate's weight: more than 1 where the rate is above its target."""
    return torch.exp(STEERING * torch.log(rate / target).clamp(-1, 1))
