"""Send images through an autoencoder and back.

python pipelines/reconstruct.py --vae RUN_OR_MODEL --input PATH --output DIR

Every image at its own size, through the posterior's mean, as a PNG of the same name, with its depth, transparency and
metadata. Run again, the command makes what is missing.
"""

from __future__ import annotations

from functools import partial

from ldm_vae.commands.convert import ConvertConfig, convert_images, prepare
from ldm_vae.errors import one_line_errors
from ldm_vae.models.reconstruction import reconstruct
from ldm_vae.runs.config import parse_flags


def main(config: ConvertConfig) -> None:
    vae, accelerator, settings = prepare(config)
    convert_images(config, vae, partial(reconstruct, vae), settings=settings, accelerator=accelerator)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(ConvertConfig, description="Send images through an autoencoder and back."))
