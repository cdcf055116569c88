"""Hugging Face hub ids, and files that must not be unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def no_pickles() -> Iterator[None]:
    """In here torch.load takes nothing but tensors and plain values, whatever a library asks it for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def is_hub_id(path: str) -> bool:
    """Whether it looks like owner/name on the Hugging Face hub, and like no path here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None and not Path(path).parent.exists()
