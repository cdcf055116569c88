from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Bernoulli, Normal, kl_divergence

from ldm_vae.objectives import losses


def posterior() -> DiagonalGaussianDistribution:
    generator = torch.Generator().manual_seed(0)
    return DiagonalGaussianDistribution(torch.randn(3, 8, 5, 6, generator=generator, dtype=torch.double))


def test_kl_is_in_nats_per_pixel_of_the_image() -> None:
    p = posterior()
    exact = kl_divergence(Normal(p.mean, p.std), Normal(0.0, 1.0))  # (3, 4, 5, 6)
    num_pixels = (5 * 8) * (6 * 8)
    assert losses.kl_per_pixel(p, num_pixels).mean().item() == pytest.approx(exact.sum().item() / 3 / num_pixels)
    bits = losses.kl_bits_per_channel(p)
    assert torch.allclose(bits, exact.mean(dim=(0, 2, 3)) / math.log(2))
    assert bits.sum().item() * 30 * math.log(2) == pytest.approx(exact.sum().item() / 3)


def test_kl_weight_of_stable_diffusion_is_a_third_of_a_millionth_here() -> None:
    """Its sums: sum |x - y| + 1e-6 * KL an image; ours: mean |x - y| + w * KL / (H W)."""
    p = posterior()
    x, y = torch.rand(3, 3, 40, 48, dtype=torch.double), torch.rand(3, 3, 40, 48, dtype=torch.double)
    theirs = (x - y).abs().sum() / 3 + 1e-6 * p.kl().mean()
    ours = losses.reconstruction_loss(x, y, "l1").double() + 1e-6 / 3 * losses.kl_per_pixel(p, 40 * 48).mean()
    assert ours.item() * 3 * 40 * 48 == pytest.approx(theirs.item(), rel=1e-6)


def test_reconstruction_losses_are_those_of_their_names() -> None:
    x, y = torch.tensor([[1.0, -0.5]]), torch.tensor([[0.0, 0.0]])
    assert losses.reconstruction_loss(x, y, "l1").item() == pytest.approx(0.75)
    assert losses.reconstruction_loss(x, y, "l2").item() == pytest.approx(0.625)
    assert losses.reconstruction_loss(x, y, "charbonnier").item() == pytest.approx(0.75, abs=1e-5)
    zero = torch.zeros(1, requires_grad=True)
    losses.reconstruction_loss(zero, torch.zeros(1), "charbonnier").backward()
    odds, truth = torch.tensor([2.0, -3.0, 50.0]), torch.tensor([1.0, 1.0, -1.0])
    p = 1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(3.0))
    expected = -(math.log(p[0]) + math.log(p[1]) - 50.0) / 3  # log(1 - p) of such odds is the odds, negative
    assert losses.reconstruction_loss(odds, truth, "cross-entropy").item() == pytest.approx(expected, rel=1e-6)
    assert zero.grad is not None
    assert zero.grad.item() == 0  # no kink


def test_adversarial_losses_have_their_textbook_values() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert losses.generator_loss(fake, "hinge").item() == pytest.approx(1.5)
    assert losses.discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.5 * (0.25 + 0.5))
    sigmoid = torch.sigmoid
    expected = -torch.log(sigmoid(fake)).mean()
    assert losses.generator_loss(fake, "non-saturating").item() == pytest.approx(expected.item())
    expected = -0.5 * (torch.log(sigmoid(real)).mean() + torch.log(1 - sigmoid(fake)).mean())
    assert losses.discriminator_loss(real, fake, "non-saturating").item() == pytest.approx(expected.item())
    assert losses.discriminator_accuracy(real, fake).item() == pytest.approx(0.75)


def test_the_adaptive_weight_makes_both_gradients_equally_long() -> None:
    other, adversarial = torch.randn(5, 5), torch.randn(5, 5) * 0.01
    weight = losses.adaptive_weight(other, adversarial)
    assert (weight * adversarial).norm().item() == pytest.approx(other.norm().item(), rel=1e-2)
    assert losses.adaptive_weight(other, torch.zeros(5, 5)).item() <= 1e4


def test_l1_sparsity_is_one_for_equal_latents_least_for_a_single_one_and_blind_to_scale() -> None:
    equal = torch.full((2, 4, 3, 3), -0.7)
    assert losses.l1_sparsity(equal).item() == pytest.approx(1)
    single = torch.zeros(1, 4, 3, 3)
    single[0, 2, 1, 1] = 5.0
    assert losses.l1_sparsity(single).item() == pytest.approx(1 / math.sqrt(36), rel=1e-5)
    latents = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses.l1_sparsity(latents), losses.l1_sparsity(10 * latents))
    torch.testing.assert_close(  # an image at a time: splitting a batch changes nothing
        losses.l1_sparsity(latents), torch.stack([losses.l1_sparsity(z[None]) for z in latents]).mean()
    )


def test_kl_sparsity_is_the_divergence_of_two_coins() -> None:
    rates = torch.tensor([0.05, 0.3])
    activations = rates[:, None, None, None].expand(2, 4, 3, 3)
    coins = [kl_divergence(Bernoulli(probs=torch.tensor(0.05)), Bernoulli(probs=r)) for r in rates]
    torch.testing.assert_close(losses.kl_sparsity(activations, 0.05), torch.stack(coins).mean())
    assert losses.kl_sparsity(torch.zeros(1, 1, 2, 2), 0.05).isfinite()
