"""`ldm-vae denoise`: files, a folder of files, or standard input, without their noise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from ldm_vae.commands.reconstruct import Reconstruct, convert_file
from ldm_vae.commands.transfer import transfer
from ldm_vae.data.image_files import images_below


@dataclass(frozen=True, kw_only=True)
class Denoise(Reconstruct):
    """Take the noise out of images, by an autoencoder that was trained to: photo.jpg -> photo.denoised.png."""

    model: str = "box:denoise"
    """Run directory, diffusers folder, hub id or model of the box: an autoencoder that was trained to."""
    sigma: float | None = None
    """Standard deviation of the noise in 0..255; the network goes by what it sees unless given."""

    def for_model(self, model: Any) -> Self:
        from ldm_vae.models.reconstruction import check_noise_level

        check_noise_level(model, self.sigma)
        return self


def denoise_file(command: Denoise) -> str | None:
    """What is to be said of it, if anything."""
    from ldm_vae.models.reconstruction import denoise

    return convert_file(command, partial(denoise, sigma=command.sigma))


def denoise_files(command: Denoise) -> None:
    command.options()  # what is wrong with a flag is said once
    transfer(denoise_file, command, inputs=images_below, extension=".png", beside=".denoised.png")
