"""A picture's latents in tiles: their symbols coded and decoded, in one process or several.

Nothing here imports torch, so that processes start fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context

import numpy as np

from ldm_vae.codec.bitstream import Box, Contents, Header, report
from ldm_vae.codec.contexts import Contexts, Integers, decode_symbols, encode_symbols
from ldm_vae.errors import CompressedFileError

BATCH = 16
"""Tiles whose symbols are in memory together."""
TILES_A_PROCESS = 2
"""Fewer are not worth starting a process for."""
Shape = tuple[int, int, int]
Outcome = Integers | CompressedFileError
_contexts: list[Contexts] = []
"""Those of this process, where it is one of several: sent once, not with every tile."""


def window(values: Integers, box: Box, inner: Box) -> Integers:
    """The part within `inner` of values (C, h, w) that lie at `box`: a view."""
    top, left = box[:2]
    return values[:, inner[0] - top : inner[2] - top, inner[1] - left : inner[3] - left]


def intersection(a: Box, b: Box) -> Box | None:
    """None where they do not overlap."""
    top, left, bottom, right = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (top, left, bottom, right) if top < bottom and left < right else None


@contextmanager
def pool_for(count: int, contexts: Contexts, workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """At most so many processes for a number of tiles; None where this one suffices."""
    workers = min(workers, count // TILES_A_PROCESS)
    if workers <= 1:
        yield None
        return
    spawn = get_context("spawn")  # a process with torch's threads must not be forked
    pool = ProcessPoolExecutor(workers, spawn, initializer=receive, initargs=(contexts,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def encode_tiles(symbols: Iterable[Integers], header: Header, contexts: Contexts, workers: int) -> list[bytes]:
    """int32 symbols (C, h, w) of each tile -> its bytes."""
    with pool_for(len(header.tile_boxes), contexts, workers) as pool:
        if pool is None:
            return [encode_symbols(tile, contexts, lanes=header.lanes) for tile in symbols]
        payloads: list[bytes] = []
        tiles = iter(symbols)
        while batch := list(islice(tiles, BATCH)):
            payloads += pool.map(partial(encode_here, lanes=header.lanes), batch)
        return payloads


class TileReader:
    """Decodes each tile of a file once, as boxes of latents ask for them.

    Args:
        damage: takes a message for each damaged tile; None: the first one is raised.

    Attributes:
        damaged: where the damaged tiles lie that were met so far.
    """

    def __init__(self, contents: Contents, contexts: Contexts, workers: int, damage: list[str] | None) -> None:
        self.contents, self.contexts, self.workers, self.damage = contents, contexts, workers, damage
        self.damaged: list[Box] = []

    def symbols(self, boxes: Sequence[Box]) -> Iterator[Integers]:
        """int32 symbols (C, h, w) of each box of latents, from top to bottom; 0 in the tiles that are damaged."""
        tiles = self.contents.header.tile_boxes
        count = sum(any(intersection(tile, box) for box in boxes) for tile in tiles)
        decoded: dict[int, Integers] = {}
        with pool_for(count, self.contexts, self.workers) as pool:
            for box in boxes:
                shared = {i: area for i, tile in enumerate(tiles) if (area := intersection(tile, box))}
                decoded = {i: s for i, s in decoded.items() if tiles[i][2] > box[0]}  # none above is needed again
                decoded |= self.decode([i for i in shared if i not in decoded], pool)
                symbols = np.zeros((self.contents.header.channels, box[2] - box[0], box[3] - box[1]), np.int32)
                for i, area in shared.items():
                    window(symbols, box, area)[:] = window(decoded[i], tiles[i], area)
                yield symbols

    def decode(self, indices: list[int], pool: ProcessPoolExecutor | None) -> dict[int, Integers]:
        header = self.contents.header
        boxes = [header.tile_boxes[i] for i in indices]
        shapes = [(header.channels, bottom - top, right - left) for top, left, bottom, right in boxes]
        payloads = [self.payload(i) for i in indices]
        results: Iterator[Outcome]
        if pool is None:
            results = map(partial(decode_tile, lanes=header.lanes, contexts=self.contexts), payloads, shapes)
        else:
            results = pool.map(partial(decode_here, lanes=header.lanes), payloads, shapes)
        decoded = {}
        for i, box, shape, result in zip(indices, boxes, shapes, results, strict=True):
            if isinstance(result, CompressedFileError):
                report(result, self.contents.tiles[i].name, self.damage)
                self.damaged.append(box)
            decoded[i] = np.zeros(shape, np.int32) if isinstance(result, CompressedFileError) else result
        return decoded

    def payload(self, index: int) -> bytes | CompressedFileError:
        try:
            return self.contents.read(self.contents.tiles[index])
        except CompressedFileError as error:
            return error


def decode_tile(payload: bytes | CompressedFileError, shape: Shape, *, lanes: int, contexts: Contexts) -> Outcome:
    """A tile's symbols, or what is wrong with it."""
    if isinstance(payload, CompressedFileError):
        return payload
    try:
        return decode_symbols(payload, shape, contexts, lanes=lanes)
    except CompressedFileError as error:
        return error


def receive(contexts: Contexts) -> None:
    _contexts.append(contexts)


def encode_here(tile: Integers, *, lanes: int) -> bytes:
    return encode_symbols(tile, _contexts[0], lanes=lanes)


def decode_here(payload: bytes | CompressedFileError, shape: Shape, *, lanes: int) -> Outcome:
    return decode_tile(payload, shape, lanes=lanes, contexts=_contexts[0])
