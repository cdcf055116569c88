"""The denoiser takes latents of any size, and its presets are the sizes that they say."""

from __future__ import annotations

import pytest
import torch

from ldm_vae.models.unet import DENOISERS, denoiser_output, make_denoiser, multiple_of, num_classes_of


def test_presets_have_the_parameters_that_the_help_names() -> None:
    with torch.device("meta"):
        sizes = {"latent_channels": 4, "sample_size": (8, 8), "num_classes": 10}
        denoisers = {name: make_denoiser(name, **sizes) for name in DENOISERS}
    millions = {name: sum(p.numel() for p in d.parameters()) / 1e6 for name, d in denoisers.items()}
    assert millions == pytest.approx({"demo": 2.8, "tiny": 11.2, "small": 42.9, "base": 171.3}, abs=0.1)


def test_any_size_is_padded_to_the_next_multiple_and_cut_again() -> None:
    torch.manual_seed(0)
    unet = make_denoiser("small", latent_channels=3, sample_size=(8, 8), num_classes=0).eval()
    assert multiple_of(unet) == 4
    assert num_classes_of(unet) == 0
    noisy, timesteps = torch.randn(2, 3, 5, 7), torch.tensor([3.5, 900.0])
    with torch.no_grad():
        output = denoiser_output(unet, noisy, timesteps, None, multiple=4)
        padded = torch.nn.functional.pad(noisy, (0, 1, 0, 3), mode="replicate")
        assert torch.equal(output, unet(padded, timesteps).sample[..., :5, :7])
        assert output.shape == noisy.shape


def test_the_last_class_is_no_class() -> None:
    torch.manual_seed(0)
    unet = make_denoiser("demo", latent_channels=2, sample_size=(4, 4), num_classes=3).eval()
    assert num_classes_of(unet) == 3
    noisy = torch.randn(1, 2, 4, 4).expand(4, -1, -1, -1)
    with torch.no_grad():
        outputs = denoiser_output(unet, noisy, torch.full((4,), 500.0), torch.arange(4), multiple=2)
    for a in range(4):
        for b in range(a):
            assert (outputs[a] - outputs[b]).abs().max() > 1e-3
