"""One training step of a denoiser of scaled latents, on any number of processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm_vae.data.loader import with_tensors
from ldm_vae.errors import nothing_usable
from ldm_vae.latents.rows import DiffusionBatch, DiffusionRows, collate_rows
from ldm_vae.latents.scaling import as_stored, scale_latents
from ldm_vae.latents.timesteps import NUM_TIMESTEPS, Prediction
from ldm_vae.models.interface import encode_moments, posterior_of
from ldm_vae.models.unet import denoiser_output
from ldm_vae.objectives.diffusion import add_noise, min_snr_weights
from ldm_vae.runs.config import Range, RunConfig
from ldm_vae.runs.sharding import averaged_copy, is_sharded, whole
from ldm_vae.runs.step import averaged, parameters_of, set_learning_rate


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig(RunConfig):
    """What the denoiser learns: the flags that a step reads."""

    prediction: Prediction = "flow"
    """Rectified flow, v with zero terminal SNR, or the noise."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon takes fewer steps; its learning rate is a few times higher."""
    min_snr_gamma: Annotated[float | None, Range(above=0)] = None
    """Weight errors by min(SNR, gamma) in terms of the clean latents; evenly in the prediction unless given."""
    label_dropout: Annotated[float, Range(at_least=0, at_most=1)] = 0.1
    """Share of labels that are replaced by "no class", for guidance."""


@dataclass(kw_only=True)
class DenoiserState:
    """What training changes, and the frozen VAE."""

    unet: nn.Module
    """As the step calls it: perhaps wrapped by DDP, or sharded."""
    bare: Any
    """The same network without a wrapper."""
    vae: Any
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    copy: Any = None
    """Of a sharded network: an unsharded one, in the main process."""

    def parts(self) -> dict[str, Any]:
        """Everything that a checkpoint holds."""
        return {"unet": self.bare, "ema": self.ema, "optimizer": self.optimizer}

    def averaged(self) -> AbstractContextManager[Any]:
        """The network with its averaged weights; of a sharded one the copy. All processes enter it."""
        if is_sharded(self.bare):
            return averaged_copy(self.ema, self.copy, self.vae.device)
        return averaged(self.bare, self.ema)


@torch.no_grad()
def scaled_latents_of(batch: DiffusionBatch, vae: Any) -> Tensor:
    """A sample of each posterior, scaled: (B, c, h, w), float32, the same from a cache and from the images."""
    moments = batch.inputs if batch.encoded else as_stored(encode_moments(vae, batch.inputs))
    posterior = posterior_of(moments)
    return scale_latents(vae, posterior.mean + posterior.std * batch.posterior_noise)


def denoising_losses(
    unet: nn.Module, scaled_latents: Tensor, batch: DiffusionBatch, config: DenoiserConfig, bare: Any
) -> Tensor:
    """The weighted squared error of each image's prediction, (B,), in float32."""
    noisy, target = add_noise(config.prediction, scaled_latents, batch.noise, batch.timesteps)
    labels = batch.labels if bare.config.num_class_embeds else None
    prediction = denoiser_output(unet, noisy, batch.timesteps, labels, bare)
    errors = (prediction - target).square().mean(dim=(1, 2, 3))
    if config.min_snr_gamma is not None:
        errors = errors * min_snr_weights(config.prediction, batch.timesteps, config.min_snr_gamma)
    return errors


@dataclass(kw_only=True)
class DenoiserStep:
    """What one step leaves for the log."""

    loss: Tensor
    grad_norm: Tensor
    waited: float
    healthy: bool
    bad_images: dict[str, str] = field(default_factory=dict)

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean loss over all processes, and the gradient's norm."""
        loss = accelerator.reduce(self.loss, "mean")
        return {"loss": float(loss), "grad_norm": float(self.grad_norm)}


def denoiser_step(
    batches: Iterator[DiffusionBatch[Tensor]],
    state: DenoiserState,
    config: DenoiserConfig,
    *,
    learning_rate: float,
    accelerator: Accelerator,
) -> DenoiserStep:
    """One global batch: forward and backward of each micro-batch, then one update.

    When a loss or a gradient is not finite anywhere, every process skips the update.
    """
    losses, waited = torch.zeros((), device=accelerator.device), 0.0
    bad_images: dict[str, str] = {}
    for _ in range(config.gradient_accumulation_steps):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        bad_images |= batch.bad_images
        batch = batch.to(accelerator.device)
        scaled_latents = scaled_latents_of(batch, state.vae)
        with accelerator.accumulate(state.unet):
            with accelerator.autocast():  # Accelerate does not do it for a network that FSDP2 shards
                loss = denoising_losses(state.unet, scaled_latents, batch, config, state.bare).mean()
            accelerator.backward(loss)
        losses += loss.detach() / config.gradient_accumulation_steps
    norm = whole(nn.utils.clip_grad_norm_(parameters_of(state.optimizer), config.max_grad_norm))
    healthy = bool(accelerator.reduce(losses + norm, "sum").isfinite())
    if healthy:
        set_learning_rate(state.optimizer, learning_rate)
        state.optimizer.step()
        state.ema.step(state.bare.parameters())
    state.optimizer.zero_grad()
    return DenoiserStep(loss=losses, grad_norm=norm, waited=waited, healthy=healthy, bad_images=bad_images)


VALIDATION_IMAGES = 64
VALIDATION_TIMES = tuple((k + 0.5) / 8 for k in range(8))
"""The middle of each of eight ranges of time."""


def validation_batches(rows: DiffusionRows, batch_size: int) -> list[DiffusionBatch[Tensor]]:
    """The same images with the same noise every time, no label dropped, in batches of at most `batch_size`.

    Raises:
        DataError: nothing in the source can be used.
    """
    fixed = replace(rows, label_dropout=0.0 if rows.num_classes else 1.0)
    positions = range(min(len(rows), VALIDATION_IMAGES))
    starts = range(0, len(positions), batch_size)
    batches = [with_tensors(collate_rows([fixed[p] for p in positions[i : i + batch_size]])) for i in starts]
    if not len(batches[0]):
        raise nothing_usable(batches[0].bad_images)
    return batches


@torch.inference_mode()
def validation_loss(
    unet: Any,
    batches: list[DiffusionBatch[Tensor]],
    state: DenoiserState,
    config: DenoiserConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """The averaged denoiser's loss on fixed (image, time, noise), weighted as in training, in all and by time."""
    losses: dict[float, list[Tensor]] = {t: [] for t in VALIDATION_TIMES}
    for batch in batches:
        batch = batch.to(accelerator.device)
        scaled_latents = scaled_latents_of(batch, state.vae)  # in float32, as in training
        for t, parts in losses.items():
            timed = replace(batch, timesteps=torch.full_like(batch.timesteps, t * NUM_TIMESTEPS))
            with accelerator.autocast():
                parts.append(denoising_losses(unet, scaled_latents, timed, config, unet))
    metrics = {f"val_loss/t={t:.3f}": float(torch.cat(parts).mean()) for t, parts in losses.items()}
    return {"val_loss": sum(metrics.values()) / len(metrics), **metrics}
