"""The flags of `ldm-vae page`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from ldm_vae.codec.bitstream import DEFAULT_MODEL, MODEL_VARIABLE
from ldm_vae.models.loading import BOX
from ldm_vae.runs.config import Range

GENERATOR, AUTOENCODER, DENOISER = "box:flowers", "box:f8c4", "box:denoise"
"""What the tabs show unless another model is given; those that the box does not have are left out."""
LOCALHOST = "127.0.0.1"


def in_box(name: str) -> str | None:
    """The model of the box, or None where the box does not have it."""
    return name if (BOX / name.removeprefix("box:")).is_dir() else None


@dataclass(frozen=True, kw_only=True)
class Page:
    """Serve a page for the browser: compress, generate, autoencode, denoise."""

    host: str = LOCALHOST
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: Annotated[int, Range(at_least=1, at_most=65535)] = 7860
    model: str = os.environ.get(MODEL_VARIABLE, DEFAULT_MODEL)
    """Codec: run directory, model folder or hub id with fitted tables, or box:codec; $LDM_VAE_MODEL unless given."""
    generate: str | None = in_box(GENERATOR)
    """Generator: run directory, pipeline folder or hub id; the box's, if it has one, unless given."""
    autoencode: str | None = in_box(AUTOENCODER)
    """Autoencoder to show beside others: run directory, model folder or hub id; the box's, if it has one, unless
    given."""
    denoise: str | None = in_box(DENOISER)
    """Denoiser: run directory, model folder or hub id; the box's, if it has one, unless given."""
    max_pixels: Annotated[int, Range(at_least=1)] = 1 << 25
    """Larger images are refused."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine's users can reach the page."""
        return self.host in (LOCALHOST, "localhost", "::1")
