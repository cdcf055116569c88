"""The density that training assumes of quantised latents: the codec's contexts in differentiable form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_SCALE = 0.02
STEP_LOGVAR = -math.log(12.0)
"""Log-variance of uniform noise of width 1: the posterior's, where the quantiser's step is 1."""


class CausalPrior(nn.Module):
    """A logistic density for each value: around a linear prediction, and the wider the larger its neighbours are.

    Its neighbours are what `ldm_vae.codec.contexts` has decoded before it: W, N, NW and NE in its own channel, and
    3 x 3 in each previous channel. Training thus lowers the rate of the real codec, not that of a code without
    contexts (Ballé et al. 2018, "Variational image compression with a scale hyperprior", equations 4 and 6, with
    decoded neighbours in place of a hyperprior as in Minnen et al. 2018).

    Args:
        channels: C, latent channels, in the order of coding.
    """

    mask: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean_weight, self.spread_weight = (nn.Parameter(torch.zeros(channels, channels, 3, 3)) for _ in range(2))
        self.mean_bias, self.spread_bias, self.spread_by_quality = (
            nn.Parameter(torch.zeros(channels)) for _ in range(3)
        )  # the last goes with the step: checkpoints know it by this name
        before = torch.tril(torch.ones(channels, channels), -1)[:, :, None, None].expand(-1, -1, 3, 3)
        own = torch.eye(channels)[:, :, None, None] * torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 0]])
        self.register_buffer("mask", before + own, persistent=False)

    def forward(self, values: Tensor, steps: Tensor) -> Tensor:
        """Nats (B, C, h, w) for coding `values` rounded, estimated from values with uniform noise instead.

        Args:
            values: (B, C, h, w) latents in units of the quantiser's step.
            steps: (B,) that step of each.
        """
        with torch.autocast(values.device.type, enabled=False):
            v = values.float()
            mean = functional.conv2d(v, self.mean_weight * self.mask, self.mean_bias, padding=1)
            spread = functional.conv2d(v.abs(), self.spread_weight * self.mask, self.spread_bias, padding=1)
            by_step = self.spread_by_quality * steps.float().log()[:, None]  # (B, C)
            scale = functional.softplus(spread + by_step[:, :, None, None]) + LEAST_SCALE
            return interval_nats(v - mean, scale)


def interval_nats(distance: Tensor, scale: Tensor) -> Tensor:
    """-log of a logistic density's integral over [distance - 1/2, distance + 1/2], exact in the tails, too.

    With s the sigmoid, s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)).
    """
    a, b = (distance + 0.5) / scale, (distance - 0.5) / scale
    within = torch.log(-torch.expm1(-1 / scale))
    return -(functional.logsigmoid(a) + functional.logsigmoid(-b) + within)
