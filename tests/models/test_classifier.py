from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_vae.errors import ModelError
from ldm_vae.models.classifier import ImageClassifier, load_classifier
from ldm_vae.models.discriminator import PatchDiscriminator
from ldm_vae.models.pretrained import PretrainedFeatures


def small(**changes: object) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(**{"num_classes": 3, "widths": (4, 8), "num_features": 6, **changes}).eval()  # type: ignore


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (64, 48)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_logits_are_the_heads_of_features_at_any_size(size: tuple[int, int], channels: int) -> None:
    classifier = small(in_channels=channels)
    images = torch.rand(2, channels, *size) * 2 - 1
    features = classifier.features(images)
    assert features.shape == (2, 6)
    assert features.min() >= 0
    assert torch.equal(classifier(images), classifier.head(features))
    assert classifier(images).shape == (2, 3)


def test_logits_depend_on_the_images_own_pixels_alone_and_on_all_of_them() -> None:
    classifier = small()
    images = torch.rand(4, 3, 17, 17) * 2 - 1
    assert torch.allclose(classifier(images)[2:3], classifier(images[2:3]), atol=1e-6)
    images.requires_grad_()
    classifier(images)[1].sum().backward()
    assert (images.grad[1] != 0).all()
    assert (images.grad[0] == 0).all()


def test_saved_and_loaded_it_is_the_same_with_the_names_of_its_classes(tmp_path: Path) -> None:
    classifier = small(class_names=("ant", "bee", "cat"), resolution=48)
    classifier.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = load_classifier(str(tmp_path))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(images), classifier(images))
    assert tuple(loaded.config.class_names) == ("ant", "bee", "cat")
    assert loaded.config.resolution == 48
    assert not loaded.training


def test_with_a_backbone_only_what_learns_is_saved_and_the_rest_is_the_installed_network(tmp_path: Path) -> None:
    classifier = small(backbone="efficientnet-lite0", class_names=("ant", "bee", "cat"))
    assert sorted(classifier.state_dict()) == ["head.bias", "head.weight", "hidden.bias", "hidden.weight"]
    classifier.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size < 4 * (1281 * 6 + 7 * 3) + 1000
    loaded = load_classifier(str(tmp_path))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    pooled = PretrainedFeatures().pooled(images)
    expected = torch.relu(pooled @ classifier.hidden.weight.T + classifier.hidden.bias)
    assert torch.allclose(loaded.features(images), expected, atol=1e-5)
    assert torch.allclose(loaded(images), classifier.head(expected), atol=1e-5)
    assert loaded.pretrained is loaded.pretrained


def test_names_for_another_number_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        small(class_names=("ant", "bee"))


def test_what_is_no_classifier_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model"):
        load_classifier(str(tmp_path / "missing"))
    with pytest.raises(ModelError, match=r"has no readable config\.json"):
        load_classifier(str(tmp_path))
    PatchDiscriminator(base_channels=8).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="holds a PatchDiscriminator"):
        load_classifier(str(tmp_path / "other"))
    small().save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "diffusion_pytorch_model.safetensors").write_bytes(b"damage")
    with pytest.raises(ModelError, match="cannot load ImageClassifier"):
        load_classifier(str(tmp_path / "damaged"))
