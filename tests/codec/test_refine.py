from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.refine import FOLDER, NUM_LEVELS, Facts, Refiner, level_of, make_refiner, noise_for
from ldm_vae.errors import ConfigError, ModelError, ModelMismatchError
from training.train_refiner import Quantiser


def refiner_for(codec: LatentCodec, **changes: Any) -> Refiner:
    torch.manual_seed(0)
    network = make_refiner("tiny", latent_channels=4, side=8)
    torch.nn.init.normal_(network.conv_out.weight, std=0.02)
    facts = Facts(
        vae=codec.tables.vae,
        tables=codec.tables.digest.hex(),
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        quality_range=(0.5, 4.0),
    )
    return Refiner(network, replace(facts, **changes))


class Oracle(torch.nn.Module):
    """It knows the true rounding error, and checks what it is shown: what lies between that and the noise."""

    config = SimpleNamespace(block_out_channels=(1, 1))

    def __init__(self, error: torch.Tensor, condition: torch.Tensor) -> None:
        super().__init__()
        self.error, self.condition, self.noise = error, condition, None
        self.times: list[float] = []

    def forward(self, given: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> SimpleNamespace:
        noisy, condition = given[0].chunk(2)
        time = float(timesteps) / 1000
        self.times.append(time)
        self.noise = noisy if self.noise is None else self.noise
        assert torch.allclose(condition, self.condition, atol=1e-5)
        assert torch.allclose(noisy, self.error.lerp(self.noise, time), atol=1e-4)
        assert class_labels.tolist() == [8]
        return SimpleNamespace(sample=(self.noise - self.error)[None])


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_true_error_leads_to_the_true_latents_in_any_number_of_steps(codec: LatentCodec, num_steps: int) -> None:
    """And a channel that is not coded stays as it is."""
    true = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    deviation = torch.tensor([0.1, 0.2, 0.3, 0.0])[:, None, None]
    step = deviation * 12**0.5
    quantised = torch.where(step > 0, (true / step).round() * step, 0.5)
    error = torch.where(step > 0, (true - quantised) / deviation, 0.0)
    refiner = refiner_for(codec, latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    refiner.network = Oracle(error, (quantised - 1) / 2)
    found = refiner.refine(quantised, deviation, 1.0, num_steps, noise=noise_for(quantised.shape))
    assert torch.allclose(found[:3], true[:3], atol=1e-5)
    assert torch.equal(found[3], quantised[3])
    assert refiner.network.times == pytest.approx([1 - i / num_steps for i in range(num_steps)])
    noise = refiner.network.noise
    assert float(noise[:3].std()) == pytest.approx(1, abs=0.15)
    assert (noise[3] == 0).all()


def test_an_error_is_at_most_half_a_step(codec: LatentCodec) -> None:
    refiner, quantised = refiner_for(codec), torch.zeros(4, 6, 8)
    refiner.network = Oracle(torch.full((4, 6, 8), 9.0), quantised)
    found = refiner.refine(quantised, torch.full((4, 1, 1), 2.0), 1.0, 1, noise=noise_for(quantised.shape))
    assert torch.allclose(found, torch.full((4, 6, 8), 2 * 12**0.5 / 2))


def test_qualities_have_classes() -> None:
    found = level_of(torch.tensor([0.01, 0.25, 0.5, 1.0, 2.0, 8.0, 100.0]))
    assert found.tolist() == [0, 0, 4, 8, 12, 20, 20]
    assert NUM_LEVELS == 21


def test_training_quantises_as_the_codec_does(codec: LatentCodec) -> None:
    latents = np.random.default_rng(0).normal(size=(4, 5, 7)).astype(np.float32)
    fewer = replace(codec.tables, channels=codec.tables.channels[1:])  # as if one were not coded
    for quality in (0.5, 1.0, 2.0):
        fixed = codec.fixed_quality(quality)
        expected = codec.dequantise(codec.quantise(latents, fixed), fixed)
        quantiser = Quantiser.of(codec.tables, torch.device("cpu"))
        quantised, error = quantiser(torch.from_numpy(latents)[None], torch.tensor([quality]))
        assert np.allclose(quantised[0].numpy(), expected, atol=1e-5)
        assert float(error.abs().max()) <= 3**0.5 + 1e-4
        assert float(error.std()) == pytest.approx(1, abs=0.25)
        quantised, error = Quantiser.of(fewer, torch.device("cpu"))(
            torch.from_numpy(latents)[None], torch.tensor([quality])
        )
        left_out = codec.tables.channels[0]
        assert torch.allclose(quantised[0, left_out], torch.tensor(codec.tables.means[left_out]).float())
        assert (error[0, left_out] == 0).all()


def test_refined_pictures_are_the_same_each_time(codec: LatentCodec, photo: np.ndarray, tmp_path: Path) -> None:
    data = codec.compress(photo)
    plain = codec.decompress_picture(data).pixels
    folder = tmp_path / FOLDER
    folder.mkdir()
    refiner_for(codec).save(folder)
    refining = LatentCodec(codec.vae, codec.tables, refiner=Refiner.from_pretrained(str(tmp_path)))
    assert np.array_equal(refining.decompress_picture(data).pixels, plain)
    first, second = (refining.decompress_picture(data, refine_steps=2).pixels for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, plain)


def test_large_pictures_are_refined_in_tiles_with_a_halo(
    codec: LatentCodec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refiner that sees 3 latents each way in each of 2 steps, and its noise, gives in tiles what it gives whole."""
    seen = []

    class Neighbours(torch.nn.Module):
        config = SimpleNamespace(block_out_channels=(1,))

        def forward(self, given: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> SimpleNamespace:
            seen.append(tuple(given.shape[2:]))
            noisy, condition = given.chunk(2, dim=1)
            blurred = torch.nn.functional.avg_pool2d(condition, 7, stride=1, padding=3, count_include_pad=False)
            return SimpleNamespace(sample=0.5 * noisy - blurred)

    refiner = refiner_for(codec)
    refiner.network = Neighbours()
    refining = LatentCodec(codec.vae, codec.tables, refiner=refiner)
    data = codec.compress(photo)
    whole = refining.decompress_picture(data, refine_steps=2).pixels
    assert not np.array_equal(whole, codec.decompress_picture(data).pixels)
    monkeypatch.setattr("ldm_vae.codec.codec.TILE", 8)
    seen.clear()
    in_tiles = refining.decompress_picture(data, refine_steps=2).pixels
    assert len(seen) > 4
    assert np.abs(in_tiles.astype(int) - whole).max() <= 1


def test_what_cannot_be_refined_is_said(codec: LatentCodec, photo: np.ndarray, tmp_path: Path) -> None:
    data = codec.compress(photo)
    with pytest.raises(ConfigError, match="needs a refiner"):
        codec.decompress_picture(data, refine_steps=1)
    refining = LatentCodec(codec.vae, codec.tables, refiner=refiner_for(codec, quality_range=(2.0, 4.0)))
    for wrong in ({"refine_steps": 1, "region": (0, 0, 8, 8)}, {"refine_steps": -1}):
        with pytest.raises(ConfigError, match="whole picture, in 0 steps or more"):
            refining.decompress_picture(data, **wrong)
    with pytest.raises(ConfigError, match="trained for qualities 2 to 4, the file has 1"):
        refining.decompress_picture(data, refine_steps=1)
    for changes, name in (({"vae": "0" * 64}, "autoencoder"), ({"tables": "0" * 16}, "tables")):
        with pytest.raises(ModelMismatchError, match=f"trained for the {name} 0000"):
            LatentCodec(codec.vae, codec.tables, refiner=refiner_for(codec, **changes))
    (tmp_path / "config.json").write_text("{}")  # as every run and every VAE has
    with pytest.raises(ModelError, match="holds no refiner"):
        Refiner.from_pretrained(str(tmp_path))
    refiner_for(codec).save(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"damage")
    with pytest.raises(ModelError, match="cannot load the refiner"):
        Refiner.from_pretrained(str(tmp_path))


def test_a_damaged_tile_is_said_to_reach_further(codec: LatentCodec, photo: np.ndarray) -> None:
    data = bytearray(codec.compress(photo))
    data[-3] ^= 1
    damage: list[str] = []
    refining = LatentCodec(codec.vae, codec.tables, refiner=refiner_for(codec))
    refining.decompress_picture(bytes(data), refine_steps=1, damage=damage)
    assert "refiner sees the whole image" in damage[-1]
