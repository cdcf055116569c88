"""Distances in a network's features: LPIPS (Zhang et al. 2018), and those of EfficientNet-Lite0."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm_vae.errors import ConfigError, ModelError
from ldm_vae.hub import no_pickles
from ldm_vae.models.pretrained import PretrainedFeatures

try:
    import lpips
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    raise ImportError(
        "torch and torchvision do not match: install a pair that does, such as the one in constraints.txt"
    ) from error

Backbone = Literal["vgg", "alex", "squeeze"]
PHASES = 8
"""Along each axis, for `at_phase`."""
SMALLEST_IMAGE = {"vgg": 64, "alex": 32, "squeeze": 32}
WEIGHTS = {
    "vgg": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
    "alex": torchvision.models.AlexNet_Weights.IMAGENET1K_V1,
    "squeeze": torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
}


class LPIPSLoss(nn.Module):
    """LPIPS between images (B, C, H, W) in [-1, 1]: `forward(reconstruction, images)` is its mean over the batch.

    The backbone is frozen; the gradient reaches the reconstruction. LPIPS knows three channels: one channel is
    repeated, and of more than three it sees the first three.

    Args:
        backbone: vgg, alex or squeeze.
        pretrained: False takes a randomly initialised backbone (always the same one). Its distances are those of
            random features and must be labelled so.
        image_channels: C.

    Raises:
        ConfigError: C is 2.
        ModelError: the pretrained weights are missing and cannot be downloaded.
    """

    def __init__(self, backbone: Backbone = "vgg", *, pretrained: bool = True, image_channels: int = 3) -> None:
        super().__init__()
        if image_channels == 2:
            raise ConfigError(
                "LPIPS sees three channels and the images have 2: do without it (training: --perceptual none; anomaly "
                "fit: other --methods)"
            )
        self.lpips = load_backbone(backbone, pretrained)
        self.name, self.smallest_image = f"lpips_{backbone}", SMALLEST_IMAGE[backbone]
        self.requires_grad_(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        return self.distances(reconstruction, images).mean()

    def distances(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """One distance an image: (B,)."""
        return self.lpips(three_channels(reconstruction), three_channels(images)).flatten()

    def maps(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """A distance a pixel: (B, H, W), features of coarser layers enlarged."""
        self.lpips.spatial = True
        try:
            return self.lpips(three_channels(reconstruction), three_channels(images))[:, 0]
        finally:
            self.lpips.spatial = False

    def train(self, mode: bool = True) -> LPIPSLoss:
        return super().train(False)  # dropout stays off


class FeatureDistance(nn.Module):
    """Distance of images (B, C, H, W) in [-1, 1] in the features of EfficientNet-Lite0: `forward` is the batch's mean.

    As LPIPS before its learned weights (Zhang et al. 2018, equation 1): at each depth, the squared distance of
    features that are divided by their length over channels, mean over positions; then the mean over depths. It is
    between 0 and 4, and no LPIPS. One channel is repeated; of more than three it sees the first three.

    The depths are the first four of `PretrainedFeatures`, from 1/2 to 1/16 of the image's side.

    Raises:
        ModelError: as `PretrainedFeatures`.
    """

    depths, name, smallest_image = 4, "features", 16

    def __init__(self) -> None:
        super().__init__()
        self.features = PretrainedFeatures()

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        return self.distances(reconstruction, images).mean()

    def distances(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """One distance an image: (B,)."""
        with torch.no_grad():
            truth = self.features.maps(three_channels(images), self.depths)
        maps = self.features.maps(three_channels(reconstruction), self.depths)
        squares = [(unit(a) - unit(b)).square().sum(dim=1) for a, b in zip(maps, truth, strict=True)]  # (B, h, w)
        return torch.stack([square.mean(dim=(1, 2)) for square in squares]).mean(dim=0)


def perceptual_loss(
    kind: Literal["pretrained", "random", "features"], backbone: Backbone, image_channels: int
) -> LPIPSLoss | FeatureDistance:
    """What `--perceptual` names. Raises ConfigError and ModelError as the two do."""
    if kind == "features":
        return FeatureDistance()
    return LPIPSLoss(backbone, pretrained=kind == "pretrained", image_channels=image_channels)


def at_phase(images: Tensor, phase: int) -> Tensor:
    """Images without 8 of their rows and columns, from one of 64 places: (B, C, H - 8, W - 8).

    A network with strides sees the pixels through a grid. A loss that always shows it the same pixels at the same
    places of the grid leaves the grid in the picture; a phase that changes from step to step does not.
    """
    y, x = phase % PHASES, phase // PHASES % PHASES
    height, width = images.shape[-2] - PHASES, images.shape[-1] - PHASES
    return images[..., y : y + height, x : x + width]


def unit(features: Tensor) -> Tensor:
    return functional.normalize(features.float(), dim=1, eps=1e-8)


def three_channels(images: Tensor) -> Tensor:
    """(B, 3, H, W): a grey image three times, or the first three channels."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def load_backbone(backbone: Backbone, pretrained: bool) -> lpips.LPIPS:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), no_pickles():
        warnings.simplefilter("ignore")  # lpips speaks torchvision's older dialect
        torch.manual_seed(0)
        try:
            return lpips.LPIPS(net=backbone, pnet_rand=not pretrained, verbose=False)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            file = Path(urlparse(WEIGHTS[backbone].url).path).name
            place = Path(torch.hub.get_dir()) / "checkpoints"
            raise ModelError(
                f"LPIPS needs the pretrained weights {file}, which are not usable in {place} and could not be "
                f"downloaded ({type(error).__name__}: {error}): copy the file there"
                f"{' (TORCH_HOME moves the place)' if 'TORCH_HOME' not in os.environ else ''}, "
                "or do without it (training: --perceptual random or none; anomaly fit: other --methods)"
            ) from None
