"""`ldm-vae reconstruct` and `denoise`: where results go, of which kind they are, and what cannot work."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.commands import convert
from ldm_vae.data import large
from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.reconstruction import denoise, reconstruct
from tests.command_line import fails, run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an untrained autoencoder that knows a noise level; `blind`, one that does not; one of 13 channels."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(block_out_channels=(8, 8), noise_level=50.0)
    torch.nn.init.normal_(vae.encoder.level.weight)
    vae.save_pretrained(folder / "vae")
    PatchAutoencoderKL(block_out_channels=(8, 8)).save_pretrained(folder / "blind")
    PatchAutoencoderKL(in_channels=13, block_out_channels=(8, 8)).save_pretrained(folder / "thirteen")
    return folder


@pytest.fixture
def two(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a.png, b.jpg, and an empty folder out."""
    first, second = sorted(photos.rglob("*.png"))[:2]
    shutil.copy(first, tmp_path / "a.png")
    Image.open(second).convert("RGB").save(tmp_path / "b.jpg")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels_of(file: str | Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def expected(models: Path, file: str, *, sigma: float | None = None, clean: bool = True) -> np.ndarray:
    vae = load_autoencoder(str(models))
    images = to_images(pixels_of(file))[None]
    with torch.inference_mode():
        return to_pixels(denoise(vae, images, sigma=sigma) if clean else reconstruct(vae, images))[0]


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_one_image_becomes_a_png_beside_it(models: Path, two: Path) -> None:
    run("denoise", "b.jpg", "--model", models, "--sigma", 20)
    run("reconstruct", "b.jpg", "--model", models)
    for name, images in (
        ("b.denoised.png", expected(models, "b.jpg", sigma=20.0)),
        ("b.reconstructed.png", expected(models, "b.jpg", clean=False)),
    ):
        assert np.abs(pixels_of(name).astype(int) - images).max() <= 1
    assert not np.array_equal(pixels_of("b.denoised.png"), pixels_of("b.reconstructed.png"))


def test_several_images_and_folders_go_into_a_folder_by_their_names(
    models: Path, two: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("--model", models, "--workers", 1)
    run("denoise", "a.png", "b.jpg", "out", *words)
    assert names_in(two / "out") == ["a.png", "b.png"]
    assert "2 of 2 files done; they are in out" in capsys.readouterr().err
    run("denoise", "b.jpg", "-o", "new/", *words)
    run("reconstruct", "out", "again", *words)
    assert (names_in(two / "new"), names_in(two / "again")) == (["b.png"], ["a.png", "b.png"])
    assert np.array_equal(pixels_of("new/b.png"), pixels_of("out/b.png"))
    (two / "out" / "c.png").write_bytes(b"damage")
    assert "1 of 1 files could not be done" in fails(capsys, "reconstruct", "out", "again", *words)


def test_a_file_is_of_the_kind_that_its_name_says_and_keeps_transparency_and_bits(
    models: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 30), np.uint16)
    Image.fromarray(values).save("deep.png")
    clear = Image.open("a.png").convert("RGBA")
    clear.putalpha(100)
    clear.save("clear.png")
    words = ("--model", models)
    run("reconstruct", "a.png", "a.webp", *words)
    run("reconstruct", "a.png", *words)
    run("reconstruct", "clear.png", "-o", "clear.webp", *words)
    run("reconstruct", "deep.png", *words)
    assert Image.open("a.webp").format == "WEBP"
    assert np.array_equal(pixels_of("a.webp"), pixels_of("a.reconstructed.png"))
    assert np.array_equal(pixels_of("clear.webp")[:, :, :3], pixels_of("a.webp"))
    assert (pixels_of("clear.webp")[:, :, 3] == 100).all()
    assert Image.open("deep.reconstructed.png").mode == "I;16"
    out = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((two / "a.png").read_bytes())))
        patch.setattr(sys, "stdout", io.TextIOWrapper(out))
        run("reconstruct", "-", "-", *words)
        assert np.array_equal(pixels_of(io.BytesIO(out.getvalue())), pixels_of("a.webp"))


def test_large_images_go_by_way_of_the_disk(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (150, 210, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    run("denoise", tmp_path / "a.png", tmp_path / "whole.png", "--model", models)
    monkeypatch.setattr(large, "LARGE", 10_000)
    monkeypatch.setattr(convert, "SIDE", 64)
    monkeypatch.setattr(convert, "IN_ONE", 10_000)
    run("denoise", tmp_path / "a.png", tmp_path / "parts.png", "--model", models)
    whole, parts = (pixels_of(tmp_path / f"{name}.png").astype(int) for name in ("whole", "parts"))
    assert np.abs(whole - parts).max() <= 1
    assert names_in(tmp_path) == ["a.png", "parts.png", "whole.png"]


def test_an_original_is_not_written_over_and_what_is_there_stays(
    models: Path, two: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("--model", models, "--workers", 1)
    before = (two / "a.png").read_bytes()
    assert "1 of 2 files could not be done" in fails(capsys, "denoise", "a.png", "b.jpg", ".", *words)
    assert "is the input itself" in fails(capsys, "denoise", "a.png", "a.png", "--overwrite", *words)
    assert "b.png is there already" in fails(capsys, "denoise", "b.jpg", "b.png", *words)
    assert (two / "a.png").read_bytes() == before
    Image.new("RGB", (8, 8)).save("b.png")
    run("denoise", "b.jpg", "b.png", "--overwrite", *words)
    assert Image.open("b.png").size == Image.open("b.jpg").size


def test_what_cannot_work_is_said_in_one_line(models: Path, two: Path, capsys: pytest.CaptureFixture) -> None:
    (two / "text.txt").write_text("no image")
    for words, said in (
        (("a.png", "--model", "box:nothing"), "the box has box:codec"),
        (("a.png", "--model", models / "blind", "--sigma", 20), "cannot be told how much noise"),
        (("a.png", "--model", models, "--sigma", 99), "can be told 0 to 50"),
        (("a.png", "--model", models / "thirteen"), "13 channels"),
        (("text.txt", "--model", models), "text.txt: "),
        (("none.png", "--model", models), "none.png: No such file"),
        (("a.png", "x.ldi", "--model", models), "name an image file"),
        (("out", "--model", models), "name the output, too"),
        (("a.png", "--model", models, "--max-side", 10), "over the limit"),
        (("a.png", "--model", models, "--value-range", 2, 1), "--value-range"),
        (("a.png", "--model", models, "--device", "cuda:99"), "--device cuda:99"),
    ):
        assert said in fails(capsys, "denoise", *words)
    assert names_in(two) == ["a.png", "b.jpg", "out", "text.txt"]
