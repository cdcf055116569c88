"""Mean and deviation of latents, against NumPy's, and the two conventions of diffusers."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import torch
from torch.nn import functional

from ldm_vae.latents.scaling import has_scale, put_statistics, scale_latents, scale_of, unscale_latents
from ldm_vae.latents.statistics import Statistics
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.interface import fingerprint
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.runs.images import forget_scale


def small_vae() -> PatchAutoencoderKL:
    torch.manual_seed(0)
    return PatchAutoencoderKL(block_out_channels=(8, 8)).eval()


def test_statistics_are_those_of_samples_however_they_are_split() -> None:
    torch.manual_seed(0)
    mean = torch.randn(60, 3, 4, 4) * torch.tensor([1.0, 0.1, 7.0])[:, None, None] + 1000  # a mean that cancels badly
    logvar = torch.randn(60, 3, 4, 4)
    moments = torch.cat([mean, logvar], dim=1)
    whole = Statistics.of(moments.numpy())
    parts = Statistics()
    for start, stop in ((0, 1), (1, 20), (20, 60)):
        parts += Statistics.of(moments[start:stop].numpy())
    for found in (whole, parts, Statistics.from_json(parts.as_json())):
        assert found.count == 60 * 16
        variance = mean.double().numpy().var(axis=(0, 2, 3)) + logvar.double().exp().numpy().mean(axis=(0, 2, 3))
        assert np.allclose(found.mean, mean.double().numpy().mean(axis=(0, 2, 3)), rtol=1e-12)
        assert np.allclose(found.std, np.sqrt(variance), rtol=1e-9)
    draws = torch.cat([mean + (logvar / 2).exp() * torch.randn_like(mean) for _ in range(50)])
    assert np.allclose(draws.std(dim=(0, 2, 3)).numpy(), whole.std, rtol=0.02)


def test_scaled_latents_have_mean_0_and_deviation_1_and_scaling_is_undone() -> None:
    vae = small_vae()
    latents = torch.randn(500, 4, 4, 4) * torch.tensor([0.1, 1.0, 5.0, 30.0])[:, None, None] - 3
    put_statistics(vae, Statistics.of(torch.cat([latents, torch.full_like(latents, -30)], dim=1).numpy()))
    scaled = scale_latents(vae, latents)
    assert scaled.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (scaled.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.allclose(unscale_latents(vae, scaled), latents, atol=1e-4)


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    moments = torch.cat([torch.full((2, 1, 2, 2), 5.0), torch.full((2, 1, 2, 2), -100.0)], dim=1)
    assert Statistics.of(moments.numpy()).std[0] > 0


def test_the_scalars_of_older_vaes_are_honoured_and_then_replaced(tmp_path) -> None:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.25, shift_factor=0.5, latent_channels=2
    )
    latents = torch.randn(3, 2, 4, 4)
    assert has_scale(vae)
    assert torch.allclose(scale_latents(vae, latents), (latents - 0.5) * 0.25)
    assert torch.allclose(unscale_latents(vae, scale_latents(vae, latents)), latents, atol=1e-6)
    before = fingerprint(vae)
    put_statistics(vae, Statistics(count=1, mean=np.array([1.0, 2.0]), squares=np.array([4.0, 9.0])))
    vae.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert loaded.config.latents_std == [2.0, 3.0]
    assert loaded.config.scaling_factor == 1.0
    assert torch.allclose(scale_latents(loaded, latents)[:, 1], (latents[:, 1] - 2) / 3, atol=1e-6)
    assert fingerprint(loaded) == before


def flux2_vae() -> diffusers.AutoencoderKLFlux2:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        mid_block_add_attention=False,
    )


def test_a_scale_over_patches_that_a_vae_has_in_buffers_is_used_and_kept(tmp_path: Path) -> None:
    vae = flux2_vae()
    assert not has_scale(vae)
    vae.bn.running_mean.copy_(torch.randn(12))
    vae.bn.running_var.copy_(torch.rand(12) + 0.1)
    assert has_scale(vae)
    latents = torch.randn(2, 3, 6, 8)
    patches = functional.pixel_unshuffle(latents, 2)  # as diffusers' Flux2Pipeline makes channels of a patch
    expected = functional.pixel_shuffle(vae.bn.eval()(patches), 2)
    assert torch.allclose(scale_latents(vae, latents), expected, atol=1e-6)
    assert torch.allclose(unscale_latents(vae, expected), latents, atol=1e-6)
    odd = latents[:, :, :5, :7]
    assert torch.allclose(scale_latents(vae, odd), expected[:, :, :5, :7], atol=1e-6)
    before = scale_of(vae)
    put_statistics(vae, Statistics(count=1, mean=np.zeros(3), squares=np.ones(3)))  # as a cache does
    vae.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert scale_of(loaded) == before
    assert loaded.config.get("latents_mean") is None
    forget_scale(loaded)  # its encoder is about to change
    assert not has_scale(loaded)
    put_statistics(loaded, Statistics(count=1, mean=np.zeros(3), squares=np.ones(3)))
    assert torch.equal(scale_latents(loaded, latents), latents)


def test_a_fingerprint_is_of_the_weights_and_the_architecture() -> None:
    vae, other = small_vae(), small_vae()
    assert not has_scale(vae)
    assert fingerprint(vae) == fingerprint(other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(vae) != fingerprint(other)
    assert fingerprint(vae) != fingerprint(PatchAutoencoderKL(block_out_channels=(8, 16)))
