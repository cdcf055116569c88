"""A picture's latents in tiles: their symbols coded and decoded, in one thread or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import numpy as np

from ldm_vae.codec.bitstream import Box, Contents, Part, report
from ldm_vae.codec.contexts import Contexts, decode_symbols, encode_symbols
from ldm_vae.codec.loops import Integers
from ldm_vae.errors import CompressedFileError

BATCH = 16
"""Tiles whose symbols are in memory together."""


def window(values: Integers, box: Box, inner: Box) -> Integers:
    """The part within `inner` of values (C, h, w) that lie at `box`: a view."""
    top, left = box[:2]
    return values[:, inner[0] - top : inner[2] - top, inner[1] - left : inner[3] - left]


def intersection(a: Box, b: Box) -> Box | None:
    """None where they do not overlap."""
    top, left, bottom, right = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (top, left, bottom, right) if top < bottom and left < right else None


def encode_tiles(symbols: Iterable[Integers], contexts: Contexts, workers: int) -> list[bytes]:
    """int32 symbols (C, h, w) of each tile -> its bytes, in so many threads."""
    payloads: list[bytes] = []
    tiles = iter(symbols)
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(pool.map(partial(encode_symbols, contexts=contexts), islice(tiles, BATCH))):
            payloads += batch
    return payloads


def decode_tiles(
    contents: Contents, boxes: Sequence[Box], contexts: Contexts, workers: int, damage: list[str] | None
) -> Iterator[tuple[Integers, list[Box]]]:
    """int32 symbols (C, h, w) of each box of latents, from top to bottom; 0 in the tiles that are damaged.

    With them come the boxes of the tiles that were damaged so far. Each tile is decoded once. `damage` takes a message
    for each damaged tile; None: the first one is raised.
    """
    channels, tiles = contents.header.channels, contents.header.tile_boxes
    decoded: dict[int, Integers] = {}
    damaged: list[Box] = []
    with ThreadPoolExecutor(workers) as pool:
        for box in boxes:
            shared = {i: area for i, tile in enumerate(tiles) if (area := intersection(tile, box))}
            decoded = {i: s for i, s in decoded.items() if tiles[i][2] > box[0]}  # none above is needed again
            new = [i for i in shared if i not in decoded]
            parts = [contents.tiles[i] for i in new]
            payloads = [contents.data[part.begin : part.end] for part in parts]
            shapes = [(channels, tiles[i][2] - tiles[i][0], tiles[i][3] - tiles[i][1]) for i in new]
            results = pool.map(partial(decode_tile, contexts=contexts), parts, payloads, shapes)
            for i, shape, result in zip(new, shapes, results, strict=True):
                if isinstance(result, CompressedFileError):
                    report(result, contents.tiles[i].name, damage)
                    damaged.append(tiles[i])
                decoded[i] = np.zeros(shape, np.int32) if isinstance(result, CompressedFileError) else result
            symbols = np.zeros((channels, box[2] - box[0], box[3] - box[1]), np.int32)
            for i, area in shared.items():
                window(symbols, box, area)[:] = window(decoded[i], tiles[i], area)
            yield symbols, damaged


def decode_tile(
    part: Part, payload: bytes, shape: tuple[int, int, int], *, contexts: Contexts
) -> Integers | CompressedFileError:
    """A tile's symbols, or what is wrong with it."""
    try:
        return decode_symbols(part.checked(payload), shape, contexts)
    except CompressedFileError as error:
        return error
