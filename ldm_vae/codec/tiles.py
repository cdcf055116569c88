"""Tiles coded and decoded, in one process or several. Nothing here imports torch, so that processes start fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

from ldm_vae.codec.contexts import Contexts, Integers, decode_symbols, encode_symbols
from ldm_vae.errors import CompressedFileError

TILES_A_PROCESS = 2
"""Fewer are not worth starting a process for."""
_contexts: list[Contexts] = []
"""Those of this process, where it is one of several: sent once, not with every tile."""


@dataclass(frozen=True, kw_only=True)
class CodedTile:
    """What is needed to decode a tile: its bytes, the shape of its symbols, and the number of lanes."""

    payload: bytes
    shape: tuple[int, int, int]
    lanes: int


class TileCoder:
    """Codes tiles here or, where there are several, in processes that stay for the next ones.

    ```
    with TileCoder(contexts, workers) as coder:
        payloads = coder.encode(tiles, lanes=8)
    ```
    """

    def __init__(self, contexts: Contexts, workers: int) -> None:
        self.contexts, self.workers = contexts, workers
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> TileCoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def pool_for(self, count: int) -> ProcessPoolExecutor | None:
        workers = min(self.workers, count // TILES_A_PROCESS)
        if self.pool is None and workers > 1:  # spawned, as a process with torch's threads must not be forked
            ways: dict[str, Any] = {"initializer": receive, "initargs": (self.contexts,)}
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"), **ways)
        return self.pool if workers > 1 else None

    def encode(self, tiles: Sequence[Integers], *, lanes: int) -> list[bytes]:
        """int32 symbols (C, h, w) of each tile -> its bytes."""
        pool = self.pool_for(len(tiles))
        if pool is None:
            return [encode_symbols(t, self.contexts, lanes=lanes) for t in tiles]
        return list(pool.map(partial(encode_here, lanes=lanes), tiles))

    def decode(self, tiles: Sequence[CodedTile]) -> Iterator[Integers | CompressedFileError]:
        """The symbols of each tile, or what is wrong with it, in order."""
        pool = self.pool_for(len(tiles))
        yield from (attempt(t, self.contexts) for t in tiles) if pool is None else pool.map(decode_here, tiles)


def attempt(tile: CodedTile, contexts: Contexts) -> Integers | CompressedFileError:
    try:
        return decode_symbols(tile.payload, tile.shape, contexts, lanes=tile.lanes)
    except CompressedFileError as error:
        return error


def receive(contexts: Contexts) -> None:
    _contexts.append(contexts)


def encode_here(tile: Integers, lanes: int) -> bytes:
    return encode_symbols(tile, _contexts[0], lanes=lanes)


def decode_here(tile: CodedTile) -> Integers | CompressedFileError:
    return attempt(tile, _contexts[0])
