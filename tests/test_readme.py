"""Every command of the README is run, made small, and so are its Python examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_vae import cli
from ldm_vae.runs.run import Run
from tests.pages import ROOT, blocks, check_command, parsed, run_commands
from tests.test_layers import LAYERS
from training import train_vae

README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_demo_goes_on_with_the_data_that_it_was_begun_with(tmp_path: Path) -> None:
    """What `make demo` asks before it clears its folder."""
    program = re.search(r"-c '(import json.*?)'", (ROOT / "Makefile").read_text())
    assert program is not None
    config = replace(train_vae.PRESETS["demo"][1], data=("Fotos ü's#train",), output=tmp_path)
    Run(tmp_path, config, free=(), main=True).release()
    for data, same in (("Fotos ü's#train", True), ("others#train", False)):
        done = subprocess.run(
            [sys.executable, "-c", program[1], str(tmp_path / "config.json"), data], stderr=subprocess.PIPE
        )
        assert (done.returncode == 0) == same
        assert not done.stderr


def test_the_commands_of_the_demo_are_understood_and_each_takes_what_one_before_has_made() -> None:
    """`make demo` itself takes minutes."""
    words = ["make", "--dry-run", "demo", "DATA=Fotos ü's"]
    dry_run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = dry_run.stdout.replace("\\\n", "")
    lines = [shlex.split(line)[1:] for line in printed.splitlines() if re.match(r"\S+python \w+/\w+\.py ", line)]
    compare, flowers, train, measure, cache, diffuse, generate = (parsed(line)[1] for line in lines)
    assert compare.data == cache.data == "Fotos ü's"
    assert train.data == ("Fotos ü's#train",)
    assert train.val_data == measure.data == "Fotos ü's#held-out"
    assert measure.vae == (train.init, cache.vae) == ("box:f8c4", str(train.output))
    assert diffuse.latents == cache.output
    assert (flowers.model, generate.model) == ("box:flowers", str(diffuse.output))
    shown = re.findall(r"^echo \"(\S+\.png): ", printed, flags=re.M)
    assert [str(Path(file).parent) for file in shown] == [str(c.output) for c in (compare, flowers, measure, generate)]


def test_the_commands_of_the_readme_run_one_after_the_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install, use = README.split("## See it work")
    make, activate, help_of = "".join(blocks(install, "bash")).splitlines()
    check_command(shlex.split(make))
    assert activate == "source .venv/bin/activate"
    with pytest.raises(SystemExit, match="0"):
        cli.main(shlex.split(help_of)[1:])
    assert "compress" in capsys.readouterr().out
    assert run_commands(use) == 4 + 3
    page, decompress = re.findall(r"`(ldm-vae \S.*?)`", use)
    check_command(shlex.split(page))
    cli.main(shlex.split(decompress)[1:])
    with Image.open("photo.png") as image, Image.open("restored.png") as restored:
        assert restored.size == image.size
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


def test_the_readme_has_at_most_700_words() -> None:
    assert len(README.split()) <= 700


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    slugs: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", text, flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        slugs.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
    return set(slugs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link, title in re.findall(r'\]\(([^)\s]+)(?: "(\w+)")?\)', text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), f"no {link}"
        assert not anchor or anchor in anchors(path), f"no heading of {link}"
        assert not title or f"def {title}(" in path.read_text(), f"no {title} in {link}"


def test_pages_that_the_code_names_are_there() -> None:
    for top in ("ldm_vae", "training", "pipelines", "benchmarks", "tests"):
        for file in (ROOT / top).rglob("*.py"):
            for name in re.findall(r"docs/[\w/\-.]*\w", file.read_text()):
                assert list(ROOT.glob(f"{name}*")), f"{file.relative_to(ROOT)} names {name}"


def test_a_decision_has_at_most_40_lines() -> None:
    for page in (ROOT / "docs" / "decisions").glob("*.md"):
        assert len(page.read_text().splitlines()) <= 40, page.name


def test_the_page_on_architecture_shows_twelve_nouns_and_the_layers_that_are_tested() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    nouns = page.split("## Twelve nouns")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| [A-Z]\w+ \|", nouns, flags=re.M)) == 12
    lines = blocks(page, "text")[-1].splitlines()
    assert [line.split(", ") for line in lines] == [[name.removeprefix("ldm_vae.") for name in row] for row in LAYERS]


def test_the_walks_on_the_page_on_architecture_stop_at_files_and_functions_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    stops = re.findall(r"^\d+\. `([\w/]+\.py)`(?:, `(\w+)`)?", page, flags=re.M)
    assert len(stops) == 10 + 8
    for file, function in stops:
        assert f"def {function}" in (ROOT / file).read_text(), f"{file} has no {function}"
