"""ImageClassifier: a small network that names the class of an image, and whose features compare sets."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Literal

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from ldm_vae.errors import ModelError
from ldm_vae.models.loading import find_saved, load_saved
from ldm_vae.models.pretrained import POOLED_CHANNELS, PretrainedFeatures

Backbone = Literal["efficientnet-lite0"]

POOLED = 2
"""Features are averaged over a grid of 2 x 2, which keeps some of their layout."""


def conv(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm (Ioffe & Szegedy 2015), ReLU: (B, before, H, W) -> (B, after, H/stride, W/stride)."""
    layer = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)  # what is normed needs no bias
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())


class ImageClassifier(ModelMixin, ConfigMixin):
    """Images (B, C, H, W) in [-1, 1] of any size, 16 pixels or more each way -> logits (B, K).

    Args:
        in_channels: C; 3 with a backbone.
        num_classes: K.
        widths: channels of the stages, the first at half the height and width of the image, each at half of the last.
        num_features: D, the width of the last layer but one.
        class_names: K names in the order of the logits; empty when they have none.
        resolution: side of the images that it was trained on, where it is at its best.
        backbone: a frozen network of the package index in place of the stages. It is not saved with the rest.

    Raises:
        ValueError: names for another number of classes.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        widths: tuple[int, ...] = (32, 64, 128),
        num_features: int = 128,
        class_names: tuple[str, ...] = (),
        resolution: int = 32,
        backbone: Backbone | None = None,
    ) -> None:
        super().__init__()
        if class_names and len(class_names) != num_classes:
            raise ValueError(f"{len(class_names)} class names for {num_classes} classes: name each, or none")
        if backbone is None:
            self.stem = conv(in_channels * 4, widths[0])
            self.stages = nn.Sequential(*(nn.Sequential(conv(a, b, stride=2), conv(b, b)) for a, b in pairwise(widths)))
        self.hidden = nn.Linear(widths[-1] * POOLED**2 if backbone is None else POOLED_CHANNELS, num_features)
        self.head = nn.Linear(num_features, num_classes)

    @cached_property  # so that it is no part of the module: neither trained nor saved
    def pretrained(self) -> PretrainedFeatures:
        """The backbone, where the other layers are when it is first used. Raises ModelError: it is not installed."""
        return PretrainedFeatures().to(self.head.weight.device)

    def pooled(self, images: Tensor) -> Tensor:
        """What the last two layers see of images (B, C, H, W) in [-1, 1]: (B, 4 w), or the backbone's (B, 1280)."""
        if self.config.backbone is not None:
            return self.pretrained.pooled(images)
        height, width = images.shape[-2:]
        even = functional.pad(images, (0, width % 2, 0, height % 2), mode="replicate")
        h = self.stem(functional.pixel_unshuffle(even, 2))  # (B, w0, H/2, W/2)
        h = self.stages(h)  # (B, w, H/2^n, W/2^n) for n widths
        return functional.adaptive_avg_pool2d(h, POOLED).flatten(1)  # (B, 4 w)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> what the last layer sees of them, none below zero: (B, D)."""
        return self.features_of(self.pooled(images))

    def features_of(self, pooled: Tensor) -> Tensor:
        return functional.relu(self.hidden(pooled))  # (B, D)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))  # (B, K)


def load_classifier(name: str) -> ImageClassifier:
    """The classifier that `benchmarks/train_classifier.py` saved, in float32 and evaluation mode.

    Raises:
        ModelError: no such model, another one, or files that cannot be read.
    """
    folder, class_name = find_saved(name, "vae")
    if class_name != ImageClassifier.__name__:
        raise ModelError(f"{name} holds a {class_name}: a classifier of benchmarks/train_classifier.py is needed")
    classifier: ImageClassifier = load_saved(ImageClassifier, folder, name)
    return classifier
