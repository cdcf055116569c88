"""The functions behind the page's tabs *Generate*, *Autoencode* and *Denoise*, without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.page.flags import Page
from tests.command_line import run
from tests.pipelines.test_generate import save_pipeline

pytest.importorskip("gradio", reason="Gradio is not installed")

from ldm_vae.commands.jobs import GenerateConfig
from ldm_vae.commands.seeds import open_pipeline
from ldm_vae.page import generate as generate_tab
from ldm_vae.page.autoencode import autoencode, check_name, denoise


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """An untrained generator of 16 x 12 pixels: its name, and the pipeline."""
    name = save_pipeline(tmp_path_factory.mktemp("flowers"), classes=("daisies", "roses"))
    return name, open_pipeline(GenerateConfig(model=name, output=Path(), num_images=1))


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    PatchAutoencoderKL(patch_size=2, block_out_channels=(8, 8)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(open_source("procedural:dead-leaves", resolution=48)[0].pixels[:36]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def gallery(flowers: tuple[str, Any], folder: Path, label: str | None, edited: Any = None) -> list[np.ndarray]:
    """Two images of seeds 5 and 6 after two steps."""
    folder.mkdir()
    [shown] = generate_tab.show(flowers[1], flowers[0], folder, label, 5, 2, 2, 3, edited, 0.7)
    assert [caption for _, caption in shown] == ["seed 5", "seed 6"]
    return [pixels for pixels, _ in shown]


def pixels_in(folder: Path) -> list[np.ndarray]:
    """Of the command's images, in the order of their seeds."""
    files = sorted((file for file in folder.rglob("0*.png")), key=lambda file: file.name)
    return [np.asarray(Image.open(file)) for file in files]


def test_the_images_are_those_of_the_command(flowers: tuple[str, Any], tmp_path: Path) -> None:
    flags = ["--model", flowers[0], "--num-images", 2, "--seed", 5, "--steps", 2, "--guidance-scale", 3]
    for label, classes in (("roses", ["--class", "roses"]), (generate_tab.ALL_CLASSES, [])):
        run("generate", *flags, *classes, "-o", tmp_path / f"command-{label}")
        images = gallery(flowers, tmp_path / f"page-{label}", label)
        assert np.array_equal(images, pixels_in(tmp_path / f"command-{label}"))


def test_what_is_painted_over_is_made_anew_and_the_rest_stays(flowers: tuple[str, Any], tmp_path: Path) -> None:
    background = np.full((120, 160, 4), 200, np.uint8)
    layer = np.zeros_like(background)
    layer[:60, :80, 3] = 255
    whole = {"background": background, "layers": [np.zeros_like(background)], "composite": None}
    part = {**whole, "layers": [layer]}
    for name, edited in (("whole", whole), ("part", part)):
        folder = tmp_path / name
        images = gallery(flowers, folder, "roses", edited)
        words = ["--image", folder / "start.png", "--class", "roses", "--seed", 5, "--num-images", 2]
        words += ["--mask", folder / "mask.png"] if name == "part" else []
        flags = ["--model", flowers[0], "--steps", 2, "--guidance-scale", 3, "--strength", 0.7]
        run("generate", *flags, *words, "-o", tmp_path / f"command-{name}")
        assert np.array_equal(images, pixels_in(tmp_path / f"command-{name}"))
    assert images[0].shape == (12, 16, 3)  # of the area that the model was trained on
    painted = np.zeros((12, 16), bool)
    painted[:6, :8] = True
    same = (images[0] == images[1]).all(axis=2)
    assert same[~painted].all()
    assert not same[painted].all()


def test_an_image_to_start_from_is_shown_large_enough_to_paint_on(photo: Path, tmp_path: Path) -> None:
    [shown] = generate_tab.start_from(1 << 20, tmp_path, str(photo))
    height, width = shown["value"]["background"].shape[:2]
    assert abs(height * width - 512**2) < 512
    assert abs(width / height - 48 / 36) < 0.01


def test_an_autoencoder_and_ours_are_shown_beside_each_other(photo: Path, vae: str, tmp_path: Path) -> None:
    shown = list(autoencode(Page(autoencode=vae), tmp_path, str(photo), " box:codec "))[-1]
    for model, slider, line in ((vae, *shown[:2]), ("box:codec", *shown[2:])):
        run("reconstruct", photo, tmp_path / "own.png", "--model", model, "--overwrite")
        assert np.array_equal(slider["value"][0], np.asarray(Image.open(photo)))
        assert np.array_equal(slider["value"][1], np.asarray(Image.open(tmp_path / "own.png")))
        assert line.startswith(f"**{model}**: ")
        assert "PSNR" in line
    [[once, line, *nothing]] = autoencode(Page(autoencode=vae), tmp_path, str(photo), vae)
    assert once["label"].startswith("Image on the left")
    assert [update["value"] for update in nothing] == [None, None]


def test_folders_of_this_machine_are_not_for_those_who_reach_the_page_from_elsewhere(vae: str) -> None:
    check_name(vae, local=True)
    for name in ("box:codec", "stabilityai/sd-vae-ft-mse"):
        check_name(name, local=False)
    for name in (vae, "/etc", ""):
        with pytest.raises(ConfigError):
            check_name(name, local=False)


def test_the_denoised_photo_is_that_of_the_command(photo: Path, vae: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    [[slider, download, note]] = denoise(vae, 1 << 20, tmp_path / "work", str(photo), None)
    run("denoise", photo, tmp_path / "own.png", "--model", vae)
    assert Path(download["value"]).name == "photo.denoised.png"
    assert Path(download["value"]).read_bytes() == (tmp_path / "own.png").read_bytes()
    assert np.array_equal(slider["value"][1], np.asarray(Image.open(tmp_path / "own.png")))
    with pytest.raises(ConfigError, match="cannot be told how much noise"):
        list(denoise(vae, 1 << 20, tmp_path / "work", str(photo), 10))
    assert note == ""
