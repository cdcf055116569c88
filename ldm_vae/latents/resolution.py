"""At which size images are encoded: that of the autoencoder's training, unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_vae.errors import ConfigError
from ldm_vae.models.interface import check_resolution, side_for, stride_of
from ldm_vae.runs.run import saved_config


def encoding_resolution(asked: int | None, vae: Any, name: str) -> int:
    """The side of the squares to encode: the one asked for, or the one that the run `name` was trained on.

    Raises:
        ConfigError: `name` is a model without its run, or the side is none that the model takes.
    """
    side = side_for(vae, asked)
    if side is None:
        run = saved_config(Path(name)) if (Path(name) / "vae").is_dir() else None
        trained = (run or {}).get("shorter_side") or (run or {}).get("resolution")
        if trained is None:
            raise ConfigError(f"{name} does not say which size of images it was trained on: add --resolution 256, say")
        side = int(trained - trained % stride_of(vae))
    check_resolution(side, vae)
    return side
