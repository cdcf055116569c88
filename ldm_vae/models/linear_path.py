"""A linear transform of patches beside a network, which starts as the cosine transform's lowest frequencies.

What JPEG does (Wallace 1991, "The JPEG still picture compression standard", section 4.1) is where training starts, and
the network learns what a linear transform cannot do.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

GAIN = 2.5
"""Of the latents over an orthonormal transform's. A step of 1 in a latent is then 0.4 in the transform, which is where
squared error and rate balance at a weight of 0.008 per pixel-nat: sqrt(18 * 0.008) = 0.38."""
CHROMA = 12.0
"""By how much the differences between channels come later than their mean in the order of the basis."""


def cosine_basis(channels: int, side: int, count: int) -> Tensor:
    """Orthonormal rows (count, C * side^2), or all: the cosine transform of patches (C, side, side), coarse to fine.

    Across the channels, too: their mean, then their differences. Rows are in the order of 1 + y^2 + x^2, of the
    frequencies y and x, as natural images' spectra fall; times CHROMA for the differences.
    """
    from scipy.fft import idctn  # a loaded network needs no basis

    numbers = channels * side**2
    z, y, x = np.meshgrid(*(np.arange(n) for n in (channels, side, side)), indexing="ij")
    order = np.argsort(((1 + y**2 + x**2) * np.where(z > 0, CHROMA, 1.0)).ravel(), kind="stable")
    single = np.zeros((min(count, numbers), numbers))
    single[np.arange(len(single)), order[: len(single)]] = 1
    waves = idctn(single.reshape(-1, channels, side, side), axes=(1, 2, 3), norm="ortho")
    return torch.from_numpy(waves.reshape(len(single), numbers)).float()


class LinearEncoder(nn.Module):
    """Images (B, C, H, W) -> (B, 2c, H/f, W/f): c latents, and 0 for what describes their deviation."""

    def __init__(self, in_channels: int, latent_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(in_channels * stride**2, 2 * latent_channels, 1)
        if not self.conv.weight.is_meta:  # else its weights are loaded
            start_at(self.conv, GAIN * cosine_basis(in_channels, stride, latent_channels))

    def forward(self, x: Tensor) -> Tensor:
        return exactly(self.conv, functional.pixel_unshuffle(x, self.stride))


class LinearDecoder(nn.Module):
    """Latents (B, c, H/f, W/f) -> images (B, C, H, W); what LinearEncoder kept comes back as it was."""

    def __init__(self, out_channels: int, latent_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(latent_channels, out_channels * stride**2, 1)
        if not self.conv.weight.is_meta:
            start_at(self.conv, cosine_basis(out_channels, stride, latent_channels).T / GAIN)

    def forward(self, z: Tensor) -> Tensor:
        return functional.pixel_shuffle(exactly(self.conv, z), self.stride)


def exactly(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """In the precision of the weights, autocast or not: latents of +-40 are 0.25 apart in bfloat16.

    A matrix product, as convolutions on a GPU take TensorFloat-32 unless told otherwise.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows = x.to(conv.weight.dtype).movedim(1, -1)
        return functional.linear(rows, conv.weight[:, :, 0, 0], conv.bias).movedim(-1, 1)


@torch.no_grad()
def start_at(conv: nn.Conv2d, matrix: Tensor) -> None:
    """Weights of a 1x1 convolution: a matrix in its first output and input channels, and 0 elsewhere."""
    silence(conv)
    conv.weight[: len(matrix), : matrix.shape[1], 0, 0] = matrix


@torch.no_grad()
def silence(conv: nn.Conv2d) -> None:
    """A convolution that gives 0 until it has learnt something."""
    for parameter in conv.parameters():
        parameter.zero_()
