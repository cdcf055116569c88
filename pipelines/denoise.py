"""Take the noise out of images, by an autoencoder that was trained to.

python pipelines/denoise.py --vae RUN_OR_MODEL --input PATH --output DIR [--sigma 25]

Every image at its own size as a PNG of the same name, with its depth, transparency and metadata. Run again, the command
makes what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ldm_vae.commands.convert import ConvertConfig, convert_images, prepare
from ldm_vae.errors import one_line_errors
from ldm_vae.models.reconstruction import check_noise_level, denoise
from ldm_vae.runs.config import parse_flags


@dataclass(frozen=True, kw_only=True)
class Config(ConvertConfig):
    sigma: float | None = None
    """Standard deviation of the noise in 0..255; the network goes by what it sees unless given."""


def main(config: Config) -> None:
    vae, accelerator, settings = prepare(config)
    check_noise_level(vae, config.sigma)
    clean = partial(denoise, vae, sigma=config.sigma)
    settings["sigma"] = str(config.sigma)
    convert_images(config, vae, clean, settings=settings, accelerator=accelerator)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Take the noise out of images."))
