"""`ldm-vae generate`: new images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ldm_vae.commands.jobs import GenerateConfig
from ldm_vae.runs.config import Range

USUAL_COUNT = 16


@dataclass(frozen=True, kw_only=True)
class Generate(GenerateConfig):
    """Generate images with a trained pipeline."""

    output: Annotated[Path, arg(aliases=["-o"])] = Path("generated")
    """Folder; the same command goes on with what is missing there."""
    num_images: Annotated[int | None, Range(at_least=1)] = None
    """16 unless given, or one for each of --image."""


def generate_images(command: Generate) -> None:
    from ldm_vae.commands.seeds import generate_all

    if command.num_images is None and command.image is None:
        command = replace(command, num_images=USUAL_COUNT)
    generate_all(command)
