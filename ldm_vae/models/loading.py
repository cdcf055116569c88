"""Finds and loads what RUN_OR_MODEL names: a run, a diffusers folder, a hub id, or a model of the box, box:NAME; an
autoencoder may also be a single .safetensors file.

Finding a model imports neither torch nor diffusers: they take seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from ldm_vae.errors import ConfigError, ModelError
from ldm_vae.files import sha256
from ldm_vae.hub import is_hub_id

WEIGHTS = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model-*.safetensors",
)
"""diffusers' names for a network's files, in one file or several."""
PARTS = {
    "vae": ((*WEIGHTS, *(f"vae/{name}" for name in WEIGHTS)), "config.json"),
    "pipeline": (("*.json", "*.safetensors"), "model_index.json"),
}
"""What is needed of a hub's repository (patterns), and the file that names the class."""
BOX = Path(__file__).parents[1] / "box"
"""Models that come with the package, a folder each."""
SINGLE_FILE = ".safetensors"
DIGESTS = "SHA256SUMS"
"""In a model's folder of the box: the digests of what is loaded, as `sha256sum -c` reads them."""


def local_folder(name: str, files: Sequence[str]) -> Path:
    """The folder that RUN_OR_MODEL names; of a hub id, the snapshot with its `files` (patterns), downloaded.

    Raises:
        ModelError: there is no such folder, the hub does not give it, or a model of the box is damaged.
    """
    if name.startswith("box:"):
        folder = BOX / name.removeprefix("box:")
        if folder.parent != BOX or not folder.is_dir():
            known = ", ".join(sorted(f"box:{place.name}" for place in BOX.iterdir() if place.is_dir()))
            raise ModelError(f"no such model: {name} (the box has {known})")
        check_digests(folder, files)
        return folder
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        raise ModelError(f"no such model: {name}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # no network, no such repository, no permission
        raise ModelError(f"{name} could not be had from the hub: {first_line(error)}") from None


def check_digests(folder: Path, files: Sequence[str]) -> None:
    """Raises ModelError where the files of a box model that match `files` (patterns) are not as they were packed."""
    name, advice = f"box:{folder.name}", "install the package again"
    try:
        lines = [line.split("  ", 1) for line in (folder / DIGESTS).read_text().splitlines()]
        for digest, file in lines:
            if any(fnmatch(file, pattern) for pattern in files) and sha256(folder / file) != digest:
                raise ModelError(f"{name} is damaged: {file} has another digest: {advice}")
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} is damaged: {first_line(error)}: {advice}") from None


def find_saved(name: str, part: Literal["vae", "pipeline"]) -> tuple[Path, str]:
    """The local folder that holds a network or a pipeline in diffusers' layout, and the name of its class.

    It is the folder that RUN_OR_MODEL names, or the one called `part` in it, as in runs.

    Raises:
        ModelError: nothing there, or no readable configuration.
    """
    files, config = PARTS[part]
    folder = local_folder(name, files)
    reasons = []
    for place in (folder, folder / part):
        try:
            return place, str(json.loads((place / config).read_text())["_class_name"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
    raise ModelError(f"{name} has no readable {config} (has its run saved yet?): {reasons[0]}")


def load_network(name: str) -> Any:
    """The network at RUN_OR_MODEL, in float32 and evaluation mode: an autoencoder, or one that finds blemishes.

    Raises:
        ModelError: nothing there, no autoencoder, or files that cannot be read.
    """
    import diffusers

    from ldm_vae.models.autoencoder import PatchAutoencoderKL
    from ldm_vae.models.single_file import load_single_file

    if name.endswith(SINGLE_FILE):
        return load_single_file(name)
    folder, class_name = find_saved(name, "vae")
    if class_name == PatchAutoencoderKL.__name__:
        model_class: Any = PatchAutoencoderKL
    else:
        model_class = getattr(diffusers, class_name, None) if "Autoencoder" in class_name else None
    if model_class is None:
        raise ModelError(f"{name} holds a {class_name}, which is not an autoencoder")
    vae = load_saved(model_class, folder, name)
    if not {"in_channels", "latent_channels"} <= set(vae.config):
        raise ModelError(f"{name} holds a {class_name}, which is not an autoencoder of single images")
    return vae


def load_autoencoder(name: str) -> Any:
    """The autoencoder at RUN_OR_MODEL: as `load_network`, and it must give images."""
    return giving_images(load_network(name), name)


def load_for_inference(name: str) -> Any:
    """As `load_autoencoder`, to encode and decode alone: a PatchAutoencoderKL comes as its `PatchNetwork`.

    That saves the import of diffusers, which takes seconds.
    """
    if name.endswith(SINGLE_FILE):
        return load_autoencoder(name)
    folder, class_name = find_saved(name, "vae")
    if class_name != "PatchAutoencoderKL" or not (folder / WEIGHTS[1]).is_file():
        return load_autoencoder(name)
    from ldm_vae.models.patch_network import PatchNetwork

    try:
        network = PatchNetwork.load(folder)
    except Exception as error:  # damaged files raise many kinds
        raise ModelError(f"cannot load {class_name} from {name}: {type(error).__name__}: {error}") from None
    return giving_images(network, name)


def giving_images(vae: Any, name: str) -> Any:
    if vae.config.get("finds_blemishes"):
        raise ModelError(f"{name} finds blemishes and gives no images: it is for `ldm-vae anomaly`")
    return vae


def load_saved(model_class: Any, folder: Path, name: str) -> Any:
    """What `save_pretrained` wrote to a folder, in evaluation mode. Raises ModelError."""
    try:
        return model_class.from_pretrained(str(folder), use_safetensors=True)
    except Exception as error:  # damaged files raise many kinds
        raise ModelError(f"cannot load {model_class.__name__} from {name}: {type(error).__name__}: {error}") from None


def check_device(device: str) -> None:
    """Raises ConfigError for one that torch does not know, or that is not there."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise ConfigError(f"--device {device} cannot be used: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
