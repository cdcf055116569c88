"""`ldm-vae export`: a decoder or an encoder as ONNX, which runs without torch and without this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ldm_vae.files import atomic


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write an autoencoder's decoder (latents -> images), or its encoder (images -> latents), as ONNX in float32.

    Batch, height and width stay free. Images are in [-1, 1], not clamped; latents are raw, those of the encoder the
    posterior's mean.
    """

    model: Annotated[Positional[str], arg(metavar="RUN_OR_MODEL")]
    """Run directory, diffusers folder, hub id or box:NAME."""
    output: Annotated[Positional[Path], arg(metavar="FILE.onnx")]
    part: Literal["decoder", "encoder"] = "decoder"


def export(command: Export) -> None:
    from ldm_vae.models.loading import load_for_inference
    from ldm_vae.models.onnx_export import as_onnx

    data = as_onnx(load_for_inference(command.model), command.part)
    with atomic(command.output) as out:
        out.write(data)
