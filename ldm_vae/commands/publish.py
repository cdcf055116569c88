"""`ldm-vae publish`: a run's model on the Hugging Face hub, with a card that is made from the run's own record."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ldm_vae.errors import ConfigError, ModelError
from ldm_vae.files import staged_directory
from ldm_vae.runs.config import OF_ONE_RUN, PRESET_FIELDS

NETWORKS = ("vae", "codec", "psnr")
"""Folders of a run that are pushed as they are, where they exist; of `pipeline`, what is in it."""
FIGURES = ("val_", "file_")
"""What the names of a card's figures begin with, in `metrics.jsonl`."""
USES = {
    "codec": ("image-compression", "```bash\nldm-vae compress photo.png --model {name}\n```"),
    "vae": ("autoencoder", '```python\nfrom ldm_vae import load_autoencoder\n\nvae = load_autoencoder("{name}")\n```'),
    "pipeline": ("image-generation", "```bash\nldm-vae generate --model {name}\n```"),
}
"""Tag and example by what a run holds; the first that is there counts."""
GRID = "samples.png"
MEASURED = "As last measured in training: on `val_data` or `val_latents` if one is named, else on training images."


@dataclass(frozen=True, kw_only=True)
class Publish:
    """Push a run's model to the Hugging Face hub: its VAE, codec or pipeline, with a card of figures, data and a grid.

    With --output, or where nobody is logged in, it pushes nothing and writes a folder of the same files.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    name: Annotated[Positional[str], arg(metavar="YOU/NAME")]
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """A new folder for what would be pushed; RUN/hub where nobody is logged in."""
    license: str | None = None
    """Of the weights, by the hub's name for it (cc-by-sa-4.0): what the training data asks for."""
    private: bool = False


def publish(command: Publish) -> None:
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    if command.name.count("/") != 1:
        raise ConfigError(f"{command.name} is no name on the hub: try you/{command.name.strip('/').split('/')[-1]}")
    validate_repo_id(command.name)
    if command.output is not None and command.output.exists():
        raise ConfigError(f"{command.output} is there: choose another --output")
    if command.output is None and huggingface_hub.get_token():
        with tempfile.TemporaryDirectory() as folder:
            gather(command, Path(folder))
            push(command, folder)
        return
    target = command.output or command.run / "hub"
    with staged_directory(target) as staging:
        gather(command, staging)
    print(f"{target} holds what {command.name} would: nothing was pushed")
    if command.output is None:
        print("nobody is logged in: after `hf auth login` the same command pushes it")


def push(command: Publish, folder: str) -> None:
    """Raises ModelError where the hub does not take it."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="ldm-vae")
    try:
        url = api.create_repo(command.name, private=command.private, exist_ok=True)
        api.upload_folder(repo_id=command.name, folder_path=folder, commit_message="Model and card by ldm-vae")
    except Exception as error:  # no network, no permission, a name that is taken
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(f"{command.name} could not be pushed: {first_line}") from None
    print(url)


def gather(command: Publish, target: Path) -> None:
    """Fills an empty folder with the model, the newest grid and the card. Raises ModelError."""
    from ldm_vae.runs.run import saved_facts, step_of  # late: they import torch

    run = command.run
    try:
        record = json.loads((run / "config.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        settings = record["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{run} is not a run with a record: {error}") from None
    kind = next((kind for kind in USES if (run / kind).is_dir()), None)
    if kind is None:
        raise ModelError(f"{run} has no model yet: it is saved with its first checkpoint")
    if kind == "pipeline":
        shutil.copytree(run / kind, target, dirs_exist_ok=True)
    for name in NETWORKS:
        if kind != "pipeline" and (run / name).is_dir():
            shutil.copytree(run / name, target / name)
    grids = sorted((run / "samples").glob("step-*.png"), key=lambda file: step_of(file.with_suffix("")))
    if grids:
        shutil.copy(grids[-1], target / GRID)
    record |= {"config": shareable(settings), "images": saved_facts(run).get("number of images")}
    (target / "README.md").write_text(card_of(command, kind, record, lines, with_grid=bool(grids)))


def shareable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what concerns one machine alone: of absolute paths, their last name."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(part) for part in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return {name: short(value) for name, value in settings.items() if name not in OF_ONE_RUN}


def card_of(
    command: Publish, kind: str, record: dict[str, Any], lines: list[dict[str, Any]], *, with_grid: bool
) -> str:
    """The README.md: how the model is used, its figures, its data, and all settings.

    Args:
        record: the run's `config.json`, and the number of its `images`, where it is known.
        lines: the run's `metrics.jsonl`.
    """
    from huggingface_hub import ModelCardData

    settings, versions, (tag, example) = record["config"], record["versions"], USES[kind]
    data = ModelCardData(license=command.license, library_name="diffusers", tags=["ldm-vae", tag])
    preset = next((settings[field] for field in PRESET_FIELDS if field in settings), None)
    figures = {name: value for line in lines for name, value in line.items() if name.startswith(FIGURES)}
    hours = max((line.get("seconds") or 0.0 for line in lines), default=0.0) / 3600
    steps = max((line["step"] for line in lines), default=0)
    sources = {name: settings[name] for name in ("data", "val_data", "latents", "val_latents") if settings.get(name)}
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {command.name.split('/')[1]}",
        f"Preset `{preset}` of ldm-vae {versions['ldm-vae']}.",
        with_grid and f"![The newest grid of the training]({GRID})",
        f"## Use\n\n{example.format(name=command.name)}",
        figures and f"## Figures\n\n{MEASURED}\n\n{table(figures)}",
        f"## Training\n\n{steps} steps of {settings['batch_size']} in {hours:.1f} hours, seed {settings['seed']}.",
        record["images"] and f"Images: {record['images']}.",
        "\n".join(f"- `{name}`: {as_text(source)}" for name, source in sources.items()),
        not command.license and "No licence is stated: ask for it before you use the weights.",
        f"```json\n{json.dumps(settings, indent=2)}\n```",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
    ]
    return "\n\n".join(str(section) for section in sections if section) + "\n"


def as_text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else ", ".join(source)


def table(figures: dict[str, float | None]) -> str:
    """In Markdown; a figure that was not finite has no row."""
    rows = (f"| {name} | {value:.4g} |" for name, value in figures.items() if value is not None)
    return "\n".join(["| figure | value |", "|---|---|", *rows])
