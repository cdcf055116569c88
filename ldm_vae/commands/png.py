"""Folders of PNG files that say how they were made, so that a job can go on and never mixes two kinds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ldm_vae.data.images import Pixels, limits_are_ours
from ldm_vae.errors import RunError
from ldm_vae.files import atomic

SHEET = "contact_sheet.png"


def write_png(file: Path, pixels: Pixels, facts: Mapping[str, str]) -> None:
    """uint8 pixels (H, W, 1, 3 or 4) as a PNG with `facts` as text chunks; whole or not there."""
    text = PngInfo()
    for key, value in facts.items():
        text.add_text(key, value.encode(errors="backslashreplace").decode())  # names of files can be no text
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as out:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(out, "PNG", pnginfo=text)


def read_facts(file: Path) -> dict[str, str] | None:
    """The text of a PNG; None for a file that is damaged."""
    try:
        with limits_are_ours(), Image.open(file, formats=["PNG"]) as image:
            facts = {str(k): str(v) for k, v in image.info.items()}
            image.verify()
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError):  # SyntaxError: PIL's, for a wrong checksum
        return None
    return facts


def read_png(file: Path) -> Pixels:
    with limits_are_ours(), Image.open(file, formats=["PNG"]) as image:
        return np.atleast_3d(np.asarray(image))


def finished(folder: Path, names: Collection[str], settings: Mapping[str, str], *, part: int, parts: int) -> set[str]:
    """Which of `names` are there below `folder`, whole. Called by all `parts` processes, which share the looking.

    Raises:
        RunError: there are PNG files of other settings, or of none: nothing is to be mixed with them or overwritten.
    """
    there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png") if p.name != SHEET)
    done, refused = [], []
    for name in there[part::parts]:
        facts = read_facts(folder / name)
        if facts is None:
            continue
        changed = [f"{k}: {facts.get(k)} -> {v}" for k, v in settings.items() if facts.get(k) != v]
        if changed:
            refused.append(f"{folder / name} was made with other settings ({'; '.join(changed)})")
        elif name in names:
            done.append(name)
    refused = gather_object(refused)
    if refused:
        raise RunError(f"{refused[0]}: use those to go on, or choose another --output")
    return set(gather_object(done))


def own_share(names: Collection[str], done: Collection[str], *, part: int, parts: int) -> list[str]:
    """What one of `parts` processes still has to make."""
    return [n for n in names if n not in done][part::parts]
