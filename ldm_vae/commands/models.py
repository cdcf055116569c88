"""`ldm-vae models`: what comes with the package."""

from __future__ import annotations

from dataclasses import dataclass

from ldm_vae.models.loading import BOX


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models that come with the package: name, size, licence, and what it is."""


def models(command: Models) -> None:
    from huggingface_hub import ModelCard

    for folder in sorted(place for place in BOX.iterdir() if place.is_dir()):
        card = ModelCard.load(folder / "README.md").data.to_dict()
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"box:{folder.name:10} {size / 1e6:5.1f} MB   {card['license']:13} {card['summary']}")
        print(f"{'':17} {folder / 'README.md'}")
