from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.fft import dctn, idctn

from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.linear_path import GAIN, cosine_basis
from ldm_vae.models.loading import load_autoencoder


def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def spectra() -> np.ndarray:
    """The cosine transform of each patch, by scipy: (B, h, w, 3, 8, 8)."""
    patches = images().numpy().reshape(2, 3, 4, 8, 6, 8).transpose(0, 2, 4, 1, 3, 5)
    return dctn(patches, axes=(3, 4, 5), norm="ortho")


def test_it_begins_as_the_cosine_transform_of_patches() -> None:
    vae = PatchAutoencoderKL(latent_channels=192, linear_path=True)
    mean = vae.encode(images()).latent_dist.mean
    own = np.sort(mean.detach().numpy().transpose(0, 2, 3, 1) / GAIN, axis=-1)
    assert np.allclose(own, np.sort(spectra().reshape(2, 4, 6, 192), axis=-1), atol=1e-4)
    assert torch.allclose(vae.decode(mean).sample, images(), atol=1e-5)
    assert torch.allclose(cosine_basis(3, 8, 192) @ cosine_basis(3, 8, 192).T, torch.eye(192), atol=1e-5)


def test_fewer_channels_keep_the_lowest_frequencies() -> None:
    vae = PatchAutoencoderKL(latent_channels=32, linear_path=True)
    kept = np.zeros((3, 8, 8), bool)
    for row in cosine_basis(3, 8, 32).numpy():
        wave = dctn(row.reshape(3, 8, 8), norm="ortho")
        kept |= np.isclose(wave, 1, atol=1e-4)
    assert kept.sum() == 32
    y, x = np.mgrid[:8, :8]
    cost = (1 + y**2 + x**2) * np.array([1, 12, 12])[:, None, None]
    assert cost[kept].max() <= cost[~kept].min()
    expected = idctn(spectra() * kept, axes=(3, 4, 5), norm="ortho").transpose(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 48)
    assert np.allclose(vae(images()).sample.detach().numpy(), expected, atol=1e-5)


def test_autocast_leaves_it_exact() -> None:
    vae = PatchAutoencoderKL(latent_channels=192, linear_path=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(vae(images()).sample, images(), atol=1e-5)


def test_the_network_learns_beside_it() -> None:
    """The last layers begin at 0 and get gradients; the layers before them do once those have moved."""
    vae = PatchAutoencoderKL(latent_channels=8, linear_path=True)
    optimizer = torch.optim.SGD(vae.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (vae(images()).sample - images()).square().mean().backward()
        optimizer.step()
    still = [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [n for n in still if "conv_out" not in n and "linear" not in n] == []


def test_it_is_saved(tmp_path: Path) -> None:
    vae = PatchAutoencoderKL(latent_channels=12, linear_path=True)
    torch.nn.init.normal_(vae.decoder.linear.conv.weight)
    vae.save_pretrained(tmp_path)
    assert torch.equal(load_autoencoder(str(tmp_path))(images()).sample, vae.eval()(images()).sample)


def test_latents_beyond_the_numbers_of_a_patch_begin_at_nothing() -> None:
    vae = PatchAutoencoderKL(in_channels=1, latent_channels=65, linear_path=True)
    grey = images()[:, :1]
    latents = vae.encode(grey).latent_dist.mean
    assert latents[:, 64].abs().max() < 1e-6
    assert torch.allclose(vae.decode(latents).sample, grey, atol=1e-5)
