"""Finds and loads the model that RUN_OR_MODEL names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from ldm_vae.errors import ConfigError, ModelError
from ldm_vae.hub import is_hub_id
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.interface import is_finder


def load_autoencoder(path: str, *, or_finder: bool = False) -> Any:
    """The autoencoder that RUN_OR_MODEL names, in float32 and evaluation mode.

    Args:
        path: a run directory (its `vae/`), a folder of diffusers' layout, a pipeline's folder, or a hub id.
        or_finder: whether a network that finds blemishes, and gives no images, will do.

    Raises:
        ModelError: nothing there, no autoencoder, or files that cannot be read.
    """
    subfolder, name = find_model(path)
    if name == "PatchAutoencoderKL":
        model_class: Any = PatchAutoencoderKL
    else:
        model_class = getattr(diffusers, name, None) if "Autoencoder" in name else None
    if model_class is None:
        raise ModelError(f"{path} holds a {name}, which is not an autoencoder")
    try:
        vae = model_class.from_pretrained(path, subfolder=subfolder, use_safetensors=True)
    except Exception as error:  # damaged files raise many kinds
        raise ModelError(f"cannot load {name} from {path}: {type(error).__name__}: {error}") from None
    if not {"in_channels", "latent_channels"} <= set(vae.config):
        raise ModelError(f"{path} holds a {name}, which is not an autoencoder of single images")
    if is_finder(vae) and not or_finder:
        raise ModelError(f"{path} finds blemishes and gives no images: it is for `ldm-vae anomaly`")
    return vae.eval()


def check_device(device: str) -> None:
    """Raises ConfigError for one that torch does not know, or that is not there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise ConfigError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None


def find_model(path: str) -> tuple[str | None, str]:
    """The subfolder that holds the autoencoder (`vae` in runs and pipelines), and the name of its class."""
    folder = Path(path)
    on_the_hub = is_hub_id(path)
    if not folder.is_dir() and not on_the_hub:
        raise ModelError(f"no such model: {path}")
    reasons = []
    for subfolder in (None, "vae"):
        try:
            config = PatchAutoencoderKL.load_config(path, subfolder=subfolder)
            return subfolder, str(config["_class_name"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reasons.append(str(error).split("\n")[0])
    where = "could not be had from the hub" if on_the_hub else "has no readable config.json (has its run saved yet?)"
    raise ModelError(f"{path} {where}: {reasons[0]}")
