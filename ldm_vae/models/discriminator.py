"""PatchDiscriminator: judges whether each patch of an image is real."""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as with_spectral_norm


class PatchDiscriminator(ModelMixin, ConfigMixin):
    """The N-layer PatchGAN of Isola et al. 2017 (section 3.2.2): images (B, C, H, W) -> logits (B, 1, h, w).

    Group norm takes the place of batch norm, so that a logit depends on its own image alone, not on the batch.

    Args:
        in_channels: channels of the images.
        base_channels: width of the first layer; it doubles up to eight times that.
        num_layers: layers of stride 2; three see 70 pixels.
        spectral_norm: weights divided by their largest singular value (Miyato et al. 2018) instead of group norm.
    """

    @register_to_config
    def __init__(
        self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3, spectral_norm: bool = False
    ) -> None:
        super().__init__()
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip([in_channels, *widths[:-1]], widths, strict=True)):
            normed = i > 0 and not spectral_norm  # normalised layers need no bias
            layers.append(nn.Conv2d(before, after, 4, stride=2 if i < num_layers else 1, padding=1, bias=not normed))
            if normed:
                layers.append(nn.GroupNorm(min(16, after), after))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if spectral_norm:
            layers = [with_spectral_norm(m) if isinstance(m, nn.Conv2d) else m for m in layers]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # (B, 1, about H / 2^N - 2, about W / 2^N - 2)

    @staticmethod
    def smallest_image(num_layers: int) -> int:
        """The smallest height and width that give a logit."""
        return 3 * 2**num_layers
