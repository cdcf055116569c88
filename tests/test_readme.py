"""Every command of the README is run, made small, and so are its Python examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_vae.runs.run import Run
from tests.pages import ROOT, blocks, parsed, run_commands
from training import train_vae

README = (ROOT / "README.md").read_text()


def test_the_demo_goes_on_with_the_data_that_it_was_begun_with(tmp_path: Path) -> None:
    """What `make demo` asks before it clears its folder."""
    found = re.search(r"-c '(import json.*?)'", (ROOT / "Makefile").read_text())
    assert found is not None
    config = replace(train_vae.PRESETS["demo"][1], data="Fotos ü's#train", output=tmp_path)
    Run(tmp_path, config, free=(), main=True).release()
    for data, same in (("Fotos ü's#train", True), ("others#train", False)):
        done = subprocess.run(
            [sys.executable, "-c", found[1], str(tmp_path / "config.json"), data], stderr=subprocess.PIPE
        )
        assert (done.returncode == 0) == same
        assert not done.stderr


def test_the_commands_of_the_demo_are_understood_and_each_takes_what_one_before_has_made() -> None:
    """`make demo` itself takes minutes."""
    words = ["make", "--dry-run", "demo", "DATA=Fotos ü's"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", "")
    lines = [shlex.split(line)[1:] for line in said.splitlines() if re.match(r"\S+python \w+/\w+\.py ", line)]
    train, measure, cache, diffuse, generate = (parsed(line)[1] for line in lines)
    assert train.data == "Fotos ü's#train"
    assert train.val_data == measure.data == "Fotos ü's#held-out"
    assert measure.vae == (cache.vae,) == (str(train.output),)
    assert diffuse.latents == cache.output
    assert generate.model == str(diffuse.output)


def test_the_commands_of_the_readme_run_one_after_the_other(here: Path) -> None:
    assert run_commands(README) == 16
    scope: dict[str, Any] = {}
    for example in blocks(README, "python"):
        exec(example.replace("256, 256", "64, 64").replace("=2.0)", "=2.0, num_inference_steps=2)"), scope)
    assert scope["latents"].shape == (1, 4, 8, 8)
    assert scope["reconstruction"].shape == (1, 3, 64, 64)
    for example in blocks((ROOT / "docs" / "diffusion.md").read_text(), "python"):
        exec(example.replace("steps=20", "steps=2"), scope)
    assert len(scope["images"]) == 4
    assert scope["again"].size == scope["images"][0].size == (64, 64)
    assert len(scope["between"]) == 8


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
