"""LPIPS (Zhang et al. 2018) through the `lpips` package, and what to do when weights or channels are missing."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from ldm_vae.errors import ConfigError, ModelError
from ldm_vae.hub import no_pickles

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
SMALLEST_IMAGE = {"vgg": 64, "alex": 32, "squeeze": 32}
WEIGHTS = {
    "vgg": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
    "alex": torchvision.models.AlexNet_Weights.IMAGENET1K_V1,
    "squeeze": torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
}


class PerceptualLoss(nn.Module):
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
        self.requires_grad_(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        return self.distances(reconstruction, images).mean()

    def distances(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """One distance an image: (B,)."""
        return self.lpips(self.three(reconstruction), self.three(images)).flatten()

    def maps(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """A distance a pixel: (B, H, W), features of coarser layers enlarged."""
        self.lpips.spatial = True
        try:
            return self.lpips(self.three(reconstruction), self.three(images))[:, 0]
        finally:
            self.lpips.spatial = False

    def three(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]  # (B, 3, H, W)

    def train(self, mode: bool = True) -> PerceptualLoss:
        return super().train(False)  # dropout stays off


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
