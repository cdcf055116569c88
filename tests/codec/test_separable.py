"""The codec's network without torch: what it computes, and that files do not depend on which of the two wrote them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.fit_tables import fit_tables
from ldm_vae.codec.separable import DEFAULTS, SeparableAutoencoder, load_separable
from ldm_vae.data.sources import open_source
from ldm_vae.errors import ModelError
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.interface import fingerprint

SMALL = {
    "latent_channels": 6,
    "patch_size": 4,
    "block_out_channels": (16,),
    "encoder_layers_per_block": (1,),
    "decoder_layers_per_block": (2,),
    "block": "separable",
}


def saved(folder: Path, **changes: object) -> PatchAutoencoderKL:
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(**SMALL | changes)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae.save_pretrained(folder)
    return vae.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    vae = saved(folder / "vae", linear_path=True)
    source = open_source("procedural:dead-leaves", channels=3, resolution=96)
    (folder / "codec").mkdir()
    fit_tables(vae, source, num_images=4, steps=(0.5, 2)).save(folder / "codec")
    return folder


@pytest.mark.parametrize("linear_path", [False, True])
def test_it_computes_what_torch_does(linear_path: bool, tmp_path: Path) -> None:
    vae = saved(tmp_path, linear_path=linear_path)
    network = load_separable(str(tmp_path))
    assert network is not None
    assert network.fingerprint == fingerprint(vae)
    assert (network.encoder_halo, network.decoder_halo) == (-(-vae.encoder_halo // 4), vae.decoder_halo)
    image = torch.rand(3, 36, 52) * 2 - 1
    with torch.inference_mode():
        mean = vae.encode(image[None]).latent_dist.mean[0]
        assert np.abs(network.encode(image.numpy()) - mean.numpy()).max() < 1e-5
        assert np.abs(network.decode(mean.numpy()) - vae.decode(mean[None]).sample[0].numpy()).max() < 1e-5


@pytest.mark.parametrize("workers", [2, 7])
def test_threads_share_an_image_and_compute_the_same(workers: int, tmp_path: Path) -> None:
    saved(tmp_path, linear_path=True)
    one, several = load_separable(str(tmp_path)), load_separable(str(tmp_path), workers)
    assert one is not None
    assert several is not None
    image = np.random.default_rng(0).uniform(-1, 1, (3, 20, 52)).astype(np.float32)  # five rows of patches
    latents = one.encode(image)
    assert np.allclose(several.encode(image), latents, atol=1e-6)
    assert np.allclose(several.decode(latents), one.decode(latents), atol=1e-6)


@pytest.mark.parametrize("change", [{"block": "residual"}, {"noise_level": 50.0}, {"block_out_channels": (16, 16)}])
def test_a_model_of_another_kind_is_left_to_torch(change: dict[str, object], tmp_path: Path) -> None:
    layers = (1,) * len(change.get("block_out_channels", (16,)))  # type: ignore[arg-type]
    saved(tmp_path, **change | {"encoder_layers_per_block": layers, "decoder_layers_per_block": layers})
    assert load_separable(str(tmp_path)) is None


def test_its_defaults_are_those_of_the_network() -> None:
    config = dict(PatchAutoencoderKL().config)
    for name, value in DEFAULTS.items():
        expected = config[name] if name != "out_channels" else None
        assert (list(expected) if isinstance(expected, tuple) else expected) == value


def test_a_damaged_model_is_one_clear_error(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cannot load PatchAutoencoderKL"):
        load_separable(str(tmp_path))


def test_either_network_reads_the_files_of_the_other(model: Path, photo: np.ndarray) -> None:
    small, large = (LatentCodec.from_pretrained(str(model), dtype=dtype) for dtype in (None, torch.float32))
    assert isinstance(small.vae, SeparableAutoencoder)
    assert not isinstance(large.vae, SeparableAutoencoder)
    files = [codec.compress(photo, step=0.7) for codec in (small, large)]
    for file in files:
        pixels = [codec.decompress_picture(file).pixels.astype(int) for codec in (small, large)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_compress_and_decompress_start_without_torch(model: Path, photo: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(photo).save(tmp_path / "a.png")
    code = (
        "import sys; from ldm_vae.cli import main; folder, model = sys.argv[1:];"
        "main(['compress', f'{folder}/a.png', f'{folder}/a.ldi', '--model', model]);"
        "main(['decompress', f'{folder}/a.ldi', f'{folder}/b.png', '--model', model]);"
        "print([name for name in ('torch', 'diffusers', 'scipy.optimize') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(model)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (120, 80)
