from __future__ import annotations

import torch

from ldm_vae.models.autoencoder import PatchAutoencoderKL


def make_vae(channels: int = 3, seed: int = 0) -> PatchAutoencoderKL:
    """Untrained, with a posterior that is sharp beside its means, so that there is something to code."""
    torch.manual_seed(seed)
    vae = PatchAutoencoderKL(
        in_channels=channels,
        latent_channels=4,
        patch_size=4,
        block_out_channels=(16,),
        encoder_layers_per_block=(1,),
        decoder_layers_per_block=(1,),
    )
    with torch.no_grad():
        vae.encoder.conv_out.bias[4:] = -5.0
    return vae.eval()
