"""The denoiser takes latents of any size, and its presets are the sizes that they say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm_vae.models.unet import (
    DENOISERS,
    denoiser_output,
    make_denoiser,
    num_classes_of,
    patch_size_of,
    with_classes,
)


def test_presets_have_the_parameters_that_the_help_names() -> None:
    with torch.device("meta"):
        sizes = {"latent_channels": 4, "sample_size": (8, 8), "num_classes": 10}
        denoisers = {name: make_denoiser(name, **sizes) for name in DENOISERS}
    millions = {name: sum(p.numel() for p in d.parameters()) / 1e6 for name, d in denoisers.items()}
    assert millions == pytest.approx(
        {"demo": 2.8, "tiny": 11.2, "tiny-256": 3.0, "small": 42.9, "base": 171.3}, abs=0.1
    )


def test_any_size_is_padded_to_the_next_multiple_and_cut_again() -> None:
    torch.manual_seed(0)
    unet = make_denoiser("small", latent_channels=3, sample_size=(8, 8), num_classes=0).eval()
    assert num_classes_of(unet) == 0
    noisy, timesteps = torch.randn(2, 3, 5, 7), torch.tensor([3.5, 900.0])
    with torch.no_grad():
        output = denoiser_output(unet, noisy, timesteps, None, unet)
        padded = torch.nn.functional.pad(noisy, (0, 1, 0, 3), mode="replicate")
        assert torch.equal(output, unet(padded, timesteps).sample[..., :5, :7])
        assert output.shape == noisy.shape


def test_patches_of_latents_become_channels_and_come_back_to_their_places() -> None:
    """The pixels of a patch are a channel's neighbours: in a network that returns its input, each comes home."""
    unet = make_denoiser("tiny-256", latent_channels=4, sample_size=(8, 8), num_classes=0)
    assert unet.config.in_channels == 16
    assert patch_size_of(unet, 4) == 2
    noisy = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))

    def same(patches: torch.Tensor, timesteps: torch.Tensor, class_labels: None) -> SimpleNamespace:
        assert patches.shape == (2, 16, 4, 6)  # 8x12 latents after padding to halves of patches
        assert torch.equal(patches[1, 4:8, 2, 3], noisy[1, 1, 4:6, 6:8].flatten())
        return SimpleNamespace(sample=patches)

    assert torch.equal(denoiser_output(same, noisy, torch.zeros(2), None, unet), noisy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes 16 channels, the autoencoder's latents have 3"):
        patch_size_of(unet, 3)


def test_the_last_class_is_no_class() -> None:
    torch.manual_seed(0)
    unet = make_denoiser("demo", latent_channels=2, sample_size=(4, 4), num_classes=3).eval()
    assert num_classes_of(unet) == 3
    noisy = torch.randn(1, 2, 4, 4).expand(4, -1, -1, -1)
    with torch.no_grad():
        outputs = denoiser_output(unet, noisy, torch.full((4,), 500.0), torch.arange(4), unet)
    for a in range(4):
        for b in range(a):
            assert (outputs[a] - outputs[b]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("num_classes", "classes"), [(0, []), (0, [None, None]), (2, []), (2, [None, 0]), (2, [1, None, 0])]
)
def test_a_copy_for_other_classes_knows_the_old_ones_and_takes_new_ones_for_no_class(
    num_classes: int, classes: list[int | None]
) -> None:
    torch.manual_seed(0)
    old = make_denoiser("demo", latent_channels=2, sample_size=(4, 4), num_classes=num_classes).eval()
    before = {name: weight.clone() for name, weight in old.state_dict().items()}
    new = with_classes(old, sample_size=(8, 8), classes=classes).eval()
    assert num_classes_of(new) == len(classes)
    assert tuple(new.config.sample_size) == (8, 8)
    noisy = torch.randn(1, 2, 4, 4)

    def output(unet: Any, label: int | None) -> torch.Tensor:
        labels = None if label is None else torch.tensor([label])
        with torch.no_grad():
            return denoiser_output(unet, noisy, torch.tensor([500.0]), labels, unet)

    for label, known in enumerate([*classes, None]):
        of_old = (num_classes if known is None else known) if num_classes else None
        torch.testing.assert_close(output(new, label if classes else None), output(old, of_old))
    assert all(torch.equal(weight, before[name]) for name, weight in old.state_dict().items())
