"""Any diffusers autoencoder, as a codec's network takes it."""

from __future__ import annotations

from typing import Any

import torch

from ldm_vae.codec.tables import Floats
from ldm_vae.models.interface import channels_of, encode_moments, fingerprint, latent_channels_of, stride_of
from ldm_vae.models.tiles import TILE


class TorchAutoencoder:
    """Encodes and decodes one image at a time.

    Args:
        vae: any diffusers autoencoder.
        dtype: in which it computes (autocast).

    Attributes:
        stride: pixels a latent, each way.
        channels, latent_channels: of images and latents.
        finite: whether its receptive field is, so that tiles give what the whole gives. Any other autoencoder takes
            the whole image at once.
        encoder_halo, decoder_halo: latents around a tile on which it depends, each way.
        tile: side of the tiles that it takes at a time, in latents.
    """

    tile = TILE

    def __init__(self, vae: Any, dtype: torch.dtype = torch.float32) -> None:
        self.vae, self.dtype = vae.eval(), dtype
        self.stride, self.channels, self.latent_channels = stride_of(vae), channels_of(vae), latent_channels_of(vae)
        self.finite = hasattr(vae, "decoder_halo")
        self.encoder_halo = -(-vae.encoder_halo // self.stride) if self.finite else 0
        self.decoder_halo = vae.decoder_halo if self.finite else 0
        self.fingerprint = fingerprint(vae)

    @torch.inference_mode()
    def encode(self, values: Floats) -> Floats:
        """An image (C, H, W) in [-1, 1] -> the posterior's mean (c, h, w), float32."""
        images = torch.from_numpy(values)[None].to(next(self.vae.parameters()))  # type and device
        with self.autocast():
            mean: Floats = encode_moments(self.vae, images).chunk(2, dim=1)[0][0].float().cpu().numpy()
        return mean

    @torch.inference_mode()
    def decode(self, latents: Floats) -> Floats:
        """Latents (c, h, w) -> an image (C, H, W), about [-1, 1] and not clamped, float32."""
        values = torch.from_numpy(latents)[None].to(next(self.vae.parameters()))
        with self.autocast():
            image: Floats = self.vae.decode(values).sample[0].float().cpu().numpy()
        return image

    def autocast(self) -> torch.autocast:
        device = next(self.vae.parameters()).device
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
