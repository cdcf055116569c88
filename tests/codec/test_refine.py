from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_vae import make_vae

from ldm_vae.codec import refine
from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.refine import FOLDER, NUM_LEVELS, Refiner, level_of
from ldm_vae.errors import ConfigError, ModelError, ModelMismatchError
from ldm_vae.models.pretrained import fingerprint
from ldm_vae.models.unet import make_denoiser
from training.train_refiner import Quantiser


def denoiser_for(vae: torch.nn.Module, *, silent: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    unet = make_denoiser("tiny", latent_channels=4, sample_size=(8, 8), num_classes=NUM_LEVELS)
    unet.register_to_config(vae=fingerprint(vae), latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    if silent:
        torch.nn.init.zeros_(unet.conv_out.weight)
        torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


class Oracle(torch.nn.Module):
    """It knows the true latents, and sees between them and the quantised ones where it is."""

    def __init__(self, true: torch.Tensor, quantised: torch.Tensor, deviation: torch.Tensor) -> None:
        super().__init__()
        self.true, self.quantised, self.deviation = true, quantised, deviation
        self.config = SimpleNamespace(block_out_channels=(1, 1))
        self.times: list[float] = []

    def forward(self, scaled: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> SimpleNamespace:
        time = float(timesteps) / 1000
        between = scaled * 2 + 1  # the scale below
        assert torch.allclose(between[0], self.true.lerp(self.quantised, time), atol=1e-4)
        self.times.append(time)
        return SimpleNamespace(sample=((self.true - self.quantised) / self.deviation)[None])


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_true_error_leads_to_the_true_latents_in_any_number_of_steps(num_steps: int) -> None:
    true = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    deviation = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    step = deviation * 12**0.5
    quantised = (true / step).round() * step
    oracle = Oracle(true, quantised, deviation)
    refiner = Refiner.__new__(Refiner)
    refiner.denoiser, refiner.scale = oracle, (torch.ones(3, 1, 1), torch.full((3, 1, 1), 2.0))
    assert torch.allclose(refiner.refine(quantised, deviation, 1.0, num_steps), true, atol=1e-5)
    assert oracle.times == pytest.approx([1 - i / num_steps for i in range(num_steps)])


def test_qualities_have_classes() -> None:
    found = level_of(torch.tensor([0.01, 0.25, 0.5, 1.0, 2.0, 8.0, 100.0]))
    assert found.tolist() == [0, 0, 4, 8, 12, 20, 20]
    assert NUM_LEVELS == 21


def test_training_quantises_as_the_codec_does(codec: LatentCodec, photo: np.ndarray) -> None:
    latents = np.random.default_rng(0).normal(size=(4, 5, 7)).astype(np.float32)
    for quality in (0.5, 1.0, 2.0):
        fixed = codec.fixed_quality(quality)
        expected = codec.dequantise(codec.quantise(latents, fixed), fixed)
        quantiser = Quantiser.of(codec.tables, torch.device("cpu"))
        found = quantiser.quantised(torch.from_numpy(latents)[None], torch.tensor([quality]))[0]
        assert np.allclose(found.numpy(), expected, atol=1e-5)


def test_refined_pictures_are_the_same_each_time_and_a_silent_refiner_changes_nothing(
    codec: LatentCodec, photo: np.ndarray, tmp_path: Path
) -> None:
    data = codec.compress(photo)
    plain = codec.decompress_picture(data).pixels
    denoiser_for(codec.vae).save_pretrained(tmp_path / FOLDER)
    refiner = Refiner.from_pretrained(str(tmp_path))
    changing = LatentCodec(codec.vae, codec.tables, refiner=refiner)
    first, second = (changing.decompress_picture(data, refine_steps=2).pixels for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, plain)
    silent = LatentCodec(codec.vae, codec.tables, refiner=Refiner(denoiser_for(codec.vae, silent=True)))
    assert np.array_equal(silent.decompress_picture(data, refine_steps=3).pixels, plain)


def test_large_latents_are_refined_in_tiles(codec: LatentCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Sides(torch.nn.Module):
        config = SimpleNamespace(block_out_channels=(1,))

        def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> SimpleNamespace:
            seen.append(tuple(x.shape[2:]))
            return SimpleNamespace(sample=x)

    monkeypatch.setattr(refine, "TILE", 16)
    monkeypatch.setattr(refine, "HALO", 4)
    refiner = Refiner.__new__(Refiner)
    refiner.denoiser, refiner.scale = Sides(), (torch.zeros(2, 1, 1), torch.ones(2, 1, 1))
    latents = torch.randn(2, 40, 20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(refiner.refine(latents, torch.ones(2, 1, 1), 1.0, 1), 2 * latents)
    assert max(max(s) for s in seen) <= 16 + 2 * 4
    assert len(seen) == 6


def test_what_cannot_be_refined_is_said(codec: LatentCodec, photo: np.ndarray, tmp_path: Path) -> None:
    data = codec.compress(photo)
    with pytest.raises(ConfigError, match="needs a refiner"):
        codec.decompress_picture(data, refine_steps=1)
    refining = LatentCodec(codec.vae, codec.tables, refiner=Refiner(denoiser_for(codec.vae)))
    with pytest.raises(ConfigError, match="whole picture"):
        refining.decompress_picture(data, refine_steps=1, region=(0, 0, 8, 8))
    with pytest.raises(ModelMismatchError, match="refiner is for the autoencoder"):
        LatentCodec(codec.vae, codec.tables, refiner=Refiner(denoiser_for(make_vae(seed=1))))
    with pytest.raises(ModelError, match="holds no refiner"):
        Refiner.from_pretrained(str(tmp_path))
    denoiser_for(codec.vae).save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"damage")
    with pytest.raises(ModelError, match="cannot load the refiner"):
        Refiner.from_pretrained(str(tmp_path))
