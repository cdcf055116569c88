"""Images to encode, at the size of the autoencoder's training unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_vae.data.reader import USUAL, ReadOptions
from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError
from ldm_vae.latents.rows import Squares
from ldm_vae.models.interface import channels_of, check_resolution, side_for, stride_of
from ldm_vae.runs.config import saved_config


def open_squares(data: str, vae: Any, name: str, resolution: int | None, *, options: ReadOptions = USUAL) -> Squares:
    """The squares of a data set that an autoencoder takes, of this side or of the one that its run was trained on.

    Raises:
        ConfigError: `name` is a model without its run, or the side is none that the model takes.
        DataError: no images there.
    """
    side = side_for(vae, resolution)
    if side is None:
        run = saved_config(Path(name)) if (Path(name) / "vae").is_dir() else None
        trained = (run or {}).get("shorter_side") or (run or {}).get("resolution")
        if trained is None:
            raise ConfigError(f"{name} does not say which size of images it was trained on: add --resolution 256, say")
        side = int(trained - trained % stride_of(vae))
    check_resolution(side, vae)
    return Squares(open_source(data, channels=channels_of(vae), resolution=side, options=options), side)
