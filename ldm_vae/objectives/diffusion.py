"""What a denoiser is asked to predict, as pure functions.

Everything is written for noisy latents `alpha * x + sigma * noise` of scaled latents x. `timesteps` are what the
network sees: in [0, 1000], 1000 (or 999) the noisiest.

| prediction | alpha, sigma at t = timestep / 1000 | target | source |
|---|---|---|---|
| flow | 1 - t, t | noise - x | rectified flow: Liu et al. 2023, equation 1; Esser et al. 2024, equations 2 and 13 |
| v | sqrt(abar), sqrt(1 - abar), abar rescaled to end at 0 | alpha * noise - sigma * x | Salimans & Ho 2022, \
appendix D; Lin et al. 2024, algorithm 1 |
| epsilon | sqrt(abar), sqrt(1 - abar) | noise | Ho et al. 2020, equations 4 and 14 |
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ldm_vae.latents.timesteps import FIRST_BETA, LAST_BETA, NUM_TIMESTEPS, Prediction


def alpha_and_sigma(prediction: Prediction, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image: (B, 1, 1, 1) each, for timesteps (B,)."""
    if prediction == "flow":
        sigma = timesteps.float() / NUM_TIMESTEPS
        alpha = 1 - sigma
    else:
        abar = cumulative_alphas(prediction, timesteps.device)[timesteps.long()]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


@cache
def cumulative_alphas(prediction: Prediction, device: torch.device) -> Tensor:
    """abar (1000,): the product of 1 - beta; for v rescaled so that the last one is 0 (Lin et al. 2024). Cached."""
    with torch.inference_mode(False):  # wherever the first call is
        betas = torch.linspace(FIRST_BETA, LAST_BETA, NUM_TIMESTEPS, dtype=torch.float64)
        root = (1 - betas).cumprod(0).sqrt()
        if prediction == "v":
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return root.square().float().to(device)


def add_noise(
    prediction: Prediction, scaled_latents: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy latents and the target for them, both (B, c, h, w)."""
    alpha, sigma = alpha_and_sigma(prediction, timesteps)
    noisy = alpha * scaled_latents + sigma * noise
    targets = {
        "flow": lambda: noise - scaled_latents,
        "v": lambda: alpha * noise - sigma * scaled_latents,
        "epsilon": lambda: noise,
    }
    return noisy, targets[prediction]()


def min_snr_weights(prediction: Prediction, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of the squared errors: min(SNR, gamma) in terms of the error in x (Hang et al. 2023, equation 8).

    SNR = alpha^2 / sigma^2. An error of the prediction is one in x times: flow, sigma (x = noisy - sigma * v, with
    alpha + sigma = 1); v, sigma; epsilon, sigma / alpha. SNR is taken as at least 0.05: at the zero terminal SNR of v
    the weight would be zero, and sampling starts there.
    """
    alpha, sigma = (a.flatten() for a in alpha_and_sigma(prediction, timesteps))
    snr = (alpha / sigma.clamp(min=1e-6)).square().clamp(min=0.05)
    in_x = sigma.square() if prediction != "epsilon" else 1 / snr
    return snr.clamp(max=gamma) * in_x
