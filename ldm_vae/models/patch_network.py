"""The networks of `PatchAutoencoderKL` in torch alone: importing diffusers takes seconds, which the codec saves."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ldm_vae.models.linear_path import LinearDecoder, LinearEncoder, silence
from ldm_vae.models.tiles import TILE, in_tiles

DETERMINISTIC_LOGVAR = -30.0
"""What stands for the log-variance of latents that have none."""
NOISE_LEVEL_SCALE = 50.0
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda latents: latents,
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
}
"""Of the posterior's mean: sparse latents are 0 where they are not active, or between 0 and 1."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an identity: (B, C, H, W) -> (B, C, H, W). It sees `radius` positions each way.

    No normalisation, and ReLU: the fastest of those compared, and none was better (docs/decisions/001).
    """

    radius, stem = 2, 3

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.relu(x))
        return x + self.conv2(functional.relu(h))


class SeparableBlock(nn.Module):
    """A depthwise 3x3 convolution, then two 1x1, around an identity: (B, C, H, W) -> (B, C, H, W).

    Liu et al. 2022, "A ConvNet for the 2020s", without normalisation and with ReLU. A quarter of `ResidualBlock`'s
    operations (docs/decisions/019).
    """

    radius, stem = 1, 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.expand(self.depthwise(x)), inplace=True)
        return self.project(h).add_(x)


BLOCKS: dict[str, type[ResidualBlock | SeparableBlock]] = {"residual": ResidualBlock, "separable": SeparableBlock}
"""By name; `radius` is what a block sees each way, `stem` the side of the convolutions before and after all blocks."""


class Stage(nn.Module):
    """The blocks of one resolution, recomputed in the backward pass when checkpointing is on."""

    def __init__(self, block: str, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BLOCKS[block](channels) for _ in range(num_blocks))
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Encoder(nn.Module):
    """Images (B, C, H, W) and, where it takes them, noise levels (B,) -> moments (B, 2c, H/f, W/f)."""

    def __init__(
        self,
        in_channels: int,
        moments: int,
        patch: int,
        widths: tuple[int, ...],
        layers: tuple[int, ...],
        block: str,
        stem: int,
        pool: int,
        takes_level: bool,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.conv_in = nn.Conv2d(in_channels * patch**2, widths[0], stem, padding=stem // 2)
        self.level = nn.Linear(2, widths[0], bias=False) if takes_level else None
        if self.level is not None:
            nn.init.zeros_(self.level.weight)
        self.stages = nn.ModuleList(Stage(block, w, n) for w, n in zip(widths, layers, strict=True))
        self.downs = nn.ModuleList(nn.Conv2d(4 * a, b, 1) for a, b in pairwise(widths))
        side, padding = (stem, stem // 2) if pool == 1 else (pool, 0)  # one that pools sees each position once
        self.conv_out = nn.Conv2d(widths[-1], moments, side, stride=pool, padding=padding)
        self.linear: LinearEncoder | None = None

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        h = self.conv_in(functional.pixel_unshuffle(x, self.patch))  # (B, w0, H/p, W/p)
        if self.level is not None and noise_level is not None:
            known = (noise_level >= 0).to(h.dtype)  # (B,)
            features = torch.stack([known * noise_level / NOISE_LEVEL_SCALE, known], dim=1).to(h.dtype)
            h = h + self.level(features)[:, :, None, None]
        for i, stage in enumerate(self.stages):
            if i > 0:
                h = self.downs[i - 1](functional.pixel_unshuffle(h, 2))  # half as high and wide
            h = stage(h)
        moments = self.conv_out(functional.relu(h))  # (B, 2c, H/f, W/f)
        return moments if self.linear is None else moments + self.linear(x)


class Decoder(nn.Module):
    """Latents (B, c, H/f, W/f) -> images (B, C, H, W)."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        patch: int,
        widths: tuple[int, ...],
        layers: tuple[int, ...],
        block: str,
        stem: int,
        pool: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        coarse_to_fine = widths[::-1]
        self.conv_in: nn.Conv2d | nn.ConvTranspose2d
        if pool == 1:
            self.conv_in = nn.Conv2d(latent_channels, coarse_to_fine[0], stem, padding=stem // 2)
        else:
            self.conv_in = nn.ConvTranspose2d(latent_channels, coarse_to_fine[0], pool, stride=pool)
        self.stages = nn.ModuleList(Stage(block, w, n) for w, n in zip(coarse_to_fine, layers[::-1], strict=True))
        self.ups = nn.ModuleList(nn.Conv2d(a, 4 * b, 1) for a, b in pairwise(coarse_to_fine))
        self.conv_out = nn.Conv2d(widths[0], out_channels * patch**2, stem, padding=stem // 2)
        self.linear: LinearDecoder | None = None

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)  # (B, w, H/f, W/f)
        for i, stage in enumerate(self.stages):
            if i > 0:
                h = functional.pixel_shuffle(self.ups[i - 1](h), 2)  # twice as high and wide
            h = stage(h)
        sample = functional.pixel_shuffle(self.conv_out(functional.relu(h)), self.patch)  # (B, C, H, W)
        return sample if self.linear is None else sample + self.linear(z)


class Config(dict[str, Any]):
    """A model's configuration, by key or by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class PatchNetwork(nn.Module):
    """The encoder and the decoder of `PatchAutoencoderKL`, which documents the arguments and errors.

    By itself, from `load`, it encodes and decodes to the same bits as that class.
    """

    config: Any
    """As of diffusers' models: the arguments, by key or attribute."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        latent_channels: int = 4,
        patch_size: int = 4,
        block_out_channels: tuple[int, ...] = (64, 128),
        encoder_layers_per_block: tuple[int, ...] = (0, 1),
        decoder_layers_per_block: tuple[int, ...] = (1, 2),
        block: str = "residual",
        stem_kernel_size: int | None = None,
        linear_path: bool = False,
        pool: int = 1,
        deterministic: bool = False,
        latent_activation: str = "none",
        noise_level: float | None = None,
        finds_blemishes: bool = False,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        widths = tuple(block_out_channels)
        encoder_layers, decoder_layers = tuple(encoder_layers_per_block), tuple(decoder_layers_per_block)
        if not len(widths) == len(encoder_layers) == len(decoder_layers) > 0:
            raise ValueError(
                f"block_out_channels {widths}, encoder_layers_per_block {encoder_layers} and decoder_layers_per_block "
                f"{decoder_layers} name one entry a resolution: give them the same length"
            )
        if patch_size < 1 or patch_size & (patch_size - 1):
            raise ValueError(f"patch_size {patch_size} is not a power of two: try 2 or 4")
        if block not in BLOCKS:
            raise ValueError(f"block is {block}: try {', '.join(BLOCKS)}")
        if stem_kernel_size is not None and stem_kernel_size % 2 == 0:
            raise ValueError(f"stem_kernel_size is {stem_kernel_size}: it must be odd, such as 3")
        if pool < 1 or latent_activation not in ACTIVATIONS:
            raise ValueError(
                f"pool is {pool}, latent_activation {latent_activation}: at least 1 and one of {', '.join(ACTIVATIONS)}"
            )
        out_channels = out_channels or in_channels
        stem = stem_kernel_size or BLOCKS[block].stem
        self.ends = stem // 2
        """Positions that the convolutions before and after all blocks see each way."""
        stride = self.spatial_compression_ratio = patch_size * 2 ** (len(widths) - 1) * pool
        moments = 2 * latent_channels
        takes_level = noise_level is not None
        ends = (block, stem, pool)
        self.encoder = Encoder(in_channels, moments, patch_size, widths, encoder_layers, *ends, takes_level)
        self.decoder = Decoder(out_channels, latent_channels, patch_size, widths, decoder_layers, *ends)
        if linear_path:
            self.encoder.linear = LinearEncoder(in_channels, latent_channels, stride)
            self.decoder.linear = LinearDecoder(out_channels, latent_channels, stride)
            silence(self.encoder.conv_out)
            silence(self.decoder.conv_out)
        self.tile: int | None = None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The network of a folder that `PatchAutoencoderKL.save_pretrained` wrote, in float32, for inference.

        Raises:
            OSError, ValueError, KeyError, RuntimeError, SafetensorError: files that are missing or damaged.
        """
        saved = json.loads((folder / "config.json").read_text())
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        arguments = {p.name: saved.get(p.name, p.default) for p in parameters}
        with torch.device("meta"):  # no weights to begin with
            network = cls(**arguments)
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        network.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
        network.config = Config(arguments, _class_name=saved["_class_name"])
        return network.requires_grad_(False).eval()

    def enable_tiling(self, tile: int = TILE) -> None:
        """From now on `encode` and `decode` work on tiles of `tile` x `tile` latents: large images in little memory.

        The result is that of the whole, to rounding: each tile is given as much around it as the receptive field
        reaches.
        """
        if tile < 1:
            raise ValueError(f"tile {tile} is too small: it must be at least 1")
        self.tile = tile

    def disable_tiling(self) -> None:
        self.tile = None

    @property
    def encoder_halo(self) -> int:
        """Pixels beyond its own f x f cell that a latent depends on, each way (f: the stride)."""
        cell, halo, block = self.config.patch_size, 0, BLOCKS[self.config.block]
        convolutions = [block.radius * n for n in self.config.encoder_layers_per_block]
        convolutions[0] += self.ends  # conv_in
        convolutions[-1] += self.ends * (self.config.pool == 1)  # conv_out; one that pools sees its own cell
        for count in convolutions:
            halo += count * cell
            cell *= 2
        return halo

    @property
    def decoder_halo(self) -> int:
        """Latents beyond its own that the f x f pixels of a latent depend on, each way."""
        block = BLOCKS[self.config.block]
        convolutions = [block.radius * n for n in self.config.decoder_layers_per_block]
        convolutions[0] += self.ends  # conv_out
        convolutions[-1] += self.ends * (self.config.pool == 1)  # conv_in
        halo = 0
        for count in convolutions:  # finest first: halve the reach at each coarser resolution, rounding up
            halo = -(-halo // 2) + count
        return -(-halo // self.config.pool)

    def moments(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> mean and log-variance of the latents (B, 2c, H/f, W/f).

        Raises:
            ValueError: H or W not a multiple of f, a channel count other than the model's, or a noise level for a model
                that takes none.
        """
        stride = self.spatial_compression_ratio
        height, width = x.shape[-2:]
        if noise_level is not None and self.config.noise_level is None:
            raise ValueError("this model takes no noise level: leave it out")
        if x.shape[1] != self.config.in_channels:
            raise ValueError(f"images have {x.shape[1]} channels, the model takes {self.config.in_channels}")
        if height % stride or width % stride or not height * width:
            nearest = f"{max(height // stride, 1) * stride}x{max(width // stride, 1) * stride}"
            raise ValueError(f"image size {height}x{width} is not a multiple of {stride}: try {nearest}")
        if self.tile is None:
            moments = self.encoder(x, noise_level)
        else:
            encoder, halo = partial(self.encoder, noise_level=noise_level), -(-self.encoder_halo // stride)
            moments = in_tiles(encoder, x, tile=self.tile, halo=halo, unit_in=stride, unit_out=1)
        if self.config.deterministic or self.config.latent_activation != "none":
            mean, logvar = moments.chunk(2, dim=1)
            mean = ACTIVATIONS[self.config.latent_activation](mean)
            logvar = torch.full_like(mean, DETERMINISTIC_LOGVAR) if self.config.deterministic else logvar
            moments = torch.cat([mean, logvar], dim=1)
        return moments

    def images(self, z: Tensor) -> Tensor:
        """Latents (B, c, H/f, W/f) -> images (B, C, H, W), about [-1, 1] and not clamped."""
        if self.tile is None:
            sample: Tensor = self.decoder(z)
            return sample
        stride = self.spatial_compression_ratio
        return in_tiles(self.decoder, z, tile=self.tile, halo=self.decoder_halo, unit_in=1, unit_out=stride)

    def encode(self, x: Tensor, noise_level: Tensor | None = None) -> Any:
        """As `PatchAutoencoderKL.encode`, whose posterior is one of diffusers'."""
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=self.moments(x, noise_level)))

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=self.images(z))
