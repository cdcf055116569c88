"""The images of a source as uint8: equal squares in an order that is a pure function of a seed, or as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from ldm_vae.data.conversion import as_uint8
from ldm_vae.data.images import Pixels, Sample, centre_square
from ldm_vae.data.sources import BadImages, Source, shuffled, usable
from ldm_vae.errors import nothing_usable


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


def read_usable(source: Source, count: int | None) -> dict[int, Pixels]:
    """The first `count` images (None: all) at their own size by index, uint8; prints those that cannot be used.

    Raises:
        DataError: none can be used.
    """
    bad_images: BadImages = {}
    images = {
        i: as_uint8(sample.pixels) for i, sample in usable(source, bad_images, indices=range(len(source))[:count])
    }
    for name, reason in bad_images.items():
        print(f"left out: {name}: {reason}")
    if not images:
        raise nothing_usable(bad_images)
    return images
