from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.errors import ConfigError, DataError, ModelError
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.pretrained import load_autoencoder
from ldm_vae.models.prior import CausalPrior
from ldm_vae.objectives.autoencoding import TrainableVAE
from pipelines.explore import Config, Space, channels, drawn, main, neighbours, traversals

ONE = {"block_out_channels": (8,), "encoder_layers_per_block": (1,), "decoder_layers_per_block": (1,)}
SHEETS = {"samples.png", "interpolations.png", "traversals.png", "neighbours.png", "channels.csv"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    PatchAutoencoderKL(latent_channels=3, **ONE).save_pretrained(folder / "a" / "kl")
    PatchAutoencoderKL(latent_channels=3, deterministic=True, **ONE).save_pretrained(folder / "plain")
    PatchAutoencoderKL(in_channels=1, latent_channels=4, pool=4, **ONE).save_pretrained(folder / "b" / "kl")
    return folder


def test_sheets_and_figures_of_each_autoencoder(models: Path, photos: Path, tmp_path: Path) -> None:
    vaes = (str(models / "a" / "kl"), str(models / "plain"), str(models / "b" / "kl"))
    main(Config(vae=vaes, data=str(photos), output=tmp_path, resolution=16, rows=3, num_samples=2))
    assert {p.name for p in tmp_path.iterdir()} == {"0-kl", "1-plain", "2-kl"}
    for folder in tmp_path.iterdir():
        assert {p.name for p in folder.iterdir()} == SHEETS | {"samples"}
    assert Image.open(tmp_path / "2-kl" / "samples" / "00000.png").mode == "L"
    rows = list(csv.DictReader((tmp_path / "0-kl" / "channels.csv").open()))
    assert len(rows) == 3
    assert all(float(r["kl_bits"]) >= 0 for r in rows)
    assert next(csv.DictReader((tmp_path / "1-plain" / "channels.csv").open()))["kl_bits"] == ""
    main(Config(vae=vaes[:1], data=str(photos), output=tmp_path / "0-kl", resolution=16, rows=3, num_samples=1))
    assert [p.name for p in (tmp_path / "0-kl" / "samples").iterdir()] == ["00000.png"]  # in the place of both
    grid = tmp_path / "1-plain" / "samples" / "step-100.png"  # as in a run's directory
    grid.write_bytes(b"a grid")
    with pytest.raises(ConfigError, match="holds other things than samples"):
        main(Config(vae=vaes, data=str(photos), output=tmp_path, resolution=16, rows=3, num_samples=1))
    assert grid.read_bytes() == b"a grid"
    assert len(list((tmp_path / "0-kl" / "samples").iterdir())) == 1


def space_of(path: Path, count: int = 200) -> Space:
    vae = load_autoencoder(str(path))
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        return Space(vae=vae, images=images, moments=vae.encode(images).latent_dist.parameters)


def test_the_prior_is_standard_normal_or_what_the_latents_have(models: Path) -> None:
    noise = drawn(space_of(models / "a" / "kl"), 500, 0)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    space = space_of(models / "plain")
    fitted = drawn(space, 2000, 0)
    for c in range(3):
        assert fitted[:, c].mean().item() == pytest.approx(space.latents[:, c].mean().item(), abs=0.05)
        assert fitted[:, c].std().item() == pytest.approx(space.latents[:, c].std().item(), rel=0.05)


def test_latents_of_the_codec_have_no_normal_prior() -> None:
    """Their deviation is that of rounding, everywhere: they are drawn as they are, and no KL is said."""
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(latent_channels=3, **ONE)
    TrainableVAE(vae, learned_logvar=False, prior=CausalPrior(3))
    with torch.no_grad():
        vae.encoder.conv_out.weight[:3] *= 50
    images = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        space = Space(vae=vae, images=images, moments=vae.encode(images).latent_dist.parameters)
    assert drawn(space, 2000, 0)[:, 0].std().item() == pytest.approx(space.latents[:, 0].std().item(), rel=0.05)
    assert {row["kl_bits"] for row in channels(space)} == {""}


@pytest.mark.parametrize(("activation", "idle"), [("relu", 0.0), ("sigmoid", 0.5)])
def test_active_latents_are_counted_as_in_training(activation: str, idle: float) -> None:
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(latent_channels=3, latent_activation=activation, deterministic=True, **ONE)
    images = torch.rand(20, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        moments = vae.encode(images).latent_dist.parameters
    rows = channels(Space(vae=vae, images=images, moments=moments))
    shares = [float((moments[:, c] > idle).float().mean()) for c in range(3)]
    assert [r["active"] for r in rows] == pytest.approx(shares)
    assert 0 < sum(shares) < 3


def test_an_image_is_its_own_nearest_neighbour_and_traversals_move_it(models: Path) -> None:
    space = space_of(models / "plain", 20)
    config = Config(data="", output=Path(), rows=3)
    sheet = np.asarray(neighbours(space, config))
    first, second = sheet[16:24, 4:12], sheet[16:24, 16:24]
    assert np.array_equal(first, np.asarray(space_pixels(space, 0)))
    assert not np.array_equal(first, second)
    rows = np.asarray(traversals(space, config))
    assert not np.array_equal(rows[16:24, 4:12], rows[16:24, -12:-4])


def space_pixels(space: Space, index: int) -> np.ndarray:
    return ((space.images[index].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


def test_what_cannot_be_explored_is_said(models: Path, photos: Path, tmp_path: Path) -> None:
    output = {"data": str(photos), "output": tmp_path}
    with pytest.raises(ConfigError, match="no --vae"):
        main(Config(**output))
    with pytest.raises(ModelError, match="no such model"):
        main(Config(vae=(str(models / "no"),), **output))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        main(Config(vae=(str(models / "plain"),), data=str(tmp_path / "empty"), output=tmp_path))
    finder = PatchAutoencoderKL(out_channels=1, finds_blemishes=True, **ONE)
    finder.save_pretrained(tmp_path / "finder")
    with pytest.raises(ModelError, match="gives no images"):
        main(Config(vae=(str(tmp_path / "finder"),), **output))
    with pytest.raises(ConfigError, match="num-images"):
        main(Config(vae=(str(models / "plain"),), num_images=1, **output))
