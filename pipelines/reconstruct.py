"""Send images through an autoencoder and back.

python pipelines/reconstruct.py --vae RUN_OR_MODEL --input PATH --output DIR

Every image at its own size, through the posterior's mean, as an 8-bit PNG of the same name. Run again, the command
makes what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.utils import logging
from tqdm import tqdm

from ldm_vae.config import parse_flags
from ldm_vae.data.conversion import check_viewable
from ldm_vae.data.images import to_images, to_pixels
from ldm_vae.data.sources import check_finite, open_source
from ldm_vae.errors import BadImageError, ConfigError, nothing_usable, one_line_errors
from ldm_vae.files import check_writable, write_csv
from ldm_vae.models.pretrained import channels_of, fingerprint, load_autoencoder
from ldm_vae.models.tiling import decode, encode_mean, turn_on_tiling
from ldm_vae.png import finished, own_share, write_png
from ldm_vae.runs import PATIENCE


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the reconstruction."""

    vae: str
    """Run directory, diffusers folder or hub id."""
    input: str
    """Folder or other source of images."""
    output: Path
    tile: bool = False
    """In tiles: for images that do not fit into memory as a whole."""


def files_of(names: Sequence[str]) -> dict[str, int]:
    """PNG file -> index of its image. a.jpg and a.tif beside each other keep their extensions: a.jpg.png, a.tif.png."""
    short = [str(PurePosixPath(n).with_suffix(".png")) for n in names]
    taken = Counter(short) + Counter(f"{n}.png" for n in names)
    return {s if taken[s] == 1 else f"{n}.png": i for i, (n, s) in enumerate(zip(names, short, strict=True))}


def stays_inside(file: str) -> bool:
    """Names come from archives, too."""
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts


def main(config: Config) -> None:
    logging.disable_progress_bar()
    accelerator = Accelerator(kwargs_handlers=[PATIENCE])
    share = {"part": accelerator.process_index, "parts": accelerator.num_processes}
    vae = load_autoencoder(config.vae).to(accelerator.device)
    check_viewable(channels_of(vae))
    source = open_source(config.input, channels=channels_of(vae))
    check_finite(source, config.input, None)
    if Path(config.input).is_dir() and config.output.resolve().is_relative_to(Path(config.input).resolve()):
        raise ConfigError(f"--output {config.output} is inside --input: its files would be images to reconstruct, too")
    check_writable(config.output)
    files = files_of([source.name(i) for i in range(len(source))])
    tile = turn_on_tiling(vae) if config.tile else None
    tiles = "blended" if config.tile and tile is None else "none, or exact"
    settings = {"model": fingerprint(vae), "images": source.fingerprint(), "tiles": tiles}
    done = finished(config.output, files, settings, **share)
    mine = own_share(files, done, **share)
    bad: dict[str, str] = {}
    for file in tqdm(mine, unit="image", disable=not accelerator.is_main_process):
        name = source.name(files[file])
        try:
            if not stays_inside(file):
                raise BadImageError("its name leads out of the output's folder")
            images = to_images(source[files[file]].pixels)[None]
        except BadImageError as error:
            bad[name] = str(error)
            continue
        with torch.inference_mode():
            made = decode(vae, encode_mean(vae, images.to(accelerator.device), tile=tile), tile=tile)
        height, width = images.shape[-2:]
        pixels = to_pixels(made[0, :, :height, :width])
        write_png(config.output / file, pixels, {"image": name, **settings})
    for part in gather_object([bad]):
        bad |= part
    if accelerator.is_main_process:
        write_csv(config.output / "bad_images.csv", [{"name": n, "reason": r} for n, r in sorted(bad.items())])
        if len(bad) == len(files):
            raise nothing_usable(bad)
        print(f"{len(files) - len(bad)} images, {len(bad)} bad; they are in {config.output}")
    accelerator.end_training()


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Send images through an autoencoder and back."))
