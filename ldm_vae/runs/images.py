"""What the trainers of autoencoders share about their images: flags, sources, and crops."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

import tyro
from accelerate import Accelerator

from ldm_vae.data.corruption import Pairing
from ldm_vae.data.loader import CropDataset
from ldm_vae.data.reader import USUAL
from ldm_vae.data.sources import Source, check_outside, open_mix, open_source
from ldm_vae.errors import ConfigError
from ldm_vae.models.interface import SCALE, channels_of, check_resolution, has_vector, patch_norm_of, stride_of
from ldm_vae.runs.config import Range, Reading, RunConfig
from ldm_vae.runs.loop import start


@dataclass(frozen=True, kw_only=True)
class ImageConfig(RunConfig):
    """Flags of every trainer that reads images."""

    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Image folder, .zip, tar shards, Hugging Face dataset, or procedural:NAME. Several times for several; of PATH:2,
    each image counts twice."""
    val_data: str | None = None
    """Images for the sample grid and the validation PSNR; the first of --data unless given."""
    resolution: Annotated[int, Range(at_least=1)] = 256
    """Side of the training crops, in pixels."""
    shorter_side: Annotated[int | None, Range(at_least=1)] = None
    """Resize images to this shorter side before the crop; keep their size unless given."""
    channels: Annotated[int, Range(at_least=1)] = 3
    """Channels of the images."""
    reading: Reading = USUAL
    mirror: bool = True
    """Mirror every second crop."""
    cache_gib: Annotated[float, Range(at_least=0)] = 1.0
    """Decoded images that each training process may keep in memory."""
    architecture: tyro.conf.Suppress[str] = "f8c4"
    init: str | None = None
    """Start from this autoencoder (run, diffusers folder, hub id or .safetensors file) instead of the preset's."""

    def check(self, num_processes: int) -> None:
        if not self.data:
            raise ConfigError("--data is missing: name a folder of images")
        super().check(num_processes)

    @property
    def side(self) -> int:
        """Of the images that are looked at."""
        return self.shorter_side or self.resolution


Config = TypeVar("Config", bound=ImageConfig)


def start_on_images(config: Config) -> tuple[Config, Accelerator, Source, Source]:
    """As `start`, with the images to train on and those of the validation.

    Raises:
        ConfigError: flags that cannot work, or a launch with FSDP.
        DataError: no images there.
    """
    config, accelerator = start(config)
    if accelerator.is_fsdp2:
        raise ConfigError("an autoencoder is not divided among processes: launch without FSDP")
    open_one = partial(open_source, channels=config.channels, resolution=config.side, options=config.reading)
    for path in config.data:
        check_outside(config.output, path, flag="--data")
    source = open_mix(config.data, open_one)
    return config, accelerator, source, source if config.val_data is None else open_one(config.val_data)


def check_network(vae: Any, config: ImageConfig) -> None:
    """Raises ConfigError for images that the autoencoder cannot take."""
    if channels_of(vae) != config.channels:
        raise ConfigError(f"{config.init} takes images of {channels_of(vae)} channels: add --channels to say so")
    if config.side < stride_of(vae):
        flag = "--shorter-side" if config.shorter_side else "--resolution"
        raise ConfigError(f"{flag} {config.side} is less than the model's stride of {stride_of(vae)}")
    check_resolution(config.resolution, vae)


def forget_scale(vae: Any) -> None:
    """Of the latents of an autoencoder whose encoder is about to change."""
    vae.register_to_config(**{name: value for name, value in SCALE.items() if name in vae.config})
    norm = patch_norm_of(vae)
    if norm is not None:
        norm.reset_running_stats()


def crops_of(
    source: Source,
    vae: Any,
    config: ImageConfig,
    *,
    pairing: Pairing | None = None,
    whole_images: bool = False,
    reduction: tuple[float, float] = (1.0, 1.0),
) -> CropDataset:
    """Random crops for an autoencoder; whole images, resized to the crop's side, where it makes one vector of them."""
    whole_images = whole_images or has_vector(vae)
    return CropDataset(
        source,
        seed=config.seed,
        resolution=config.resolution,
        shorter_side=config.side if whole_images else config.shorter_side,
        cache_bytes=int(config.cache_gib * 2**30) // max(config.loader_processes, 1),
        mirror=config.mirror,
        reduction=reduction,
        pairing=pairing,
    )
