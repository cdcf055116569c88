"""What a diffusion step is made of: an image's latents or the image, with all that is random about it drawn here."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm_vae.data.images import centre_square, to_images
from ldm_vae.data.loader import MAX_TRIES, BadImages
from ldm_vae.data.order import Stream, generator_at, index_at
from ldm_vae.data.sources import Source
from ldm_vae.errors import BadImageError, nothing_usable
from ldm_vae.latents.cache import LatentCache
from ldm_vae.objectives.diffusion import Prediction, timestep_at


class Inputs(Protocol):
    """Images, or their moments, by index: `load(index, mirrored)` -> tensor (or None), label, bad images met."""

    def __len__(self) -> int: ...
    def load(self, index: int, mirrored: bool) -> tuple[Tensor | None, int | None, BadImages]: ...


class CachedMoments:
    """Moments (2c, h, w) from a cache."""

    def __init__(self, cache: LatentCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def load(self, index: int, mirrored: bool) -> tuple[Tensor | None, int | None, BadImages]:
        row = self.cache.row(index, mirrored)
        return row.moments, row.label, {}


class Squares:
    """The centred square of each image, (C, R, R) in [-1, 1]: what a cache is made from.

    A bad image's place is taken by the next one of the source that can be used.
    """

    def __init__(self, source: Source, resolution: int, num_images: int | None = None) -> None:
        self.source, self.resolution = source, resolution
        self.count = min(len(source), num_images or len(source))
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, mirrored: bool) -> tuple[Tensor | None, int | None, BadImages]:
        met: BadImages = {}
        for _ in range(min(self.count, MAX_TRIES)):
            if index not in self.bad:
                try:
                    return *self.square(index, mirrored), met
                except BadImageError as error:
                    self.bad[index] = str(error)
            met[self.source.name(index)] = self.bad[index]
            index = (index + 1) % self.count
        return None, None, met

    def square(self, index: int, mirrored: bool) -> tuple[Tensor, int | None]:
        """Raises BadImageError."""
        sample = self.source[index]
        images = to_images(centre_square(sample.pixels, self.resolution))
        return images.flip(-1) if mirrored else images, sample.label


@dataclass(frozen=True, kw_only=True)
class DiffusionBatch:
    """What one micro-batch of diffusion training needs. All that is random in it belongs to a position."""

    inputs: Tensor
    """Moments (B, 2c, h, w) from a cache, or images (B, C, R, R)."""
    labels: Tensor
    """(B,), K where there is none or it was dropped."""
    timesteps: Tensor
    """(B,)."""
    noise: Tensor
    """(B, c, h, w), of the diffusion."""
    posterior_noise: Tensor
    """(B, c, h, w), of the sample from the posterior."""
    bad_images: BadImages

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> DiffusionBatch:
        return self.changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> DiffusionBatch:
        return self.changed(lambda tensor: tensor.pin_memory())

    def changed(self, change: Any) -> DiffusionBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return DiffusionBatch(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()})


DiffusionRow = tuple[Tensor | None, int, float, Tensor, Tensor, BadImages]


class DiffusionRows(Dataset[DiffusionRow]):
    """`rows[position]`: an image and its draws, a pure function of (data, seed, position).

    Args:
        latent_shape: (c, h, w).
        num_classes: K; labels are dropped to K with probability `label_dropout` (Ho & Salimans 2022).
        flip: half of the positions take the mirrored image.
    """

    def __init__(
        self,
        images: Inputs,
        *,
        seed: int,
        prediction: Prediction,
        latent_shape: tuple[int, int, int],
        num_classes: int,
        label_dropout: float,
        flip: bool,
    ) -> None:
        self.images, self.seed, self.prediction, self.latent_shape = images, seed, prediction, latent_shape
        self.num_classes, self.label_dropout, self.flip = num_classes, label_dropout, flip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> DiffusionRow:
        index = index_at(position, size=len(self.images), seed=self.seed)
        mirrored = self.flip and generator_at(self.seed, position, Stream.FLIP).random() < 0.5
        image, label, met = self.images.load(index, mirrored)
        if label is None or generator_at(self.seed, position, Stream.LABEL).random() < self.label_dropout:
            label = self.num_classes
        timestep = timestep_at(self.prediction, self.seed, position)
        noises = [self.draw(position, stream) for stream in (Stream.NOISE, Stream.POSTERIOR)]
        return image, label, timestep, *noises, met  # type: ignore[return-value]

    def draw(self, position: int, stream: Stream) -> Tensor:
        return torch.from_numpy(
            generator_at(self.seed, position, stream).standard_normal(self.latent_shape, dtype="float32")
        )


def collate_rows(rows: list[DiffusionRow]) -> DiffusionBatch:
    """A batch of length 0 when there are no images that can be used."""
    images, labels, timesteps, noise, posterior_noise, met = zip(*rows, strict=True)
    bad_images: BadImages = {}
    for here in met:
        bad_images |= here
    usable = [image for image in images if image is not None]
    return DiffusionBatch(
        inputs=torch.stack(usable) if usable else torch.empty(0),
        labels=torch.tensor(labels),
        timesteps=torch.tensor(timesteps, dtype=torch.float32),
        noise=torch.stack(noise),
        posterior_noise=torch.stack(posterior_noise),
        bad_images=bad_images,
    )


VALIDATION_IMAGES = 64
VALIDATION_TIMES = tuple((k + 0.5) / 8 for k in range(8))
"""The middle of each of eight ranges of time."""


def validation_batches(rows: DiffusionRows, batch_size: int) -> list[DiffusionBatch]:
    """The same images with the same noise always, none with a dropped label, in batches of at most `batch_size`.

    Raises:
        DataError: nothing in the source can be used.
    """
    fixed = copy(rows)
    fixed.label_dropout = 0.0 if rows.num_classes else 1.0
    positions = range(min(len(rows), VALIDATION_IMAGES))
    starts = range(0, len(positions), batch_size)
    batches = [collate_rows([fixed[p] for p in positions[start : start + batch_size]]) for start in starts]
    if not len(batches[0]):
        raise nothing_usable(batches[0].bad_images)
    return batches
