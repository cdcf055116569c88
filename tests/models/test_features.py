from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ldm_vae.errors import ModelError
from ldm_vae.models import features
from ldm_vae.models.classifier import ImageClassifier
from ldm_vae.models.features import INCEPTION, INCEPTION_FILE, FeatureExtractor, load_features

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)


class Network(nn.Module):
    """Images (B, 3, 16, 16) -> (B, 5); in training mode it would drop half of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5), nn.Dropout())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float())


def load(path: Path | str, network_input: Any = "images") -> FeatureExtractor:
    return load_features(str(path), network_input=network_input, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network as a traced, a scripted and an exported module of images, and exported of pixels."""
    folder = tmp_path_factory.mktemp("modules")
    network, images = Network(), torch.zeros(4, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network.train()), str(folder / "scripted.pt"))
        torch.jit.save(torch.jit.trace(network.eval(), images), str(folder / "traced.ts"))
        torch.export.save(torch.export.export(network, (images,)), folder / "exported.pt2")
        torch.export.save(torch.export.export(network, (images.byte(),)), folder / "of_pixels.pt2")
    torch.save(network.state_dict(), folder / "weights.pt")
    (folder / "text.pt2").write_text("text")
    return folder


@pytest.mark.parametrize("name", ["scripted.pt", "traced.ts", "exported.pt2"])
def test_a_saved_module_gives_what_the_network_gives_of_images(name: str, modules: Path) -> None:
    images = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1
    given, classes = load(modules / name)(PIXELS)
    assert torch.allclose(given, Network().eval()(images).double(), atol=1e-6)
    assert given.dtype == torch.float64
    assert classes is None


@pytest.mark.parametrize("name", ["scripted.pt", "of_pixels.pt2"])
def test_a_module_of_pixels_is_given_bytes(name: str, modules: Path) -> None:
    expected = Network().eval()(torch.from_numpy(PIXELS).permute(0, 3, 1, 2)).double()
    assert torch.allclose(load(modules / name, "pixels")(PIXELS)[0], expected, rtol=1e-5)


def test_a_classifier_gives_its_features_and_the_classes_that_it_sees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = ImageClassifier(num_classes=3, class_names=("ant", "bee", "cat"), resolution=16).eval()
    classifier.save_pretrained(tmp_path)
    extract = load(tmp_path)
    images = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1
    given, classes = extract(PIXELS)
    assert torch.allclose(given, classifier.features(images).double(), atol=1e-5)
    assert classes is not None
    assert classes.tolist() == classifier(images).argmax(dim=1).tolist()
    assert (extract.channels, extract.resolution, extract.class_names) == (3, 16, ("ant", "bee", "cat"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.pt", "no such model"),
        ("weights.pt", "is not a TorchScript module"),
        ("text.pt2", "is not an exported"),
        (".", "has no readable config.json"),
    ],
)
def test_what_is_no_network_is_a_model_error_and_nothing_else_is_said(
    name: str, message: str, modules: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match=message):
        load(modules / name)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["scripted.pt", "exported.pt2"])
def test_images_that_a_network_does_not_take_are_named(name: str, modules: Path) -> None:
    with pytest.raises(ModelError, match=r"does not take float32 \(4, 1, 16, 16\)"):
        load(modules / name)(PIXELS[..., :1])


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x: x, r"gives \(4, 3, 16, 16\) of \(4, 3, 16, 16\)"),
        (lambda x: (x.flatten(1),), "gives tuple of"),
        (lambda x: x.flatten(1)[:2], r"gives \(2, 768\)"),
        (lambda x: x.flatten(1) / 0, "not finite"),
    ],
)
def test_what_are_no_features_is_refused(network: Any, message: str) -> None:
    extract = FeatureExtractor(name="it", network=network, network_input="images", device=torch.device("cpu"))
    with pytest.raises(ModelError, match=message):
        extract(PIXELS)


def test_missing_inception_weights_are_one_error_that_names_file_place_and_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints"
    with pytest.raises(ModelError) as error:
        load(INCEPTION)
    for part in (INCEPTION_FILE, str(place), "https://", "TORCH_HOME", "--features PATH"):
        assert part in str(error.value)
    place.mkdir(parents=True)
    (place / INCEPTION_FILE).write_bytes(b"another file")
    with pytest.raises(ModelError, match="damaged or another file"):
        load(INCEPTION)


def test_inception_takes_pixels_as_torch_fidelity_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random numbers for weights, since the real ones cannot be had here."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(features, "sha256", lambda file: "6726825d" + "0" * 56)
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    torch.save({}, place / INCEPTION_FILE)
    torch.manual_seed(0)
    direct = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(place / INCEPTION_FILE))
    torch.manual_seed(0)
    given, _ = load(INCEPTION)(PIXELS[:2])
    assert given.shape == (2, 2048)
    assert torch.allclose(given, direct(torch.from_numpy(PIXELS[:2]).permute(0, 3, 1, 2))[0].double())
