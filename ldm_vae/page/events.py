"""What all tabs share: how an event runs, what is said of an error, and images as a browser is shown them."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from ldm_vae.data.conversion import as_uint8
from ldm_vae.data.images import Pixels, resize
from ldm_vae.data.reader import read_image
from ldm_vae.errors import NO_MEMORY, LdmVaeError

SHOWN_PIXELS = 1 << 21
"""A browser is shown larger images reduced to so many."""
QUEUED: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
"""Of every event that computes: one at a time."""
DROP_HEIGHT = 150
BUTTONS = ["download", "fullscreen"]
"""Of an image; Gradio's others would share it."""
SLIDER: dict[str, Any] = {"format": "png", "interactive": False, "max_height": 620, "buttons": BUTTONS}
WORKERS = os.cpu_count() or 1


def in_a_folder(act: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The event act(folder, ...): with a folder for its files, which goes once they are shown.

    An error that the user can put right is said in a sentence on the page.
    """

    def event(*values: Any) -> Iterator[Any]:
        try:
            with TemporaryDirectory() as folder:
                yield from act(Path(folder), *values)
        except (LdmVaeError, ValueError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
                raise
            raise gr.Error(sentence(error), duration=None, print_exception=False) from None

    return event


def sentence(error: Exception) -> str:
    """What went wrong, as HTML."""
    if isinstance(error, (MemoryError, RuntimeError)):
        return "There is not enough memory for it: try a smaller image."
    text = str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split())
    return html.escape(f"{text[:1].upper()}{text[1:]}.")


def viewed(file: Path, max_pixels: int) -> Pixels:
    """The image of a file in sRGB, uint8 (H, W, 3). Raises BadImageError."""
    return as_uint8(read_image(file, max_pixels=max_pixels).pixels)


def reduced(pixels: Pixels, most: int = SHOWN_PIXELS) -> Pixels:
    """The image, at most so many pixels of it."""
    height, width = pixels.shape[:2]
    return pixels if height * width <= most else resize(pixels, size_of_area(pixels, most))


def size_of_area(pixels: Pixels, area: int) -> tuple[int, int]:
    """Height and width of the image's proportions, and of about so many pixels."""
    height, width = pixels.shape[:2]
    scale = math.sqrt(area / (height * width))
    return max(round(height * scale), 1), max(round(width * scale), 1)
