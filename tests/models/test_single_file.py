"""AutoencoderKL in one file, under CompVis' names and diffusers', without a network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from ldm_vae.errors import ModelError
from ldm_vae.models.loading import load_autoencoder, load_for_inference

NAMES = (
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_(.)", r"mid.attn_1.\1"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{1 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)
"""diffusers' names and CompVis', of two resolutions."""


def original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under CompVis' names, where attention has convolutions of 1 x 1."""
    renamed = {}
    for name, value in weights.items():
        is_matrix = "attentions" in name and value.ndim == 2
        for pattern, other in NAMES:
            name = re.sub(pattern, other, name)
        renamed[name] = value[:, :, None, None].contiguous() if is_matrix else value
    return renamed


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=6,
    ).eval()


@pytest.mark.parametrize("kind", ["original", "of a whole Stable Diffusion", "diffusers", "float16"])
def test_a_file_of_other_tools_gives_the_same_images(kind: str, vae: AutoencoderKL, tmp_path: Path) -> None:
    weights = {name: value.contiguous() for name, value in vae.state_dict().items()}
    if kind != "diffusers":
        weights = original(weights)
    if kind == "of a whole Stable Diffusion":
        weights = {f"first_stage_model.{name}": value for name, value in weights.items()}
        weights["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(4, 4, 3, 3)
    if kind == "float16":
        weights = {name: value.half() for name, value in weights.items()}
    save_file(weights, tmp_path / "vae.safetensors")
    loaded = load_autoencoder(str(tmp_path / "vae.safetensors"))
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.inference_mode():
        expected, found = (model.decode(model.encode(images).latent_dist.mean).sample for model in (vae, loaded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if kind != "float16" else 1e-2)
    assert found.dtype == torch.float32
    assert loaded.config.scaling_factor == 1.0
    assert not loaded.training


def test_a_file_that_holds_something_else_is_said_in_one_line(vae: AutoencoderKL, tmp_path: Path) -> None:
    weights = original({name: value.contiguous() for name, value in vae.state_dict().items()})
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({k: v for k, v in weights.items() if "mid.block_2" not in k}, tmp_path / "part.safetensors")
    save_file(weights | {"encoder.down.1.attn.0.q.weight": torch.zeros(1)}, tmp_path / "attention.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    for name, said in (
        ("other", "other.safetensors cannot be loaded: its weights are not named as an AutoencoderKL's"),
        ("part", "cannot load an AutoencoderKL"),
        ("attention", "attention elsewhere"),
        ("damaged", "cannot load an AutoencoderKL"),
        ("missing", "no such model"),
    ):
        for load in (load_autoencoder, load_for_inference):
            with pytest.raises(ModelError, match=said):
                load(str(tmp_path / f"{name}.safetensors"))
