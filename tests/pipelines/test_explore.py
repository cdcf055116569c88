from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.errors import ConfigError, DataError, ModelError
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.objectives.rate import TrainableCodec
from pipelines.explore import Config, Space, channels, interpolations, main, samples, traversals

ONE = {"block_out_channels": (8,), "encoder_layers_per_block": (1,), "decoder_layers_per_block": (1,)}
GRIDS = {"samples.png", "interpolations.png", "traversals.png", "channels.csv"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    PatchAutoencoderKL(latent_channels=3, **ONE).save_pretrained(folder / "a" / "kl")
    PatchAutoencoderKL(latent_channels=3, deterministic=True, **ONE).save_pretrained(folder / "plain")
    PatchAutoencoderKL(in_channels=1, latent_channels=4, pool=4, **ONE).save_pretrained(folder / "b" / "kl")
    return folder


def test_grids_and_figures_of_an_autoencoder(models: Path, photos: Path, tmp_path: Path) -> None:
    config = Config(vae="", data=str(photos), output=tmp_path, resolution=16, rows=3, num_samples=2)
    kl, plain, grey = (
        replace(config, vae=str(models / model), output=tmp_path / model) for model in ("a/kl", "plain", "b/kl")
    )
    for each in (kl, plain, grey):
        main(each)
        assert {p.name for p in each.output.iterdir()} == GRIDS | {"samples"}
    assert Image.open(grey.output / "samples" / "00000.png").mode == "L"
    rows = list(csv.DictReader((kl.output / "channels.csv").open()))
    assert len(rows) == 3
    assert all(float(r["kl_bits"]) >= 0 for r in rows)
    assert next(csv.DictReader((plain.output / "channels.csv").open()))["kl_bits"] == ""
    main(replace(kl, num_samples=1))
    assert [p.name for p in (kl.output / "samples").iterdir()] == ["00000.png"]  # in the place of both


def test_a_run_s_grids_are_left_alone(models: Path, photos: Path, tmp_path: Path) -> None:
    grid = tmp_path / "samples" / "step-100.png"  # as in a run's directory
    grid.parent.mkdir()
    grid.write_bytes(b"a grid")
    with pytest.raises(ConfigError, match="holds other things than samples"):
        main(Config(vae=str(models / "plain"), data=str(photos), output=tmp_path, num_samples=1))
    assert [p.name for p in tmp_path.rglob("*.*")] == ["step-100.png"]
    assert grid.read_bytes() == b"a grid"


def space_of(path: Path, count: int = 200) -> Space:
    vae = load_autoencoder(str(path))
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        return Space(vae=vae, images=images, moments=vae.encode(images).latent_dist.parameters)


def test_the_prior_is_standard_normal_or_what_the_latents_have(models: Path) -> None:
    noise = space_of(models / "a" / "kl").draw(500, 0)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    space = space_of(models / "plain")
    fitted = space.draw(2000, 0)
    for c in range(3):
        assert fitted[:, c].mean().item() == pytest.approx(space.latents[:, c].mean().item(), abs=0.05)
        assert fitted[:, c].std().item() == pytest.approx(space.latents[:, c].std().item(), rel=0.05)


def test_latents_of_the_codec_have_no_normal_prior() -> None:
    """Their deviation is that of rounding, everywhere: they are drawn as they are, and no KL is said."""
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(latent_channels=3, **ONE)
    TrainableCodec(vae)
    with torch.no_grad():
        vae.encoder.conv_out.weight[:3] *= 50
    images = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        space = Space(vae=vae, images=images, moments=vae.encode(images).latent_dist.parameters)
    assert space.draw(2000, 0)[:, 0].std().item() == pytest.approx(space.latents[:, 0].std().item(), rel=0.05)
    assert {row["kl_bits"] for row in channels(space)} == {""}


def test_latents_of_a_sparse_autoencoder_are_drawn_where_they_can_be() -> None:
    torch.manual_seed(0)
    for activation, low, high in (("relu", 0.0, torch.inf), ("sigmoid", 0.0, 1.0)):
        vae = PatchAutoencoderKL(latent_channels=3, latent_activation=activation, deterministic=True, **ONE)
        images = torch.rand(30, 3, 8, 8) * 2 - 1
        with torch.inference_mode():
            space = Space(vae=vae, images=images, moments=vae.encode(images).latent_dist.parameters)
        latents = space.draw(500, 0)
        assert low <= latents.min() < latents.max() <= high


def cell(grid: Image.Image, row: int, column: int) -> np.ndarray:
    """Of 8 x 8 pixels, below its label."""
    top, left = row * (8 + 16 + 4) + 16, 4 + column * (8 + 4)
    return np.asarray(grid)[top : top + 8, left : left + 8]


def test_each_image_of_a_grid_is_what_its_place_says(models: Path) -> None:
    space = space_of(models / "plain", 20)
    config = Config(vae="", data="", output=Path(), rows=3)
    latents = space.latents

    def decoded(z: torch.Tensor) -> np.ndarray:
        return space.decode(z[None])[0]

    grid = interpolations(space, config)
    for row in range(3):
        first, last = latents[2 * row], latents[2 * row + 1]
        assert np.array_equal(cell(grid, row, 0), space_pixels(space, 2 * row))
        assert np.array_equal(cell(grid, row, 9), space_pixels(space, 2 * row + 1))
        for step in range(8):
            expected = decoded(first + step / 7 * (last - first))
            assert np.abs(cell(grid, row, 1 + step).astype(int) - expected).max() <= 1

    grid = traversals(space, config)
    deviations = latents.transpose(0, 1).flatten(1).std(dim=1)
    for row, channel in enumerate(deviations.argsort(descending=True).tolist()):
        for step in range(8):
            moved = latents[0].clone()
            moved[channel] += (6 * step / 7 - 3) * deviations[channel]
            assert np.abs(cell(grid, row, step).astype(int) - decoded(moved)).max() <= 1

    grid = samples(space, config)
    for index, z in enumerate(space.draw(24, config.seed)):
        assert np.array_equal(cell(grid, index // 8, index % 8), decoded(z))


def test_channels_are_measured(models: Path) -> None:
    space = space_of(models / "a" / "kl", 50)
    posterior = space.vae.encode(space.images).latent_dist
    for c, row in enumerate(channels(space)):
        means, deviations = posterior.mean[:, c].detach().numpy(), posterior.std[:, c].detach().numpy()
        nats = 0.5 * (means**2 + deviations**2 - 1 - 2 * np.log(deviations))
        assert row["mean"] == pytest.approx(means.mean(), abs=1e-5)
        assert row["std"] == pytest.approx(means.std(ddof=1), rel=1e-4)
        assert row["activity"] == pytest.approx(means.var(ddof=1), rel=1e-4)
        assert row["kl_bits"] == pytest.approx(nats.mean() / np.log(2), rel=1e-4)


def space_pixels(space: Space, index: int) -> np.ndarray:
    return ((space.images[index].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


def test_what_cannot_be_explored_is_said(models: Path, photos: Path, tmp_path: Path) -> None:
    output = {"data": str(photos), "output": tmp_path}
    with pytest.raises(ModelError, match="no such model"):
        main(Config(vae=str(models / "no"), **output))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        main(Config(vae=str(models / "plain"), data=str(tmp_path / "empty"), output=tmp_path))
    finder = PatchAutoencoderKL(out_channels=1, finds_blemishes=True, **ONE)
    finder.save_pretrained(tmp_path / "finder")
    with pytest.raises(ModelError, match="gives no images"):
        main(Config(vae=str(tmp_path / "finder"), **output))
    with pytest.raises(ConfigError, match="num-images"):
        main(Config(vae=str(models / "plain"), num_images=1, **output))


def test_images_of_all_sizes_are_looked_at_past_bad_ones(models: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate(((40, 9), (8, 70), (100, 100), (33, 34))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"nothing")
    ways = {"data": str(tmp_path / "in"), "output": tmp_path / "out", "resolution": 16, "rows": 2}
    main(Config(vae=str(models / "plain"), **ways))
    assert {p.name for p in (tmp_path / "out").iterdir()} == GRIDS
