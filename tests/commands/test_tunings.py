"""Two networks in one model: which one writes, and that either reads both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae import pillow_plugin
from ldm_vae.codec import bitstream
from ldm_vae.codec.codec import LatentCodec
from ldm_vae.errors import CorruptError
from ldm_vae.models.loading import load_autoencoder
from tests.command_line import fails, run


@pytest.fixture(scope="module")
def tuned(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(model, folder)
    vae = load_autoencoder(str(model))
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.2
    vae.save_pretrained(folder / "psnr" / "vae")
    run("fit-codec", "--vae", folder / "psnr", "--data", photos, "--num-images", 2, "--steps", 0.4, 1)
    return folder


def test_each_tuning_writes_its_files_and_either_reads_both(
    tuned: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    run("compress", image, "psnr.ldi", "--model", tuned, "--tune", "psnr", "--step", 0.5)
    run("compress", image, "visual.ldi", "--model", tuned, "--step", 0.5)
    capsys.readouterr()
    run("info", "visual.ldi", "psnr.ldi", "--json")
    assert [facts["tuning"] for facts in json.loads(capsys.readouterr().out)] == ["visual", "psnr"]
    alone = {"visual": str(tuned), "psnr": str(tuned / "psnr")}
    for wrote in ("visual", "psnr"):
        run("decompress", f"{wrote}.ldi", f"{wrote}.png", "--model", tuned)
        with Image.open(f"{wrote}.png") as file:
            made = np.asarray(file)
        data = Path(f"{wrote}.ldi").read_bytes()
        for reads in ("visual", "psnr"):
            codec = LatentCodec.from_pretrained(str(tuned), tune=reads)
            assert np.array_equal(np.asarray(codec.decompress(data)), made)
        with Image.open(image) as file:
            network = LatentCodec.from_pretrained(alone[wrote])
            assert np.array_equal(np.asarray(network.decompress(network.compress(file, step=0.5))), made)
    pillow_plugin.register(str(tuned))
    with Image.open(image) as file:
        file.save("saved.ldi", tune="psnr", step=0.5)
    assert Path("saved.ldi").read_bytes() == Path("psnr.ldi").read_bytes()
    with Image.open("saved.ldi") as file, Image.open("psnr.png") as png:
        assert np.array_equal(np.asarray(file), np.asarray(png))


def test_a_tuning_that_is_not_there_is_said(
    model: Path, tuned: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "x.ldi"
    said = fails(capsys, "compress", image, file, "--model", model, "--tune", "psnr")
    assert said == f"error: {model} has a single tuning: leave out psnr"
    assert not file.exists()
    run("compress", image, file, "--model", tuned, "--tune", "psnr")
    assert "another model" in fails(capsys, "decompress", file, tmp_path / "x.png", "--model", model)
    data = bytearray(file.read_bytes())
    data[5] |= 0x20
    with pytest.raises(CorruptError, match="its tuning cannot be"):
        bitstream.unpack(bytes(data))
