from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lpips
import pytest
import torch
import torchvision

from ldm_vae.errors import ConfigError, ModelError
from ldm_vae.objectives.perceptual import WEIGHTS, Backbone, FeatureDistance, LPIPSLoss, at_phase


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty TORCH_HOME, and a download that fails at once."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*_args: object, **_keywords: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("backbone", ["vgg", "alex", "squeeze"])
def test_missing_weights_are_one_error_that_names_file_place_and_way_out(backbone: str, no_weights: Path) -> None:
    file = Path(urlparse(WEIGHTS[backbone].url).path).name
    with pytest.raises(ModelError) as error:
        LPIPSLoss(backbone)
    for part in (file, str(no_weights), "--perceptual random", "no network"):
        assert part in str(error.value)


def test_pretrained_weights_at_their_place_are_used(no_weights: Path) -> None:
    """The file's format is torchvision's; its numbers are ours, since the real ones cannot be had here."""
    torch.manual_seed(3)
    network = torchvision.models.squeezenet1_1()
    no_weights.mkdir(parents=True)
    torch.save(network.state_dict(), no_weights / Path(urlparse(WEIGHTS["squeeze"].url).path).name)
    loss = LPIPSLoss("squeeze")
    assert torch.equal(loss.lpips.net.slice1[0].weight, network.features[0].weight)
    reference = lpips.LPIPS(net="squeeze", verbose=False)
    x, y = torch.rand(2, 3, 40, 40) * 2 - 1, torch.rand(2, 3, 40, 40) * 2 - 1
    assert torch.allclose(loss(x, y), reference(x, y).mean())
    assert torch.allclose(loss.distances(x, y), reference(x, y).flatten())


def test_a_random_backbone_is_always_the_same_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = LPIPSLoss("squeeze", pretrained=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second = LPIPSLoss("squeeze", pretrained=False)
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    assert torch.equal(first(x, y), second(x, y))


def test_the_reconstruction_gets_a_gradient_and_the_backbone_none() -> None:
    loss = LPIPSLoss("squeeze", pretrained=False)
    reconstruction = torch.rand(2, 3, 32, 32, requires_grad=True)
    loss.train()
    loss(reconstruction, torch.rand(2, 3, 32, 32)).backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in loss.parameters())
    assert not any(m.training for m in loss.modules())


@pytest.mark.parametrize("backbone", ["squeeze", "alex"])
def test_gradients_are_finite_at_black_white_and_grey_and_where_the_images_are_equal(backbone: Backbone) -> None:
    """Features can all be 0 there, and the derivative of their norm is infinite."""
    loss = LPIPSLoss(backbone, pretrained=False)
    flat = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 3, 64, 64)
    for target in (flat, flat.flip(0), torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1):
        reconstruction = flat.clone().requires_grad_()
        loss(reconstruction, target).backward()
        assert reconstruction.grad is not None
        assert reconstruction.grad.isfinite().all()


def test_lpips_sees_one_channel_three_times_and_the_first_three_of_many() -> None:
    grey = LPIPSLoss("squeeze", pretrained=False, image_channels=1)
    colour = LPIPSLoss("squeeze", pretrained=False)
    x, y = torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32)
    assert torch.equal(grey(x, y), colour(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))
    bands = LPIPSLoss("squeeze", pretrained=False, image_channels=13)
    x, y = torch.rand(1, 13, 32, 32), torch.rand(1, 13, 32, 32)
    assert torch.equal(bands(x, y), colour(x[:, :3], y[:, :3]))
    with pytest.raises(ConfigError, match="sees three channels and the images have 2: do without it"):
        LPIPSLoss("squeeze", pretrained=False, image_channels=2)


def test_weights_that_would_run_code_are_refused(no_weights: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (no_weights / "ran",)

    no_weights.mkdir(parents=True, exist_ok=True)
    torch.save(Hostile(), no_weights / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(ModelError, match="not usable"):
        LPIPSLoss("squeeze")
    assert not (no_weights / "ran").exists()


@pytest.fixture(scope="module")
def features() -> FeatureDistance:
    return FeatureDistance()


def test_the_distance_in_features_is_that_of_unit_vectors_mean_over_places_and_depths(
    features: FeatureDistance,
) -> None:
    a, b = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    squares = []
    for x, y in zip(features.features.maps(a, 4), features.features.maps(b, 4), strict=True):
        cosine = torch.nn.functional.cosine_similarity(x, y, dim=1)  # |u - v|^2 = 2 - 2 u.v
        squares.append((2 - 2 * cosine).mean(dim=(1, 2)))
    expected = torch.stack(squares).mean(dim=0)
    assert torch.allclose(features.distances(a, b), expected, atol=1e-5)
    assert features(a, b).item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert features(a, a).item() == 0


def test_the_distance_in_features_has_a_gradient_in_the_reconstruction_alone(features: FeatureDistance) -> None:
    reconstruction, images = (torch.rand(1, 3, 32, 32, requires_grad=True) for _ in range(2))
    features(reconstruction, images).backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().sum() > 0
    assert images.grad is None


def test_features_see_grey_three_times_and_of_many_channels_the_first_three(features: FeatureDistance) -> None:
    a, b = torch.rand(2, 1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    grey = features(a, b)
    assert grey == features(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1))
    more = torch.rand(1, 2, 32, 32)
    assert grey == features(*(torch.cat([x.expand(-1, 3, -1, -1), more], dim=1) for x in (a, b)))


def test_phases_visit_every_place_once_in_64_steps() -> None:
    rows = torch.arange(20.0)[:, None].expand(20, 20)
    images = torch.stack([rows, rows.T])[None]  # its row, its column
    corners = {tuple(at_phase(images, phase)[0, :, 0, 0].int().tolist()) for phase in range(64)}
    assert corners == {(y, x) for y in range(8) for x in range(8)}
    assert torch.equal(at_phase(images, 64 + 5), at_phase(images, 5))
    assert at_phase(images, 63).shape == (1, 2, 12, 12)
