from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.equal_bytes import Config, load_photos, main
from ldm_vae.codec.fit_tables import fit_tables
from ldm_vae.codec.others import best_within, pillow_codec
from ldm_vae.data.sources import open_source
from ldm_vae.errors import DataError
from ldm_vae.models.autoencoder import PatchAutoencoderKL


def photo_of(height: int, width: int) -> np.ndarray:
    grain = np.random.default_rng(height).normal(size=(height, width, 3))
    return (
        (128 + 60 * np.sin(np.mgrid[:height, :width].sum(0) / 9)[:, :, None] + 9 * grain).clip(0, 255).astype(np.uint8)
    )


def test_the_best_file_within_a_size_is_the_last_one_that_fits() -> None:
    codec, pixels = pillow_codec("jpeg-420"), photo_of(40, 64)
    assert codec is not None
    for quality in (1, 30, 100):
        size = len(codec.encode(pixels, quality))
        assert len(best_within(codec, pixels, size)) == size
    assert best_within(codec, pixels, 10) == codec.encode(pixels, 1)  # none is that small
    assert best_within(codec, pixels, 10**6) == codec.encode(pixels, 100)


def test_photos_of_a_folder_are_compressed_in_no_more_bytes_and_shown_at_full_size(tmp_path: Path) -> None:
    run, images = tmp_path / "run", tmp_path / "in"
    images.mkdir()
    (run / "codec").mkdir(parents=True)
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(block_out_channels=(8,), encoder_layers_per_block=(1,), decoder_layers_per_block=(1,))
    vae.save_pretrained(run / "vae")
    fit_tables(vae, open_source("procedural:dead-leaves", resolution=64), num_images=2).save(run / "codec")
    for name, size in (("a.png", (300, 40)), ("b.png", (64, 320))):
        Image.fromarray(photo_of(*size)).save(images / name)
    (images / "bad.png").write_bytes(b"nothing")
    main(Config(codec=str(run), data=str(images), output=tmp_path / "out", others=("jpeg-420",), side=256))
    files = json.loads((tmp_path / "out" / "results.json").read_text())["files"]
    sizes = {(row["image"], row["codec"]): row["bytes"] for row in files}
    jpeg = pillow_codec("jpeg-420")
    assert jpeg is not None
    for name, pixels in (("a.png", photo_of(300, 40)[11:267]), ("b.png", photo_of(64, 320)[:, 32:288])):
        assert sizes[name, "jpeg-420"] == len(best_within(jpeg, pixels, sizes[name, str(run)]))
    with Image.open(tmp_path / "out" / "compressed.png") as shown:
        first = {tuple(shown.crop((left, 16, left + 40, 272)).tobytes()) for left in (4, 264)}
    assert tuple(photo_of(300, 40)[11:267].tobytes()) in first


def test_without_data_the_photos_are_those_of_scikit_image_and_a_wrong_folder_is_said(tmp_path: Path) -> None:
    photos = load_photos(Config(output=tmp_path))
    assert {name: pixels.shape for name, pixels in photos.items()} == {
        "astronaut": (512, 512, 3),
        "chelsea": (300, 451, 3),
        "coffee": (400, 600, 3),
        "rocket": (427, 640, 3),
    }
    with pytest.raises(DataError, match="no such folder"):
        load_photos(Config(output=tmp_path, data=str(tmp_path / "nowhere")))
