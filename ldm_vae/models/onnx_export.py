"""The decoder or the encoder of an autoencoder as ONNX."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm_vae.errors import ConfigError
from ldm_vae.models.interface import channels_of, encode_moments, latent_channels_of, stride_of

PLACES = (3, 4)
"""Height and width of the example's latents: unequal, as neither may depend on the other."""


class DecoderAlone(nn.Module):
    """Latents (B, c, H/f, W/f) -> images (B, C, H, W)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(latents).sample
        return images


class EncoderAlone(nn.Module):
    """Images (B, C, H, W) -> the posterior's mean (B, c, H/f, W/f)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        return encode_moments(self.vae, images).chunk(2, dim=1)[0]


@torch.no_grad()
def as_onnx(vae: Any, part: Literal["decoder", "encoder"]) -> bytes:
    """The decoder, from an input `latents` to an output `images`, or the encoder, the other way round.

    Raises:
        ConfigError: a package is missing.
    """
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise ConfigError("ONNX needs two packages that are not installed: pip install 'ldm-vae[onnx]'")
    height, width = PLACES
    if part == "decoder":
        network: nn.Module = DecoderAlone(vae)
        example, names = torch.zeros(2, latent_channels_of(vae), height, width), ("latents", "images")
    else:
        stride, network = stride_of(vae), EncoderAlone(vae)
        example, names = torch.zeros(2, channels_of(vae), height * stride, width * stride), ("images", "latents")
    program = torch.onnx.export(
        network.eval(),
        (example,),
        dynamo=True,
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
        input_names=names[:1],
        output_names=names[1:],
        verbose=False,
    )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())
