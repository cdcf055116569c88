"""`ldm-vae reconstruct`: files, a folder of files, or standard input, through an autoencoder and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

from ldm_vae.commands.embed import ready
from ldm_vae.commands.folders import in_one_line
from ldm_vae.commands.transfer import STREAM, Transfer, is_nameless, read, transfer, write
from ldm_vae.data.image_files import images_below
from ldm_vae.data.reader import ReadOptions, read_image
from ldm_vae.files import atomic
from ldm_vae.runs.config import Range


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Transfer):
    """Send images through an autoencoder and back: photo.jpg -> photo.reconstructed.png."""

    model: str = "box:f8c4"
    """Run directory, diffusers folder, hub id or model of the box: an autoencoder."""
    workers: Annotated[int, Range(at_least=0)] = 0
    """Processes for several files; 0: one a core."""
    tile: bool = False
    """Blend tiles, for large images through autoencoders that see the whole image; others work on tiles anyway."""
    pages_as_channels: bool = False
    """Take the pages of a TIFF as channels; otherwise its first page is the image."""
    value_range: tuple[float, float] | None = None
    """Values of black and white in images of floats, or of more than 8 bits."""

    def options(self) -> ReadOptions:
        return ReadOptions(keep_colour=True, pages_as_channels=self.pages_as_channels, value_range=self.value_range)

    def check_name(self) -> None:
        from ldm_vae.codec.picture import check_extension

        if not is_nameless(self.output):
            check_extension(Path(self.output).suffix.lower())

    def loaded(self, workers: int) -> Any:
        return load_vae(self.model, self.device, self.tile)


@lru_cache(maxsize=2)
def load_vae(model: str, device: str, tile: bool) -> Any:
    from ldm_vae.data.conversion import check_viewable
    from ldm_vae.models.interface import channels_of
    from ldm_vae.models.loading import load_for_inference
    from ldm_vae.models.reconstruction import turn_on_tiling

    vae = ready(load_for_inference, model, device)
    check_viewable(channels_of(vae))
    if tile:
        turn_on_tiling(vae)
    return vae


def reconstruct_file(command: Reconstruct) -> str | None:
    """What is to be said of it, if anything."""
    from ldm_vae.models.reconstruction import reconstruct

    return convert_file(command, reconstruct)


def convert_file(command: Reconstruct, function: Callable[[Any, Any], Any]) -> str | None:
    """Writes function(autoencoder, image) of the command's input, and returns what is to be said of it, if anything."""
    import numpy as np
    import torch

    from ldm_vae.codec.picture import encode_picture, from_pixels
    from ldm_vae.commands.convert import convert_image
    from ldm_vae.data.png import stream_png
    from ldm_vae.models.interface import channels_of
    from ldm_vae.models.reconstruction import reach_of

    vae = command.loaded(command.workers)
    found = read_image(
        read(STREAM) if command.input == STREAM else Path(command.input),
        channels=channels_of(vae),
        keep_alpha=True,
        max_pixels=command.max_pixels,
        options=command.options(),
        scratch=None if reach_of(vae) is None else command.scratch,
    )
    command.limits().check(found.pixels.shape[1], found.pixels.shape[0])
    image = convert_image(found, partial(function, vae), vae, torch.device(command.device))
    extension = ".png" if is_nameless(command.output) else Path(command.output).suffix.lower()
    notes = list(image.notes)
    if extension == ".png":
        note = in_one_line(notes, strict=command.strict)
        with nullcontext(sys.stdout.buffer) if command.output == STREAM else atomic(Path(command.output)) as out:
            stream_png(out, image.strips, image.shape, metadata=image.metadata)
        return note
    picture = from_pixels(np.concatenate(list(image.strips)), channels=channels_of(vae), metadata=image.metadata)
    data = encode_picture(picture, extension, notes)
    note = in_one_line(notes, strict=command.strict)
    write(command.output, data)
    return note


def reconstruct_files(command: Reconstruct) -> None:
    command.options()  # what is wrong with a flag is said once
    transfer(reconstruct_file, command, inputs=images_below, extension=".png", beside=".reconstructed.png")
