"""Rows of diffusion training: an image or its latents, with every random number that its step needs. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Generic

import numpy as np

from ldm_vae.data.images import centre_square, values_of
from ldm_vae.data.loader import Values, stacked
from ldm_vae.data.order import Stream, generator_at, index_at
from ldm_vae.data.sources import BadImages, Source, first_usable, usable
from ldm_vae.latents.cache import LatentCache
from ldm_vae.latents.timesteps import Prediction, timestep_at


@dataclass(frozen=True)
class Squares:
    """The centred square of each image, (C, R, R) in [-1, 1]: what a cache is made from.

    A bad image is replaced by the next usable one of the source.
    """

    source: Source
    resolution: int
    known_bad: dict[int, str] = field(default_factory=dict)
    encoded: ClassVar[bool] = False

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int, mirrored: bool) -> tuple[np.ndarray | None, int | None, BadImages]:
        read = partial(self.square, mirrored=mirrored)
        square, bad_images = first_usable(self.source, index, self.known_bad, read=read)
        image, label = square or (None, None)
        return image, label, bad_images

    def square(self, index: int, mirrored: bool) -> tuple[np.ndarray, int | None]:
        """Raises BadImageError."""
        sample = self.source[index]
        pixels = centre_square(sample.pixels, self.resolution)
        return values_of(pixels[:, ::-1] if mirrored else pixels), sample.label


@dataclass(frozen=True, kw_only=True)
class EncoderBatch(Generic[Values]):
    """The usable images of a batch for a cache, and the bad ones."""

    tensors: Values
    """Centred squares (B, C, R, R); once encoded, their moments (B, E, 2c, h, w)."""
    indices: list[int]
    labels: list[int]
    bad_images: BadImages


def squares_of(squares: Squares, indices: range) -> EncoderBatch[np.ndarray]:
    """Reads these images of the source."""
    images, labels, good = [], [], []
    bad_images: BadImages = {}
    read = partial(squares.square, mirrored=False)
    for index, (image, label) in usable(squares.source, bad_images, indices=indices, read=read):
        images.append(image)
        labels.append(-1 if label is None else label)
        good.append(index)
    return EncoderBatch(tensors=stacked(images), indices=good, labels=labels, bad_images=bad_images)


@dataclass(frozen=True, kw_only=True)
class DiffusionBatch(Generic[Values]):
    """One micro-batch of diffusion training. Its random numbers depend on positions alone."""

    inputs: Values
    """Moments (B, 2c, h, w) from a cache if `encoded`, otherwise images (B, C, R, R)."""
    encoded: bool
    labels: Values
    """(B,), K where there is none or it was dropped."""
    timesteps: Values
    """(B,)."""
    noise: Values
    """(B, c, h, w), of the diffusion."""
    posterior_noise: Values
    """(B, c, h, w), of the sample from the posterior."""
    bad_images: BadImages

    def __len__(self) -> int:
        return len(self.inputs)  # type: ignore[arg-type]

    def to(self, device: Any) -> DiffusionBatch[Values]:
        """Of tensors."""
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in TENSORS}
        return replace(self, **moved)


TENSORS = ("inputs", "labels", "timesteps", "noise", "posterior_noise")
DiffusionRow = tuple[np.ndarray | None, bool, int, float, np.ndarray, np.ndarray, BadImages]


@dataclass(frozen=True)
class DiffusionRows:
    """`rows[position]`: an image and its draws, a pure function of (data, seed, position)."""

    images: LatentCache | Squares
    seed: int
    prediction: Prediction
    latent_shape: tuple[int, int, int]
    """(c, h, w)."""
    label_of: Sequence[int]
    """What each label of the images is called here: K labels, none without classes."""
    label_dropout: float
    """The probability that a label is dropped to K (Ho & Salimans 2022)."""
    flip: bool
    """Half of the positions take the mirrored image."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.label_of)

    def __getitem__(self, position: int) -> DiffusionRow:
        index = index_at(position, size=len(self.images), seed=self.seed)
        mirrored = self.flip and generator_at(self.seed, position, Stream.FLIP).random() < 0.5
        image, label, met = self.images.load(index, mirrored)
        if label is None or generator_at(self.seed, position, Stream.LABEL).random() < self.label_dropout:
            label = self.num_classes
        else:
            label = self.label_of[label]
        timestep = timestep_at(self.prediction, self.seed, position)
        draws = [generator_at(self.seed, position, stream) for stream in (Stream.NOISE, Stream.POSTERIOR)]
        noises = [draw.standard_normal(self.latent_shape, dtype=np.float32) for draw in draws]
        return image, self.images.encoded, label, timestep, *noises, met  # type: ignore[return-value]


def collate_rows(rows: list[DiffusionRow]) -> DiffusionBatch[np.ndarray]:
    """A batch of length 0 when no image is usable."""
    images, encoded, labels, timesteps, noise, posterior_noise, met = zip(*rows, strict=True)
    return DiffusionBatch(
        inputs=stacked([image for image in images if image is not None]),
        encoded=encoded[0],
        labels=np.array(labels),
        timesteps=np.array(timesteps, np.float32),
        noise=np.stack(noise),
        posterior_noise=np.stack(posterior_noise),
        bad_images={name: reason for bad_images in met for name, reason in bad_images.items()},
    )
