"""Networks whose features compare sets of images."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ldm_vae.data.conversion import to_images
from ldm_vae.data.images import Pixels
from ldm_vae.errors import ModelError
from ldm_vae.files import sha256
from ldm_vae.hub import no_pickles
from ldm_vae.models.classifier import ImageClassifier, load_classifier
from ldm_vae.models.pretrained import PretrainedFeatures

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The network of published Fréchet distances, as torch-fidelity has it; its sha256 begins as its name ends."""
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"

INCEPTION, EFFICIENTNET = "inception", "efficientnet-lite0"
NetworkInput = Literal["images", "pixels"]


@dataclass(frozen=True, kw_only=True)
class FeatureExtractor:
    """Pixels uint8 (B, H, W, C) -> features float64 (B, D) on the CPU, and the classes that a classifier recognises.

    Args:
        name: what it is, for tables.
        network: gives (B, D) of its input (B, C, H, W).
        network_input: images are float32 in [-1, 1], pixels are uint8.
        device: where its input goes.
        channels, resolution: of the images that it is for, when they are known.
        classifier: the project's own, whose logits are read beside its features.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    network_input: NetworkInput
    device: torch.device
    channels: int | None = None
    resolution: int | None = None
    classifier: ImageClassifier | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.classifier.config.class_names) if self.classifier is not None else ()

    def __call__(self, pixels: Pixels) -> tuple[Tensor, Tensor | None]:
        """Features (B, D), and the recognised classes (B,) of a classifier.

        Raises:
            ModelError: the network does not take such an input, or does not give finite (B, D).
        """
        as_pixels = self.network_input == "pixels"
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() if as_pixels else to_images(pixels)
        with torch.inference_mode():
            features = self.run(images.to(self.device))
            classes = None if self.classifier is None else self.classifier.head(features).argmax(dim=1).cpu()
        return features.double().cpu(), classes

    def run(self, images: Tensor) -> Tensor:
        shape, kind = tuple(images.shape), str(images.dtype).removeprefix("torch.")
        try:
            features = self.network(images)
        except ModelError:
            raise
        except Exception as error:  # whatever the code of a stranger's module raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ModelError(
                f"{self.name} does not take {kind} {shape}: {reason} (--batch-size, --resolution, --channels and "
                "--features-input choose what it is given)"
            ) from None
        output = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            raise ModelError(f"{self.name} gives {output} of {shape}: features of shape ({len(images)}, D) are needed")
        if not features.isfinite().all():
            raise ModelError(f"{self.name} gives features that are not finite")
        return features


def load_features(path: str, *, network_input: NetworkInput, device: torch.device) -> FeatureExtractor:
    """Inception's features, EfficientNet-Lite0's, or those of the network at `path`.

    Args:
        path: a classifier of train_classifier.py; the file of an exported (.pt2) or TorchScript module that turns
            (B, C, H, W) into (B, D); `efficientnet-lite0` for `PretrainedFeatures`; `inception` for Inception.
        network_input: what such a module takes: float32 in [-1, 1] ("images") or uint8 ("pixels").

    Raises:
        ModelError: nothing there, or not what it should be.
    """
    if path == INCEPTION:
        inception = load_inception(Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE).to(device)
        return FeatureExtractor(
            name="Inception (2015)",
            network=lambda pixels: inception(pixels)[0],
            network_input="pixels",
            device=device,
            channels=3,
        )
    if path == EFFICIENTNET:
        efficientnet = PretrainedFeatures().to(device)
        return FeatureExtractor(
            name="EfficientNet-Lite0", network=efficientnet.pooled, network_input="images", device=device, channels=3
        )
    if not Path(path).is_file():
        classifier = load_classifier(path).to(device)
        return FeatureExtractor(
            name=path,
            network=classifier.features,
            network_input="images",
            device=device,
            channels=classifier.config.in_channels,
            resolution=classifier.config.resolution,
            classifier=classifier,
        )
    exported = Path(path).suffix == ".pt2"
    if exported:
        device = torch.device("cpu")  # constants of an exported program stay where they were
    network = load_module(path, exported=exported, device=device)
    return FeatureExtractor(name=path, network=network, network_input=network_input, device=device)


def load_module(path: str, *, exported: bool, device: torch.device) -> nn.Module:
    """A module that `torch.export.save` or `torch.jit.save` wrote. Raises ModelError."""
    try:
        with quiet(), no_pickles():
            if exported:
                return torch.export.load(path).module()
            module: nn.Module = torch.jit.load(path, map_location=device)
            return module.eval()
    except Exception as error:  # damaged and foreign files raise many kinds
        kind = "an exported (.pt2)" if exported else "a TorchScript"
        reason = str(error).strip().split(". ")[0]
        raise ModelError(f"{path} is not {kind} module: {type(error).__name__}: {reason}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's word that TorchScript is deprecated (files of it are not gone), and its log of what is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def load_inception(weights: Path) -> nn.Module:
    """The Inception of published Fréchet distances: uint8 (B, 3, H, W) -> a tuple of (B, 2048), by torch-fidelity.

    It resamples to 299 as TensorFlow 1 did, as the published ones have it; torchmetrics' own way differs from it.

    Raises:
        ModelError: the weights are missing or not the published ones. They are not downloaded.
    """
    hint = f"TORCH_HOME, now {os.environ.get('TORCH_HOME', 'not set')}, moves the place"
    way_out = f"copy it there from {INCEPTION_URL} ({hint}), or give --features PATH or {EFFICIENTNET}"
    if not weights.is_file():
        raise ModelError(f"Inception's features need {weights.name}, which is not in {weights.parent}: {way_out}")
    digest = sha256(weights)
    if not digest.startswith(weights.stem.rpartition("-")[2]):  # it is read as a pickle: only the published one
        raise ModelError(f"{weights} is damaged or another file (its sha256 is {digest}): {way_out}")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
