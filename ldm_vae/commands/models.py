"""`ldm-vae models`: what comes with the package."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass

from ldm_vae.models.loading import BOX

INDENT = 4


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models that come with the package: name, size, licence, what it is, and how good."""


def models(command: Models) -> None:
    from huggingface_hub import ModelCard

    width = shutil.get_terminal_size().columns
    for folder in sorted(place for place in BOX.iterdir() if place.is_dir()):
        card = ModelCard.load(folder / "README.md").data.to_dict()
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"box:{folder.name:10} {size / 1e6:5.1f} MB   {card['license']}")
        for text in (card["summary"], card["figure"]):
            print(textwrap.fill(text, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT))
        print(f"{'':{INDENT}}{folder / 'README.md'}")
