"""What comes with the package is listed, with a card that names its licence, and is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from ldm_vae.errors import ModelError
from ldm_vae.files import sha256
from ldm_vae.models import loading
from ldm_vae.models.loading import BOX, DIGESTS, find_saved, local_folder
from tests.command_line import fails, run

LIMITS = {"codec": 10e6, "denoise": 5e6, "f8c4": 5e6, "flowers": 25e6}
"""Bytes that a model may take."""


def test_the_models_of_the_box_are_listed_with_size_licence_figure_and_card(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    run("models")
    said = capsys.readouterr().out
    for name, limit in LIMITS.items():
        size = sum(file.stat().st_size for file in (BOX / name).rglob("*") if file.is_file())
        assert size <= limit
        line, *others = said[said.index(f"box:{name} ") :].splitlines()
        assert f"{size / 1e6:.1f} MB" in line
        assert "cc-by-sa-4.0" in line
        assert any(character.isdigit() for text in others[2:4] for character in text), "a figure"
        assert all(len(text) <= 60 for text in others if "/" not in text)
        assert str(BOX / name / "README.md") in said
    assert {folder.name for folder in BOX.iterdir() if folder.is_dir()} == set(LIMITS)


def test_the_digests_of_the_box_are_those_of_its_files() -> None:
    """If not: the recipe of a model says how to write them anew."""
    for folder in (place for place in BOX.iterdir() if place.is_dir()):
        files = sorted(str(p.relative_to(folder)) for kind in ("*.json", "*.safetensors") for p in folder.rglob(kind))
        expected = "".join(f"{sha256(folder / file)}  {file}\n" for file in files)
        assert (folder / DIGESTS).read_text() == expected, f"{folder / DIGESTS} is stale"


def test_a_damaged_model_of_the_box_is_named_and_only_what_is_loaded_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(BOX / "codec", tmp_path / "codec")
    monkeypatch.setattr(loading, "BOX", tmp_path)
    weights = folder / "psnr" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    find_saved("box:codec", "vae")
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    said = fails(capsys, "compress", image, "--model", "box:codec", "--tune", "psnr")
    assert said == (
        "error: box:codec is damaged: psnr/vae/diffusion_pytorch_model.safetensors has another digest: "
        "install the package again"
    )
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(
        ModelError, match=r"box:codec is damaged: .*No such file.*config\.json.*install the package again"
    ):
        find_saved("box:codec", "vae")
    (folder / DIGESTS).write_text("nonsense")
    with pytest.raises(ModelError, match="box:codec is damaged"):
        local_folder("box:codec", ["codec/*"])
