"""Train KL-VAEs on your own images, compress with them, and sample from diffusion models; see README.md."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "LatentCodec": "ldm_vae.codec.codec",
    "LatentDiffusionPipeline": "ldm_vae.pipeline",
    "LdmVaeError": "ldm_vae.errors",
    "PatchAutoencoderKL": "ldm_vae.models.autoencoder",
    "PatchDiscriminator": "ldm_vae.models.discriminator",
    "denoise": "ldm_vae.models.reconstruction",
    "embed": "ldm_vae.analysis.embedding",
    "load_autoencoder": "ldm_vae.models.loading",
    "load_pipeline": "ldm_vae.pipeline",
    "open_source": "ldm_vae.data.sources",
    "reconstruct": "ldm_vae.models.reconstruction",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: torch and diffusers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module ldm_vae has no attribute {name}")
    return getattr(import_module(_HOMES[name]), name)
