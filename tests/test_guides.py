"""The guides' commands are understood, and those that build on one another run, made small; so do the examples."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_vae.errors import ConfigError
from tests.pages import ROOT, blocks, check_command, commands, run_commands

DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")))
def test_every_command_of_a_page_is_understood(page: str) -> None:
    for words in commands((ROOT / page).read_text()):
        check_command(words)


@pytest.mark.parametrize(
    "command",
    [
        "python training/train_vae.py f8c5 --data photos --output run",
        "accelerate launch --multi_gpu training/train_vae.py f8c4 --data photos --output run --no-such-flag",
        "ldm-vae compress photo.png photo.ldi --no-such-flag",
        "make nothing",
    ],
)
def test_a_wrong_flag_preset_or_target_in_a_guide_is_noticed(command: str) -> None:
    [words] = commands(f"```bash\n{command}\n```")
    with pytest.raises((ConfigError, AssertionError)):
        check_command(words)


def test_the_commands_of_the_guide_to_compression_run(here: Path) -> None:
    page = (DOCS / "compression.md").read_text()
    assert run_commands(page) == 7
    for example in blocks(page, "python"):
        exec(example, {})
    assert (here / "restored.png").exists()
    assert (here / "runs" / "rates" / "psnr.png").exists()


def test_the_commands_of_the_guide_to_autoencoders_run(here: Path) -> None:
    page = (DOCS / "autoencoders.md").read_text()
    for folder in ("good", "more-good"):
        shutil.copytree(here / "photos", here / folder)
    assert run_commands(page) == 11
    for example in blocks(page, "python"):
        scope: dict[str, Any] = {}
        exec(example, scope)
        assert scope["clean"].size == Image.open("photo.png").size
        assert scope["vector"].shape == (32,)
    assert (here / "scored" / "scores.csv").exists()
    assert (here / "explored" / "vectors" / "samples.png").exists()
