"""PatchAutoencoderKL: a convolutional KL-VAE that does all its work on patches and has a finite receptive field."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ldm_vae.models.patch_network import PatchNetwork


class PatchAutoencoderKL(PatchNetwork, ModelMixin, ConfigMixin):
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
        block: "residual", or "separable": cheaper, for patches as large as the stride.
        stem_kernel_size: side of the convolutions before and after all blocks, odd; the block's own unless given: 3 for
            "residual", 1 for "separable", which leaves the pixels of a patch to one position.
        linear_path: adds a linear transform of patches of the stride's side, and its inverse, which start as the cosine
            transform; the network's own output starts at 0 and learns the rest (docs/decisions/011).
        pool: one latent for pool x pool positions of the coarsest resolution; the stride grows by the same factor. An
            image of that side becomes one vector of `latent_channels` numbers.
        deterministic: a plain autoencoder: the posterior is its mean.
        latent_activation: of the mean: "none", or for sparse latents "relu" or "sigmoid".
        noise_level: the encoder takes the standard deviation of an image's noise where it is known, in 0..255 and up to
            this one. At the start of training it has no effect.
        finds_blemishes: a detector: its one output channel is no image, but the log-odds of a blemish at each place.
        latents_mean, latents_std: per latent channel, measured over a data set; (z - mean) / std are scaled latents.
        scaling_factor, shift_factor: the scalar convention of older diffusers VAEs, for code that asks for it.

    Raises:
        ValueError: lengths that differ, a patch size that is not a power of two, an even kernel, or an unknown
            activation.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("Stage",)  # what compile_repeated_blocks() compiles
    __init__ = register_to_config(PatchNetwork.__init__)

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True, noise_level: Tensor | None = None
    ) -> AutoencoderKLOutput | tuple[Any]:
        """Images (B, C, H, W) in [-1, 1] -> `latent_dist` over latents (B, c, H/f, W/f).

        `noise_level` (B,): standard deviation of the noise in each image, in 0..255, negative where it is not known;
        for models made with `noise_level`. Raises as `PatchNetwork.moments`.
        """
        moments = self.moments(x, noise_level)
        posterior = DiagonalGaussianDistribution(moments, deterministic=self.config.deterministic)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, c, H/f, W/f) -> `sample`, images (B, C, H, W), about [-1, 1] and not clamped.

        `generator` is unused: diffusers' pipelines pass one.
        """
        sample = self.images(z)
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


SEPARABLE: dict[str, Any] = {
    "patch_size": 2,
    "block_out_channels": (32, 96, 192),
    "encoder_layers_per_block": (0, 1, 3),
    "decoder_layers_per_block": (1, 3, 5),
    "block": "separable",
    "stem_kernel_size": 3,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # of train_vae.py
    "demo": {
        "latent_channels": 8,
        "block_out_channels": (96,),
        "encoder_layers_per_block": (2,),
        "decoder_layers_per_block": (3,),
    },
    "f8c4": {"latent_channels": 4, **SEPARABLE},
    "f8c8": {"latent_channels": 8, **SEPARABLE},
    "f16c16": {
        "latent_channels": 16,
        **SEPARABLE,
        "block_out_channels": (32, 96, 192, 256),
        "encoder_layers_per_block": (0, 0, 1, 3),
        "decoder_layers_per_block": (1, 2, 3, 5),
    },
    "f4c3": {"latent_channels": 3, "patch_size": 2},
    "f8c4-large": {
        "latent_channels": 4,
        "patch_size": 2,
        "block_out_channels": (128, 256, 768),
        "encoder_layers_per_block": (2, 2, 2),
        "decoder_layers_per_block": (2, 3, 5),
    },
    # of train_codec.py
    "f8c32": {"latent_channels": 32, "block_out_channels": (96, 192), "linear_path": True},
    "f8c64": {
        "latent_channels": 64,
        "patch_size": 8,
        "block_out_channels": (192,),
        "encoder_layers_per_block": (3,),
        "decoder_layers_per_block": (3,),
        "block": "separable",
        "linear_path": True,
    },
    "f16c64": {
        "latent_channels": 64,
        "linear_path": True,
        "block_out_channels": (64, 128, 256),
        "encoder_layers_per_block": (0, 1, 1),
        "decoder_layers_per_block": (1, 1, 2),
    },
    # of train_autoencoder.py
    "plain": {"latent_channels": 8},
    "sparse": {"latent_channels": 32},
    "denoise": {
        "latent_channels": 48,
        "patch_size": 2,
        "encoder_layers_per_block": (1, 3),
        "decoder_layers_per_block": (1, 3),
        "linear_path": True,
    },
    "find": {
        "latent_channels": 64,
        "patch_size": 2,
        "block_out_channels": (32, 64, 128),
        "encoder_layers_per_block": (1, 1, 2),
        "decoder_layers_per_block": (1, 1, 2),
    },
}
"""Arguments of PatchAutoencoderKL for each trainer's presets; docs/training.md says what they are for."""
