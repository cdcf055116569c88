from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_vae.errors import ModelError
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.interface import encode_moments, fingerprint
from ldm_vae.models.loading import load_for_inference
from ldm_vae.models.patch_network import PatchNetwork


@pytest.mark.parametrize(
    "keywords",
    [
        {"block_out_channels": (8, 16)},
        {"block_out_channels": (8, 8), "linear_path": True, "latents_std": (2.0,) * 4, "latents_mean": (1.0,) * 4},
        {"block_out_channels": (8, 8), "latent_activation": "relu", "deterministic": True, "patch_size": 2},
        {"block_out_channels": (8, 8), "pool": 2, "noise_level": 50.0, "in_channels": 1},
    ],
)
def test_a_saved_model_loads_without_diffusers_to_the_same_bits(keywords: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(**keywords).eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae.save_pretrained(tmp_path / "vae")
    network = load_for_inference(str(tmp_path))
    assert type(network) is PatchNetwork
    assert fingerprint(network) == fingerprint(vae) == fingerprint(PatchAutoencoderKL.from_pretrained(tmp_path / "vae"))
    assert (network.encoder_halo, network.decoder_halo) == (vae.encoder_halo, vae.decoder_halo)
    images = torch.rand(2, vae.config.in_channels, 64, 96) * 2 - 1
    with torch.inference_mode():
        moments = encode_moments(vae, images)
        assert torch.equal(encode_moments(network, images), moments)
        latents = moments.chunk(2, dim=1)[0]
        assert torch.equal(network.decode(latents).sample, vae.decode(latents).sample)


def test_a_model_saved_before_an_argument_existed_gets_its_default(tmp_path: Path) -> None:
    PatchAutoencoderKL(block_out_channels=(8, 8)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pool"], config["linear_path"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fingerprint(load_for_inference(str(tmp_path))) == fingerprint(PatchAutoencoderKL.from_pretrained(tmp_path))


def test_damaged_weights_are_one_clear_error(tmp_path: Path) -> None:
    PatchAutoencoderKL(block_out_channels=(8, 8)).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ModelError, match="cannot load PatchAutoencoderKL"):
        load_for_inference(str(tmp_path))
