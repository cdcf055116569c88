from __future__ import annotations

import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ldm_vae.codec.picture import Picture, encode_picture, read_picture
from ldm_vae.commands import convert
from ldm_vae.commands.convert import ConvertConfig as Config
from ldm_vae.commands.folders import numbered, result_names
from ldm_vae.data import large
from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.metadata import Metadata
from ldm_vae.data.reader import read_pixels
from ldm_vae.data.shards import build_index, shards_of
from ldm_vae.errors import ConfigError, RunError, one_line_errors
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.interface import fingerprint
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.reconstruction import reconstruct
from ldm_vae.runs.config import parse_flags
from pipelines.reconstruct import main


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with an untrained autoencoder."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    PatchAutoencoderKL(block_out_channels=(8, 8)).save_pretrained(run / "vae")
    return str(run)


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """Images of unlike sizes and kinds in folders, and a damaged one."""
    root = tmp_path / "images"
    (root / "in" / "depth ü").mkdir(parents=True)
    first, second = (Image.open(p) for p in sorted(photos.rglob("*.png"))[:2])
    first.crop((0, 0, 50, 41)).save(root / "a.bmp")
    second.crop((0, 0, 33, 8)).save(root / "in" / "b.webp", lossless=True)
    first.convert("L").save(root / "in" / "depth ü" / "c.tif")
    first.save(root / "same.png")
    second.save(root / "same.tif")
    (root / "bad.jpg").write_bytes(b"damage")
    return root


FILES = {
    "a.png": "a.bmp",
    "in/b.png": "in/b.webp",
    "in/depth ü/c.png": "in/depth ü/c.tif",
    "same.png.png": "same.png",
    "same.tif.png": "same.tif",
}


def made(output: Path) -> dict[str, np.ndarray]:
    return {str(p.relative_to(output)): np.asarray(Image.open(p)) for p in output.rglob("*.png")}


def test_every_image_comes_back_at_its_own_size_under_its_own_name(vae: str, folder: Path, tmp_path: Path) -> None:
    main(Config(vae=vae, input=str(folder), output=tmp_path / "out"))
    results = made(tmp_path / "out")
    assert results.keys() == FILES.keys()
    model = load_autoencoder(vae)
    for name, original in FILES.items():
        images = to_images(read_pixels((folder / original).read_bytes()))[None]
        with torch.no_grad():
            images = reconstruct(model, images)
            grey = results[name].ndim == 2
            expected = to_pixels(images.mean(dim=1, keepdim=True) if grey else images)[0].squeeze()
        assert grey == (original == "in/depth ü/c.tif")
        assert np.abs(results[name].astype(int) - expected).max() <= 1
        assert Image.open(tmp_path / "out" / name).info["model"] == fingerprint(model)
    table = (tmp_path / "out" / "bad_images.csv").read_text().splitlines()
    assert table[0] == "name,reason"
    assert len(table) == 2
    assert table[1].startswith("bad.jpg,")


def test_what_is_there_is_skipped_and_another_model_is_refused(vae: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    main(Config(vae=vae, input=str(folder), output=output))
    (output / "a.png").unlink()
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*.png")}
    main(Config(vae=vae, input=str(folder), output=output))
    assert made(output).keys() == FILES.keys()
    assert {p: p.stat().st_mtime_ns for p in before} == before
    PatchAutoencoderKL(block_out_channels=(8, 4)).save_pretrained(tmp_path / "other")
    with pytest.raises(RunError, match=r"was made with other settings \(model: "):
        main(Config(vae=str(tmp_path / "other"), input=str(folder), output=output))
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_tiles_change_nothing(vae: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 610, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "large.png")
    for tile in (False, True):
        main(Config(vae=vae, input=str(tmp_path / "images"), output=tmp_path / str(tile), tile=tile))
    whole, tiled = (made(tmp_path / str(tile))["large.png"].astype(int) for tile in (False, True))
    assert whole.shape == (300, 610, 3)
    assert np.abs(whole - tiled).max() <= 1


def test_images_of_one_name_in_two_shards_are_two_files(vae: str, tmp_path: Path) -> None:
    for number, colour in enumerate(("red", "blue")):
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / "image.png")
        with tarfile.open(tmp_path / str(number) / "a.tar", "w") as tar:
            tar.add(tmp_path / "image.png", "0.png")
    shards = str(tmp_path / "{0..1}" / "a.tar")
    build_index(shards_of(shards))
    main(Config(vae=vae, input=shards, output=tmp_path / "out"))
    results = made(tmp_path / "out")
    assert results.keys() == {"a.tar/0.png", "a.tar/0 (2).png"}
    assert not np.array_equal(*results.values())


def test_a_name_in_an_archive_leads_nowhere_else(vae: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("good.png", "../outside.png", f"{tmp_path}/absolute.png"):
            archive.writestr(zipfile.ZipInfo(name), (tmp_path / "red.png").read_bytes())
    main(Config(vae=vae, input=str(tmp_path / "images.zip"), output=tmp_path / "deep" / "out"))
    assert set(made(tmp_path)) == {"red.png", "deep/out/good.png"}
    assert "absolute.png,its name leads out" in (tmp_path / "deep" / "out" / "bad_images.csv").read_text()


def test_depth_transparency_and_metadata_go_along(vae: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "a description"
    metadata = Metadata(
        icc=srgb,
        cicp=(1, 13, 0, 1),
        exif=exif.tobytes().removeprefix(b"Exif\0\0"),
        xmp=b"<x/>",
        text=(("model", "another one's"), ("prompt", "a cat")),
    )
    values = np.random.default_rng(0).integers(0, 65536, (20, 30, 4), np.uint16)
    given = Picture(pixels=values[:, :, :3], alpha=values[:, :, 3], metadata=metadata)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "deep.png").write_bytes(encode_picture(given, ".png"))
    grey = Picture(pixels=values[:, :, :1], metadata=metadata)
    (tmp_path / "in" / "grey.png").write_bytes(encode_picture(grey, ".png"))
    main(Config(vae=vae, input=str(tmp_path / "in"), output=tmp_path / "out"))
    found = read_picture(tmp_path / "out" / "deep.png")
    assert np.array_equal(found.alpha, given.alpha)
    assert len(np.unique(found.pixels % 257)) > 100  # 8 bits would be multiples of 257
    texts = dict(found.metadata.text)
    assert replace(found.metadata, text=()) == replace(metadata, text=())
    assert (texts["prompt"], texts["model"]) == ("a cat", fingerprint(load_autoencoder(vae)))
    assert read_picture(tmp_path / "out" / "grey.png").metadata.icc == b""
    assert capsys.readouterr().err == "grey.png: its colour profile is for RGB and the image is grey: left out\n"
    main(Config(vae=vae, input=str(tmp_path / "in"), output=tmp_path / "strict", strict=True))
    assert made(tmp_path / "strict").keys() == {"deep.png"}
    assert "grey.png,its colour profile" in (tmp_path / "strict" / "bad_images.csv").read_text()


def test_an_original_behind_a_link_among_the_outputs_is_not_written_over(vae: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "in" / "a.bmp")
    (tmp_path / "out" / "a.png").symlink_to(tmp_path / "in" / "a.bmp")
    with pytest.raises(ConfigError, match="inside --input"):
        main(Config(vae=vae, input=str(tmp_path / "in"), output=tmp_path / "out"))
    assert Image.open(tmp_path / "in" / "a.bmp").format == "BMP"


def test_names_that_differ_by_their_extension_alone_keep_it() -> None:
    names = ["a.jpg", "b.jpg", "b.tif", "c/a.png"]
    assert numbered(["x/a.png", "x/a.png", "b", "x/a (2).png", "x/a.png"]) == [
        *("x/a.png", "x/a (2).png", "b", "x/a (2) (2).png", "x/a (3).png")
    ]
    assert result_names(names, ".png") == ["a.png", "b.jpg.png", "b.tif.png", "c/a.png"]
    assert result_names(["b.jpg", "b.jpg.png", "b.tif"], ".png") == ["b.jpg.png", "b.jpg.png.png", "b.tif.png"]


def test_autoencoders_of_diffusers_reconstruct_too(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    main(Config(vae=str(tmp_path / "vae"), input=f"{photos}#held-out", output=tmp_path / "out", tile=True))
    assert len(made(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vae", "{tmp}/missing"], "no such model"),
        (["--input", "{tmp}/missing"], "no such folder or file"),
        (["--input", "{tmp}/bad"], "no usable image"),
        (["--input", "procedural:dead-leaves"], "has no end"),
        (["--output", "{photos}/out"], "is inside --input"),
        (["--input", "{photos}#train", "--output", "{photos}/out"], "is inside --input"),
        (["--output", "{tmp}/bad/x.png/out"], "cannot write to"),
        (["--vae", "{tmp}/thirteen"], "13 channels cannot be PIL images or PNG"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    words: list[str], message: str, vae: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"damage")
    PatchAutoencoderKL(in_channels=13, block_out_channels=(8,) * 2).save_pretrained(tmp_path / "thirteen")
    given = ["--vae", vae, "--input", str(photos), "--output", str(tmp_path / "out")]
    given += [w.format(tmp=tmp_path, photos=photos) for w in words]
    with pytest.raises(SystemExit) as ended, one_line_errors():
        main(parse_flags(Config, description="", args=given))
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("tile", [False, True])
def test_large_images_go_through_in_parts(
    tile: bool, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 410, 4), np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "large.png")
    words = {"vae": vae, "input": str(tmp_path / "images"), "tile": tile}
    main(Config(**words, output=tmp_path / "whole"))
    monkeypatch.setattr(large, "LARGE", 10_000)
    monkeypatch.setattr(convert, "SIDE", 64)
    monkeypatch.setattr(convert, "IN_ONE", 10_000)
    for _ in range(2):  # the second time there is nothing to do
        main(Config(**words, output=tmp_path / "parts"))
    whole, parts = (made(tmp_path / name)["large.png"].astype(int) for name in ("whole", "parts"))
    assert np.abs(whole - parts).max() <= 1
    assert (whole != parts).mean() < 1e-3  # ties of rounding
    assert Image.open(tmp_path / "parts" / "large.png").info["image"] == "large.png"
