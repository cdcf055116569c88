"""Every command of the README is run, made small; its Python examples and the guides', too."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from ldm_vae import cli
from ldm_vae.runs.config import parse_config, parse_flags
from ldm_vae.runs.run import Run
from training import train_vae

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALLER = {
    "train_vae": "--steps 2 --batch-size 2 --resolution 64 --lpips-backbone squeeze --perceptual random",
    "train_vae find": "--steps 2 --batch-size 2 --resolution 64",
    "cache_latents": "--resolution 64 --num-workers 0",
    "train_diffusion": "--steps 2 --batch-size 2 --num-workers 0",
    "generate": "--steps 2",
    "fit-codec": "--num-images 12 --qualities 1",
    "train_classifier": "--epochs 1 --batch-size 8",
    "generation": "--num-images 4",
    "rate_distortion": "--others jpeg-420 webp --num-images 2 --qualities 0.5 1 2",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def parsed(words: list[str]) -> tuple[Any, Any]:
    """A script, and what it makes of its arguments."""
    script = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
    presets: Any = getattr(script, "PRESETS", None)
    if presets:
        return script, parse_config(presets, description="", args=words[1:])
    return script, parse_flags(script.Config, description="", args=words[1:])


def run(words: list[str]) -> None:
    """One of the scripts, in this process, with flags that make it small."""
    AcceleratorState._reset_state(reset_partial_state=True)
    name = Path(words[0]).stem
    args = words[1:] + shlex.split(SMALLER.get(f"{name} {words[1]}", SMALLER.get(name, "")))
    if name == "train_diffusion":
        args[0] = "demo"
    if name == "reconstruction" and "--perceptual" not in args:
        args += ["--perceptual", "random"]
    script, config = parsed([words[0], *args])
    script.main(config)


@pytest.fixture
def here(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a folder of photos, enough of them to be held out and compared, and a photo.png."""
    monkeypatch.chdir(tmp_path)
    for i, file in enumerate(sorted(photos.rglob("*.png")) * 4):
        copy = tmp_path / "photos" / file.parent.name / f"{i}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    (tmp_path / "photo.png").write_bytes(file.read_bytes())
    return tmp_path


def run_commands(page: str) -> int:
    """How many there were."""
    ran = 0
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line)
        if not words:
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
            continue  # `make demo` is what it runs, and this is `make test`
        while words[0] in ("accelerate", "launch", "python"):
            words.pop(0)
        if words[0] == "ldm-vae":
            cli.main(words[1:] + shlex.split(SMALLER.get(words[1], "")))
        else:
            run(words)
        ran += 1
    return ran


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


def test_the_commands_of_the_guide_to_compression_run(here: Path) -> None:
    page = (ROOT / "docs" / "compression.md").read_text()
    assert run_commands(page) == 7
    for example in blocks(page, "python"):
        exec(example, {})
    assert (here / "restored.png").exists()
    assert (here / "runs" / "rates" / "psnr.png").exists()


def test_the_commands_of_the_guide_to_autoencoders_run(here: Path) -> None:
    page = (ROOT / "docs" / "autoencoders.md").read_text()
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
