"""The guides' commands are understood, and those that build on one another run, made small; so do the examples."""

from __future__ import annotations

import re
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


def test_every_flag_that_the_guides_name_is_a_field_of_some_configuration() -> None:
    """In running text and tables, too. Underscored flags are Accelerate's."""
    folders = ("ldm_vae", "training", "pipelines", "benchmarks", "tests/endurance")
    code = "\n".join(path.read_text() for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    fields = set(re.findall(r"^    (\w+): ", code, flags=re.M)) | set(re.findall(r'aliases=\["--(\w+)"\]', code))
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)(?![\w-])", page.read_text())) - {"help", "quiet"}:
            assert flag.removeprefix("no-").replace("-", "_") in fields, f"{page.name} names --{flag}"


def test_every_file_of_the_repository_that_the_guides_name_is_there() -> None:
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        for file in re.findall(
            r"`((?:ldm_vae|training|pipelines|benchmarks|tests|configs)/[\w/]+\.\w+)`", page.read_text()
        ):
            assert (ROOT / file).exists(), f"{page.name} names {file}"


def test_the_commands_of_the_guides_to_training_and_generation_run(here: Path) -> None:
    """A page uses what the pages before it have made."""
    for name, count in (("data", 2), ("training", 5), ("reconstruction", 4), ("diffusion", 4), ("generation", 2)):
        assert run_commands((DOCS / f"{name}.md").read_text()) == count, name
    scope: dict[str, Any] = {}
    for example in blocks((DOCS / "diffusion.md").read_text(), "python"):
        exec(example.replace("steps=20", "steps=2"), scope)
    assert len(scope["images"]) == 4
    assert scope["again"].size == scope["images"][0].size == (64, 64)
    assert len(scope["between"]) == 8


def test_the_commands_of_the_guide_to_compression_run(here: Path) -> None:
    page = (DOCS / "compression.md").read_text()
    assert run_commands(page) == 9
    for example in blocks(page, "python"):
        exec(example, {})
    assert (here / "restored.png").exists()
    assert (here / "runs" / "rates" / "psnr.png").exists()


def test_the_commands_of_the_guide_to_autoencoders_run(here: Path) -> None:
    page = (DOCS / "autoencoders.md").read_text()
    for folder in ("good", "more-good"):
        shutil.copytree(here / "photos", here / folder)
    assert run_commands(page) == 13
    for example in blocks(page, "python"):
        scope: dict[str, Any] = {}
        exec(example, scope)
        assert scope["clean"].size == Image.open("photo.png").size
        assert scope["vector"].shape == (8,)
    assert (here / "scored" / "scores.csv").exists()
    assert (here / "explored" / "samples.png").exists()
