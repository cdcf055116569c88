"""PatchAutoencoderKL: a convolutional KL-VAE that does all its work on patches and sees only so far."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
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

    No normalisation and ReLU: the fastest of what was compared, and nothing was better (docs/decisions/001).
    """

    radius = 2

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.relu(x))
        return x + self.conv2(functional.relu(h))


class Stage(nn.Module):
    """The blocks of one resolution, recomputed in the backward pass when checkpointing is on."""

    def __init__(self, block: type[nn.Module], channels: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(channels) for _ in range(num_blocks))
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
        block: type[nn.Module],
        in_channels: int,
        moments: int,
        patch: int,
        widths: tuple[int, ...],
        layers: tuple[int, ...],
        pool: int,
        takes_level: bool,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.conv_in = nn.Conv2d(in_channels * patch**2, widths[0], 3, padding=1)
        self.level = nn.Linear(2, widths[0], bias=False) if takes_level else None
        if self.level is not None:
            nn.init.zeros_(self.level.weight)
        self.stages = nn.ModuleList(Stage(block, w, n) for w, n in zip(widths, layers, strict=True))
        self.downs = nn.ModuleList(nn.Conv2d(4 * a, b, 1) for a, b in pairwise(widths))
        if pool == 1:
            self.conv_out = nn.Conv2d(widths[-1], moments, 3, padding=1)
        else:  # all of pool x pool positions, once
            self.conv_out = nn.Conv2d(widths[-1], moments, pool, stride=pool)
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
        block: type[nn.Module],
        out_channels: int,
        latent_channels: int,
        patch: int,
        widths: tuple[int, ...],
        layers: tuple[int, ...],
        pool: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        coarse_to_fine = widths[::-1]
        self.conv_in: nn.Conv2d | nn.ConvTranspose2d
        if pool == 1:
            self.conv_in = nn.Conv2d(latent_channels, coarse_to_fine[0], 3, padding=1)
        else:
            self.conv_in = nn.ConvTranspose2d(latent_channels, coarse_to_fine[0], pool, stride=pool)
        self.stages = nn.ModuleList(Stage(block, w, n) for w, n in zip(coarse_to_fine, layers[::-1], strict=True))
        self.ups = nn.ModuleList(nn.Conv2d(a, 4 * b, 1) for a, b in pairwise(coarse_to_fine))
        self.conv_out = nn.Conv2d(widths[0], out_channels * patch**2, 3, padding=1)
        self.linear: LinearDecoder | None = None

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)  # (B, w, H/f, W/f)
        for i, stage in enumerate(self.stages):
            if i > 0:
                h = functional.pixel_shuffle(self.ups[i - 1](h), 2)  # twice as high and wide
            h = stage(h)
        sample = functional.pixel_shuffle(self.conv_out(functional.relu(h)), self.patch)  # (B, C, H, W)
        return sample if self.linear is None else sample + self.linear(z)


class PatchAutoencoderKL(ModelMixin, ConfigMixin):
    r"""A KL-VAE (Kingma & Welling 2014; Rombach et al. 2022, section 3.1) with a finite receptive field.

    Pixel-unshuffle takes the images to H/patch x W/patch at once, residual blocks without attention or spatial
    normalisation do the rest. The interface is diffusers' `AutoencoderKL`'s: `encode(x).latent_dist`,
    `decode(z).sample`, `save_pretrained`, `from_pretrained`.

    Args:
        in_channels: channels of the images.
        out_channels: channels of the reconstruction; those of the images unless given.
        latent_channels: channels c of the latents.
        patch_size: side of the patches that the stem folds into channels, a power of two.
        block_out_channels: width of each resolution, finest first. The stride is
            `f = patch_size * 2 ** (len(block_out_channels) - 1)`.
        encoder_layers_per_block, decoder_layers_per_block: residual blocks at each resolution, finest first.
        linear_path: beside the network, a linear transform of patches of the stride's side and its inverse, which begin
            as the cosine transform; the network begins at nothing, and learns the rest (docs/decisions/011).
        pool: one latent for so many positions of the coarsest resolution, each way, and the stride as much larger. With
            crops of that stride's side, an image is one vector of `latent_channels` numbers.
        deterministic: a plain autoencoder: the posterior is its mean.
        latent_activation: of the mean: "none", or for sparse latents "relu" or "sigmoid".
        noise_level: the encoder takes the standard deviation of the noise in an image where it is known, up to this, in
            0..255. It begins with no effect.
        finds_blemishes: what it gives is no image but, of one channel, the log-odds that a blemish is there.
        latents_mean, latents_std: per latent channel, measured over a data set; (z - mean) / std are scaled latents.
        scaling_factor, shift_factor: the scalar convention of older diffusers VAEs, for code that asks for it.

    Raises:
        ValueError: lengths that differ, a patch size that is not a power of two, or an activation that is not known.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("Stage",)  # what compile_repeated_blocks() compiles
    block: type[ResidualBlock] = ResidualBlock

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        latent_channels: int = 4,
        patch_size: int = 4,
        block_out_channels: tuple[int, ...] = (64, 128),
        encoder_layers_per_block: tuple[int, ...] = (0, 1),
        decoder_layers_per_block: tuple[int, ...] = (1, 2),
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
        if pool < 1 or latent_activation not in ACTIVATIONS:
            raise ValueError(
                f"pool is {pool}, latent_activation {latent_activation}: at least 1 and one of {', '.join(ACTIVATIONS)}"
            )
        out_channels = out_channels or in_channels
        stride = self.spatial_compression_ratio = patch_size * 2 ** (len(widths) - 1) * pool
        moments = 2 * latent_channels
        told = noise_level is not None
        self.encoder = Encoder(self.block, in_channels, moments, patch_size, widths, encoder_layers, pool, told)
        self.decoder = Decoder(self.block, out_channels, latent_channels, patch_size, widths, decoder_layers, pool)
        if linear_path:
            self.encoder.linear = LinearEncoder(in_channels, latent_channels, stride)
            self.decoder.linear = LinearDecoder(out_channels, latent_channels, stride)
            silence(self.encoder.conv_out)
            silence(self.decoder.conv_out)
        self.tile: int | None = None

    def enable_tiling(self, tile: int = TILE) -> None:
        """From now on `encode` and `decode` work on tiles of `tile` x `tile` latents: large images in little memory.

        What they give is what the whole gives, to rounding: each tile goes with as much around it as the receptive
        field reaches.
        """
        if tile < 1:
            raise ValueError(f"tile {tile} is too small: it must be at least 1")
        self.tile = tile

    def disable_tiling(self) -> None:
        self.tile = None

    @property
    def encoder_halo(self) -> int:
        """Pixels beyond its own f x f cell that a latent depends on, each way (f: the stride)."""
        cell, halo = self.config.patch_size, 0
        convolutions = [self.block.radius * n for n in self.config.encoder_layers_per_block]
        convolutions[0] += 1  # conv_in
        convolutions[-1] += self.config.pool == 1  # conv_out; one that pools sees its own cell alone
        for count in convolutions:
            halo += count * cell
            cell *= 2
        return halo

    @property
    def decoder_halo(self) -> int:
        """Latents beyond its own that the f x f pixels of a latent depend on, each way."""
        convolutions = [self.block.radius * n for n in self.config.decoder_layers_per_block]
        convolutions[0] += 1  # conv_out
        convolutions[-1] += self.config.pool == 1  # conv_in
        halo = 0
        for count in convolutions:  # finest first: halve the reach at each coarser resolution, rounding up
            halo = -(-halo // 2) + count
        return -(-halo // self.config.pool)

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True, noise_level: Tensor | None = None
    ) -> AutoencoderKLOutput | tuple[Any]:
        """Images (B, C, H, W) in [-1, 1] -> `latent_dist` over latents (B, c, H/f, W/f).

        `noise_level` (B,): standard deviation of the noise in each image, in 0..255, negative where it is not known;
        for models made with `noise_level`.

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
            units = {"halo": -(-self.encoder_halo // stride), "unit_in": stride, "unit_out": 1}
            moments = in_tiles(lambda t: self.encoder(t, noise_level), x, tile=self.tile, **units)
        if self.config.deterministic or self.config.latent_activation != "none":
            mean, logvar = moments.chunk(2, dim=1)
            mean = ACTIVATIONS[self.config.latent_activation](mean)
            logvar = torch.full_like(mean, DETERMINISTIC_LOGVAR) if self.config.deterministic else logvar
            moments = torch.cat([mean, logvar], dim=1)
        posterior = DiagonalGaussianDistribution(moments, deterministic=self.config.deterministic)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, c, H/f, W/f) -> `sample`, images (B, C, H, W), about [-1, 1] and not clamped.

        `generator` is unused: diffusers' pipelines pass one.
        """
        if self.tile is None:
            sample = self.decoder(z)
        else:
            units = {"halo": self.decoder_halo, "unit_in": 1, "unit_out": self.spatial_compression_ratio}
            sample = in_tiles(self.decoder, z, tile=self.tile, **units)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Images in, reconstruction out, through the posterior's mean or, if asked for, a sample of it."""
        posterior = self.encode(sample, return_dict=False)[0]
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "demo": {
        "latent_channels": 8,
        "patch_size": 4,
        "block_out_channels": (96,),
        "encoder_layers_per_block": (2,),
        "decoder_layers_per_block": (3,),
    },
    "f8c4": {"latent_channels": 4},
    "f8c8": {"latent_channels": 8},
    "f16c16": {
        "latent_channels": 16,
        "block_out_channels": (64, 128, 256),
        "encoder_layers_per_block": (0, 1, 1),
        "decoder_layers_per_block": (1, 1, 2),
    },
    "f4c3": {"latent_channels": 3, "patch_size": 2},
    "f8c8-codec": {"latent_channels": 8, "block_out_channels": (96, 192), "linear_path": True},
    "f8c32-codec": {"latent_channels": 32, "block_out_channels": (96, 192), "linear_path": True},
    "f8c64-codec": {"latent_channels": 64, "block_out_channels": (128, 256), "linear_path": True},
    "f16c64-codec": {
        "latent_channels": 64,
        "linear_path": True,
        "block_out_channels": (64, 128, 256),
        "encoder_layers_per_block": (0, 1, 1),
        "decoder_layers_per_block": (1, 1, 2),
    },
    "plain": {"latent_channels": 8},
    "sparse": {"latent_channels": 32},
    "denoise": {
        "latent_channels": 48,
        "patch_size": 2,
        "block_out_channels": (64, 128),
        "encoder_layers_per_block": (1, 3),
        "decoder_layers_per_block": (1, 3),
        "linear_path": True,
    },
    "restore": {
        "latent_channels": 32,
        "patch_size": 2,
        "block_out_channels": (32, 64, 128),
        "encoder_layers_per_block": (1, 1, 2),
        "decoder_layers_per_block": (1, 1, 2),
    },
    "find": {
        "latent_channels": 64,
        "patch_size": 2,
        "block_out_channels": (32, 64, 128),
        "encoder_layers_per_block": (1, 1, 2),
        "decoder_layers_per_block": (1, 1, 2),
    },
    "f8c4-large": {
        "latent_channels": 4,
        "patch_size": 2,
        "block_out_channels": (128, 256, 768),
        "encoder_layers_per_block": (2, 2, 2),
        "decoder_layers_per_block": (2, 3, 5),
    },
}
"""Keywords of PatchAutoencoderKL for each preset; docs/training.md says what they are for."""
