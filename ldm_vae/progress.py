"""Progress bars, the same everywhere: on a terminal, never in a log file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    items: Iterable[Item] | None = None,
    *,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    description: str | None = None,
    show: bool = True,
) -> tqdm[Item]:
    """A bar around `items`, or one of `total` to be updated by hand. `show` is False in all but the main process."""
    hidden = None if show else True  # None: tqdm hides it when standard error is no terminal
    return tqdm(items, unit=unit, total=total, initial=initial, desc=description, disable=hidden)
