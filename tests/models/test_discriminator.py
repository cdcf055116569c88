from __future__ import annotations

import pytest
import torch

from ldm_vae.models.discriminator import PatchDiscriminator


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3, 13])
def test_there_is_a_logit_for_each_patch_down_to_the_smallest_image(num_layers: int, channels: int) -> None:
    network = PatchDiscriminator(in_channels=channels, base_channels=8, num_layers=num_layers)
    side = PatchDiscriminator.smallest_image(num_layers)
    assert network(torch.zeros(2, channels, side, side)).shape == (2, 1, 1, 1)
    assert network(torch.zeros(2, channels, 64, 64)).shape[-1] == 64 // 2**num_layers - 2


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_a_logit_depends_on_its_own_image_alone(spectral_norm: bool) -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(base_channels=8, spectral_norm=spectral_norm).eval()
    images = torch.randn(4, 3, 32, 32)
    assert torch.allclose(network(images)[2:3], network(images[2:3]), atol=1e-6)


def test_spectral_norm_makes_the_largest_singular_value_one() -> None:
    network = PatchDiscriminator(base_channels=8, spectral_norm=True).train()
    for _ in range(50):
        network(torch.randn(1, 3, 32, 32))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_three_layers_see_seventy_pixels() -> None:
    network = PatchDiscriminator(in_channels=1, base_channels=4, spectral_norm=True).double().eval()
    images = torch.randn(1, 1, 160, 160, dtype=torch.double, requires_grad=True)
    network(images)[0, 0, 9, 9].backward()
    touched = images.grad[0, 0].nonzero()
    assert (touched.max(dim=0).values - touched.min(dim=0).values + 1).tolist() == [70, 70]
