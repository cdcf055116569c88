"""Look into the latent space of autoencoders, beside each other.

python pipelines/explore.py --vae RUN_OR_MODEL [--vae ...] --data PATH --output DIR

For each autoencoder a folder with contact sheets: samples.png (latents from the prior, or without one from a
normal distribution of each channel's mean and deviation), interpolations.png, traversals.png (the channels that vary
most, one at a time), neighbours.png (images with the nearest vectors); and channels.csv (mean, deviation, KL and
activity of each channel). --num-samples writes samples one by one, for benchmarks/generation.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.files import check_writable, write_csv
from ldm_vae.grids import labelled_rows, validation_images, visible
from ldm_vae.models.interface import channels_of, encode_moments, is_variational, posterior_of, side_for, stride_of
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.objectives.losses import kl_bits_per_channel
from ldm_vae.runs.config import parse_flags

STEPS = 8
"""Pictures a row of interpolations and traversals."""
REACH = 3.0
"""Traversals go so many deviations each way."""
RANGES = {"none": (-torch.inf, torch.inf), "relu": (0.0, torch.inf), "sigmoid": (0.0, 1.0)}
"""Where latents can be, by their activation."""
SAMPLE = "[0-9][0-9][0-9][0-9][0-9].png"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the explorer."""

    vae: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Run directory, diffusers folder or hub id; give it once for each autoencoder."""
    data: str
    """Images whose latents are looked at."""
    output: Path
    resolution: int = 64
    """Side of the squares that images are resized to; a model of vectors has its own."""
    num_images: int = 500
    """Images that are measured, up to 1000."""
    rows: int = 8
    """Rows of a sheet."""
    num_samples: int = 0
    """Samples to write one by one."""
    seed: int = 0


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
        """Whether the latents were drawn towards N(0, 1); those whose deviation never changes were not: of plain
        autoencoders, and of those that were trained for the codec."""
        deviations = self.moments.chunk(2, dim=1)[1]
        return is_variational(self.vae) and not bool((deviations == deviations.flatten()[0]).all())

    def decoded(self, latents: Tensor) -> np.ndarray:
        """Latents (n, c, h, w) -> pixels (n, R, R, 3)."""
        with torch.inference_mode():
            return visible(torch.cat([self.vae.decode(z[None]).sample for z in latents]).clamp(-1, 1))


def drawn(space: Space, count: int, seed: int) -> Tensor:
    """Latents from N(0, 1) where that is their prior; otherwise from a normal distribution fitted to each channel.

    Those of a sparse autoencoder that would be where no latent can be are moved to the nearest place where one can.
    """
    noise = torch.randn((count, *space.latents.shape[1:]), generator=torch.Generator().manual_seed(seed))
    if space.normal_prior:
        return noise
    mean, std = (f(space.latents, dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    return (mean + std * noise).clamp(*RANGES[space.vae.config.get("latent_activation", "none")])


def samples(space: Space, config: Config) -> Image.Image:
    made = space.decoded(drawn(space, config.rows * STEPS, config.seed))
    of = "N(0, 1)" if space.normal_prior else "each channel's mean and deviation"
    rows = [(f"latents from {of}" if i == 0 else "", made[i * STEPS : (i + 1) * STEPS]) for i in range(config.rows)]
    return labelled_rows(rows)


def write_samples(space: Space, folder: Path, config: Config) -> None:
    """One PNG a sample, grey or RGB, in the place of the ones before."""
    grey = channels_of(space.vae) == 1
    folder.mkdir(exist_ok=True)
    for old in folder.glob(SAMPLE):
        old.unlink()
    for i, z in enumerate(drawn(space, config.num_samples, config.seed + 1)):
        pixels = space.decoded(z[None])[0]
        Image.fromarray(pixels[:, :, 0] if grey else pixels).save(folder / f"{i:05d}.png")


def interpolations(space: Space, config: Config) -> Image.Image:
    """Straight lines between the latents of two images; the images themselves at both ends."""
    rows = []
    for i in range(min(config.rows, len(space.images) // 2)):
        first, last = space.latents[2 * i], space.latents[2 * i + 1]
        shares = torch.linspace(0, 1, STEPS)[:, None, None, None]
        between = space.decoded((1 - shares) * first + shares * last)
        ends = visible(space.images[2 * i : 2 * i + 2])
        rows.append(("image, latents between, image" if i == 0 else "", np.concatenate([ends[:1], between, ends[1:]])))
    return labelled_rows(rows)


def traversals(space: Space, config: Config) -> Image.Image:
    """One image with a channel moved from -REACH to REACH of its deviations, for the channels that vary most."""
    deviations = space.latents.std(dim=(0, 2, 3))
    rows = []
    for channel in deviations.argsort(descending=True)[: config.rows].tolist():
        moved = space.latents[:1].repeat(STEPS, 1, 1, 1)
        moved[:, channel] += (torch.linspace(-REACH, REACH, STEPS) * deviations[channel])[:, None, None]
        title = f"channel {channel}, -{REACH:g} to {REACH:g} deviations of {deviations[channel]:.3g}"
        rows.append((title, space.decoded(moved)))
    return labelled_rows(rows)


def neighbours(space: Space, config: Config) -> Image.Image:
    """Images, and those whose vectors are nearest."""
    vectors = space.latents.flatten(1)
    distances = torch.cdist(vectors[: config.rows], vectors)
    nearest = distances.argsort(dim=1)[:, :STEPS]
    titles = ["image, then the nearest ones"] + [""] * (len(nearest) - 1)
    rows = [(title, visible(space.images[n])) for title, n in zip(titles, nearest, strict=True)]
    return labelled_rows(rows)


def channels(space: Space) -> list[dict[str, Any]]:
    """A row a channel. Activity is the variance of the means (Burda et al. 2016, section 2.4: in use above 0.01)."""
    posterior = posterior_of(space.moments)
    bits = kl_bits_per_channel(posterior).tolist() if space.normal_prior else None
    idle = 0.5 if space.vae.config.get("latent_activation") == "sigmoid" else 0.0
    rows = []
    for c in range(space.latents.shape[1]):
        values = space.latents[:, c].double()
        rows.append(
            {
                "channel": c,
                "mean": float(values.mean()),
                "std": float(values.std()),
                "activity": float(values.var()),
                "active": float((values.abs() > idle).double().mean()),
                "posterior_std": "" if bits is None else float(posterior.std[:, c].square().mean().sqrt()),
                "kl_bits": "" if bits is None else bits[c],
            }
        )
    return rows


def main(config: Config) -> None:
    if not config.vae:
        raise ConfigError("no --vae given: name at least one run directory, diffusers folder or hub id")
    if min(config.resolution, config.rows) < 1 or config.num_images < 2 or config.num_samples < 0:
        raise ConfigError("--resolution and --rows must be at least 1, --num-images 2, and --num-samples 0")
    paths = list(dict.fromkeys(config.vae))
    folders = [Path(path).name for path in paths]
    if len(set(folders)) < len(folders):  # runs/a/vae and runs/b/vae
        folders = [f"{i}-{name}" for i, name in enumerate(folders)]
    targets = [config.output / name if len(paths) > 1 else config.output for name in folders]
    for folder in targets if config.num_samples else []:
        if any(not p.match(SAMPLE) for p in (folder / "samples").glob("*")):
            raise ConfigError(f"{folder / 'samples'} holds other things than samples: choose another --output")
    check_writable(config.output)
    for path, folder in zip(paths, targets, strict=True):
        vae = load_autoencoder(path)
        side = side_for(vae, None) or max(config.resolution // stride_of(vae), 1) * stride_of(vae)
        source = open_source(config.data, channels=channels_of(vae), resolution=side)
        images, bad = validation_images(source, side=side, count=config.num_images, seed=config.seed)
        if len(images) < 2:
            raise ConfigError(f"{config.data} has one usable image: at least two are needed")
        with torch.inference_mode():
            moments = torch.cat([encode_moments(vae, i[None]).float() for i in images])
        space = Space(vae=vae, images=images, moments=moments)
        folder.mkdir(parents=True, exist_ok=True)
        for draw in (samples, interpolations, traversals, neighbours):
            draw(space, config).save(folder / f"{draw.__name__}.png")
        write_csv(folder / "channels.csv", channels(space))
        if config.num_samples:
            write_samples(space, folder / "samples", config)
        print(f"{path}: {len(images)} images, {len(bad)} bad; the sheets are in {folder}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Look into the latent space of autoencoders."))
