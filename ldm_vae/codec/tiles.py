"""Tiles coded and decoded, in one process or several. Nothing here imports torch, so that processes start fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

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


def encode_tiles(tiles: Sequence[Integers], contexts: Contexts, *, lanes: int, workers: int = 1) -> list[bytes]:
    """int32 symbols (C, h, w) of each tile -> its bytes."""
    workers = min(workers, len(tiles) // TILES_A_PROCESS)
    if workers <= 1:
        return [encode_symbols(t, contexts, lanes=lanes) for t in tiles]
    with processes(contexts, workers) as pool:
        return list(pool.map(partial(encode_here, lanes=lanes), tiles))


def decode_tiles(
    tiles: Sequence[CodedTile], contexts: Contexts, *, workers: int = 1
) -> Iterator[Integers | CompressedFileError]:
    """The symbols of each tile, or what is wrong with it, in order."""
    workers = min(workers, len(tiles) // TILES_A_PROCESS)
    if workers <= 1:
        yield from (attempt(t, contexts) for t in tiles)
        return
    with processes(contexts, workers) as pool:
        yield from pool.map(decode_here, tiles)


def attempt(tile: CodedTile, contexts: Contexts) -> Integers | CompressedFileError:
    try:
        return decode_symbols(tile.payload, tile.shape, contexts, lanes=tile.lanes)
    except CompressedFileError as error:
        return error


def processes(contexts: Contexts, workers: int) -> ProcessPoolExecutor:
    """Spawned, as a process with torch's threads must not be forked."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=receive, initargs=(contexts,))


def receive(contexts: Contexts) -> None:
    _contexts.append(contexts)


def encode_here(tile: Integers, lanes: int) -> bytes:
    return encode_symbols(tile, _contexts[0], lanes=lanes)


def decode_here(tile: CodedTile) -> Integers | CompressedFileError:
    return attempt(tile, _contexts[0])
