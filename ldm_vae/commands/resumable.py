"""Folders of PNG files that say how they were made, so that a job can continue and never mixes two kinds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ldm_vae.data.images import Pixels
from ldm_vae.data.pil import limits_are_ours
from ldm_vae.errors import RunError
from ldm_vae.files import atomic

CONTACT_SHEET = "contact_sheet.png"


def write_png(file: Path, pixels: Pixels, facts: Mapping[str, str]) -> None:
    """Writes uint8 pixels (H, W, 1, 3 or 4) atomically, with `facts` as text chunks."""
    text = PngInfo()
    for key, value in facts.items():
        text.add_text(key, value.encode(errors="backslashreplace").decode())  # file names need not be valid text
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


def share_work(
    folder: Path, names: Collection[str], settings: Mapping[str, str], accelerator: Accelerator
) -> tuple[list[str], int]:
    """Which of `names` this process has to make in `folder`, and how many are there already, intact.

    Called by all processes, which also share the checking of the files.

    Raises:
        RunError: the folder has PNG files of other settings, or of none, which are neither mixed nor overwritten.
    """
    part, parts = accelerator.process_index, accelerator.num_processes
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png") if p.name != CONTACT_SHEET)
    own_finished, refused = [], []
    for name in files[part::parts]:
        facts = read_facts(folder / name)
        if facts is None:
            continue
        changed = [f"{k}: {facts.get(k)} -> {v}" for k, v in settings.items() if facts.get(k) != v]
        if changed:
            refused.append(f"{folder / name} was made with other settings ({'; '.join(changed)})")
        elif name in names:
            own_finished.append(name)
    refused = gather_object(refused)
    if refused:
        raise RunError(f"{refused[0]}: use those to go on, or choose another --output")
    finished = set(gather_object(own_finished))
    return [name for name in names if name not in finished][part::parts], len(finished)
