"""What a denoiser is asked to predict, as pure functions, and the stock diffusers schedulers that sample with it.

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

import inspect
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from ldm_vae.objectives.timesteps import NUM_TIMESTEPS, Prediction

FIRST_BETA, LAST_BETA = 1e-4, 0.02
"""Linear between them: Ho et al. 2020, section 4."""
SMALLEST_SNR = 0.05
"""For min-SNR weights: at the zero terminal SNR of v the weight would be zero, and sampling starts there."""

# Training -------------------------------------------------------------------------------------------------------------


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
    """abar (1000,): the product of 1 - beta; for v rescaled so that the last one is 0 (Lin et al. 2024). Made once."""
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
    alpha + sigma = 1); v, sigma; epsilon, sigma / alpha. SNR is taken as at least SMALLEST_SNR.
    """
    alpha, sigma = (a.flatten() for a in alpha_and_sigma(prediction, timesteps))
    snr = (alpha / sigma.clamp(min=1e-6)).square().clamp(min=SMALLEST_SNR)
    in_x = sigma.square() if prediction != "epsilon" else 1 / snr
    return snr.clamp(max=gamma) * in_x


# Sampling -------------------------------------------------------------------------------------------------------------

DISCRETE: dict[str, Any] = {
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": FIRST_BETA,
    "beta_end": LAST_BETA,
    "beta_schedule": "linear",
    "timestep_spacing": "trailing",
}
PREDICTION_TYPES = {"flow": "flow_prediction", "v": "v_prediction", "epsilon": "epsilon"}
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
V = {**DISCRETE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
EPSILON = {**DISCRETE, "prediction_type": "epsilon"}
NO_CLIPPING = {"clip_sample": False}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SCHEDULERS: dict[Prediction, dict[str, tuple[Any, dict[str, Any]]]] = {
    "flow": {
        "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, FLOW),
        "sde-dpmsolver++": (diffusers.DPMSolverMultistepScheduler, FLOW | SDE),
        "euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
        "heun": (diffusers.FlowMatchHeunDiscreteScheduler, {}),
        "unipc": (diffusers.UniPCMultistepScheduler, FLOW),
    },
    "v": {
        "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, V),
        "sde-dpmsolver++": (diffusers.DPMSolverMultistepScheduler, V | SDE),
        "ddim": (diffusers.DDIMScheduler, V | NO_CLIPPING),
        "unipc": (diffusers.UniPCMultistepScheduler, V),
    },
    "epsilon": {
        "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, EPSILON),
        "sde-dpmsolver++": (diffusers.DPMSolverMultistepScheduler, EPSILON | SDE),
        "ddim": (diffusers.DDIMScheduler, EPSILON | NO_CLIPPING),
        "unipc": (diffusers.UniPCMultistepScheduler, EPSILON),
    },
}
"""The diffusers schedulers that fit each prediction, and their settings; the first of each is the default."""


def make_scheduler(prediction: Prediction, name: str | None = None) -> Any:
    """A stock diffusers scheduler for what the denoiser predicts.

    Raises:
        ValueError: a name that does not fit the prediction.
    """
    fitting = SCHEDULERS[prediction]
    if name is not None and name not in fitting:
        raise ValueError(f"scheduler {name} does not fit {prediction}: try {', '.join(fitting)}")
    scheduler_class, settings = fitting[name or next(iter(fitting))]
    return scheduler_class(**settings)


def prediction_of(scheduler: Any) -> Prediction:
    """What the denoiser that this scheduler samples with predicts."""
    of_type = {t: p for p, t in PREDICTION_TYPES.items()}
    return of_type[scheduler.config.get("prediction_type", "flow_prediction")]  # type: ignore[return-value]


def set_timesteps(scheduler: Any, num_inference_steps: int, device: torch.device) -> None:
    """So many steps, evenly spaced in the time of the prediction, from pure noise to none.

    The own choice of the FlowMatch schedulers ends with a step from 0.001 to 0; even steps are 1/N apart. For some N
    (61, 103, ...) "trailing" spacing rounds to one timestep more than was asked for, -1: that one is taken away.

    Raises:
        ValueError: a number of steps that DDIMScheduler cannot take. In each it removes the noise of 1000 // N
            timesteps, whatever their distance is: with 600 steps samples would end a third too wide. Or more steps
            than there are timesteps, of which a solver would meet some twice and divide by their distance.
    """
    if prediction_of(scheduler) != "flow" and num_inference_steps > NUM_TIMESTEPS:
        raise ValueError(f"{num_inference_steps} steps are more than the {NUM_TIMESTEPS} timesteps that there are")
    if isinstance(scheduler, diffusers.DDIMScheduler) and NUM_TIMESTEPS % num_inference_steps:
        divisors = [n for n in range(1, NUM_TIMESTEPS + 1) if NUM_TIMESTEPS % n == 0]
        near = sorted(divisors, key=lambda n: abs(n - num_inference_steps))[:2]
        raise ValueError(
            f"DDIM needs a number of steps that divides {NUM_TIMESTEPS}, and {num_inference_steps} does not: "
            f"try {near[0]} or {near[1]}, or another scheduler"
        )
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters and "Euler" in type(scheduler).__name__:
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(num_inference_steps, device=device, sigmas=sigmas)
    else:
        if isinstance(scheduler, diffusers.FlowMatchHeunDiscreteScheduler):
            scheduler.sigma_min = 1 / num_inference_steps
        scheduler.set_timesteps(num_inference_steps, device=device)
    if scheduler.timesteps[-1] < 0:
        scheduler.timesteps = scheduler.timesteps[:-1]
        scheduler.num_inference_steps = num_inference_steps
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])
