"""What sampling takes besides networks: options, noise levels of a scheduler, a generator for each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae.objectives.diffusion import SCHEDULERS, prediction_of
from ldm_vae.objectives.timesteps import NUM_TIMESTEPS

Seed = int | torch.Generator


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How latents are made. Raises ValueError for what cannot be."""

    num_inference_steps: int = 50
    strength: float = 0.8
    """Of image-to-image: the share of the way that is noised and made anew."""
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

    def guidance_at(self, time: float) -> float:
        low, high = self.guidance_interval
        return self.guidance_scale if low <= time <= high else 1.0


@dataclass(frozen=True, kw_only=True)
class NoiseLevel:
    """A sample on its way: alpha * x + sigma * noise, at a time in [0, 1] of which 1 is pure noise."""

    time: float
    alpha: float
    sigma: float

    def noised(self, scaled_latents: Tensor, noise: Tensor) -> Tensor:
        return self.alpha * scaled_latents + self.sigma * noise


def check_scheduler(scheduler: Any) -> None:
    """Raises ValueError for one whose noise levels are not known here, or that draws noise without generators."""
    known = {c.__name__: c for fitting in SCHEDULERS.values() for c, _ in fitting.values()}
    if not any(isinstance(scheduler, c) for c in known.values()):
        names = ", ".join(sorted(known))
        raise ValueError(f"{type(scheduler).__name__} is not a scheduler that is known here: use one of {names}")
    if scheduler.config.get("stochastic_sampling"):
        raise ValueError(
            f"this {type(scheduler).__name__} adds noise in each step that is not of an image's own seed: "
            "set stochastic_sampling to False, or take sde-dpmsolver++"
        )


def adds_noise(scheduler: Any) -> bool:
    """Whether its steps take generators and draw noise: it solves the reverse SDE, not the ODE of equal marginals."""
    return "sde" in str(scheduler.config.get("algorithm_type"))


def noise_levels(scheduler: Any) -> list[NoiseLevel]:
    """Before each of the scheduler's timesteps, and after the last.

    The schedulers' own `add_noise` and `scale_noise` answer for the step that they are in, which has to be set first
    and differently for each; and the timesteps of the multistep ones are cut to integers, which a flow's times are not.
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


def generators_for(generator: Any, count: int) -> list[torch.Generator]:
    """A generator for each image: those given, or new ones with seeds drawn from the one given (None: from torch's)."""
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
    if angle.sin() < 1e-6:  # of the same direction
        return torch.lerp(a, b, weight)
    shares = [float(((1 - weight) * angle).sin() / angle.sin()), float((weight * angle).sin() / angle.sin())]
    return shares[0] * a + shares[1] * b


def common_count(num_images: int, **given: Any) -> int:
    """How many images: the length of what was given as several, which must agree. Raises ValueError."""
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}: it must be at least 1")
    lengths = {k: len(v) for k, v in given.items() if isinstance(v, (list, tuple, range, Tensor))}
    count = max([num_images, *lengths.values()])
    for name, length in lengths.items():
        if length not in (1, count) or (name == "generator" and length != count):
            raise ValueError(f"{length} of {name} for {count} images: give one for each")
    if num_images not in (1, count):
        raise ValueError(f"num_images is {num_images}, but {count} were described: leave num_images out")
    return count


def check_interpolation(num_images: int, scheduler: Any) -> None:
    """Raises ValueError."""
    if num_images < 2:
        raise ValueError(f"num_images is {num_images}: an interpolation has at least its two ends")
    if adds_noise(scheduler):
        raise ValueError(
            f"this {type(scheduler).__name__} adds noise in each step, in which frames would differ at random: "
            "set algorithm_type to dpmsolver++"
        )
