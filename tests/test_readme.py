"""Every command of the README is run, made small; its Python example, too."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import reconstruction
from ldm_vae.config import parse_config, parse_flags
from training import train_vae

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALLER = "--steps 2 --batch-size 2 --resolution 64 --num-workers 0 --perceptual random --lpips-backbone squeeze"


def blocks(language: str) -> str:
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", README, flags=re.S))


def test_the_commands_of_the_readme_run_one_after_the_other(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    ran = 0
    for line in blocks("bash").splitlines():
        words = shlex.split(line)
        if not words:
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
            continue  # `make demo` is what it runs, and this is `make test`
        while words[0] in ("accelerate", "launch", "python"):
            words.pop(0)
        if words[0] == "training/train_vae.py":
            train_vae.main(parse_config(train_vae.PRESETS, description="", args=words[1:] + shlex.split(SMALLER)))
        else:
            assert words[0] == "benchmarks/reconstruction.py"
            args = words[1:] + ([] if "--perceptual" in words else ["--perceptual", "random"])
            reconstruction.main(parse_flags(reconstruction.Config, description="", args=args))
        ran += 1
    assert ran == 5
    example = blocks("python").replace("256, 256", "64, 64")
    scope: dict[str, object] = {}
    exec(example, scope)
    assert scope["latents"].shape == (1, 4, 8, 8)
    assert scope["reconstruction"].shape == (1, 3, 64, 64)


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
