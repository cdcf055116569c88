"""Take the noise out of images, by an autoencoder that was trained to.

python pipelines/denoise.py --vae RUN_OR_MODEL --input PATH --output DIR [--sigma 25]

Every image at its own size as an 8-bit PNG of the same name. Run again, the command makes what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from diffusers.utils import logging

from ldm_vae.commands.folders import convert_images
from ldm_vae.data.large import MAX_LARGE_PIXELS
from ldm_vae.errors import one_line_errors
from ldm_vae.models.interface import fingerprint
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.reconstruction import check_noise_level, denoise, exact_float32, turn_on_tiling
from ldm_vae.runs.config import parse_flags
from ldm_vae.runs.processes import PATIENCE


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the denoiser."""

    vae: str
    """Run directory (train_vae.py denoise), diffusers folder or hub id."""
    input: str
    """Folder or other source of images."""
    output: Path
    sigma: float | None = None
    """Standard deviation of the noise in 0..255; the network goes by what it sees unless given."""
    tile: bool = False
    """In tiles, in memory for one of them."""
    max_pixels: int = MAX_LARGE_PIXELS
    """Larger images are listed as bad ones. From some 33 million pixels on they go by way of the disk, if the
    autoencoder sees only so far."""


def main(config: Config) -> None:
    logging.disable_progress_bar()
    exact_float32()
    accelerator = Accelerator(kwargs_handlers=[PATIENCE])
    vae = load_autoencoder(config.vae).to(accelerator.device)
    check_noise_level(vae, config.sigma)
    tiles = "none, or exact" if not config.tile or turn_on_tiling(vae) else "blended"
    settings = {"model": fingerprint(vae), "tiles": tiles, "sigma": str(config.sigma)}
    clean = partial(denoise, vae, sigma=config.sigma)
    ways = {"vae": vae, "settings": settings, "accelerator": accelerator, "max_pixels": config.max_pixels}
    convert_images(config.input, config.output, clean, **ways)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Take the noise out of images."))
