"""What a file holds, part by part: the symbols of a box of latents, and what is written beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm_vae.codec import bitstream, picture
from ldm_vae.codec.bitstream import Contents
from ldm_vae.codec.boxes import Box, put
from ldm_vae.codec.tiles import CodedTile, TileCoder
from ldm_vae.data.images import Pixels
from ldm_vae.errors import CompressedFileError

MAX_METADATA = 1 << 24
"""Bytes of an ICC profile or of EXIF."""


class Reader:
    """Decodes each tile once, as boxes ask for it from top to bottom.

    Args:
        damage: takes a message for each part that is damaged; None: the first one is raised.
    """

    def __init__(self, contents: Contents, coder: TileCoder, damage: list[str] | None) -> None:
        self.contents, self.header, self.coder, self.damage = contents, contents.header, coder, damage
        self.tiles: dict[int, np.ndarray[Any, Any] | None] = {}
        """Symbols (C, h, w) of those that may be asked for again; None for a damaged one."""

    def symbols(self, box: Box) -> tuple[np.ndarray[Any, Any], list[Box]]:
        """int32 symbols (C, h, w) of a box of latents, 0 in the tiles that are damaged, and the boxes of those."""
        boxes = {i: self.header.tile_box(i) for i in range(len(self.contents.tiles))}
        wanted = {i: tile for i, tile in boxes.items() if overlap(tile, box)}
        self.tiles = {i: known for i, known in self.tiles.items() if boxes[i][2] > box[0]}  # none above is needed again
        self.decode([i for i in wanted if i not in self.tiles])
        symbols = np.zeros((self.header.channels, box[2] - box[0], box[3] - box[1]), np.int32)
        bad = []
        for i, tile in wanted.items():
            found = self.tiles[i]
            if found is None:
                bad.append(tile)
            else:
                put(symbols, box, found, tile, box)
        return symbols, bad

    def decode(self, indices: list[int]) -> None:
        coded: dict[int, CodedTile] = {}
        for i in indices:
            top, left, bottom, right = self.header.tile_box(i)
            try:
                payload = self.contents.read(self.contents.tiles[i])
            except CompressedFileError as error:
                self.tiles[i] = None
                self.report(error, self.contents.tiles[i].name)
                continue
            shape = (self.header.channels, bottom - top, right - left)
            coded[i] = CodedTile(payload=payload, shape=shape, lanes=self.header.lanes)
        for i, found in zip(coded, self.coder.decode(list(coded.values())), strict=True):
            if isinstance(found, CompressedFileError):
                self.tiles[i] = None
                self.report(found, self.contents.tiles[i].name)
            else:
                self.tiles[i] = found

    def sections(self) -> tuple[Pixels | None, bytes, bytes]:
        """Alpha, ICC profile and EXIF."""
        found: dict[int, Any] = {}
        for kind, part in self.contents.sections.items():
            try:
                data = self.contents.read(part)
                if kind == bitstream.ALPHA:
                    dtype = np.dtype(np.uint16 if self.header.depth == 16 else np.uint8)
                    found[kind] = picture.unpack_alpha(data, self.header.height, self.header.width, dtype)
                elif kind in bitstream.SECTIONS:
                    found[kind] = picture.inflate(data, limit=MAX_METADATA)
            except CompressedFileError as error:
                self.report(error, part.name)
        return found.get(bitstream.ALPHA), found.get(bitstream.ICC, b""), found.get(bitstream.EXIF, b"")

    def report(self, error: CompressedFileError, name: str) -> None:
        """Notes what is wrong with a part, or raises it when nobody takes notes."""
        if self.damage is None:
            raise type(error)(f"{name}: {error}") from None
        self.damage.append(f"{name}: {error}")


def overlap(a: Box, b: Box) -> bool:
    return max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])
