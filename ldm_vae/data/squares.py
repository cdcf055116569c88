"""The images of a source as equal uint8 squares, in an order that is a pure function of a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from ldm_vae.data.conversion import as_uint8
from ldm_vae.data.images import Sample, centre_square
from ldm_vae.data.sources import BadImages, Source, shuffled, usable


def shuffled_squares(
    source: Source, *, resolution: int, seed: int, limit: int, bad_images: BadImages
) -> Iterator[Sample]:
    """The first `limit` usable images of a source in a keyed permutation, each once: pixels uint8 (R, R, C).

    Args:
        resolution: R, of the centred squares.
        bad_images: those that cannot be used are passed over and put in here: name -> reason.
    """
    for _, sample in islice(usable(source, bad_images, indices=shuffled(source, seed)), limit):
        yield replace(sample, pixels=as_uint8(centre_square(sample.pixels, resolution)))
