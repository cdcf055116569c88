"""Train a compression model: an autoencoder by the squared error and the rate of its rounded latents.

accelerate launch training/train_codec.py PRESET --data PATH --output RUN

The same command resumes a run, on any number of processes. `ldm-vae fit-codec` makes a codec of what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.distortion import DISTORTIONS, SCALE_WEIGHTS
from ldm_vae.codec.fit_tables import fit_tables
from ldm_vae.codec.search import bits_per_pixel
from ldm_vae.data.conversion import as_uint8
from ldm_vae.data.loader import Batch, collate
from ldm_vae.data.sources import Source, usable
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.metrics import psnr
from ldm_vae.models.autoencoder import ARCHITECTURES, PatchAutoencoderKL
from ldm_vae.models.interface import is_variational
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.objectives.autoencoding import (
    AutoencoderState,
    StepSummary,
    draw_reconstructions,
    micro_batches,
    open_loop,
    reconstructions_of,
    save_autoencoder,
    update,
    validation_set,
)
from ldm_vae.objectives.rate import TrainableCodec, steering, steps_at
from ldm_vae.runs.config import Range, parse_config
from ldm_vae.runs.images import ImageConfig, check_network, crops_of, forget_scale, start_on_images
from ldm_vae.runs.step import sent

# Config ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(ImageConfig):
    latent_channels: Annotated[int | None, Range(at_least=1)] = None
    """Channels of the latents; the preset's unless given. Few are for low rates."""
    rate_weight: Annotated[float, Range(above=0)] = 0.02
    """Times nats per pixel, beside a mean squared error on [-1, 1]."""
    target_bpp: Annotated[float | None, Range(above=0)] = None
    """Steer the rate's weight to so many bits per pixel, from --rate-weight on."""
    step_range: Annotated[tuple[float, float], Range(above=0)] = (0.5, 4.0)
    """Steps of the quantiser that the model is trained for, one drawn for each image."""
    reduction: Annotated[tuple[float, float], Range(above=0, at_most=1)] = (1.0, 1.0)
    """Reduce images by a factor drawn from this range before each crop, which hides the artefacts of their JPEGs."""
    tune: Literal["psnr", "visual"] = "psnr"
    """The distortion: the squared error, or that as it is seen, which the eye and SSIMULACRA2 prefer at equal bytes."""

    def check(self, num_processes: int) -> None:
        super().check(num_processes)
        if self.step_range[0] > self.step_range[1]:
            raise ConfigError(f"--step-range is {self.step_range}: the lower number comes first")
        if self.reduction[0] > self.reduction[1]:
            raise ConfigError(f"--reduction is {self.reduction}: the lower number comes first")
        if self.init is not None and self.latent_channels is not None:
            raise ConfigError("--latent-channels makes a new network: leave out --init")
        least = 2 ** (len(SCALE_WEIGHTS) - 1)
        if self.tune == "visual" and self.resolution < least:
            raise ConfigError(f"--tune visual needs crops of {least} pixels, --resolution is {self.resolution}")


def preset(architecture: str, *, target_bpp: float) -> Config:
    return Config(
        architecture=architecture,
        target_bpp=target_bpp,
        resolution=64,
        batch_size=16,
        learning_rate=1e-3,
        sample_every=5000,
    )


PRESETS = {
    "f8c32": ("stride 8, 32 channels", preset("f8c32", target_bpp=0.5)),
    "f8c64": ("stride 8, 64 channels, 0.1 to 0.8 bits per pixel", preset("f8c64", target_bpp=0.75)),
    "f16c64": ("stride 16, 64 channels", preset("f16c64", target_bpp=0.3)),
}

# Step -----------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class CodecState(AutoencoderState):
    """With the rate's weight, which changes where the rate has a target."""

    rate_weight: Tensor = field(default_factory=lambda: torch.ones(()))

    def parts(self) -> dict[str, Any]:
        return super().parts() | {"rate_weight": self.rate_weight}


def codec_terms(
    images: Tensor, reconstruction: Tensor, nats: Tensor, steps: Tensor, rate_weight: Tensor, config: Config
) -> dict[str, Tensor]:
    """The named loss terms of images (B, C, H, W), their rates and their quantiser's steps (B,).

    A step q times as wide makes q^2 times the error and has q^2 times the price of a bit (for squared errors at high
    rates). Both terms are divided by q, so that no step outweighs the others.
    """
    name = "masked" if config.tune == "visual" else "l2"
    return {
        name: DISTORTIONS[config.tune](reconstruction, images, 1 / steps),
        "rate": rate_weight * (steps * nats).mean(),
    }


def codec_step(
    batches: Iterator[Batch[Tensor]],
    state: CodecState,
    config: Config,
    *,
    learning_rate: float,
    accelerator: Accelerator,
) -> StepSummary:
    """One global batch: forward and backward of each micro-batch, then one update, also of the rate's weight."""
    summary = StepSummary()
    for batch, noise in micro_batches(batches, state.bare.vae, config, summary, accelerator):
        steps = sent(steps_at(batch.positions, config.seed, config.step_range), accelerator.device)
        with accelerator.accumulate(state.network):
            reconstruction, moments, nats = state.network(batch.images, noise, steps)
            terms = codec_terms(batch.images, reconstruction, nats, steps, state.rate_weight, config)
            accelerator.backward(sum(terms.values()))
        summary.add(terms | {"bits_per_pixel": nats.mean() / math.log(2)})
        summary.moments = moments.detach()
    update(state, summary, {"vae": learning_rate}, config, accelerator)
    summary.terms["rate_weight"] = state.rate_weight.clone()  # the one that this step used
    if summary.healthy and config.target_bpp is not None:
        rate = accelerator.reduce(summary.terms["bits_per_pixel"], "mean")
        state.rate_weight.mul_(steering(rate, config.target_bpp))
    return summary


# What files weigh -----------------------------------------------------------------------------------------------------

FITTED_ON, MEASURED_ON = 32, 8
"""Images: few, as this interrupts the training."""


def measure_files(vae: Any, source: Source, held_out: Source, step_range: tuple[float, float]) -> dict[str, float]:
    """Mean bits per pixel and PSNR of compressed files at three of the steps: the estimate in training is far higher.

    The tables are fitted to a few images of `source`; the files are those of the first of `held_out`.
    """
    low, high = step_range
    steps = (low, math.sqrt(low * high), high)
    codec = LatentCodec(vae, fit_tables(vae, source, num_images=FITTED_ON, steps=steps))
    images = [
        as_uint8(sample.pixels) for _, sample in usable(held_out, {}, indices=range(min(len(held_out), MEASURED_ON)))
    ]
    figures = {}
    for step in steps:
        files = [codec.compress(pixels, step=step) for pixels in images]
        decoded = [codec.decompress_picture(file).pixels for file in files]
        rates = [bits_per_pixel(file, pixels) for file, pixels in zip(files, images, strict=True)]
        psnrs = [psnr(a[None], b[None]).item() for a, b in zip(images, decoded, strict=True)]
        figures[f"file_bits_per_pixel_{step:.2g}"] = sum(rates) / len(rates)
        figures[f"file_psnr_{step:.2g}"] = sum(psnrs) / len(psnrs)
    vae.train()
    return figures


# Main -----------------------------------------------------------------------------------------------------------------


def build(config: Config, accelerator: Accelerator) -> CodecState:
    """The network, its prior and their optimizer, the same in every process."""
    set_seed(config.seed)
    if config.init is None:
        arguments = ARCHITECTURES[config.architecture]
        if config.latent_channels is not None:
            arguments = arguments | {"latent_channels": config.latent_channels}
        vae = PatchAutoencoderKL(in_channels=config.channels, **arguments)
    else:
        vae = load_autoencoder(config.init)
        if not isinstance(vae, PatchAutoencoderKL) or not is_variational(vae):
            raise ConfigError(f"{config.init} is not a PatchAutoencoderKL with a posterior: leave out --init")
        forget_scale(vae)
    check_network(vae, config)
    state = CodecState.of(TrainableCodec(vae), config, accelerator)
    state.rate_weight = torch.tensor(config.rate_weight, device=accelerator.device)
    return state


def main(config: Config) -> None:
    config, accelerator, source, val_source = start_on_images(config)
    state = build(config, accelerator)
    vae = state.bare.vae
    loop = open_loop(config, state, source, accelerator)
    crops = crops_of(source, vae, config, reduction=config.reduction)
    images = validation_set(loop, val_source, config, vae)
    with loop:
        for _, batches in loop.steps(crops, collate):
            rate = loop.learning_rate(config.learning_rate)
            summary = codec_step(batches, state, config, learning_rate=rate, accelerator=accelerator)
            loop.finish(healthy=summary.healthy, waited=summary.waited, bad_images=summary.bad_images)
            if loop.logging:
                loop.log_step(summary.metrics(accelerator) | {"learning_rate": rate})
            if loop.drawing and loop.run.main:
                draw_reconstructions(loop, images, reconstructions_of(state, images, accelerator).clamp(-1, 1))
                if loop.step >= config.sample_every:  # not at the first few grids
                    with state.averaged() as averaged_vae:
                        loop.log(measure_files(averaged_vae, source, val_source, config.step_range))
            if loop.saving:
                save_autoencoder(loop, state)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Train a compression model on images."))
