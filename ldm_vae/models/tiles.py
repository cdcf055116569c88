"""A network that sees only so far, run tile by tile: equal to the whole, to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TILE = 64
"""Side of a tile, in latents."""


def in_tiles(
    function: Callable[[Tensor], Tensor], values: Tensor, *, tile: int, halo: int, unit_in: int, unit_out: int
) -> Tensor:
    """function(values) from tiles of `tile` x `tile` cells, in memory for about one of them.

    `values` are (B, ., h * unit_in, w * unit_in) for h x w cells; the result is (B, ., h * unit_out, w * unit_out).
    What comes out of a cell depends on the cells at most `halo` away, so a tile goes in with that many around it, and
    they are cut off again. At the border there are none: there the tile ends as the values do, and convolutions pad it
    with the same zeros.
    """
    import torch  # the codec, which needs `spans` alone, starts without

    height, width = (n // unit_in for n in values.shape[-2:])
    rows = []
    for top, bottom, above, below in spans(height, tile, halo):
        row = []
        for left, right, before, behind in spans(width, tile, halo):
            outer = values[..., above * unit_in : below * unit_in, before * unit_in : behind * unit_in]
            done = function(outer)
            y, x = (top - above) * unit_out, (left - before) * unit_out
            row.append(done[..., y : y + (bottom - top) * unit_out, x : x + (right - left) * unit_out])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


def spans(length: int, tile: int, halo: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, stop, start with halo, stop with halo) of each tile along a side."""
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        yield start, stop, max(start - halo, 0), min(stop + halo, length)
