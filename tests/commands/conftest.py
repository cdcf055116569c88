from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_vae.models.autoencoder import PatchAutoencoderKL
from tests.command_line import run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A run directory with a VAE, and with tables that the command made."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(
        latent_channels=4, block_out_channels=(16,), encoder_layers_per_block=(1,), decoder_layers_per_block=(1,)
    )
    with torch.no_grad():
        vae.encoder.conv_out.bias[4:] = -5.0
    vae.save_pretrained(folder / "vae")
    run("fit-codec", "--vae", folder, "--data", photos, "--num-images", 5, "--steps", 0.375, 0.5, 1)
    return folder


@pytest.fixture
def image(photos: Path) -> Path:
    return sorted(photos.rglob("*.png"))[0]
