"""One image through an autoencoder; and every image of a source, as PNG files of the same names, on all processes of a
launch, where the same command makes what is missing.

Accelerate and diffusers are imported for the sources alone: they take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae.codec.picture import from_pixels, with_alpha
from ldm_vae.commands.folders import in_one_line, numbered, result_names, run_jobs, stays_inside, totals
from ldm_vae.data.colour import fitting
from ldm_vae.data.conversion import check_viewable, to_images, to_pixels
from ldm_vae.data.images import ImageFile, Pixels, Sample, convert_channels
from ldm_vae.data.large import MAX_LARGE_PIXELS, let_go
from ldm_vae.data.metadata import Metadata
from ldm_vae.data.png import stream_png
from ldm_vae.data.reader import ReadOptions
from ldm_vae.data.sources import Source, check_finite, check_outside, open_source
from ldm_vae.errors import BadImageError, nothing_usable
from ldm_vae.files import atomic, check_writable, write_bad_images
from ldm_vae.models.interface import channels_of, fingerprint
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.reconstruction import exact_float32, reach_of, turn_on_tiling
from ldm_vae.models.tiles import spans
from ldm_vae.runs.config import Range, check_ranges

if TYPE_CHECKING:
    from accelerate import Accelerator

SIDE = 1024
"""Of the tiles in which a large image goes through an autoencoder that sees only so far, in pixels."""
IN_ONE = 4 * SIDE**2
"""Pixels of the largest image that goes through as a whole."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    vae: str
    """Run directory, diffusers folder or hub id."""
    input: str
    """Folder or other source of images."""
    output: Path
    tile: bool = False
    """Work on tiles, in the memory of one tile."""
    max_pixels: Annotated[int, Range(at_least=1)] = MAX_LARGE_PIXELS
    """Larger images are listed as bad ones. From some 33 million pixels on they go by way of the disk, if the
    autoencoder sees only so far."""
    pages_as_channels: bool = False
    """Take the pages of a TIFF as channels; otherwise its first page is the image."""
    value_range: tuple[float, float] | None = None
    """Values of black and white in images of floats, or of more than 8 bits."""
    strict: bool = False
    """List an image as a bad one if something of it would be lost, instead of a line that says what."""

    def options(self) -> ReadOptions:
        return ReadOptions(keep_colour=True, pages_as_channels=self.pages_as_channels, value_range=self.value_range)


def prepare(config: ConvertConfig) -> tuple[Any, Accelerator, dict[str, str]]:
    """The autoencoder on this process's device, and the settings that results depend on."""
    from accelerate import Accelerator
    from diffusers.utils import logging

    from ldm_vae.runs.processes import PATIENCE

    check_ranges(config)
    logging.disable_progress_bar()
    exact_float32()
    accelerator = Accelerator(kwargs_handlers=[PATIENCE])
    vae = load_autoencoder(config.vae).to(accelerator.device)
    tiles = "none, or exact" if not config.tile or turn_on_tiling(vae) else "blended"
    return vae, accelerator, {"model": fingerprint(vae), "tiles": tiles}


def open_images(config: ConvertConfig, channels: int, scratch: Path | None) -> Source:
    """As they are stored, with transparency and metadata. Raises ConfigError, DataError."""
    source = open_source(
        config.input,
        channels=channels,
        keep_alpha=True,
        max_pixels=config.max_pixels,
        options=config.options(),
        scratch=scratch,
    )
    check_finite(source, config.input, None)
    check_outside(config.output, config.input, flag="--input")
    return source


def convert_images(
    config: ConvertConfig,
    vae: Any,
    function: Callable[[Tensor], Tensor],
    *,
    settings: Mapping[str, str],
    accelerator: Accelerator,
) -> None:
    """Each image (1, C, H, W) in [-1, 1] of a source -> function(image), as a PNG of as many bits.

    Transparency and metadata go along unchanged. What is there and whole is left as it is. `bad_images.csv` lists what
    could not be used.

    Args:
        function: a way through `vae` that gives images of the same size; called without gradients, on the process's
            device. Where the autoencoder sees only so far, large images go through in tiles, and never lie in memory
            as a whole.
        settings: what the results depend on beside the images; files of others are not mixed with these.

    Raises:
        ConfigError: an output within the input, or a source without end.
        DataError: nothing that can be used.
        RunError: files of other settings are there.
    """
    from accelerate.utils import gather_object

    from ldm_vae.commands.resumable import share_work

    channels, reach = channels_of(vae), reach_of(vae)
    check_viewable(channels)
    source = open_images(config, channels, scratch=None if reach is None else config.output)
    check_writable(config.output)
    names = numbered(source.name(i) for i in range(len(source)))
    files = result_names(names, ".png")
    index_of = {file: index for index, file in enumerate(files)}
    settings = {**settings, "images": source.fingerprint()}
    own_files, num_finished = share_work(config.output, index_of, settings, accelerator)

    def convert(index: int) -> str | None:
        if not stays_inside(files[index]):
            raise BadImageError("its name leads out of the output's folder")
        target = config.output / files[index]
        if target.is_symlink():
            check_outside(target, config.input, flag="--input")
        image = convert_image(source[index], function, vae, accelerator.device)
        note = in_one_line(image.notes, strict=config.strict)
        text = {"image": names[index], **settings}
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target) as out:
            stream_png(out, image.strips, image.shape, metadata=image.metadata, text=text)
        return note

    jobs = {names[index_of[file]]: index_of[file] for file in own_files}
    failures = run_jobs(convert, jobs, errors=(BadImageError,), show=accelerator.is_main_process)
    for part in gather_object([failures]):
        failures |= part
    if accelerator.is_main_process:
        write_bad_images(config.output, failures)
        if len(failures) == len(files):
            raise nothing_usable(failures)
        print(totals(len(files) - num_finished, failures, config.output, skipped=num_finished))
    accelerator.end_training()


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a file of the result is made of: its pixels and transparency in strips, each made when it is asked for."""

    strips: Iterator[Pixels]
    shape: tuple[int, ...]
    """(H, W, C) of the whole."""
    metadata: Metadata
    notes: tuple[str, ...]


def convert_image(
    found: Sample | ImageFile, function: Callable[[Tensor], Tensor], vae: Any, device: torch.device
) -> Converted:
    """An image as it was stored -> function(image), with as many bits, its transparency and metadata.

    Args:
        function: as `convert_images` takes it. If `vae` has four channels, it takes the transparency, too.

    Raises:
        BadImageError: channels that do not fit.
    """
    channels, reach = channels_of(vae), reach_of(vae)
    pixels = convert_channels(found.pixels, 4) if channels == 4 else found.pixels
    picture = from_pixels(pixels, channels=channels, metadata=found.metadata)
    pixels, alpha = picture.pixels, picture.alpha
    colours = channels_of_result(pixels.shape[2], channels)
    metadata, dropped = fitting(picture.metadata, colours)
    way = partial(through, function, channels=channels, device=device)
    if reach is None or pixels[:, :, 0].size <= IN_ONE:
        strips: Iterator[Pixels] = map(way, [pixels])
    else:
        strips = strips_through(way, pixels, *reach, colours=colours)
    return Converted(
        strips=with_alpha(strips, alpha),
        shape=(*pixels.shape[:2], colours + (alpha is not None)),
        metadata=metadata,
        notes=(*found.notes, *dropped),
    )


def channels_of_result(have: int, channels: int) -> int:
    """Without transparency: a grey image stays grey in an autoencoder of three channels."""
    return 1 if (have, channels) == (1, 3) else channels


@torch.inference_mode()
def through(function: Callable[[Tensor], Tensor], pixels: Pixels, *, channels: int, device: torch.device) -> Pixels:
    """Pixels (H, W, C) of 8 or 16 bits -> those of function(image), of as many bits."""
    images = function(to_images(convert_channels(pixels, channels))[None].to(device))[0]
    if channels_of_result(pixels.shape[2], channels) == 1:
        images = images.mean(dim=0, keepdim=True)
    return to_pixels(images, pixels.dtype)


def strips_through(
    way: Callable[[Pixels], Pixels], pixels: Pixels, reach: int, unit: int, *, colours: int
) -> Iterator[Pixels]:
    """What `through` gives, in strips of the whole width from top to bottom, made tile by tile.

    Args:
        reach: pixels around a tile on which it depends.
        unit: tiles begin at multiples of so many pixels.
        colours: channels of what `way` gives.
    """
    side = -(-SIDE // unit) * unit
    height, width = pixels.shape[:2]
    for top, bottom, above, below in spans(height, side, reach):
        strip = np.empty((bottom - top, width, colours), pixels.dtype)
        for left, right, before, behind in spans(width, side, reach):
            tile = way(pixels[above:below, before:behind])
            strip[:, left:right] = tile[top - above : bottom - above, left - before : right - before]
        let_go(pixels)
        yield strip
