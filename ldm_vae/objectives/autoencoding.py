"""Training an autoencoder, on any number of processes: what the steps of all three trainers consist of."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm_vae.data.conversion import to_pixels
from ldm_vae.data.loader import Batch
from ldm_vae.data.order import Stream, noise_at
from ldm_vae.data.sources import Source
from ldm_vae.errors import ConfigError
from ldm_vae.files import staged_directory
from ldm_vae.grids import reconstruction_grid, validation_images
from ldm_vae.latents.scaling import mean_and_std
from ldm_vae.metrics import psnr
from ldm_vae.models.interface import (
    encode_moments,
    is_variational,
    last_layer,
    latent_channels_of,
    posterior_of,
    stride_of,
)
from ldm_vae.models.reconstruction import reconstruct
from ldm_vae.objectives import losses
from ldm_vae.runs.config import RunConfig
from ldm_vae.runs.images import ImageConfig
from ldm_vae.runs.loop import FREE_ON_RESUME, Loop
from ldm_vae.runs.run import Checkpoint, Run
from ldm_vae.runs.state import state_tensors
from ldm_vae.runs.step import averaged, parameters_of, sent, set_learning_rate

# Networks -------------------------------------------------------------------------------------------------------------


class TrainableVAE(nn.Module):
    """The forward pass that DDP wraps: encode, sample, decode, and the KL."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        noise_level: Tensor | None = None,
        reduction: float = 1.0,
        latent_noise: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W), normal noise (B, c, h, w) -> reconstruction, moments, KL in nats per pixel (B,).

        Without a posterior the latents are its mean, and the KL is 0. noise_level (B,): see `encode_moments`. With a
        reduction r < 1 the latents are resized to r times their side before they are decoded. latent_noise: how much
        wider than the posterior the latents are spread, in their standard deviations by the VAE's scale.
        """
        moments = encode_moments(self.vae, images, noise_level)
        posterior = posterior_of(moments)
        if is_variational(self.vae):
            spread = posterior.std
            nats = losses.kl_per_pixel(posterior, images.shape[-2] * images.shape[-1])
        else:
            spread = torch.zeros_like(posterior.mean)
            nats = torch.zeros(len(images), device=images.device)
        if latent_noise:
            spread = spread + latent_noise * mean_and_std(self.vae, spread)[1]
        latents = posterior.mean + spread * noise
        size = [round(side * reduction) for side in latents.shape[-2:]]
        return self.vae.decode(losses.resized(latents, size)).sample, moments, nats


def check_posterior(vae: Any, kl_weight: float) -> None:
    """Raises ConfigError for a KL of an autoencoder that has none."""
    if kl_weight > 0 and not is_variational(vae):
        raise ConfigError(f"{type(vae).__name__} has no posterior, and so no KL: add --kl-weight 0")


def adamw(network: nn.Module, learning_rate: float, betas: tuple[float, float] = (0.9, 0.99)) -> torch.optim.Optimizer:
    """For the parameters that are trained."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, learning_rate, betas=betas, weight_decay=0.0, fused=True)


@dataclass(kw_only=True)
class AutoencoderState:
    """What training changes."""

    network: nn.Module
    """A trainable autoencoder, perhaps wrapped by DDP."""
    bare: Any
    """The same, not wrapped: its `vae` is the autoencoder."""
    ema: EMAModel
    optimizers: dict[str, torch.optim.Optimizer]
    """`vae`, and those of other networks that are trained beside it."""

    @classmethod
    def of(cls, bare: nn.Module, config: RunConfig, accelerator: Accelerator) -> Self:
        """A network whose `vae` is to be trained, on the device, channels last, with its average and its optimizer.

        Raises:
            ConfigError: --compile for an autoencoder that does not name its repeated blocks.
        """
        vae: Any = bare.vae
        if config.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        bare = bare.to(accelerator.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        if config.compile:
            if not getattr(vae, "_repeated_blocks", None):
                raise ConfigError(f"--compile is not for {type(vae).__name__}, which does not name its repeated blocks")
            vae.compile_repeated_blocks()
        return cls(
            network=accelerator.prepare(bare),
            bare=bare,
            ema=EMAModel(vae.parameters(), decay=config.ema_decay, foreach=True),
            optimizers={"vae": adamw(bare, config.learning_rate)},
        )

    def parts(self) -> dict[str, Any]:
        """Everything that a checkpoint holds."""
        return {"vae": self.bare, "ema": self.ema} | {f"{name}_optimizer": o for name, o in self.optimizers.items()}

    def averaged(self) -> AbstractContextManager[Any]:
        """The autoencoder with its averaged weights in place."""
        return averaged(self.bare.vae, self.ema)


# A step ---------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class StepSummary:
    """What a step of an autoencoder leaves for the log."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    """Weighted loss terms and the like: summed over micro-batches, and their means after `update`."""
    moments: Tensor | None = None
    """Of the last micro-batch."""
    bad_images: dict[str, str] = field(default_factory=dict)
    waited: float = 0.0
    """Seconds spent waiting for data."""
    healthy: bool = True

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0) + value.detach()

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes; per-channel figures come from this step's last micro-batch."""
        assert self.moments is not None
        posterior = posterior_of(self.moments)
        latents = posterior.mean.transpose(0, 1).flatten(1)  # (c, B * h * w)
        vectors = {"latents_mean": latents.mean(dim=1), "latents_square": latents.square().mean(dim=1)}
        if "kl" in self.terms:
            vectors["kl_bits"] = losses.kl_bits_per_channel(posterior)
        channels = {f"{name}/{c}": value for name, vector in vectors.items() for c, value in enumerate(vector)}
        values = self.terms | channels
        means = accelerator.reduce(torch.stack([value.float() for value in values.values()]), "mean").tolist()
        metrics = dict(zip(values, means, strict=True))
        for c in range(len(latents)):
            variance = metrics.pop(f"latents_square/{c}") - metrics[f"latents_mean/{c}"] ** 2
            metrics[f"latents_std/{c}"] = math.sqrt(max(variance, 0.0))
        return metrics


def micro_batches(
    batches: Iterator[Batch[Tensor]], vae: Any, config: RunConfig, summary: StepSummary, accelerator: Accelerator
) -> Iterator[tuple[Batch[Tensor], Tensor]]:
    """The micro-batches of a step, on the device, each with normal noise (B, c, h, w) for its latents."""
    stride, device = stride_of(vae), accelerator.device
    channels_last = last_layer(vae).is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for _ in range(config.gradient_accumulation_steps):
        before = time.perf_counter()
        batch = next(batches)
        summary.waited += time.perf_counter() - before
        summary.bad_images |= batch.bad_images
        shape = (latent_channels_of(vae), batch.images.shape[-2] // stride, batch.images.shape[-1] // stride)
        noise = torch.from_numpy(noise_at(config.seed, batch.positions, shape, Stream.POSTERIOR))
        images = batch.images.to(device, memory_format=layout, non_blocking=True)
        inputs = batch.inputs
        if inputs is not None:
            inputs = inputs.to(device, memory_format=layout, non_blocking=True)
        yield replace(batch, images=images, inputs=inputs), sent(noise, device)


def update(
    state: AutoencoderState,
    summary: StepSummary,
    learning_rates: Mapping[str, float],
    config: RunConfig,
    accelerator: Accelerator,
) -> None:
    """One step of each optimizer that has a learning rate, and of the average, with the gradients of all micro-batches.

    When a loss or a gradient is not finite anywhere, every process skips it.
    """
    summary.terms = {name: value / config.gradient_accumulation_steps for name, value in summary.terms.items()}
    total = torch.stack([value.float() for value in summary.terms.values()]).sum()
    for name in learning_rates:
        norm = nn.utils.clip_grad_norm_(parameters_of(state.optimizers[name]), config.max_grad_norm)
        summary.terms[f"{name}_grad_norm"] = norm
        total = total + norm
    summary.healthy = bool(accelerator.reduce(total, "sum").isfinite())
    for name, learning_rate in learning_rates.items():
        if summary.healthy:
            set_learning_rate(state.optimizers[name], learning_rate)
            state.optimizers[name].step()
        state.optimizers[name].zero_grad()
    if summary.healthy:
        state.ema.step(state.bare.vae.parameters())


# Beside the steps -----------------------------------------------------------------------------------------------------


def open_loop(config: ImageConfig, state: AutoencoderState, source: Source, accelerator: Accelerator) -> Loop:
    """The run's loop, where its last checkpoint left it. Prints what is trained, and whether the images changed."""
    run = Run(config.output, config, free=FREE_ON_RESUME, extend=config.extend, main=accelerator.is_main_process)
    loop = Loop(run, state.parts(), config, accelerator)
    before = loop.facts.get("number of images", len(source))
    if before != len(source):
        accelerator.print(f"warning: {len(source)} images where there were {before}: from here on in another order")
    loop.facts["number of images"] = len(source)
    parameters = sum(p.numel() for p in state.bare.vae.parameters()) / 1e6
    batch = config.effective_batch(accelerator.num_processes)
    accelerator.print(f"{parameters:.2f} M parameters, {len(source)} images; {batch}")
    return loop


def validation_set(loop: Loop, source: Source, config: ImageConfig, vae: Any) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] for the grid and the PSNR; N is 0 but in the main process, which draws them."""
    if not loop.run.main:
        return torch.empty(0)
    with loop.run.listing_bad_images():
        images, bad_images = validation_images(source, side=config.side - config.side % stride_of(vae))
        loop.run.add_bad_images(bad_images)
    return images


def reconstructions_of(state: AutoencoderState, images: Tensor, accelerator: Accelerator) -> Tensor:
    """What the averaged autoencoder gives for images (N, C, H, W), not clamped."""
    with state.averaged() as vae, torch.inference_mode(), accelerator.autocast():
        return torch.cat([reconstruct(vae, image[None].to(accelerator.device)).float().cpu() for image in images])


def draw_reconstructions(loop: Loop, images: Tensor, reconstructions: Tensor, inputs: Tensor | None = None) -> None:
    """The sample grid, and the PSNR of the reconstructions for the log; all in [-1, 1]."""
    grid = reconstruction_grid(images[:8], reconstructions[:8], None if inputs is None else inputs[:8])
    grid.save(loop.run.directory / "samples" / f"step-{loop.step}.png")
    val_psnr = float(psnr(to_pixels(images), to_pixels(reconstructions)).mean())
    loop.log({"val_psnr": val_psnr, "seconds": loop.facts["seconds"]})


def save_autoencoder(loop: Loop, state: AutoencoderState) -> None:
    """The averaged autoencoder in diffusers' layout, then the checkpoint: every checkpoint has its model beside it."""
    if loop.run.main:
        with state.averaged() as vae, staged_directory(loop.run.directory / "vae") as staging:
            vae.save_pretrained(staging)
        loop.run.save(Checkpoint(step=loop.step, tensors=state_tensors(state.parts()), facts=loop.facts))
