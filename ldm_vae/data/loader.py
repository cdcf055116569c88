"""Batches for training: which crop of which image stands at which position, decoded ahead by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from ldm_vae.data.corruption import UNKNOWN_LEVEL, Pairing
from ldm_vae.data.images import Pixels, resize, values_of
from ldm_vae.data.order import Stream, generator_at, index_at, positions_of
from ldm_vae.data.sources import BadImages, Source, first_usable
from ldm_vae.data.workers import made_ahead
from ldm_vae.errors import nothing_usable

Values = TypeVar("Values")
"""Arrays where rows are made, tensors in the trainer."""


@dataclass(frozen=True, kw_only=True)
class Batch(Generic[Values]):
    """images (B, C, R, R) in [-1, 1], their positions, and the bad images passed on the way."""

    images: Values
    positions: list[int]
    bad_images: BadImages
    inputs: Values | None = None
    """What the network sees (B, C, R, R), where that differs from the images, which are its targets."""
    noise_levels: Values | None = None
    """Standard deviation of the noise in the inputs (B,), in 0..255; negative where it is unknown."""

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A crop, its position, and the bad images passed on the way; no crop when nothing is usable."""

    image: np.ndarray | None
    """(C, R, R) in [-1, 1]."""
    position: int
    bad_images: BadImages
    input: np.ndarray | None = None
    noise_level: float = UNKNOWN_LEVEL


class CropDataset:
    """`crops[position]` is a random crop, perhaps mirrored: a pure function of (source, seed, position).

    A bad image is replaced by the next usable one of the source.

    Args:
        resolution: side R of the crops.
        shorter_side: images are resized so that their shorter side has this many pixels before the crop; None
            keeps their size. Images smaller than the crop are always enlarged.
        cache_bytes: decoded images are kept in this process up to so many bytes.
        mirror: whether every second crop is mirrored.
        reduction: images are resized by a factor drawn from this range (low, high), at most 1, before each crop; no
            further than the crop's side.
        pairing: makes of a crop what the network sees, and its target; the crop is both unless given.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        resolution: int,
        shorter_side: int | None = None,
        cache_bytes: int = 0,
        mirror: bool = True,
        reduction: tuple[float, float] = (1.0, 1.0),
        pairing: Pairing | None = None,
    ) -> None:
        self.source, self.seed, self.resolution, self.shorter_side = source, seed, resolution, shorter_side
        self.mirror, self.reduction, self.pairing = mirror, reduction, pairing
        self.cache: dict[int, Pixels] = {}
        self.cache_left = cache_bytes
        self.known_bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Row:
        index = index_at(position, size=len(self.source), seed=self.seed)
        pixels, bad_images = first_usable(self.source, index, self.known_bad, read=self.load)
        if pixels is None:
            return Row(image=None, position=position, bad_images=bad_images)
        crop = self.crop(pixels, generator_at(self.seed, position, Stream.CROP))
        row = Row(image=values_of(crop), position=position, bad_images=bad_images)
        if self.pairing is None:
            return row
        pair = self.pairing(crop, generator_at(self.seed, position, Stream.CORRUPTION))
        return replace(row, image=values_of(pair.target), input=values_of(pair.input), noise_level=pair.noise_level)

    def load(self, index: int) -> Pixels:
        """Image `index`, shrunk to the shorter side where it is larger. Raises BadImageError."""
        if index in self.cache:
            return self.cache[index]
        pixels = self.source[index].pixels
        height, width = pixels.shape[:2]
        target = max(self.shorter_side or min(height, width), self.resolution)
        if target < min(height, width):
            scale = target / min(height, width)
            size = (max(target, round(height * scale)), max(target, round(width * scale)))
            pixels = resize(pixels, size)
        if pixels.nbytes <= self.cache_left:
            self.cache[index] = pixels
            self.cache_left -= pixels.nbytes
        return pixels

    def crop(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """A crop (R, R, C); `rng` draws its place, whether it is mirrored, and how far the image is reduced."""
        height, width = pixels.shape[:2]
        target = max(self.shorter_side or min(height, width), self.resolution)
        side = self.resolution * min(height, width) / target  # in pixels of this image; below R it is enlarged
        along, across, mirror, reduced = rng.random(4)
        low, high = self.reduction
        side = min(side / (low + (high - low) * reduced), max(side, min(height, width)))
        if side == self.resolution:
            top, left = int(along * (height - self.resolution + 1)), int(across * (width - self.resolution + 1))
            crop = pixels[top : top + self.resolution, left : left + self.resolution]
        else:
            y, x = along * (height - side), across * (width - side)
            crop = resize(pixels, (self.resolution, self.resolution), (x, y, x + side, y + side))
        return crop[:, ::-1] if self.mirror and mirror < 0.5 else crop


class MicroBatches:
    """The positions of each micro-batch of one process, from `first_step` up to `last_step`."""

    def __init__(
        self, *, first_step: int, last_step: int, batch_size: int, rank: int, num_processes: int, accumulation: int
    ) -> None:
        self.first_step, self.last_step, self.batch_size = first_step, last_step, batch_size
        self.rank, self.num_processes, self.accumulation = rank, num_processes, accumulation

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            positions = positions_of(step, batch_size=self.batch_size, rank=self.rank, num_processes=self.num_processes)
            share = len(positions) // self.accumulation
            for i in range(self.accumulation):
                yield list(positions[i * share : (i + 1) * share])


def collate(rows: list[Row]) -> Batch[np.ndarray]:
    """A batch; without images when none is usable."""
    bad_images: BadImages = {}
    for row in rows:
        bad_images |= row.bad_images
    images = [row.image for row in rows if row.image is not None]
    inputs = [row.input for row in rows if row.input is not None]
    return Batch(
        images=stacked(images),
        positions=[row.position for row in rows],
        bad_images=bad_images,
        inputs=stacked(inputs) if inputs else None,
        noise_levels=np.array([row.noise_level for row in rows], np.float32) if inputs else None,
    )


def stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """Rows (N, ...) one after another in memory; of none (0,)."""
    if not arrays:
        return np.empty(0, np.float32)
    return np.stack(arrays, out=np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype))


def collated(rows: Any, collate: Callable[[list[Any]], Any], items: list[int]) -> Any:
    return collate([rows[item] for item in items])


def load_batches(
    rows: Any,
    order: MicroBatches,
    *,
    collate: Callable[[list[Any]], Any],
    num_workers: int,
    pin_memory: bool,
) -> Iterator[Any]:
    """The micro-batches of `order`, as tensors, made by `num_workers` processes, or by this one when that is 0.

    Args:
        rows: indexed by position; free of torch, which workers do not import.
        collate: a list of rows -> a batch of arrays, with `bad_images` and a length: 0 where nothing is usable.

    Raises:
        DataError: nothing in the source can be used.
    """
    for batch in made_ahead(partial(collated, rows, collate), order, num_workers=num_workers):
        if not len(batch):
            raise nothing_usable(batch.bad_images)
        yield with_tensors(batch, pin_memory=pin_memory)


def with_tensors(batch: Any, *, pin_memory: bool = False) -> Any:
    """The batch with tensors for arrays; they share the arrays' memory unless it is pinned."""
    import torch  # the trainer has it, workers do not

    arrays = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {n: torch.from_numpy(a) for n, a in arrays.items() if isinstance(a, np.ndarray)}
    return replace(batch, **{n: t.pin_memory() if pin_memory else t for n, t in tensors.items()})
