from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.codec.picture import read_picture
from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.images import convert_channels
from ldm_vae.errors import ConfigError, DataError, RunError, one_line_errors
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.reconstruction import denoise
from ldm_vae.runs.config import parse_flags
from pipelines.denoise import Config, main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Untrained, but it knows a noise level."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(block_out_channels=(8, 8), noise_level=50.0)
    torch.nn.init.normal_(vae.encoder.level.weight)
    vae.save_pretrained(folder / "vae")
    PatchAutoencoderKL(block_out_channels=(8, 8)).save_pretrained(folder / "blind")
    return str(folder)


@pytest.mark.parametrize("sigma", [None, 25.0])
def test_tiles_give_what_the_whole_gives_at_any_size(sigma: float | None, run: str) -> None:
    vae = load_autoencoder(run)
    images = torch.rand(2, 3, 70, 101) * 2 - 1
    with torch.inference_mode():
        whole = denoise(vae, images, sigma=sigma)
        assert whole.shape == images.shape
        vae.enable_tiling(4)
        torch.testing.assert_close(denoise(vae, images, sigma=sigma), whole, rtol=0, atol=1e-5)
    assert sigma is None or not torch.allclose(whole, denoise(vae, images))


def test_every_image_of_a_folder_is_denoised(run: str, photos: Path, tmp_path: Path) -> None:
    main(Config(vae=run, input=str(photos), output=tmp_path / "out", sigma=10.0, tile=True))
    vae = load_autoencoder(run)
    for file in photos.rglob("*.png"):
        images = to_images(np.asarray(Image.open(file)))[None]
        with torch.inference_mode():
            expected = to_pixels(denoise(vae, images, sigma=10.0))[0]
        found = np.asarray(Image.open(tmp_path / "out" / file.relative_to(photos)))
        assert np.abs(found.astype(int) - expected).max() <= 1
    with pytest.raises(RunError, match="sigma: 10"):  # two kinds are not mixed
        main(Config(vae=run, input=str(photos), output=tmp_path / "out"))


def test_files_of_all_kinds_are_denoised_past_bad_ones(run: str, tmp_path: Path) -> None:
    """Grey, transparent, of 16 bits, of odd sizes: grey stays grey, and transparency goes round the network."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    Image.fromarray(rng.integers(0, 256, (33, 47), np.uint8)).save(tmp_path / "in" / "grey.png")
    Image.fromarray(rng.integers(0, 256, (20, 9, 4), np.uint8)).save(tmp_path / "in" / "transparent.png")
    Image.fromarray(rng.integers(0, 65536, (17, 64), np.uint16)).save(tmp_path / "in" / "deep.png")
    Image.fromarray(rng.integers(0, 256, (300, 530, 3), np.uint8)).save(tmp_path / "in" / "large.png")  # six tiles
    (tmp_path / "in" / "bad.png").write_bytes(b"nothing")
    main(Config(vae=run, input=str(tmp_path / "in"), output=tmp_path / "out", tile=True))
    vae = load_autoencoder(run)
    for name in ("grey", "transparent", "deep", "large"):
        given, found = (read_picture(tmp_path / folder / f"{name}.png") for folder in ("in", "out"))
        with torch.inference_mode():
            images = denoise(vae, to_images(convert_channels(given.pixels, 3))[None])
        if name in ("grey", "deep"):
            images = images.mean(dim=1, keepdim=True)
        assert found.pixels.dtype == (np.uint16 if name == "deep" else np.uint8)
        expected = to_pixels(images, found.pixels.dtype)[0].astype(int)
        assert np.abs(found.pixels - expected).max() <= (1 if name != "deep" else 2)
        assert (name == "transparent") == (found.alpha is not None)
        assert found.alpha is None or np.array_equal(found.alpha, given.alpha)
    assert "bad.png" in (tmp_path / "out" / "bad_images.csv").read_text()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        main(Config(vae=run, input=str(tmp_path / "empty"), output=tmp_path / "none"))


def test_a_level_that_cannot_be_told_is_refused(
    run: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = {"input": str(photos), "output": tmp_path / "out"}
    with pytest.raises(ConfigError, match="cannot be told"):
        main(Config(vae=f"{run}/blind", sigma=25.0, **output))
    for sigma in (-1.0, 51.0, float("nan")):
        with pytest.raises(ConfigError, match="can be told 0 to 50"):
            main(Config(vae=run, sigma=sigma, **output))
    out = ["--output", str(tmp_path / "none")]
    for words, said in (
        (["--vae", run, "--input", str(tmp_path / "no")], "no such folder or file"),
        (["--vae", str(tmp_path / "no"), "--input", str(photos)], "no such model"),
    ):
        with pytest.raises(SystemExit) as exit_, one_line_errors():
            main(parse_flags(Config, description="", args=[*words, *out]))
        assert exit_.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
