"""The images of a source as equal uint8 squares, in an order that is a pure function of a seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.images import Sample, centre_square
from ldm_vae.data.order import index_at
from ldm_vae.data.sources import Source
from ldm_vae.errors import BadImageError


def shuffled_squares(
    source: Source, *, resolution: int, seed: int, limit: int, bad_images: dict[str, str]
) -> Iterator[Sample]:
    """The first `limit` usable images of a source in a keyed permutation, each once: pixels uint8 (R, R, C).

    The permutation makes a part of a data set that is sorted by class a fair part.

    Args:
        resolution: R, of the centred squares.
        bad_images: what cannot be used is passed over and put in here: name -> reason.
    """
    found = 0
    for position in range(len(source)):
        if found == limit:
            return
        index = index_at(position, size=len(source), seed=seed)
        try:
            sample = source[index]
        except BadImageError as error:
            bad_images[source.name(index)] = str(error)
            continue
        pixels = centre_square(sample.pixels, resolution)
        pixels = pixels if pixels.dtype == np.uint8 else to_pixels(to_images(pixels))
        found += 1
        yield Sample(pixels=pixels, label=sample.label, name=sample.name)
