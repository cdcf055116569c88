from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.analysis.embedding import embed
from ldm_vae.data.conversion import to_images
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.loading import load_autoencoder
from tests.command_line import fails, run

ONE_RESOLUTION = {
    "block_out_channels": (8,),
    "encoder_layers_per_block": (1,),
    "decoder_layers_per_block": (1,),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained: a map of latents, and a vector for images of 32 pixels."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    PatchAutoencoderKL(latent_channels=5, **ONE_RESOLUTION).save_pretrained(folder / "map" / "vae")
    PatchAutoencoderKL(latent_channels=6, pool=8, **ONE_RESOLUTION).save_pretrained(folder / "vector" / "vae")
    return folder


def test_a_vector_is_the_mean_over_places_or_all_of_them(models: Path) -> None:
    vae = load_autoencoder(str(models / "map"))
    images = torch.rand(3, 3, 20, 24) * 2 - 1
    latents = vae.encode(images).latent_dist.mean
    torch.testing.assert_close(embed(vae, images), latents.mean(dim=(2, 3)))
    torch.testing.assert_close(embed(vae, images, pooling="flatten"), latents.flatten(1))
    for i in range(3):  # no image depends on the others
        torch.testing.assert_close(embed(vae, images[i : i + 1])[0], latents[i].mean(dim=(1, 2)), rtol=0, atol=1e-6)


def test_a_folder_becomes_vectors_with_names_and_classes(models: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "in").symlink_to(photos)
    run("embed", "--vae", models / "map", "--data", photos, "--output", tmp_path / "v.npy")
    vectors = np.load(tmp_path / "v.npy")
    rows = list(csv.DictReader((tmp_path / "v.csv").open()))
    assert vectors.shape == (12, 5)
    vae = load_autoencoder(str(models / "map"))
    for vector, row in zip(vectors, rows, strict=True):
        images = to_images(np.asarray(Image.open(photos / row["name"])))[None]
        assert np.allclose(vector, embed(vae, images)[0].numpy(), atol=1e-6)
        assert row["class"] == row["name"].split("/")[0]
    parquet = pytest.importorskip("pyarrow.parquet")
    run("embed", "--vae", models / "map", "--data", photos, "--output", tmp_path / "v.parquet", "--num-images", 7)
    table = parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert table["name"] == [r["name"] for r in rows[:7]]
    assert np.array_equal(np.array(table["vector"], np.float32), vectors[:7])


def test_names_that_are_no_text_are_kept_as_far_as_parquet_can(models: Path, photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    os.makedirs(os.fsencode(tmp_path / "in") + b"/caf\xe9")
    shutil.copy(sorted(photos.rglob("*.png"))[0], os.fsencode(tmp_path / "in") + b"/caf\xe9/\xff.png")
    run("embed", "--vae", models / "map", "--data", tmp_path / "in", "--output", tmp_path / "v.parquet")
    table = parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert (table["name"], table["class"]) == (["caf\\udce9/\\udcff.png"], ["caf\\udce9"])


def test_images_of_unlike_sizes_are_resized_where_a_vector_needs_it(models: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    image = Image.open(sorted(photos.rglob("*.png"))[0])
    image.save(folder / "a.png")
    image.resize((40, 90)).save(folder / "b.png")
    (folder / "bad.png").write_bytes(b"nothing")
    run("embed", "--vae", models / "vector", "--data", folder, "--output", tmp_path / "v.npy")
    assert np.load(tmp_path / "v.npy").shape == (2, 6)
    flat = ("embed", "--vae", models / "map", "--data", folder, "--output", tmp_path / "f.npy", "--pooling", "flatten")
    run(*flat, "--resolution", 16)
    assert np.load(tmp_path / "f.npy").shape == (2, 5 * 4 * 4)


def test_what_cannot_be_embedded_is_said(
    models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, out = ("--vae", models / "map"), ("--output", tmp_path / "v.npy")
    data = ("--data", photos)
    assert "no such model" in fails(capsys, "embed", "--vae", tmp_path / "no", *data, *out)
    (tmp_path / "empty").mkdir()
    assert "no images" in fails(capsys, "embed", *model, "--data", tmp_path / "empty", *out)
    assert "no end" in fails(capsys, "embed", *model, "--data", "procedural:shapes", *out)
    assert ".npy or a .parquet" in fails(capsys, "embed", *model, *data, "--output", tmp_path / "v.txt")
    assert "--resolution" in fails(capsys, "embed", *model, *data, *out, "--resolution", 0)
    inside = ("--data", tmp_path / "in", "--output", tmp_path / "in" / "v.npy")
    (tmp_path / "in").mkdir()
    assert "is inside --data" in fails(capsys, "embed", *model, *inside)
    assert "--device" in fails(capsys, "embed", *model, *data, *out, "--device", "nothing")
    vector = ("--vae", models / "vector")
    assert "32 pixels" in fails(capsys, "embed", *vector, *data, *out, "--resolution", 64)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, size in enumerate(((16, 16), (24, 16))):
        Image.new("RGB", size).save(mixed / f"{i}.png")
    words = ("embed", *model, "--data", mixed, *out, "--pooling", "flatten")
    assert "add --resolution" in fails(capsys, *words)
    assert not (tmp_path / "v.npy").exists()
    run("embed", *model, *data, *out)
    assert "there already" in fails(capsys, "embed", *model, *data, *out)
