"""What would be pushed is a model that loads, with a card of the run's own figures; nothing is pushed here."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from ldm_vae.runs.config import RunConfig
from ldm_vae.runs.run import Run
from tests.command_line import fails, run


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    data: tuple[str, ...]
    architecture: str = "f8c64"


@pytest.fixture
def trained(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a VAE, tables, figures and grids, where nobody is logged in."""
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    folder = tmp_path / "run"
    shutil.copytree(model, folder)
    begun = Run(folder, Config(output=folder, data=(str(tmp_path / "own photos"), "you/set"), steps=20))
    begun.log(9, {"val_psnr": 20.0, "seconds": 900.0})
    begun.log(20, {"l2": 0.25, "seconds": 1800.0})
    begun.log(20, {"val_psnr": 23.4567, "seconds": 1800.0})
    for step in (9, 10):
        Image.new("RGB", (step, step)).save(folder / "samples" / f"step-{step}.png")
    begun.release()
    return folder


def test_without_a_token_a_folder_is_written_that_compresses_and_says_what_the_run_recorded(
    trained: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run("publish", trained, "you/photos", "--license", "cc-by-sa-4.0")
    assert "nothing was pushed" in capsys.readouterr().out
    hub = trained / "hub"
    run("compress", image, tmp_path / "theirs.ldi", "--model", hub)
    run("compress", image, tmp_path / "ours.ldi", "--model", trained)
    assert (tmp_path / "theirs.ldi").read_bytes() == (tmp_path / "ours.ldi").read_bytes()
    card = ModelCard.load(hub / "README.md")
    assert (card.data.license, card.data.tags) == ("cc-by-sa-4.0", ["ldm-vae", "image-compression"])
    for said in (
        "# photos\n",
        "Preset `f8c64`",
        "| val_psnr | 23.46 |",
        "20 steps of 32 in 0.5 hours, seed 0",
        "- `data`: own photos, you/set",
        "ldm-vae compress photo.png --model you/photos",
    ):
        assert said in card.text
    assert str(tmp_path) not in card.content
    assert Image.open(hub / "samples.png").size == (10, 10)
    run("publish", trained, "you/photos")  # again, in place of the first
    assert "No licence is stated" in (hub / "README.md").read_text()


def test_what_cannot_be_published_is_said_in_a_line_and_nothing_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert "try you/photos" in fails(capsys, "publish", trained, "photos")
    assert "you/--photos" in fails(capsys, "publish", trained, "you/--photos")
    assert "is there" in fails(capsys, "publish", trained, "you/photos", "-o", trained)
    assert "no run" in fails(capsys, "publish", tmp_path / "no run", "you/photos", "-o", tmp_path / "hub")
    for part in ("vae", "codec"):
        shutil.rmtree(trained / part)
    assert "no model yet" in fails(capsys, "publish", trained, "you/photos")
    assert not (trained / "hub").exists()
    assert not (tmp_path / "hub").exists()
