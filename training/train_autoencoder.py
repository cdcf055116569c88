"""Train an autoencoder of another kind than the KL-VAE (plain, denoising, sparse), or a detector of blemishes.

accelerate launch training/train_autoencoder.py PRESET --data PATH --output RUN

The same command resumes a run, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ldm_vae.analysis.anomaly import as_images, is_blemish_detector
from ldm_vae.data.blemishes import with_blemishes
from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.corruption import UNKNOWN_LEVEL, Corruption, Pairing, parse_corruption
from ldm_vae.data.loader import Batch, CropDataset, collate
from ldm_vae.data.order import Stream, generator_at
from ldm_vae.data.sources import Source
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.models.autoencoder import ARCHITECTURES, PatchAutoencoderKL
from ldm_vae.models.interface import is_variational, posterior_of
from ldm_vae.models.loading import load_autoencoder, load_network
from ldm_vae.objectives import losses
from ldm_vae.objectives.autoencoding import (
    AutoencoderState,
    StepSummary,
    TrainableVAE,
    check_posterior,
    draw_reconstructions,
    micro_batches,
    open_loop,
    reconstructions_of,
    save_autoencoder,
    update,
    validation_set,
)
from ldm_vae.runs.config import Range, parse_config
from ldm_vae.runs.images import ImageConfig, check_network, crops_of, forget_scale, start_on_images
from ldm_vae.runs.step import sent

# Config ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(ImageConfig):
    reconstruction: Literal["l1", "l2", "charbonnier", "cross-entropy"] = "l2"
    """cross-entropy makes a detector: it sees blemishes made on images, and gives the log-odds of one at each place."""
    posterior: Literal["deterministic", "gaussian"] = "deterministic"
    """deterministic is a plain autoencoder: no noise, and no KL."""
    kl_weight: Annotated[float, Range(at_least=0)] = 0.0
    """Times nats per pixel, with --posterior gaussian."""
    global_latent: Annotated[int | None, Range(at_least=1)] = None
    """One vector of so many numbers for a crop instead of a map. Images are resized to the crop, unless --shorter-side
    says otherwise."""
    corruption: str | None = None
    """What the network undoes: gaussian:SIGMA (in 0..255), masking:RATIO, jpeg:QUALITY, poisson:PEAK; or LOW-HIGH."""
    sparsity: Literal["none", "l1", "kl"] = "none"
    """Few active latents: by L1 (they are 0 or more) or by a KL to --target-activation (they are between 0 and 1)."""
    sparsity_weight: Annotated[float, Range(at_least=0)] = 0.01
    target_activation: Annotated[float, Range(above=0, below=1)] = 0.05
    """The mean latent that --sparsity kl asks for."""

    def check(self, num_processes: int) -> None:
        super().check(num_processes)
        corruption = corruption_of(self)
        if corruption is not None and corruption.kind == "jpeg" and self.channels not in (1, 3):
            raise ConfigError(f"images of {self.channels} channels cannot be JPEG: choose another --corruption")
        if corruption is not None and self.reconstruction == "cross-entropy":
            raise ConfigError("--reconstruction cross-entropy is for blemishes: leave out --corruption")
        if self.init is not None and self.global_latent is not None:
            raise ConfigError("--global-latent makes a new network: leave out --init")


def preset(architecture: str, *, resolution: int = 64, batch_size: int = 16, **others: Any) -> Config:
    shared = Config(architecture=architecture, learning_rate=1e-3, resolution=resolution, batch_size=batch_size)
    return replace(shared, **others)


PRESETS = {
    "plain": ("stride 8, 8 channels, no KL and no noise", preset("plain")),
    "sparse": ("stride 8, 32 channels, of which few are not 0", preset("sparse", sparsity="l1")),
    "denoise": (
        "stride 4, 48 channels, removes Gaussian noise of up to 55 of 255",
        preset("denoise", corruption="gaussian:0-55", resolution=96, batch_size=8),
    ),
    "find": (
        "stride 8, 64 channels, finds what does not belong there: for anomalies",
        preset("find", reconstruction="cross-entropy"),
    ),
}
ACTIVATION_OF = {"none": "none", "l1": "relu", "kl": "sigmoid"}


def corruption_of(config: Config) -> Corruption | None:
    return None if config.corruption is None else parse_corruption(config.corruption)


def pairings(config: Config) -> tuple[Pairing | None, Pairing | None]:
    """How a crop becomes an input and its target, in training and in validation; None where it is both itself."""
    if config.reconstruction == "cross-entropy":
        return with_blemishes, with_blemishes
    corruption = corruption_of(config)
    return (None, None) if corruption is None else (corruption.told_half_the_time, corruption)


# Step -----------------------------------------------------------------------------------------------------------------


def loss_terms(
    images: Tensor, reconstruction: Tensor, moments: Tensor, nats: Tensor, config: Config
) -> dict[str, Tensor]:
    """The named loss terms of images (B, C, H, W), their moments (B, 2c, h, w) and KL in nats per pixel (B,)."""
    error = losses.reconstruction_loss(reconstruction, images, config.reconstruction)
    terms: dict[str, Tensor] = {config.reconstruction: error}
    latents = posterior_of(moments).mean
    if config.kl_weight > 0:
        terms["kl"] = config.kl_weight * nats.mean()
    if config.sparsity == "l1":
        terms["sparsity"] = config.sparsity_weight * losses.l1_sparsity(latents)
    elif config.sparsity == "kl":
        terms["sparsity"] = config.sparsity_weight * losses.kl_sparsity(latents, config.target_activation)
    return terms


@torch.no_grad()
def rate_and_activity(moments: Tensor, nats: Tensor, vae: Any, config: Config) -> dict[str, Tensor]:
    """For the log: the rate, and the share of active latents: above 0, or above 1/2 where they are in 0..1."""
    values = {}
    if is_variational(vae):
        values["bits_per_pixel"] = nats.mean() / math.log(2)
    if config.sparsity != "none":
        values["active_latents"] = (posterior_of(moments).mean > (0.5 if config.sparsity == "kl" else 0)).float().mean()
    return values


def levels_of(batch: Batch[Tensor], vae: Any) -> Tensor | None:
    """Noise levels (B,), for a network that takes them."""
    if vae.config.get("noise_level") is None:
        return None
    unknown = torch.full((len(batch),), UNKNOWN_LEVEL)
    return sent(unknown if batch.noise_levels is None else batch.noise_levels, batch.images.device)


def autoencoder_step(
    batches: Iterator[Batch[Tensor]],
    state: AutoencoderState,
    config: Config,
    *,
    learning_rate: float,
    accelerator: Accelerator,
) -> StepSummary:
    """One global batch: forward and backward of each micro-batch, then one update."""
    summary, vae = StepSummary(), state.bare.vae
    for batch, noise in micro_batches(batches, vae, config, summary, accelerator):
        inputs = batch.images if batch.inputs is None else batch.inputs
        with accelerator.accumulate(state.network):
            reconstruction, moments, nats = state.network(inputs, noise, levels_of(batch, vae))
            terms = loss_terms(batch.images, reconstruction, moments, nats, config)
            accelerator.backward(sum(terms.values()))
        summary.add(terms | rate_and_activity(moments, nats, vae, config))
        summary.moments = moments.detach()
    update(state, summary, {"vae": learning_rate}, config, accelerator)
    return summary


# Network --------------------------------------------------------------------------------------------------------------


def build(config: Config, accelerator: Accelerator) -> AutoencoderState:
    """The network and its optimizer, the same in every process."""
    set_seed(config.seed)
    if config.init is None:
        vae = PatchAutoencoderKL(in_channels=config.channels, **architecture_of(config))
    else:
        vae = loaded(config.init, config)
    check_network(vae, config)
    check_posterior(vae, config.kl_weight)
    return AutoencoderState.of(TrainableVAE(vae), config, accelerator)


def architecture_of(config: Config) -> dict[str, Any]:
    """Arguments of PatchAutoencoderKL: the preset's, and what the flags make of it."""
    arguments = ARCHITECTURES[config.architecture] | {"deterministic": config.posterior == "deterministic"}
    arguments["latent_activation"] = ACTIVATION_OF[config.sparsity]
    if config.reconstruction == "cross-entropy":
        arguments |= {"out_channels": 1, "finds_blemishes": True}
    corruption = corruption_of(config)
    if corruption is not None and corruption.kind == "gaussian":
        arguments["noise_level"] = corruption.high
    if config.global_latent is not None:
        one = {"in_channels": config.channels, "latent_channels": 1}
        stride = PatchAutoencoderKL(**arguments | one).spatial_compression_ratio
        if config.resolution % stride:
            nearest = max(config.resolution // stride, 1) * stride
            raise ConfigError(f"--resolution {config.resolution} is not a multiple of {stride}: try {nearest}")
        arguments |= {"latent_channels": config.global_latent, "pool": config.resolution // stride}
    return arguments


def loaded(init: str, config: Config) -> Any:
    """The network of --init. Raises ConfigError where it does not fit the other flags."""
    detector = config.reconstruction == "cross-entropy"
    vae = load_network(init) if detector else load_autoencoder(init)
    if config.posterior == "deterministic" and is_variational(vae):
        raise ConfigError(f"{init} has a posterior: add --posterior gaussian, or leave out --init")
    if detector and not is_blemish_detector(vae):
        raise ConfigError(f"{init} does not find blemishes: leave out --init")
    if config.sparsity != "none" and vae.config.get("latent_activation") != ACTIVATION_OF[config.sparsity]:
        raise ConfigError(f"{init} was not made for --sparsity {config.sparsity}: leave out --init")
    forget_scale(vae)
    corruption = corruption_of(config)
    if corruption is not None and corruption.kind == "gaussian" and vae.config.get("noise_level") is not None:
        vae.register_to_config(noise_level=max(vae.config.noise_level, corruption.high))
    return vae


# Main -----------------------------------------------------------------------------------------------------------------


def training_crops(source: Source, vae: Any, config: Config) -> CropDataset:
    return crops_of(source, vae, config, pairing=pairings(config)[0], whole_images=config.global_latent is not None)


def validation_pairs(images: Tensor, pairing: Pairing | None) -> tuple[Tensor, Tensor | None]:
    """Targets and, where they differ, inputs of validation images (N, C, H, W): always the same."""
    if pairing is None or not len(images):
        return images, None
    pairs = [pairing(to_pixels(image), generator_at(0, i, Stream.VALIDATION)) for i, image in enumerate(images)]
    return torch.stack([to_images(p.target) for p in pairs]), torch.stack([to_images(p.input) for p in pairs])


def main(config: Config) -> None:
    config, accelerator, source, val_source = start_on_images(config)
    state = build(config, accelerator)
    vae = state.bare.vae
    loop = open_loop(config, state, source, accelerator)
    crops = training_crops(source, vae, config)
    images, inputs = validation_pairs(validation_set(loop, val_source, config, vae), pairings(config)[1])
    with loop:
        for _, batches in loop.steps(crops, collate):
            rate = loop.learning_rate(config.learning_rate)
            summary = autoencoder_step(batches, state, config, learning_rate=rate, accelerator=accelerator)
            loop.finish(healthy=summary.healthy, waited=summary.waited, bad_images=summary.bad_images)
            if loop.logging:
                loop.log_step(summary.metrics(accelerator) | {"learning_rate": rate})
            if loop.drawing and loop.run.main:
                sample = reconstructions_of(state, images if inputs is None else inputs, accelerator)
                draw_reconstructions(loop, images, as_images(vae, sample), inputs)
            if loop.saving:
                save_autoencoder(loop, state)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Train an autoencoder, or a detector of blemishes, on images."))
