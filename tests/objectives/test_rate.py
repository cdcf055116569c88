"""What the codec's rate is in training, and what of the latents its decoder sees."""

from __future__ import annotations

import pytest
import torch

from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.objectives.rate import TrainableCodec, steering, steps_at

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
NOISE = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
STEPS = torch.tensor([0.5, 1.0, 2.0, 4.0])


@pytest.fixture
def codec() -> TrainableCodec:
    torch.manual_seed(0)
    return TrainableCodec(PatchAutoencoderKL(block_out_channels=(8, 16)))


def test_the_deviation_is_fixed_whatever_a_linear_path_was_trained_to_say_of_it() -> None:
    vae = PatchAutoencoderKL(latent_channels=4, block_out_channels=(8, 8), linear_path=True)
    torch.nn.init.normal_(vae.encoder.linear.conv.weight)
    TrainableCodec(vae)
    logvar = vae.encode(IMAGES).latent_dist.logvar
    assert torch.allclose(logvar, torch.tensor(1 / 12).log())


def test_the_rate_is_that_of_the_prior_for_the_noisy_latents(codec: TrainableCodec) -> None:
    _, moments, nats = codec(IMAGES, NOISE, STEPS)
    step = STEPS[:, None, None, None]
    uniform = torch.special.ndtr(NOISE) - 0.5
    values = moments[:, :4] / step + uniform
    expected = codec.prior(values, STEPS).sum(dim=(1, 2, 3)) / 32**2
    assert nats.shape == (4,)
    assert torch.allclose(nats, expected, rtol=1e-4)


def test_the_decoder_sees_rounded_latents_and_its_gradient_goes_past_the_rounding(codec: TrainableCodec) -> None:
    step = STEPS[:, None, None, None]
    reconstruction, moments, _ = codec(IMAGES, NOISE, STEPS)
    rounded = ((moments[:, :4] / step).round() * step).detach().requires_grad_()
    expected = codec.vae.decode(rounded).sample
    assert torch.allclose(reconstruction, expected, atol=1e-6)
    (through,) = torch.autograd.grad(reconstruction.square().sum(), moments)
    (direct,) = torch.autograd.grad(expected.square().sum(), rounded)
    assert torch.allclose(through[:, :4], direct, atol=1e-5)
    assert direct.abs().sum() > 0


def test_steps_are_log_uniform_and_belong_to_positions() -> None:
    steps = steps_at(list(range(4000)), 0, (0.5, 4.0))
    assert steps.min() >= 0.5
    assert steps.max() <= 4
    assert float(steps.log2().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(steps_at([7, 5], 0, (0.5, 4.0)), steps[[7, 5]])


def test_a_rate_at_its_target_leaves_the_weight_as_it_is() -> None:
    assert float(steering(torch.tensor(0.3), 0.3)) == 1
    assert float(steering(torch.tensor(0.4), 0.3)) > 1 > float(steering(torch.tensor(0.2), 0.3))
