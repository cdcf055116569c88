"""Every image of a source through a function, as PNG files of the same names: on all processes, to be gone on with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ldm_vae.commands.png import finished, own_share, write_png
from ldm_vae.data.conversion import check_viewable, to_images, to_pixels
from ldm_vae.data.images import Pixels
from ldm_vae.data.large import let_go, write_large
from ldm_vae.data.sources import check_finite, check_outside, open_source
from ldm_vae.errors import BadImageError, ConfigError, nothing_usable
from ldm_vae.files import atomic, check_writable, write_csv
from ldm_vae.models.interface import channels_of
from ldm_vae.models.reconstruction import reach_of
from ldm_vae.models.tiles import spans

SIDE = 1024
"""Of the tiles in which images go through a function that sees only so far, in pixels."""
IN_ONE = 4 * SIDE**2
"""Pixels of the largest image that goes through in one."""


def distinct(names: Iterable[str]) -> list[str]:
    """The same names; of those that come again, which archives and shards can have, a.jpg becomes a (2).jpg."""
    taken: set[str] = set()
    found = []
    for name in names:
        path, number = PurePosixPath(name), 1
        while name in taken:
            number += 1
            name = str(path.with_name(f"{path.stem} ({number}){path.suffix}"))
        taken.add(name)
        found.append(name)
    return found


def files_of(names: Sequence[str]) -> dict[str, int]:
    """PNG file -> index of its image, whose names are distinct.

    a.jpg and a.tif beside each other keep their extensions: a.jpg.png, a.tif.png.
    """
    short = [str(PurePosixPath(n).with_suffix(".png")) for n in names]
    taken = Counter(short) + Counter(f"{n}.png" for n in names)
    return {s if taken[s] == 1 else f"{n}.png": i for i, (n, s) in enumerate(zip(names, short, strict=True))}


def stays_inside(file: str) -> bool:
    """Names come from archives, too."""
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts


def convert_images(
    given: str,
    output: Path,
    function: Callable[[Tensor], Tensor],
    *,
    vae: Any,
    settings: Mapping[str, str],
    accelerator: Accelerator,
    max_pixels: int,
) -> None:
    """Each image (1, C, H, W) in [-1, 1] of a folder or other source -> function(image), as an 8-bit PNG.

    What is there and whole is left as it is. `bad_images.csv` lists what could not be used.

    Args:
        given: the source, as `open_source` takes it.
        function: a way through `vae` that gives images of the same size; called without gradients, on the process's
            device. Where the autoencoder sees only so far, images go through in parts, and large ones never lie in
            memory as a whole.
        settings: what the results depend on beside the images; files of others are not mixed with these.
        max_pixels: images with more are bad ones.

    Raises:
        ConfigError: an output within the input, or a source without end.
        DataError: nothing that can be used.
        RunError: files of other settings are there.
    """
    share = {"part": accelerator.process_index, "parts": accelerator.num_processes}
    if max_pixels < 1:
        raise ConfigError(f"--max-pixels is {max_pixels}: it must be at least 1")
    channels, reach = channels_of(vae), reach_of(vae)
    check_viewable(channels)
    scratch = None if reach is None else output
    source = open_source(given, channels=channels, max_pixels=max_pixels, scratch=scratch)
    check_finite(source, given, None)
    check_outside(output, given, flag="--input")
    check_writable(output)
    names = distinct(source.name(i) for i in range(len(source)))
    files = files_of(names)
    settings = {**settings, "images": source.fingerprint()}
    done = finished(output, files, settings, **share)
    bad: dict[str, str] = {}
    for file in tqdm(own_share(files, done, **share), unit="image", disable=not accelerator.is_main_process):
        name = names[files[file]]
        try:
            if not stays_inside(file):
                raise BadImageError("its name leads out of the output's folder")
            pixels = source[files[file]].pixels
        except BadImageError as error:
            bad[name] = str(error)
            continue
        facts = {"image": name, **settings}
        if reach is None or pixels[:, :, 0].size <= IN_ONE:
            write_png(output / file, through(function, pixels, accelerator.device), facts)
            continue
        parts = in_parts(function, pixels, *reach, device=accelerator.device)
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        with atomic(output / file) as out:
            write_large(out, parts, pixels.shape, folder=output, text=facts)
    for part in gather_object([bad]):
        bad |= part
    if accelerator.is_main_process:
        write_csv(output / "bad_images.csv", [{"name": n, "reason": r} for n, r in sorted(bad.items())])
        if len(bad) == len(files):
            raise nothing_usable(bad)
        print(f"{len(files) - len(bad)} images, {len(bad)} bad; they are in {output}")
    accelerator.end_training()


@torch.inference_mode()
def through(function: Callable[[Tensor], Tensor], pixels: Pixels, device: torch.device) -> Pixels:
    """Pixels (H, W, C) -> those of function(image), 8 bits."""
    return to_pixels(function(to_images(pixels)[None].to(device))[0])


def in_parts(
    function: Callable[[Tensor], Tensor], pixels: Pixels, reach: int, unit: int, *, device: torch.device
) -> Iterator[Pixels]:
    """What `through` gives, from top to bottom in parts of the whole width, made tile by tile."""
    side = -(-SIDE // unit) * unit
    height, width = pixels.shape[:2]
    for top, bottom, above, below in spans(height, side, reach):
        part = np.empty((bottom - top, *pixels.shape[1:]), np.uint8)
        for left, right, before, behind in spans(width, side, reach):
            made = through(function, pixels[above:below, before:behind], device)
            part[:, left:right] = made[top - above : bottom - above, left - before : right - before]
        let_go(pixels)
        yield part
