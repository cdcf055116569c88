"""One training step of a KL-VAE with perceptual and adversarial losses, on any number of processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm_vae.data.corruption import UNKNOWN_LEVEL
from ldm_vae.data.loader import Batch
from ldm_vae.data.order import Stream, generator_at, noise_at
from ldm_vae.models.interface import (
    encode_moments,
    is_variational,
    last_layer,
    latent_channels_of,
    posterior_of,
    stride_of,
)
from ldm_vae.models.prior import STEP_LOGVAR, CausalPrior
from ldm_vae.objectives import losses
from ldm_vae.objectives.perceptual import Backbone
from ldm_vae.runs.config import Range, RunConfig
from ldm_vae.runs.step import averaged, parameters_of, sent, set_learning_rate


@dataclass(frozen=True, kw_only=True)
class Objective(RunConfig):
    """What is minimised, and how: the part of a configuration that a step reads."""

    reconstruction: losses.ReconstructionLoss = "l1"
    coarse_weight: Annotated[float, Range(at_least=0)] = 0.0
    """Times the same error of images 1/4 and 1/8 as large, four and eight times: low frequencies count for more."""
    kl_weight: Annotated[float, Range(at_least=0)] = 1e-4
    """Times nats per pixel, beside a mean error on [-1, 1]; Stable Diffusion's is 3.3e-7."""
    perceptual: Literal["pretrained", "random", "none"] = "pretrained"
    """LPIPS with pretrained features, with random features (no download), or without LPIPS."""
    lpips_backbone: Backbone = "vgg"
    lpips_weight: Annotated[float, Range(at_least=0)] = 1.0
    lpips_channels: tuple[int, int, int] | None = None
    """The three channels that LPIPS sees, when the images have neither one nor three."""
    adversarial: Literal["hinge", "non-saturating", "none"] = "hinge"
    adversarial_weight: Annotated[float, Range(at_least=0)] = 0.5
    """Times the adaptive weight."""
    disc_start: Annotated[int, Range(at_least=0)] = 50_000
    """The step from which the discriminator trains and counts."""
    learned_logvar: bool = False
    """Learn the scale of the reconstruction error instead of fixing it at 1."""
    prior: Literal["normal", "causal"] = "normal"
    """causal trains for the codec: rounding for the posterior's noise, and the codec's rate for the KL."""
    quality_range: tuple[float, float] = (0.5, 4.0)
    """With the causal prior: qualities that a model is trained for, one drawn for each image."""
    target_bpp: float | None = None
    """Steer the weight of the rate (or KL) to so many bits per pixel, from --kl-weight on."""
    sparsity: Literal["none", "l1", "kl"] = "none"
    """Few active latents: by L1 (they are 0 or more) or by a KL to --target-activation (they are between 0 and 1)."""
    sparsity_weight: Annotated[float, Range(at_least=0)] = 0.01
    target_activation: Annotated[float, Range(above=0, below=1)] = 0.05
    """The mean latent that --sparsity kl asks for."""


class TrainableVAE(nn.Module):
    """The one forward pass that DDP wraps: encode, sample, decode, with the scale of the error and the rate beside it.

    With a prior, the posterior's deviation is that of uniform noise of width 1, everywhere and for good: a latent's
    scale says how exactly it is kept. Noise stands for rounding in the rate alone: the decoder sees what is rounded,
    and the gradient goes past that (Minnen & Singh 2020, "Channel-wise autoregressive entropy models", section 3.3).
    """

    def __init__(self, vae: Any, learned_logvar: bool, prior: CausalPrior | None = None) -> None:
        super().__init__()
        self.vae: Any = vae
        self.prior = prior
        self.logvar = nn.Parameter(torch.zeros(()), requires_grad=learned_logvar)
        if prior is not None:
            channels = latent_channels_of(vae)
            last = [vae.encoder.conv_out] + ([vae.encoder.linear.conv] if vae.encoder.linear is not None else [])
            with torch.no_grad():  # no gradient reaches them, as only the mean is used
                for layer in last:
                    layer.weight[channels:] = 0
                    layer.bias[channels:] = 0
                vae.encoder.conv_out.bias[channels:] = STEP_LOGVAR

    def forward(
        self, images: Tensor, noise: Tensor, quality: Tensor, noise_level: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (B, C, H, W), normal noise (B, c, h, w), qualities (B,) -> reconstruction, moments, logvar, nats.

        nats (B,): per pixel, of the posterior's KL, or of what the prior says to the codec's symbols; 0 without a
        posterior. noise_level (B,): of the images, for a network that takes it.
        """
        moments = encode_moments(self.vae, images, noise_level)
        posterior = posterior_of(moments)
        num_pixels = images.shape[-2] * images.shape[-1]
        if not is_variational(self.vae):
            latents, nats_per_pixel = posterior.mean, torch.zeros(len(images), device=images.device)
        elif self.prior is None:
            latents = posterior.mean + posterior.std * noise
            nats_per_pixel = losses.kl_per_pixel(posterior, num_pixels)
        else:
            step = quality[:, None, None, None]
            symbols = posterior.mean / step
            uniform = 0.5 * torch.erf(noise / math.sqrt(2))  # in -1/2..1/2
            nats_per_pixel = self.prior(symbols + uniform, quality).sum(dim=(1, 2, 3)) / num_pixels
            latents = posterior.mean + step * (symbols.round() - symbols).detach()
        return self.vae.decode(latents).sample, moments, self.logvar * 1, nats_per_pixel


@dataclass(kw_only=True)
class State:
    """What training changes, and what it needs beside it. `vae` and `discriminator` may be wrapped by DDP."""

    vae: nn.Module
    discriminator: nn.Module | None
    lpips: nn.Module | None
    ema: EMAModel
    optimizers: dict[str, torch.optim.Optimizer]
    adaptive_weight: Tensor
    kl_weight: Tensor
    """Of the KL or rate; it changes where a rate is asked for."""
    bare: TrainableVAE

    def parts(self) -> dict[str, Any]:
        """Everything that a checkpoint holds."""
        networks = {
            **{"vae": self.bare, "ema": self.ema},
            **{"adaptive_weight": self.adaptive_weight, "kl_weight": self.kl_weight},
        }
        if self.discriminator is not None:
            networks["discriminator"] = getattr(self.discriminator, "module", self.discriminator)
        return networks | {f"{name}_optimizer": optimizer for name, optimizer in self.optimizers.items()}

    def averaged(self) -> AbstractContextManager[Any]:
        """The network with its averaged weights in place."""
        return averaged(self.bare.vae, self.ema)


@dataclass(kw_only=True)
class GeneratorStep:
    """Weighted loss terms by name, and what they were made from."""

    terms: dict[str, Tensor]
    reconstruction: Tensor
    moments: Tensor
    nats_per_pixel: Tensor
    adversarial_gradient: Tensor | None
    """Of the adversarial loss, unweighted, at the decoder's last layer; None before `disc_start`."""


def generator_step(
    images: Tensor,
    noise: Tensor,
    quality: Tensor,
    state: State,
    config: Objective,
    *,
    adversarial: bool,
    first: bool,
    accelerator: Accelerator,
    inputs: Tensor | None = None,
    noise_level: Tensor | None = None,
) -> GeneratorStep:
    """One forward of the wrapped VAE and its named loss terms. images: (B, C, H, W) in [-1, 1], quality: (B,).

    `inputs`, where they differ from the images, are what the network sees, and `noise_level` (B,) is theirs.

    A step q times as wide makes q^2 times the error and has q^2 times the price of a bit (for squared errors at high
    rates). Both terms are divided by q, so that no quality outweighs the others.

    `first`: whether this is the step's first micro-batch. Only then is the discriminator in training mode, in which
    spectral norm's power iteration advances: once a step, before anything is judged, however the batch is split.
    """
    seen = images if inputs is None else inputs
    reconstruction, moments, logvar, nats = state.vae(seen, noise, quality, noise_level)
    scale = torch.exp(-logvar)
    terms: dict[str, Tensor] = {}
    error = losses.reconstruction_loss(reconstruction, images, config.reconstruction, 1 / quality)
    terms[config.reconstruction] = scale * error
    if config.coarse_weight > 0:
        coarse = losses.coarse_loss(reconstruction, images, config.reconstruction, 1 / quality)
        terms["coarse"] = scale * config.coarse_weight * coarse
    if state.lpips is not None:
        with accelerator.autocast():
            name = "lpips_random" if config.perceptual == "random" else "lpips"
            terms[name] = scale * config.lpips_weight * state.lpips(reconstruction, images)
    if config.learned_logvar:
        terms["logvar"] = logvar
    if config.kl_weight > 0:
        terms["kl"] = state.kl_weight * (quality * nats).mean()
    if config.sparsity != "none":
        latents = posterior_of(moments).mean
        is_l1 = config.sparsity == "l1"
        sparsity = losses.l1_sparsity(latents) if is_l1 else losses.kl_sparsity(latents, config.target_activation)
        terms["sparsity"] = config.sparsity_weight * sparsity
    gradient = None
    if adversarial:
        assert state.discriminator is not None
        judge = accelerator.unwrap_model(state.discriminator)
        judge.train(first).requires_grad_(False)  # no gradient for the discriminator in this step
        loss = losses.GENERATOR_LOSSES[config.adversarial](judge(reconstruction))
        judge.requires_grad_(True)
        gradient = torch.autograd.grad(loss, last_layer(state.bare.vae), retain_graph=True)[0]
        terms["adversarial"] = config.adversarial_weight * state.adaptive_weight * loss
    return GeneratorStep(
        terms=terms,
        reconstruction=reconstruction,
        moments=moments,
        nats_per_pixel=nats.detach().mean(),
        adversarial_gradient=gradient,
    )


def discriminator_step(
    images: Tensor, reconstruction: Tensor, discriminator: nn.Module, config: Objective
) -> tuple[Tensor, Tensor]:
    """Its loss and its accuracy on one micro-batch, real and fake in one forward."""
    discriminator.eval()
    real, fake = discriminator(torch.cat([images, reconstruction.detach()])).chunk(2)
    return losses.DISCRIMINATOR_LOSSES[config.adversarial](real, fake), losses.discriminator_accuracy(real, fake)


@dataclass(kw_only=True)
class StepResult:
    """What one step leaves for the log."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    moments: Tensor | None = None
    bad_images: dict[str, str] = field(default_factory=dict)
    waited: float = 0.0
    healthy: bool = True

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0) + value.detach()

    def average(self, count: int) -> None:
        self.terms = {name: value / count for name, value in self.terms.items()}

    def metrics(self, accelerator: Accelerator, *, fixed_deviation: bool = False) -> dict[str, float]:
        """Means over all processes; per-channel figures come from this step's last micro-batch.

        `fixed_deviation`: the posterior's says nothing of how many bits a channel has.
        """
        assert self.moments is not None
        posterior = posterior_of(self.moments)
        latents = posterior.mean.transpose(0, 1).flatten(1)  # (c, B * h * w)
        vectors = {"latents_mean": latents.mean(dim=1), "latents_square": latents.square().mean(dim=1)}
        if "kl" in self.terms and not fixed_deviation:
            vectors["kl_bits"] = losses.kl_bits_per_channel(posterior)
        names = list(self.terms)
        values = torch.cat([torch.stack([self.terms[n].float() for n in names]), *vectors.values()])
        means = accelerator.reduce(values, "mean").tolist()
        metrics = dict(zip(names, means, strict=False))
        channels = len(latents)
        for i, name in enumerate(vectors):
            for c in range(channels):
                metrics[f"{name}/{c}"] = means[len(names) + i * channels + c]
        for c in range(channels):
            variance = metrics.pop(f"latents_square/{c}") - metrics[f"latents_mean/{c}"] ** 2
            metrics[f"latents_std/{c}"] = math.sqrt(max(variance, 0.0))
        return metrics


def train_step(
    batches: Iterator[Batch[Tensor]],
    state: State,
    config: Objective,
    *,
    step: int,
    learning_rates: dict[str, float],
    accelerator: Accelerator,
) -> StepResult:
    """One global batch: forward and backward of each micro-batch, then one update of each network.

    Gradients are summed over micro-batches and averaged over processes before anything is read from them. When a
    loss or a gradient is not finite anywhere, every process skips the update.
    """
    adversarial = state.discriminator is not None and step >= config.disc_start
    networks = [n for n in (state.vae, state.discriminator) if n is not None]
    vae = state.bare.vae
    last = last_layer(vae)
    adversarial_gradient = torch.zeros_like(last)
    layout = torch.channels_last if last.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    result = StepResult()
    for micro in range(config.gradient_accumulation_steps):
        before = time.perf_counter()
        batch = next(batches)
        result.waited += time.perf_counter() - before
        result.bad_images |= batch.bad_images
        images = batch.images.to(accelerator.device, memory_format=layout, non_blocking=True)
        inputs = batch.inputs
        if inputs is not None:
            inputs = inputs.to(accelerator.device, memory_format=layout, non_blocking=True)
        levels = None
        if vae.config.get("noise_level") is not None:
            levels = torch.full((len(images),), UNKNOWN_LEVEL) if batch.noise_levels is None else batch.noise_levels
            levels = sent(levels, images.device)
        shape = (latent_channels_of(vae), images.shape[-2] // stride_of(vae), images.shape[-1] // stride_of(vae))
        drawn = torch.from_numpy(noise_at(config.seed, batch.positions, shape, Stream.POSTERIOR))
        noise, quality = (sent(t, images.device) for t in (drawn, qualities_at(batch.positions, config)))
        with accelerator.accumulate(*networks):
            done = generator_step(
                images,
                noise,
                quality,
                state,
                config,
                adversarial=adversarial,
                first=micro == 0,
                accelerator=accelerator,
                inputs=inputs,
                noise_level=levels,
            )
            accelerator.backward(sum(done.terms.values()))
            result.add(done.terms)
            result.moments = done.moments.detach()
            if is_variational(vae):
                result.add({"bits_per_pixel": done.nats_per_pixel / math.log(2)})
            if config.sparsity != "none":
                result.add({"active_latents": active_share(result.moments, config.sparsity)})
            if adversarial:
                assert done.adversarial_gradient is not None
                assert state.discriminator is not None
                adversarial_gradient += done.adversarial_gradient
                loss, accuracy = discriminator_step(images, done.reconstruction, state.discriminator, config)
                accelerator.backward(loss)
                result.add({"discriminator": loss, "discriminator_accuracy": accuracy})
    result.average(config.gradient_accumulation_steps)
    total = torch.stack([value.float() for value in result.terms.values()]).sum()
    if adversarial:  # last.grad is that of every weighted term: take the adversarial one off
        adversarial_gradient = accelerator.reduce(adversarial_gradient, "mean") / config.gradient_accumulation_steps
        share = config.adversarial_weight * state.adaptive_weight
        assert last.grad is not None
        adaptive_weight = losses.adaptive_weight(last.grad - share * adversarial_gradient, adversarial_gradient)
    for name, optimizer in state.optimizers.items():
        if name == "vae" or adversarial:
            norm = nn.utils.clip_grad_norm_(parameters_of(optimizer), config.max_grad_norm)
            result.terms[f"{name}_grad_norm"] = norm
            total = total + norm
    result.healthy = bool(accelerator.reduce(total, "sum").isfinite())
    for name, optimizer in state.optimizers.items():
        if result.healthy and (name == "vae" or adversarial):
            set_learning_rate(optimizer, learning_rates[name])
            optimizer.step()
        optimizer.zero_grad()
    if result.healthy:
        state.ema.step(state.bare.vae.parameters())
        if adversarial:
            state.adaptive_weight.copy_(adaptive_weight)
        if config.target_bpp is not None:
            rate = accelerator.reduce(result.terms["bits_per_pixel"], "mean")
            state.kl_weight.mul_(steering(rate, config.target_bpp))
    return result


def active_share(moments: Tensor, sparsity: str) -> Tensor:
    """The share of latents that are active: above 0 where L1 keeps them at 0, above 1/2 where they are in 0..1."""
    return (posterior_of(moments).mean > (0.5 if sparsity == "kl" else 0.0)).float().mean()


STEERING = 0.001
"""How much a weight changes in a step, at most. The network takes some hundred steps to follow, or it overshoots."""


def steering(rate: Tensor, target: float) -> Tensor:
    """By what to multiply the rate's weight: more than 1 where the rate is above its target."""
    return torch.exp(STEERING * torch.log(rate / target).clamp(-1, 1))


def qualities_at(positions: list[int], config: Objective) -> Tensor:
    """The quality of each image (B,): log-uniform in the range, by (seed, position); 1 without the causal prior."""
    if config.prior == "normal":
        return torch.ones(len(positions))
    shares = [generator_at(config.seed, p, Stream.QUALITY).random() for p in positions]
    low, high = (math.log(q) for q in config.quality_range)
    return torch.tensor([math.exp(low + (high - low) * s) for s in shares])
