"""How samples are drawn: diffusers' schedulers and their noise levels, and the loop from noise to latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from ldm_vae.latents.timesteps import FIRST_BETA, LAST_BETA, NUM_TIMESTEPS, Prediction
from ldm_vae.models.unet import denoiser_output, num_classes_of

Seed = int | torch.Generator
StepCallback = Callable[[int, Tensor, Tensor], Tensor]
"""Step, timestep and latents -> the latents to go on with."""

DISCRETE: dict[str, Any] = {
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": FIRST_BETA,
    "beta_end": LAST_BETA,
    "beta_schedule": "linear",
    "timestep_spacing": "trailing",
}
PREDICTIONS: dict[str, Prediction] = {"flow_prediction": "flow", "v_prediction": "v", "epsilon": "epsilon"}
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
SDE = {"algorithm_type": "sde-dpmsolver++"}


def discrete_time(settings: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The schedulers of v and epsilon."""
    return {
        "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, settings),
        "sde-dpmsolver++": (diffusers.DPMSolverMultistepScheduler, settings | SDE),
        "ddim": (diffusers.DDIMScheduler, settings | {"clip_sample": False}),
        "unipc": (diffusers.UniPCMultistepScheduler, settings),
    }


SCHEDULERS: dict[Prediction, dict[str, tuple[Any, dict[str, Any]]]] = {
    "flow": {
        "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, FLOW),
        "sde-dpmsolver++": (diffusers.DPMSolverMultistepScheduler, FLOW | SDE),
        "euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
        "heun": (diffusers.FlowMatchHeunDiscreteScheduler, {}),
        "unipc": (diffusers.UniPCMultistepScheduler, FLOW),
    },
    "v": discrete_time(DISCRETE | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "epsilon": discrete_time(DISCRETE | {"prediction_type": "epsilon"}),
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
    return PREDICTIONS[scheduler.config.get("prediction_type", "flow_prediction")]


def set_timesteps(scheduler: Any, num_inference_steps: int, device: torch.device) -> None:
    """Sets N steps, evenly spaced in the time of the prediction, from pure noise to none.

    FlowMatch schedulers by themselves end with a step from 0.001 to 0; even steps are 1/N apart. For some N
    (61, 103, ...) "trailing" spacing rounds to one timestep too many, -1, which is removed.

    Raises:
        ValueError: a number of steps that DDIMScheduler cannot take: each removes the noise of 1000 // N timesteps,
            whatever their distance, so that with 600 steps samples would end a third too wide. Or more steps than
            timesteps: a solver would meet some twice, and divide by their distance.
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
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
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


@dataclass(frozen=True, kw_only=True)
class NoiseLevel:
    """Of a sample alpha * x + sigma * noise, at a time in [0, 1]; 1 is pure noise."""

    time: float
    alpha: float
    sigma: float

    def noised(self, scaled_latents: Tensor, noise: Tensor) -> Tensor:
        return self.alpha * scaled_latents + self.sigma * noise


def check_scheduler(scheduler: Any) -> None:
    """Raises ValueError for a scheduler whose noise levels are unknown, or that draws noise without generators."""
    known: set[Any] = {scheduler_class for fitting in SCHEDULERS.values() for scheduler_class, _ in fitting.values()}
    if not issubclass(type(scheduler), tuple(known)):
        names = ", ".join(sorted(c.__name__ for c in known))
        raise ValueError(f"{type(scheduler).__name__} is not a scheduler that is known here: use one of {names}")
    if scheduler.config.get("stochastic_sampling"):
        raise ValueError(
            f"this {type(scheduler).__name__} adds noise in each step that is not of an image's own seed: "
            "set stochastic_sampling to False, or take sde-dpmsolver++"
        )


def adds_noise(scheduler: Any) -> bool:
    """Whether its steps draw noise, from generators: it solves the reverse SDE, not the ODE of equal marginals."""
    return "sde" in str(scheduler.config.get("algorithm_type"))


def noise_levels(scheduler: Any) -> list[NoiseLevel]:
    """Before each of the scheduler's timesteps, and after the last.

    The schedulers' own `add_noise` and `scale_noise` answer for their current step, which has to be set first, in a
    way that differs between them; and multistep schedulers round timesteps to integers, which a flow's times are not.
    """
    timesteps = [*scheduler.timesteps.tolist(), 0.0]
    if not hasattr(scheduler, "sigmas"):  # DDIM
        squares = [*scheduler.alphas_cumprod[scheduler.timesteps.cpu()].tolist(), 1.0]
        pairs = [(a**0.5, (1 - a) ** 0.5) for a in squares]
    elif prediction_of(scheduler) == "flow":
        pairs = [(1 - s, s) for s in scheduler.sigmas.tolist()]
        timesteps = [s * NUM_TIMESTEPS for _, s in pairs]
    else:  # sigma is that of x + sigma * noise
        pairs = [((1 + s**2) ** -0.5, s * (1 + s**2) ** -0.5) for s in scheduler.sigmas.tolist()]
    return [NoiseLevel(time=t / NUM_TIMESTEPS, alpha=a, sigma=s) for t, (a, s) in zip(timesteps, pairs, strict=True)]


@dataclass(frozen=True)
class Sampling:
    """The options of a sampling run. Raises ValueError for values that are out of range."""

    num_inference_steps: int = 50
    strength: float = 0.8
    """Of image-to-image: the share of the way from noise that is noised and sampled anew."""
    guidance_scale: float = 1.0
    """g of `none + g * (class - none)` (Ho & Salimans 2022, equation 6, g = 1 + w); 1: no guidance, half the cost."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times in which guidance is applied, with both ends; 1 is pure noise, 0 the image (Kynkaanniemi et al. 2024)."""

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}: it must be at least 1")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength}: it must be in 0 to 1")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval is {low} to {high}: both must be in 0 to 1, the lower one first")

    @property
    def skipped_steps(self) -> int:
        """Of image-to-image, as diffusers counts: the last int(steps * strength) are done."""
        return self.num_inference_steps - int(self.num_inference_steps * self.strength + 1e-6)


def sample_latents(
    unet: Any,
    scheduler: Any,
    noise: Tensor,
    labels: Tensor | None,
    sampling: Sampling,
    *,
    generators: list[torch.Generator] | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    progress_bar: Callable[[Any], Iterable[Any]] = iter,
    on_step_end: StepCallback | None = None,
) -> Tensor:
    """Noise (N, c, h, w) and labels (N,), None for no class -> scaled latents (N, c, h, w).

    Args:
        generators: one per image, for a scheduler that adds noise in each step.
        known: scaled latents of images to start from, noised as far as the strength says.
        mask: bool (N, 1, h, w); where it is False, the latents after each step are the known ones with the noise of
            that time (Lugmayr et al. 2022, equation 8, without resampling, and one noise for all times).
        progress_bar: wraps the timesteps.
    """
    check_scheduler(scheduler)
    set_timesteps(scheduler, sampling.num_inference_steps, noise.device)
    levels = noise_levels(scheduler)
    first, latents = 0, noise
    if known is not None:
        first = min(sampling.skipped_steps * scheduler.order, len(levels) - 1)
        latents = levels[first].noised(known, noise)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    low, high = sampling.guidance_interval
    for i, timestep in enumerate(progress_bar(scheduler.timesteps[first:])):
        now, then = levels[first + i : first + i + 2]
        guidance_scale = sampling.guidance_scale if low <= now.time <= high else 1.0
        output = guided_output(unet, latents, now.time, labels, guidance_scale)
        if adds_noise(scheduler):
            latents = scheduler.step(output, timestep, latents, generator=generators, return_dict=False)[0]
        else:
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        if mask is not None and known is not None:
            latents = torch.where(mask, latents, then.noised(known, noise))
        if on_step_end is not None:
            latents = on_step_end(i, timestep, latents)
    return latents


def guided_output(unet: Any, noisy: Tensor, time: float, labels: Tensor | None, guidance_scale: float) -> Tensor:
    """The denoiser's output (N, c, h, w); with guidance, from one forward pass of 2N. Time 1 is pure noise."""
    no_class = num_classes_of(unet)
    none = torch.full((len(noisy),), no_class, device=noisy.device) if no_class else None
    count = len(noisy)
    if labels is None:
        labels = none
    elif none is not None and guidance_scale != 1:
        noisy, labels = torch.cat([noisy, noisy]), torch.cat([labels, none])
    timesteps = torch.full((len(noisy),), time * NUM_TIMESTEPS, device=noisy.device)
    output = denoiser_output(unet, noisy.to(unet.dtype), timesteps, labels, unet)
    if len(noisy) == count:
        return output
    with_class, without = output.chunk(2)
    return without + guidance_scale * (with_class - without)


def common_count(num_images: int, **options: Any) -> int:
    """How many images: the length of the options that have several values, which must agree. Raises ValueError."""
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}: it must be at least 1")
    lengths = {name: len(o) for name, o in options.items() if isinstance(o, (list, tuple, range, Tensor))}
    count = max([num_images, *lengths.values()])
    for name, length in lengths.items():
        if length not in (1, count) or (name == "generator" and length != count):
            raise ValueError(f"{length} of {name} for {count} images: give one for each")
    if num_images not in (1, count):
        raise ValueError(f"num_images is {num_images}, but {count} were described: leave num_images out")
    return count


def check_interpolation(num_images: int, scheduler: Any) -> None:
    """Raises ValueError for too few images, or a scheduler that adds noise."""
    if num_images < 2:
        raise ValueError(f"num_images is {num_images}: an interpolation has at least its two ends")
    if adds_noise(scheduler):
        raise ValueError(
            f"this {type(scheduler).__name__} adds noise in each step, in which frames would differ at random: "
            "set algorithm_type to dpmsolver++"
        )


def generators_for(generator: Any, count: int) -> list[torch.Generator]:
    """A generator per image: those of a list, or new ones with seeds drawn from a single one (None: from torch's)."""
    if isinstance(generator, (list, tuple, range)):
        return [seeded(g) for g in generator]
    if count == 1 and generator is not None:
        return [seeded(generator)]
    parent = None if generator is None else seeded(generator)
    device = torch.device("cpu") if parent is None else parent.device
    seeds = torch.randint(2**63 - 1, (count,), generator=parent, device=device).tolist()
    return [torch.Generator(device).manual_seed(s) for s in seeds]


def seeded(seed: Seed) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(int(seed))


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """From a (weight 0) to b (weight 1) at even speed along the arc between them (Shoemake 1985, section 3.3)."""
    cosine = nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).clamp(-1, 1)
    angle = cosine.acos()
    if angle.sin() < 1e-6:  # parallel
        return torch.lerp(a, b, weight)
    shares = [float(((1 - weight) * angle).sin() / angle.sin()), float((weight * angle).sin() / angle.sin())]
    return shares[0] * a + shares[1] * b
