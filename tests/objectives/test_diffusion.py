"""Each prediction with each of its schedulers ends at the distribution that it was trained on."""

from __future__ import annotations

import math
from functools import cache
from typing import get_args

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_vae.latents.timesteps import Prediction, timestep_at
from ldm_vae.objectives.diffusion import add_noise, alpha_and_sigma, min_snr_weights
from ldm_vae.sampling import SCHEDULERS, make_scheduler, prediction_of, set_timesteps

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
PAIRS = [(p, name) for p in PREDICTIONS for name in SCHEDULERS[p]]
MEANS = torch.tensor([[-1.3, -0.7], [1.2, -0.5], [0.2, 1.4]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
STD = 0.25


def mixture(count: int, generator: torch.Generator) -> Tensor:
    """(count, 2, 1, 1), as latents are."""
    modes = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    return (MEANS[modes] + STD * torch.randn(count, 2, generator=generator))[:, :, None, None]


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None] / 1000 * math.pi * 2.0 ** torch.arange(-1, 3)
        return self.net(torch.cat([noisy.flatten(1), angles.sin(), angles.cos()], dim=1))[:, :, None, None]


@cache
def trained(prediction: Prediction) -> Denoiser:
    """A small network that has learnt the mixture by this prediction's formulas, in seconds."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser()
    times = torch.tensor([timestep_at(prediction, 0, position) for position in range(8000)], dtype=torch.float32)
    optimizer = torch.optim.Adam(denoiser.parameters(), 1e-2, fused=True)
    steps = 1200
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        latents = mixture(512, generator)
        timesteps = times[torch.randint(len(times), (512,), generator=generator)]
        noisy, target = add_noise(prediction, latents, torch.randn(latents.shape, generator=generator), timesteps)
        loss = (denoiser(noisy, timesteps) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return denoiser.eval()


@torch.inference_mode()
def sampled(denoiser: Denoiser, prediction: Prediction, name: str, count: int = 4000) -> Tensor:
    """(count, 2) by the scheduler."""
    scheduler = make_scheduler(prediction, name)
    set_timesteps(scheduler, 40, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, 2, 1, 1, generator=generator)
    draws = {"generator": generator} if "sde" in name else {}
    for timestep in scheduler.timesteps:
        output = denoiser(latents, timestep.float().expand(count))
        latents = scheduler.step(output, timestep, latents, **draws).prev_sample
    return latents.flatten(1)


@pytest.mark.parametrize(("prediction", "name"), PAIRS)
def test_a_known_mixture_is_recovered(prediction: Prediction, name: str) -> None:
    """Weights to 0.03, means to 0.15, deviations to 0.1: DDIM with 40 steps is the least exact."""
    samples = sampled(trained(prediction), prediction, name)
    nearest = torch.cdist(samples, MEANS).argmin(dim=1)
    for mode in range(3):
        members = samples[nearest == mode]
        assert len(members) / len(samples) == pytest.approx(WEIGHTS[mode].item(), abs=0.03)
        assert torch.allclose(members.mean(dim=0), MEANS[mode], atol=0.15)
        spread = 1.4826 * (members - members.median(dim=0).values).abs().median(dim=0).values  # few stray between modes
        assert spread.tolist() == pytest.approx([STD, STD], abs=0.1)


@pytest.mark.parametrize(("prediction", "name"), PAIRS)
def test_training_adds_noise_as_the_scheduler_does(prediction: Prediction, name: str) -> None:
    latents, noise = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    for i in range(1, 6):
        scheduler = make_scheduler(prediction, name)  # anew: Heun's remembers its first step
        set_timesteps(scheduler, 10, torch.device("cpu"))
        timestep = scheduler.timesteps[i]
        ours, _ = add_noise(prediction, latents, noise, timestep[None])
        stock = getattr(scheduler, "scale_noise", None)
        if stock is not None:
            theirs = stock(latents, timestep[None], noise)
        else:
            theirs = scheduler.add_noise(latents, noise, timestep[None])
        assert torch.allclose(ours, theirs, atol=2e-3)  # the multistep ones round flow's timesteps down to integers
    assert prediction_of(scheduler) == prediction
    assert prediction_of(type(scheduler).from_config(scheduler.config)) == prediction


def test_the_target_leads_back_to_the_clean_latents() -> None:
    latents, noise = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    timesteps = torch.tensor([10.0, 300.0, 700.0, 990.0])
    for prediction in PREDICTIONS:
        noisy, target = add_noise(prediction, latents, noise, timesteps)
        alpha, sigma = alpha_and_sigma(prediction, timesteps)
        clean = {
            "flow": noisy - sigma * target,
            "v": alpha * noisy - sigma * target,
            "epsilon": (noisy - sigma * target) / alpha,
        }[prediction]
        assert torch.allclose(clean, latents, atol=1e-3)


def test_v_has_zero_snr_at_its_last_timestep_and_epsilon_is_ddpm() -> None:
    last = torch.tensor([999.0])
    assert alpha_and_sigma("v", last)[0].item() == 0
    stock = diffusers.DDPMScheduler(beta_schedule="linear")
    alpha, sigma = alpha_and_sigma("epsilon", torch.arange(1000.0))
    assert torch.allclose(alpha.flatten().square(), stock.alphas_cumprod, atol=1e-6)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(1), atol=1e-6)


def test_min_snr_weights_are_errors_in_the_clean_latents_up_to_gamma() -> None:
    """The weight times a small change of the prediction, squared, is min(SNR, gamma) times the change in x, squared."""
    latents, noise, change = (torch.randn(6, 1, 1, 1) for _ in range(3))
    timesteps = torch.tensor([50.0, 100.0, 200.0, 300.0, 400.0, 450.0])
    for prediction in PREDICTIONS:
        alpha, sigma = alpha_and_sigma(prediction, timesteps)
        noisy, target = add_noise(prediction, latents, noise, timesteps)
        moved = {
            "flow": noisy - sigma * (target + change),
            "v": alpha * noisy - sigma * (target + change),
            "epsilon": (noisy - sigma * (target + change)) / alpha,
        }[prediction]
        snr = (alpha / sigma).square().flatten()
        assert snr.min() > 0.05
        expected = snr.clamp(max=5) * (moved - latents).square().flatten()
        given = min_snr_weights(prediction, timesteps, 5.0) * change.square().flatten()
        assert torch.allclose(given, expected, rtol=1e-3, atol=1e-5)
    assert min_snr_weights("v", torch.tensor([999.0]), 5.0).item() == pytest.approx(0.05)


def test_times_are_drawn_from_the_distributions_that_are_named() -> None:
    flow = np.array([timestep_at("flow", 3, position) for position in range(4000)]) / 1000
    logits = np.log(flow / (1 - flow))
    assert logits.mean() == pytest.approx(0, abs=0.05)
    assert logits.std() == pytest.approx(1, abs=0.05)
    uniform = np.array([timestep_at("v", 3, position) for position in range(4000)])
    assert uniform.min() >= 0
    assert uniform.max() <= 999
    assert np.histogram(uniform, bins=10, range=(0, 1000))[0] == pytest.approx(400, abs=80)
    assert timestep_at("flow", 3, 7) == timestep_at("flow", 3, 7) != timestep_at("flow", 4, 7)


def test_even_steps_and_a_scheduler_that_does_not_fit() -> None:
    scheduler = make_scheduler("flow", "euler")
    set_timesteps(scheduler, 4, torch.device("cpu"))
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    heun = make_scheduler("flow", "heun")
    for _ in range(2):  # it remembers nothing of the first time
        set_timesteps(heun, 4, torch.device("cpu"))
        assert heun.sigmas.tolist() == pytest.approx([1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0])
        set_timesteps(heun, 7, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"scheduler ddim does not fit flow: try dpmsolver\+\+, sde-dpmsolver\+\+, euler, heun, unipc"
    ):
        make_scheduler("flow", "ddim")
