"""Train a KL-VAE on images.

accelerate launch training/train_vae.py PRESET --data PATH --output RUN

The same command resumes a run, on any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed

from ldm_vae.data.loader import collate
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.latents.scaling import has_scale
from ldm_vae.models.autoencoder import ARCHITECTURES, PatchAutoencoderKL
from ldm_vae.models.discriminator import PatchDiscriminator
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.objectives.autoencoding import (
    TrainableVAE,
    adamw,
    check_posterior,
    draw_reconstructions,
    open_loop,
    reconstructions_of,
    save_autoencoder,
    validation_set,
)
from ldm_vae.objectives.perceptual import perceptual_loss
from ldm_vae.objectives.vae import VAEConfig, VAEState, vae_step
from ldm_vae.runs.config import Range, parse_config
from ldm_vae.runs.images import check_network, crops_of, forget_scale, start_on_images

# Config ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(VAEConfig):
    disc_learning_rate: tyro.conf.Suppress[Annotated[float, Range(above=0)]] = 2e-4
    disc_channels: tyro.conf.Suppress[Annotated[int, Range(at_least=1)]] = 32
    """Of the discriminator's first layer."""
    spectral_norm: tyro.conf.Suppress[bool] = False
    """Spectral norm instead of group norm in the discriminator."""


DEMO = Config(
    architecture="demo",
    steps=1000,
    mixed_precision="no",
    batch_size=16,
    resolution=64,
    perceptual="random",
    lpips_backbone="squeeze",
    perceptual_weight=0.1,
    adversarial_weight=0.2,
    spectral_norm=True,
    disc_start=800,
    learning_rate=2e-3,
    sample_every=250,
    checkpoint_every=250,
    ema_decay=0.99,
)
PRESETS = {
    "demo": ("minutes on two CPU cores, every loss on", DEMO),
    "f8c4": ("stride 8, 4 channels: Stable Diffusion's shape of latents", Config(scale_equivariance=0.4)),
    "f8c8": ("stride 8, 8 channels", Config(architecture="f8c8", scale_equivariance=0.4)),
    "f16c16": ("stride 16, 16 channels", Config(architecture="f16c16", scale_equivariance=0.4)),
    "f4c3": ("stride 4, 3 channels: small images", Config(architecture="f4c3")),
    "f8c4-large": (
        "stride 8, 4 channels, about the parameters of Stable Diffusion's VAE, for GPUs",
        Config(architecture="f8c4-large", learning_rate=1e-4, disc_learning_rate=1e-4, disc_channels=64),
    ),
}

# Networks -------------------------------------------------------------------------------------------------------------


def build(config: Config, accelerator: Accelerator) -> VAEState:
    """The networks and their optimizers, the same in every process."""
    set_seed(config.seed)
    state = VAEState.of(TrainableVAE(first_vae(config)), config, accelerator)
    state.adaptive_weight, state.accuracy = (x.to(accelerator.device) for x in (state.adaptive_weight, state.accuracy))
    if config.adversarial != "none":
        discriminator = PatchDiscriminator(
            in_channels=config.channels, base_channels=config.disc_channels, spectral_norm=config.spectral_norm
        )
        discriminator = discriminator.to(accelerator.device, memory_format=torch.channels_last)
        state.optimizers["discriminator"] = adamw(discriminator, config.disc_learning_rate, betas=(0.5, 0.9))
        state.discriminator = accelerator.prepare(discriminator)
    if config.perceptual != "none":
        with accelerator.local_main_process_first():  # one download a machine
            perceptual = perceptual_loss(config.perceptual, config.lpips_backbone, config.channels)
        state.perceptual = perceptual.to(accelerator.device).to(memory_format=torch.channels_last)
    return state


def first_vae(config: Config) -> Any:
    """The preset's network, or that of --init, ready for these images; of the decoder alone, the encoder is frozen."""
    if config.init is None:
        vae = PatchAutoencoderKL(in_channels=config.channels, **ARCHITECTURES[config.architecture])
    else:
        vae = load_autoencoder(config.init)
    check_network(vae, config)
    check_posterior(vae, config.kl_weight)
    if config.train == "robust-decoder" and not has_scale(vae):
        raise ConfigError(
            "--train robust-decoder needs the scale of the latents: give --init CACHE/vae, of their cache"
        )
    if config.train != "all":
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(not name.startswith(("encoder.", "quant_conv.")))
    elif config.init is not None:
        forget_scale(vae)
    return vae


# Main -----------------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    config, accelerator, source, val_source = start_on_images(config)
    state = build(config, accelerator)
    vae = state.bare.vae
    loop = open_loop(config, state, source, accelerator)
    crops = crops_of(source, vae, config)
    images = validation_set(loop, val_source, config, vae)
    if config.perceptual == "random":
        accelerator.print("LPIPS has a random backbone: its values compare with nothing else")
    if config.perceptual != "none" and config.channels > 3:
        accelerator.print(f"the perceptual loss sees the first three of {config.channels} channels")
    with loop:
        for step, batches in loop.steps(crops, collate):
            peaks = {"vae": config.learning_rate, "discriminator": config.disc_learning_rate}
            rates = {name: loop.learning_rate(peak) for name, peak in peaks.items()}
            summary = vae_step(batches, state, config, step=step, learning_rates=rates, accelerator=accelerator)
            loop.finish(healthy=summary.healthy, waited=summary.waited, bad_images=summary.bad_images)
            if loop.logging:
                loop.log_step(summary.metrics(accelerator) | {"learning_rate": rates["vae"]})
            if loop.drawing and loop.run.main:
                draw_reconstructions(loop, images, reconstructions_of(state, images, accelerator).clamp(-1, 1))
            if loop.saving:
                save_autoencoder(loop, state)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Train a KL-VAE on images."))
