from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from ldm_vae.errors import ModelError
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.interface import encode_moments
from ldm_vae.models.reconstruction import encode_mean, reconstruct, turn_on_tiling

SHAPES: list[dict[str, Any]] = [
    {"patch_size": 4, "block_out_channels": (8,), "encoder_layers_per_block": (2,), "decoder_layers_per_block": (3,)},
    {"patch_size": 2, "block_out_channels": (8, 8)},
    {
        "patch_size": 1,
        "block_out_channels": (4, 8, 8),
        "encoder_layers_per_block": (1, 0, 1),
        "decoder_layers_per_block": (1, 1, 2),
    },
]


def vae_of(shape: dict[str, Any]) -> PatchAutoencoderKL:
    torch.manual_seed(0)
    return PatchAutoencoderKL(**shape).eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", [1, 7, 16, 100])
@torch.no_grad()
def test_tiles_are_the_whole_to_rounding(shape: dict[str, Any], tile: int) -> None:
    vae = vae_of(shape)
    latents = torch.randn(2, 4, 23, 9 if tile == 1 else 37)
    images = torch.rand(1, 3, 23 * 4, latents.shape[-1] * 4) * 2 - 1
    decoded, moments = vae.decode(latents).sample, encode_moments(vae, images)
    vae.enable_tiling(tile)
    torch.testing.assert_close(vae.decode(latents).sample, decoded, rtol=0, atol=1e-5)
    torch.testing.assert_close(encode_moments(vae, images), moments, rtol=0, atol=1e-5)
    vae.disable_tiling()
    assert torch.equal(vae.decode(latents).sample, decoded)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_halo_smaller_by_one_would_not_do(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vae = vae_of(shape)
    latents = torch.randn(1, 4, 20, 30)
    whole, halo = vae.decode(latents).sample, vae.decoder_halo
    monkeypatch.setattr(PatchAutoencoderKL, "decoder_halo", halo - 1)
    vae.enable_tiling(8)
    assert (vae.decode(latents).sample - whole).abs().max() > 1e-5


@torch.no_grad()
def test_a_tile_is_all_that_is_worked_on() -> None:
    vae = vae_of(SHAPES[0])
    seen: list[tuple[int, ...]] = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    vae.enable_tiling(16)
    vae.decode(torch.randn(1, 4, 64, 64))
    assert len(seen) == 16
    assert max(map(max, seen)) == 16 + 2 * vae.decoder_halo


@torch.no_grad()
def test_images_of_any_size_come_back_as_reconstruct_makes_them() -> None:
    vae = vae_of(SHAPES[1])
    images = torch.rand(1, 3, 61, 90) * 2 - 1
    whole = reconstruct(vae, images)
    assert whole.shape == images.shape
    vae.enable_tiling(6)
    latents = encode_mean(vae, images)
    assert latents.shape == (1, 4, 16, 23)
    torch.testing.assert_close(vae.decode(latents).sample[..., :61, :90], whole, rtol=0, atol=1e-5)


def test_others_blend_tiles_and_say_so_or_have_none() -> None:
    assert turn_on_tiling(vae_of(SHAPES[0]))
    stock = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.warns(UserWarning, match="blended, and come near"):
        assert not turn_on_tiling(stock)
    assert stock.use_tiling
    with pytest.raises(ModelError, match="Linear cannot be run in tiles"):
        turn_on_tiling(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="tile 0 is too small"):
        vae_of(SHAPES[0]).enable_tiling(0)
