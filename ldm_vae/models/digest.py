"""The digest that tells models apart. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def digest_of(class_name: str, changed: Mapping[str, Any], tensors: Iterable[tuple[str, str, Any, bytes]]) -> str:
    """sha256 of a model's class, the entries of its configuration that are not the defaults, and its tensors.

    Args:
        tensors: name, type, shape and bytes of each, in the order of their names.
    """
    digest = hashlib.sha256((class_name + canonical(changed)).encode())
    for name, dtype, shape, data in tensors:
        digest.update(f"{name} {dtype} {tuple(shape)}".encode())
        digest.update(data)
    return digest.hexdigest()


def canonical(value: Any) -> str:
    """JSON that is the same for tuples and lists."""
    return json.dumps(value, sort_keys=True, default=str)
