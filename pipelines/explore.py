"""Look into the latent space of an autoencoder.

python pipelines/explore.py --vae RUN_OR_MODEL --data PATH --output DIR

Writes grids: samples.png (latents from the prior, or without one from a normal distribution of each channel's mean and
deviation), interpolations.png, traversals.png (the channels that vary most, one at a time); and channels.csv (mean,
deviation, activity and KL of each channel). --num-samples writes samples one by one, for benchmarks/generation.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.data.reader import USUAL
from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.files import check_writable, write_csv
from ldm_vae.grids import labelled_rows, validation_images, visible
from ldm_vae.models.interface import channels_of, encode_moments, is_variational, posterior_of, side_for, stride_of
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.objectives.losses import kl_bits_per_channel
from ldm_vae.runs.config import Range, Reading, check_ranges, parse_flags

STEPS = 8
"""Images in a row of a grid."""
REACH = 3.0
"""Traversals go this many deviations each way."""
RANGES = {"none": (-torch.inf, torch.inf), "relu": (0.0, torch.inf), "sigmoid": (0.0, 1.0)}
"""Where latents can be, by their activation."""
SAMPLE = "[0-9][0-9][0-9][0-9][0-9].png"


@dataclass(frozen=True, kw_only=True)
class Config:
    vae: str
    """Run directory, diffusers folder or hub id."""
    data: str
    """Images whose latents are looked at."""
    output: Path
    resolution: Annotated[int, Range(at_least=1)] = 64
    """Side of the squares that images are resized to; a model of vectors has its own."""
    num_images: Annotated[int, Range(at_least=2)] = 500
    """Images that are measured, up to 1000."""
    rows: Annotated[int, Range(at_least=1)] = 8
    """Rows of a grid."""
    num_samples: Annotated[int, Range(at_least=0)] = 0
    """Samples to write one by one."""
    seed: int = 0
    reading: Reading = USUAL


@dataclass(frozen=True, kw_only=True)
class Space:
    """An autoencoder, images (N, C, R, R) and their moments (N, 2c, h, w)."""

    vae: Any
    images: Tensor
    moments: Tensor

    @property
    def latents(self) -> Tensor:
        """The posteriors' means."""
        return self.moments.chunk(2, dim=1)[0]

    @property
    def normal_prior(self) -> bool:
        """Whether latents were drawn towards N(0, 1). Those of one deviation everywhere were not: of plain autoencoders
        and of codecs."""
        deviations = self.moments.chunk(2, dim=1)[1]
        return is_variational(self.vae) and not bool((deviations == deviations.flatten()[0]).all())

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (n, c, h, w) -> pixels (n, R, R, 3)."""
        with torch.inference_mode():
            return visible(torch.cat([self.vae.decode(z[None]).sample for z in latents]).clamp(-1, 1))

    def draw(self, count: int, seed: int) -> Tensor:
        """Latents from N(0, 1) where that is their prior; otherwise from a normal distribution fitted to each channel,
        clamped to where a sparse autoencoder's latents can be."""
        noise = torch.randn((count, *self.latents.shape[1:]), generator=torch.Generator().manual_seed(seed))
        if self.normal_prior:
            return noise
        mean, std = (f(self.latents, dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        return (mean + std * noise).clamp(*RANGES[self.vae.config.get("latent_activation", "none")])


def grid(title: str, rows: list[np.ndarray]) -> Image.Image:
    return labelled_rows([("" if i else title, row) for i, row in enumerate(rows)])


def samples(space: Space, config: Config) -> Image.Image:
    prior = "N(0, 1)" if space.normal_prior else "each channel's mean and deviation"
    pixels = space.decode(space.draw(config.rows * STEPS, config.seed))
    return grid(f"latents from {prior}", np.split(pixels, config.rows))


def interpolations(space: Space, config: Config) -> Image.Image:
    """Straight lines between the latents of two images; the images themselves at both ends."""
    shares = torch.linspace(0, 1, STEPS)[:, None, None, None]
    rows = []
    for i in range(0, 2 * min(config.rows, len(space.images) // 2), 2):
        first, last = space.latents[i], space.latents[i + 1]
        between = space.decode((1 - shares) * first + shares * last)
        ends = visible(space.images[i : i + 2])
        rows.append(np.concatenate([ends[:1], between, ends[1:]]))
    return grid("image, latents between, image", rows)


def traversals(space: Space, config: Config) -> Image.Image:
    """One image with a channel moved from -REACH to REACH of its deviations, for the channels that vary most."""
    deviations = space.latents.std(dim=(0, 2, 3))
    rows = []
    for channel in deviations.argsort(descending=True)[: config.rows].tolist():
        latents = space.latents[:1].repeat(STEPS, 1, 1, 1)
        latents[:, channel] += (torch.linspace(-REACH, REACH, STEPS) * deviations[channel])[:, None, None]
        title = f"channel {channel}, -{REACH:g} to {REACH:g} deviations of {deviations[channel]:.3g}"
        rows.append((title, space.decode(latents)))
    return labelled_rows(rows)


def channels(space: Space) -> list[dict[str, Any]]:
    """A row per channel. Activity is the variance of the means (Burda et al. 2016, section 2.4: in use above 0.01)."""
    bits = kl_bits_per_channel(posterior_of(space.moments)).tolist() if space.normal_prior else None
    rows = []
    for c, values in enumerate(space.latents.double().unbind(dim=1)):
        row = {"channel": c, "mean": float(values.mean()), "std": float(values.std()), "activity": float(values.var())}
        rows.append(row | {"kl_bits": "" if bits is None else bits[c]})
    return rows


def write_samples(space: Space, folder: Path, config: Config) -> None:
    """One PNG per sample, grey or RGB, in the place of earlier ones."""
    grey = channels_of(space.vae) == 1
    folder.mkdir(exist_ok=True)
    for old in folder.glob(SAMPLE):
        old.unlink()
    for i, z in enumerate(space.draw(config.num_samples, config.seed + 1)):
        pixels = space.decode(z[None])[0]
        Image.fromarray(pixels[:, :, 0] if grey else pixels).save(folder / f"{i:05d}.png")


def main(config: Config) -> None:
    check_ranges(config)
    if config.num_samples and any(not p.match(SAMPLE) for p in (config.output / "samples").glob("*")):
        raise ConfigError(f"{config.output / 'samples'} holds other things than samples: choose another --output")
    check_writable(config.output)
    vae = load_autoencoder(config.vae)
    side = side_for(vae, None) or max(config.resolution // stride_of(vae), 1) * stride_of(vae)
    source = open_source(config.data, channels=channels_of(vae), resolution=side, options=config.reading)
    images, bad_images = validation_images(source, side=side, count=config.num_images, seed=config.seed)
    if len(images) < 2:
        raise ConfigError(f"{config.data} has one usable image: at least two are needed")
    with torch.inference_mode():
        moments = torch.cat([encode_moments(vae, image[None]).float() for image in images])
    space = Space(vae=vae, images=images, moments=moments)
    for draw in (samples, interpolations, traversals):
        draw(space, config).save(config.output / f"{draw.__name__}.png")
    write_csv(config.output / "channels.csv", channels(space))
    if config.num_samples:
        write_samples(space, config.output / "samples", config)
    print(f"{len(images)} images, {len(bad_images)} bad; the grids are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Look into the latent space of an autoencoder."))
