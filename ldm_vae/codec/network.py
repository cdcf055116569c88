"""An autoencoder from pixels to latents and back, box by box, so that large pictures need little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ldm_vae.codec.bitstream import Box, Header
from ldm_vae.codec.tables import Floats
from ldm_vae.codec.tiles import BATCH, window
from ldm_vae.data.images import Pixels, pixels_of, values_of
from ldm_vae.data.large import let_go
from ldm_vae.errors import ModelError
from ldm_vae.models.tiles import spans

MARK = (255, 0, 255)
"""Colour of what could not be decoded; grey pictures take its mean."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """A box of pixels that are decoded together, and the box of latents that they depend on."""

    pixels: Box
    latents: Box


class Network:
    """An autoencoder's geometry.

    Args:
        autoencoder: a TorchAutoencoder or a SeparableAutoencoder.

    Attributes:
        stride, channels, finite: the autoencoder's.
    """

    def __init__(self, autoencoder: Any) -> None:
        self.autoencoder = autoencoder
        self.stride, self.channels, self.finite = autoencoder.stride, autoencoder.channels, autoencoder.finite
        self.decoder_halo = autoencoder.decoder_halo

    def box_of(self, pixels: Pixels) -> Box:
        """All latents of a picture."""
        return 0, 0, -(-pixels.shape[0] // self.stride), -(-pixels.shape[1] // self.stride)

    def bands(self, header: Header, box: Box) -> list[Band]:
        """A box of pixels from top to bottom, divided where the tiles end that are in memory together."""
        top, left, bottom, right = box
        rows = max(BATCH // header.grid[1], 1) * (self.stride << header.log2_tile) if self.finite else header.height
        bands = []
        for above, below in pairwise([top, *range(top - top % rows + rows, bottom, rows), bottom]):
            pixels = (above, left, below, right)
            around = grown(self.cells(pixels), self.decoder_halo, header.latent_size)
            bands.append(Band(pixels=pixels, latents=around if self.finite else (0, 0, *header.latent_size)))
        return bands

    def latents(self, pixels: Pixels, boxes: Iterable[Box]) -> Iterator[Floats]:
        """Pixels (H, W, C) -> the posterior's mean, float32 (c, h, w), in each box of latents.

        Raises:
            ModelError: pixels of other channels than the model's.
        """
        whole = None if self.finite else self.encode(pixels, self.box_of(pixels))
        for box in boxes:
            yield self.encode(pixels, box) if whole is None else window(whole, self.box_of(pixels), box)
            let_go(pixels)

    def encode(self, pixels: Pixels, box: Box) -> Floats:
        latents = np.empty((self.autoencoder.latent_channels, box[2] - box[0], box[3] - box[1]), np.float32)
        for inner, outer in self.tiles(box, self.box_of(pixels)[2:], self.autoencoder.encoder_halo):
            mean = self.autoencoder.encode(values_of(self.pixels_at(pixels, outer)))
            window(latents, box, inner)[:] = window(mean, outer, inner)
        return latents

    def decode(self, latents: Floats, band: Band, header: Header) -> Pixels:
        """float32 latents (c, h, w) of a band -> its pixels (h, w, colours), of the depth that the header names."""
        f, cells = self.stride, self.cells(band.pixels) if self.finite else band.latents
        dtype = np.uint16 if header.depth == 16 else np.uint8
        pixels = np.empty((header.colours, f * (cells[2] - cells[0]), f * (cells[3] - cells[1])), dtype)
        for inner, outer in self.tiles(cells, header.latent_size, self.decoder_halo):
            image = self.autoencoder.decode(window(latents, band.latents, outer))
            if header.colours == 1:
                image = image.mean(axis=0, keepdims=True)
            tile = np.moveaxis(pixels_of(image, dtype), 2, 0)
            window(pixels, in_pixels(cells, f), in_pixels(inner, f))[:] = window(
                tile, in_pixels(outer, f), in_pixels(inner, f)
            )
        return np.ascontiguousarray(np.moveaxis(window(pixels, in_pixels(cells, f), band.pixels), 0, 2))

    def mark(self, pixels: Pixels, band: Band, damaged: Iterable[Box]) -> None:
        """Paints the damaged tiles, and what they spoil around them, in a band's pixels."""
        colour = np.array(MARK if pixels.shape[2] == 3 else [sum(MARK) // 3])
        for tile in damaged:
            top, left, bottom, right = in_pixels(grown(tile, self.decoder_halo), self.stride)
            y, x = band.pixels[:2]
            rows, columns = slice(max(top - y, 0), max(bottom - y, 0)), slice(max(left - x, 0), max(right - x, 0))
            pixels[rows, columns] = colour * (257 if pixels.dtype == np.uint16 else 1)

    def cells(self, box: Box) -> Box:
        """The latents under a box of pixels."""
        return box[0] // self.stride, box[1] // self.stride, -(-box[2] // self.stride), -(-box[3] // self.stride)

    def tiles(self, box: Box, size: tuple[int, ...], halo: int) -> Iterator[tuple[Box, Box]]:
        """What the network computes at a time of a box, without and with what it sees around that."""
        side = self.autoencoder.tile if self.finite else max(size)
        for top, bottom, _, _ in spans(box[2] - box[0], side, 0):
            for left, right, _, _ in spans(box[3] - box[1], side, 0):
                inner = (box[0] + top, box[1] + left, box[0] + bottom, box[1] + right)
                yield inner, grown(inner, halo, size)

    def pixels_at(self, pixels: Pixels, box: Box) -> Pixels:
        """The pixels of a box of latents, in the model's channels; the last row and column continue to the stride.

        A grey picture is repeated for a model of colours.
        """
        top, left, bottom, right = in_pixels(box, self.stride)
        part, channels = pixels[top:bottom, left:right], pixels.shape[2]
        if channels != self.channels and (channels, self.channels) != (1, 3):
            raise ModelError(
                f"the picture has {channels} channels and the model {self.channels}: it cannot be compressed with it"
            )
        part = np.repeat(part, self.channels // channels, axis=2)
        down, beside = bottom - top - part.shape[0], right - left - part.shape[1]
        return np.pad(part, ((0, down), (0, beside), (0, 0)), mode="edge") if down or beside else part


def grown(box: Box, halo: int, size: tuple[int, ...] = (1 << 62, 1 << 62)) -> Box:
    """A box with a halo around it, as far as there are latents of a size (h, w) and above 0."""
    top, left, bottom, right = box
    return max(top - halo, 0), max(left - halo, 0), min(bottom + halo, size[0]), min(right + halo, size[1])


def in_pixels(box: Box, stride: int) -> Box:
    """A box of latents -> the pixels that it covers."""
    return box[0] * stride, box[1] * stride, box[2] * stride, box[3] * stride
