from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.rate_distortion import Config, difference, main, mean_curve
from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.fit_tables import fit_tables
from ldm_vae.codec.others import pillow_codec
from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError, DataError
from ldm_vae.models.autoencoder import PatchAutoencoderKL


def pixels_of() -> np.ndarray:
    """With detail of every size, so that each setting of a codec has its own fidelity."""
    y, x = np.mgrid[:64, :96]
    smooth = np.stack([(x * 2) % 256, (y * 4) % 256, (x + y) % 256], axis=2)
    grain = np.random.default_rng(0).normal(size=(64, 96, 1)) * (x[:, :, None] / 4)
    return (smooth + grain).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["jpeg-420", "jpeg-444", "webp", "avif-420", "avif-444", "jpeg2000"])
def test_each_codec_gives_back_nearly_the_image_and_less_for_less(name: str) -> None:
    codec = pillow_codec(name)
    if codec is None:
        pytest.skip("not in this Pillow")
    files = [codec.encode(pixels_of(), s) for s in codec.settings]
    errors = [np.square(codec.decode(f).astype(float) - pixels_of()).mean() for f in files]
    assert len(files[0]) < len(files[-1])
    assert errors[0] > errors[-1]
    assert codec.decode(files[-1]).shape == (64, 96, 3)


def test_chroma_is_subsampled_where_the_name_says_so() -> None:
    for name, layers in (("jpeg-420", (2, 2)), ("jpeg-444", (1, 1))):
        codec = pillow_codec(name)
        assert codec is not None
        image = Image.open(io.BytesIO(codec.encode(pixels_of(), 50)))
        assert image.layer[0][1:3] == layers


def rows_of(factor: float) -> list[dict]:
    return [
        {"setting": s, "image": i, "bpp": factor * 0.1 * 2**s * (1 + 0.1 * i), "psnr": 25.0 + 3 * s + i}
        for s in range(4)
        for i in range(3)
    ]


def test_differences_are_those_of_the_means_and_of_each_image() -> None:
    found = difference(rows_of(0.7), rows_of(1.0), "psnr", (0.0, 10.0))
    assert found["images"] == 3
    for key in ("of_means", "mean", "low", "high"):
        assert found[key] == pytest.approx(-30)
    rates, values = mean_curve(rows_of(1.0), "psnr")
    assert rates == pytest.approx([0.11, 0.22, 0.44, 0.88])
    assert values == pytest.approx([26, 29, 32, 35])


def test_a_table_plots_and_the_bytes_of_whole_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels_of()).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"nothing")
    published = tmp_path / "published.csv"
    published.write_text("codec,bits_per_pixel,psnr_rgb_db,source\nX,0.1,30,paper\nX,0.5,35,paper\n")
    output, others = tmp_path / "out", ("jpeg-420", "webp")
    main(Config(data=str(tmp_path / "in"), output=output, others=others, published=published, between=(0.0, 100.0)))
    rows = list(csv.DictReader((tmp_path / "out" / "per_image.csv").open()))
    jpeg = pillow_codec("jpeg-420")
    assert jpeg is not None
    for row in rows:
        if row["codec"] == "jpeg-420":
            data = jpeg.encode(pixels_of(), int(row["setting"]))
            assert int(row["bytes"]) == len(data)
            assert float(row["bpp"]) == pytest.approx(8 * len(data) / (64 * 96))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["differences"]["jpeg-420"]["jpeg-420"]["psnr"]["of_means"] == pytest.approx(0, abs=1e-9)
    for name in ("table.md", "psnr.png", "ssimulacra2.png", "gallery.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_our_codec_is_measured_beside_others_and_an_exact_copy_does_not_hide_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, images = tmp_path / "run", tmp_path / "in"
    images.mkdir()
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(block_out_channels=(8,), encoder_layers_per_block=(1,), decoder_layers_per_block=(1,))
    vae.save_pretrained(run / "vae")
    (run / "codec").mkdir()
    steps = (0.5, 1.0)
    fit_tables(vae, open_source("procedural:dead-leaves", resolution=64), num_images=2, steps=steps).save(run / "codec")
    Image.fromarray(pixels_of()).save(images / "a.png")
    Image.fromarray(np.full((64, 96, 3), 128, np.uint8)).save(images / "flat.png")  # JPEG gives it back as it is
    config = Config(codec=(str(run),), data=str(images), output=tmp_path / "out", steps=steps, others=("jpeg-420",))
    main(config)
    assert "PSNR" in capsys.readouterr().out.split("1 of 2 images have none")[0]
    rows = list(csv.DictReader((tmp_path / "out" / "per_image.csv").open()))
    codec = LatentCodec.from_pretrained(str(run))
    ours = [r for r in rows if r["codec"] == str(run)]
    assert len(ours) == 4
    for row in ours:
        pixels = np.asarray(Image.open(images / row["image"]))
        data = codec.compress(pixels, step=float(row["setting"]))
        assert int(row["bytes"]) == len(data)
        error = np.square(np.asarray(codec.decompress(data)).astype(float) - pixels).mean()
        assert float(row["psnr"]) == pytest.approx(10 * np.log10(255**2 / error))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["curves"]["jpeg-420"]["psnr"][1][0] == pytest.approx(
        next(float(r["psnr"]) for r in rows if r["codec"] == "jpeg-420" and r["image"] == "a.png")
    )


def test_what_cannot_work_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no codec"):
        main(Config(data=str(tmp_path), output=tmp_path / "out", others=()))
    with pytest.raises(DataError):
        main(Config(data=str(tmp_path / "nowhere"), output=tmp_path / "out"))
    for count in (0, -1):
        with pytest.raises(ConfigError, match="--num-images"):
            main(Config(data=str(tmp_path), output=tmp_path / "out", num_images=count))
