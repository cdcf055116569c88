"""Commands and examples of the documentation's pages: read, understood without running them, or run small."""

from __future__ import annotations

import importlib
import re
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_type_hints

import tyro
from accelerate.state import AcceleratorState

from ldm_vae import cli
from ldm_vae.runs.config import RunConfig, check_ranges, parse_config, parse_flags, tyro_errors
from tests.processes import narrow

ROOT = Path(__file__).parent.parent
SMALLER = {
    "train_vae": "--steps 2 --batch-size 2 --resolution 64 --lpips-backbone squeeze --perceptual random",
    "train_codec": "--steps 2 --batch-size 2 --resolution 64",
    "train_autoencoder": "--steps 2 --batch-size 2 --resolution 64",
    "cache_latents": "--num-workers 0",
    "train_diffusion": "--steps 2 --batch-size 16 --num-workers 0",
    "generate": "--steps 2",
    "fit-codec": "--num-images 12 --steps 1",
    "train_classifier": "--epochs 1 --batch-size 8",
    "generation": "--num-images 4",
    "rate_distortion": "--others jpeg-420 webp --num-images 2 --steps 0.5 1 2",
}
"""Flags that make a command small."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def commands(page: str) -> list[list[str]]:
    """The commands of a page's bash blocks in words; a script's begin with its file, whatever launches it."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [launched(words) for words in map(shlex.split, lines) if words]


def launched(words: list[str]) -> list[str]:
    """Without variables, `python`, and `accelerate launch` with its flags."""
    while "=" in words[0]:
        words = words[1:]
    if words[:2] == ["python", "-m"]:
        return [module_file(words[2]), *words[3:]]
    if words[0] in ("python", "accelerate"):
        return words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    return words


def module_file(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"


def parsed(words: list[str]) -> tuple[Any, Any]:
    """A script, and its configuration from the arguments. Raises ConfigError for what it does not know."""
    script = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
    presets: Any = getattr(script, "PRESETS", None)
    if presets:
        return script, parse_config(presets, description="", args=words[1:])
    return script, parse_flags(get_type_hints(script.main)["config"], description="", args=words[1:])


def check_command(words: list[str]) -> None:
    """Raises ConfigError or AssertionError for a command that would be refused, without running it."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M), f"no make {words[1]}"
    elif words[0] == "ldm-vae":
        classes: dict[str, Any] = {name: command for name, (command, _) in cli.COMMANDS.items()}
        with tyro_errors():
            tyro.extras.subcommand_cli_from_dict(classes, args=words[1:], prog="ldm-vae")
    else:
        _, config = parsed(words)
        check_ranges(config)
        if hasattr(config, "check"):
            config.check(1) if isinstance(config, RunConfig) else config.check()


def run(words: list[str]) -> None:
    """One of the scripts, in this process, with flags that make it small."""
    AcceleratorState._reset_state(reset_partial_state=True)
    name = Path(words[0]).stem
    args = words[1:] + shlex.split(SMALLER.get(name, ""))
    if name == "train_diffusion":
        args[0] = "demo"
    if name == "reconstruction" and "--perceptual" not in args:
        args += ["--perceptual", "random"]
    script, config = parsed([words[0], *args])
    with narrow(config.architecture, 4) if hasattr(config, "architecture") else nullcontext():
        script.main(config)


def run_commands(page: str) -> int:
    """Runs a page's commands one after the other; returns how many there were. `make` is only looked up."""
    ran = 0
    for words in commands(page):
        if words[0] == "make":
            check_command(words)
            continue
        if words[0] == "ldm-vae":
            cli.main(words[1:] + shlex.split(SMALLER.get(words[1], "")))
        else:
            run(words)
        ran += 1
    return ran
