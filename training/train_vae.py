"""Train a KL-VAE on images.

accelerate launch training/train_vae.py PRESET --data PATH --output RUN

The same command resumes a run, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor

from ldm_vae.data.blemishes import with_blemishes
from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.corruption import Corruption, parse_corruption
from ldm_vae.data.loader import Batch, CropDataset, MicroBatches, collate, load_batches, map_image
from ldm_vae.data.order import Stream, generator_at
from ldm_vae.data.sources import Source, check_outside, open_source
from ldm_vae.data.workers import default_workers
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.files import staged_directory
from ldm_vae.grids import reconstruction_grid, validation_images
from ldm_vae.metrics import psnr
from ldm_vae.models.autoencoder import ARCHITECTURES, PatchAutoencoderKL
from ldm_vae.models.discriminator import PatchDiscriminator
from ldm_vae.models.interface import (
    SCALE,
    channels_of,
    check_resolution,
    has_vector,
    is_finder,
    is_variational,
    latent_channels_of,
    stride_of,
    viewable,
)
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.prior import CausalPrior
from ldm_vae.models.reconstruction import reconstruct
from ldm_vae.objectives import losses, perceptual
from ldm_vae.objectives.autoencoding import Objective, State, TrainableVAE, train_step
from ldm_vae.runs.config import Range, parse_config
from ldm_vae.runs.loop import FREE_ON_RESUME, Loop
from ldm_vae.runs.run import Checkpoint, Run
from ldm_vae.runs.state import state_tensors

# Config ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(Objective):
    """Flags of the VAE's trainer."""

    data: str = tyro.MISSING
    """Image folder, .zip, tar shards, Hugging Face dataset, or procedural:NAME."""
    val_data: str | None = None
    """Images for the sample grid and the validation PSNR; the first of --data unless given."""
    resolution: Annotated[int, Range(at_least=1)] = 256
    """Side of the training crops, in pixels."""
    shorter_side: Annotated[int | None, Range(at_least=1)] = None
    """Resize images to this shorter side before the crop; keep their size unless given."""
    channels: Annotated[int, Range(at_least=1)] = 3
    """Channels of the images."""
    architecture: tyro.conf.Suppress[str] = "f8c4"
    init: str | None = None
    """Start from this autoencoder (run, diffusers folder or hub id) instead of the preset's network."""
    posterior: Literal["gaussian", "deterministic"] = "gaussian"
    """deterministic is a plain autoencoder: no noise, and no KL."""
    global_latent: Annotated[int | None, Range(at_least=1)] = None
    """One vector of so many numbers for a crop instead of a map. Images are resized to the crop, unless --shorter-side
    says otherwise."""
    corruption: str | None = None
    """What the network undoes: gaussian:SIGMA (in 0..255), masking:RATIO, jpeg:QUALITY, poisson:PEAK, blemishes:COUNT;
    or LOW-HIGH."""
    target: Literal["images", "blemishes"] = "images"
    """blemishes: the network sees images with blemishes made on them, and gives where these are."""
    train: Literal["all", "decoder"] = "all"
    """decoder leaves the encoder, and so the latents, as they are."""
    spectral_norm: bool = False
    """Spectral norm instead of group norm in the discriminator."""
    disc_learning_rate: Annotated[float, Range(above=0)] = 2e-4
    mirror: bool = True
    """Mirror every second crop."""
    cache_gib: Annotated[float, Range(at_least=0)] = 1.0
    """Decoded images that each training process may keep in memory."""


def preset(architecture: str, **changes: Any) -> Config:
    return Config(architecture=architecture, **changes)


def codec_preset(architecture: str, *, target_bpp: float) -> Config:
    """Squared error and rate. A second run with --init and --coarse-weight 2 brings back what is faint."""
    return preset(
        architecture,
        prior="causal",
        reconstruction="l2",
        kl_weight=0.02,
        target_bpp=target_bpp,
        perceptual="none",
        adversarial="none",
        resolution=64,
        batch_size=16,
        learning_rate=1e-3,
    )


def plain_preset(architecture: str, **changes: Any) -> Config:
    """Squared error and no posterior."""
    quiet = {"perceptual": "none", "adversarial": "none", "kl_weight": 0.0, "posterior": "deterministic"}
    fast = {"reconstruction": "l2", "resolution": 64, "batch_size": 16, "learning_rate": 1e-3}
    return preset(architecture, **{**quiet, **fast, **changes})


PRESETS = {
    "demo": (
        "minutes on two CPU cores, every loss on",
        preset(
            "demo",
            steps=1000,
            mixed_precision="no",
            batch_size=16,
            resolution=64,
            perceptual="random",
            lpips_backbone="squeeze",
            lpips_weight=0.1,
            adversarial_weight=0.2,
            spectral_norm=True,
            disc_start=800,
            learning_rate=2e-3,
            sample_every=250,
            checkpoint_every=250,
            ema_decay=0.99,
        ),
    ),
    "f8c4": ("stride 8, 4 channels: Stable Diffusion's shape of latents", preset("f8c4")),
    "f8c8": ("stride 8, 8 channels", preset("f8c8")),
    "f16c16": ("stride 16, 16 channels", preset("f16c16")),
    "f4c3": ("stride 4, 3 channels: small images", preset("f4c3")),
    "f8c8-codec": ("8 channels for the codec, low rates", codec_preset("f8c8-codec", target_bpp=0.2)),
    "f8c32-codec": ("32 channels for the codec", codec_preset("f8c32-codec", target_bpp=0.5)),
    "f8c64-codec": (
        "64 channels for the codec, 0.1 to 0.8 bits per pixel",
        codec_preset("f8c64-codec", target_bpp=0.75),
    ),
    "f16c64-codec": ("stride 16, 64 channels for the codec", codec_preset("f16c64-codec", target_bpp=0.3)),
    "plain": ("stride 8, 8 channels, no KL and no noise", plain_preset("plain")),
    "sparse": ("stride 8, 32 channels, of which few are not 0", plain_preset("sparse", sparsity="l1")),
    "denoise": (
        "stride 4, 48 channels, takes Gaussian noise of up to 55 of 255 away",
        plain_preset("denoise", corruption="gaussian:0-55", resolution=96, batch_size=8),
    ),
    "restore": (
        "stride 8, 32 channels, takes what does not belong there away: for anomalies",
        plain_preset("restore", corruption="blemishes:0-3", reconstruction="l1"),
    ),
    "find": (
        "stride 8, 64 channels, says what does not belong there: for anomalies",
        plain_preset("find", target="blemishes", reconstruction="cross-entropy"),
    ),
    "f8c4-large": (
        "stride 8, 4 channels, about the parameters of Stable Diffusion's VAE, for GPUs",
        preset("f8c4-large", learning_rate=1e-4, disc_learning_rate=1e-4),
    ),
}


def validate(config: Config, num_processes: int) -> None:
    """Raises ConfigError for flags that cannot work."""
    config.check(num_processes)
    corruption = corruption_of(config)
    if corruption is not None and corruption.kind == "jpeg" and config.channels not in (1, 3):
        raise ConfigError(f"images of {config.channels} channels cannot be JPEG: choose another --corruption")
    pictures = config.perceptual != "none" or config.adversarial != "none" or corruption is not None
    if config.target == "blemishes" and (pictures or config.prior == "causal"):
        raise ConfigError(
            "--target blemishes is no picture: add --perceptual none --adversarial none, no --corruption, no --prior"
        )
    if (config.target == "blemishes") != (config.reconstruction == "cross-entropy"):
        raise ConfigError("--reconstruction cross-entropy is that of --target blemishes, and of no other")
    if config.target_bpp is not None and (config.target_bpp <= 0 or config.kl_weight <= 0):
        raise ConfigError("--target-bpp steers --kl-weight: both must be more than 0")
    if config.target_bpp is not None and config.train == "decoder":
        raise ConfigError("--target-bpp steers the encoder, which --train decoder leaves as it is: leave one out")
    if not 0 < config.quality_range[0] <= config.quality_range[1] < math.inf:
        raise ConfigError(f"--quality-range is {config.quality_range}: it must be two ascending numbers above 0")
    if config.prior == "causal" and config.kl_weight <= 0:
        raise ConfigError("--prior causal needs a rate that counts: add --kl-weight, such as 0.008")
    if config.perceptual != "none" and config.resolution < perceptual.SMALLEST_IMAGE[config.lpips_backbone]:
        least = perceptual.SMALLEST_IMAGE[config.lpips_backbone]
        raise ConfigError(
            f"LPIPS with {config.lpips_backbone} needs crops of {least} pixels, --resolution is {config.resolution}: "
            "enlarge it, or choose --perceptual none"
        )
    if config.coarse_weight > 0 and config.resolution < max(losses.COARSE):
        least = max(losses.COARSE)
        raise ConfigError(f"--coarse-weight needs crops of {least} pixels, --resolution is {config.resolution}")
    smallest = PatchDiscriminator.smallest_image(num_layers=3)
    if config.adversarial != "none" and config.resolution < smallest:
        raise ConfigError(
            f"the discriminator needs crops of {smallest} pixels, --resolution is {config.resolution}: "
            "enlarge it, or choose --adversarial none"
        )


# Main -----------------------------------------------------------------------------------------------------------------


def build(config: Config, accelerator: Accelerator) -> State:
    """The networks and their optimizers, the same in every process."""
    set_seed(config.seed)
    if config.init:
        vae = load_autoencoder(config.init, or_finder=config.target == "blemishes")
        if channels_of(vae) != config.channels:
            raise ConfigError(f"{config.init} takes images of {channels_of(vae)} channels: add --channels to say so")
        if config.train == "all":  # its latents will be others, and so will their scale
            vae.register_to_config(**{k: v for k, v in SCALE.items() if k in vae.config})
        corruption = corruption_of(config)
        if corruption is not None and corruption.kind == "gaussian" and vae.config.get("noise_level") is not None:
            vae.register_to_config(noise_level=max(vae.config.noise_level, corruption.high))
    else:
        vae = PatchAutoencoderKL(in_channels=config.channels, **architecture_of(config))
    check_variant(vae, config)
    if config.kl_weight > 0 and not is_variational(vae):
        raise ConfigError(f"{type(vae).__name__} has no posterior, and so no KL: add --kl-weight 0")
    if (config.shorter_side or config.resolution) < stride_of(vae):
        side = f"--shorter-side {config.shorter_side}" if config.shorter_side else f"--resolution {config.resolution}"
        raise ConfigError(f"{side} is less than the model's stride of {stride_of(vae)}")
    check_resolution(config.resolution, vae)
    if config.train == "decoder":
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(not name.startswith(("encoder.", "quant_conv.")))
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    prior = None
    if config.prior == "causal":
        if not isinstance(vae, PatchAutoencoderKL) or config.train == "decoder":
            raise ConfigError("--prior causal trains the whole of a PatchAutoencoderKL: leave out --init or --train")
        prior = CausalPrior(latent_channels_of(vae))
    bare = TrainableVAE(vae, config.learned_logvar, prior)
    bare = bare.to(accelerator.device).to(memory_format=torch.channels_last).train()
    if config.compile:
        if not getattr(vae, "_repeated_blocks", None):
            raise ConfigError(f"--compile is not for {type(vae).__name__}, which does not name its repeated blocks")
        vae.compile_repeated_blocks()
    discriminator = lpips = None
    if config.adversarial != "none":
        discriminator = PatchDiscriminator(in_channels=config.channels, spectral_norm=config.spectral_norm)
        discriminator = discriminator.to(accelerator.device, memory_format=torch.channels_last)
    if config.perceptual != "none":
        with accelerator.local_main_process_first():  # one download a machine
            lpips = perceptual.PerceptualLoss(
                config.lpips_backbone,
                pretrained=config.perceptual == "pretrained",
                image_channels=config.channels,
                channels=config.lpips_channels,
            )
        lpips = lpips.to(accelerator.device).to(memory_format=torch.channels_last)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, network, rate in (
        ("vae", bare, config.learning_rate),
        ("discriminator", discriminator, config.disc_learning_rate),
    ):
        if network is not None:
            trained = [p for p in network.parameters() if p.requires_grad]
            betas = (0.9, 0.99) if name == "vae" else (0.5, 0.9)
            optimizers[name] = torch.optim.AdamW(trained, rate, betas=betas, weight_decay=0.0, fused=True)
    return State(
        vae=accelerator.prepare(bare),
        discriminator=None if discriminator is None else accelerator.prepare(discriminator),
        lpips=lpips,
        ema=EMAModel(vae.parameters(), decay=config.ema_decay, foreach=True),
        optimizers=optimizers,
        adaptive_weight=torch.zeros((), device=accelerator.device),
        kl_weight=torch.tensor(config.kl_weight, device=accelerator.device),
        bare=bare,
    )


def architecture_of(config: Config) -> dict[str, Any]:
    """Keywords of PatchAutoencoderKL: the preset's, and what other flags make of it."""
    keywords = ARCHITECTURES[config.architecture] | {"deterministic": config.posterior == "deterministic"}
    keywords["latent_activation"] = ACTIVATION_OF[config.sparsity]
    if config.target == "blemishes":
        keywords |= {"out_channels": 1, "finds_blemishes": True}
    corruption = corruption_of(config)
    if corruption is not None and corruption.kind == "gaussian":
        keywords["noise_level"] = corruption.high
    if config.global_latent is not None:
        one = {"in_channels": config.channels, "latent_channels": 1}
        stride = PatchAutoencoderKL(**keywords | one).spatial_compression_ratio
        if config.resolution % stride:
            nearest = max(config.resolution // stride, 1) * stride
            raise ConfigError(f"--resolution {config.resolution} is not a multiple of {stride}: try {nearest}")
        keywords |= {"latent_channels": config.global_latent, "pool": config.resolution // stride}
    return keywords


ACTIVATION_OF = {"none": "none", "l1": "relu", "kl": "sigmoid"}


def check_variant(vae: Any, config: Config) -> None:
    """Raises ConfigError for flags that the autoencoder of --init was not made for."""
    if config.init and config.posterior == "deterministic" and is_variational(vae):
        raise ConfigError(f"{config.init} has a posterior: add --posterior gaussian, or leave out --init")
    if config.init and config.global_latent is not None:
        raise ConfigError("--global-latent makes a new network: leave out --init")
    if is_finder(vae) != (config.target == "blemishes"):
        raise ConfigError(f"{config.init} was not made for --target blemishes: leave out --init")
    if config.sparsity != "none" and vae.config.get("latent_activation") != ACTIVATION_OF[config.sparsity]:
        raise ConfigError(f"{config.init} was not made for --sparsity {config.sparsity}: leave out --init")


def save(run: Run, state: State, *, step: int, facts: dict[str, Any]) -> None:
    """The averaged VAE in diffusers' layout, and then the checkpoint: where it is, the model of its step is, too."""
    if run.main:
        with state.averaged() as vae, staged_directory(run.directory / "vae") as staging:
            vae.save_pretrained(staging)
        run.save(Checkpoint(step=step, tensors=state_tensors(state.parts()), facts=facts))


def corruption_of(config: Config) -> Corruption | None:
    return None if config.corruption is None else parse_corruption(config.corruption)


def validation_pairs(images: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """What the network is to give, and what it is to see, for images (N, C, H, W): always the same."""
    rngs = [generator_at(0, i, Stream.VALIDATION) for i in range(len(images))]
    if config.target == "blemishes":
        pairs = [with_blemishes(to_pixels(i), rng) for i, rng in zip(images, rngs, strict=True)]
        seen, where = zip(*pairs, strict=True)
        return torch.from_numpy(np.stack([map_image(w) for w in where])), torch.stack([to_images(s) for s in seen])
    corruption = corruption_of(config)
    if corruption is None:
        return images, images
    damaged = [to_images(corruption(to_pixels(i), rng)[0]) for i, rng in zip(images, rngs, strict=True)]
    return images, torch.stack(damaged)


def draw(
    run: Run, state: State, images: Tensor, inputs: Tensor, *, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """The sample grid of the averaged VAE, and its PSNR on the validation images; `inputs` are what it sees of them."""
    with state.averaged() as vae, torch.inference_mode(), accelerator.autocast():
        given = [reconstruct(vae, i[None].to(accelerator.device)).float().cpu() for i in inputs]
    reconstructions = viewable(vae, torch.cat(given))
    grid = reconstruction_grid(images[:8], reconstructions[:8], None if inputs is images else inputs[:8])
    grid.save(run.directory / "samples" / f"step-{step}.png")
    return {"val_psnr": float(psnr(to_pixels(images), to_pixels(reconstructions)).mean())}


def batches_from(
    step: int, source: Source, vae: Any, config: Config, accelerator: Accelerator
) -> Iterator[Batch[Tensor]]:
    """This process's micro-batches from `step` on."""
    num_workers = default_workers() if config.num_workers is None else config.num_workers
    whole = config.global_latent is not None or has_vector(vae)  # --init says nothing of it
    crops = CropDataset(
        source,
        seed=config.seed,
        resolution=config.resolution,
        shorter_side=config.shorter_side or (config.resolution if whole else None),
        corruption=corruption_of(config),
        blemishes=config.target == "blemishes",
        mirror=config.mirror,
        cache_bytes=int(config.cache_gib * 2**30) // max(num_workers, 1),
    )
    order = MicroBatches(
        first_step=step,
        last_step=config.steps,
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        accumulation=config.gradient_accumulation_steps,
    )
    on_gpu = accelerator.device.type == "cuda"
    return load_batches(crops, order, collate=collate, num_workers=num_workers, pin_memory=on_gpu)


def describe(config: Config, state: State, source: Source, accelerator: Accelerator) -> str:
    parameters = sum(p.numel() for p in state.bare.vae.parameters()) / 1e6
    text = f"{parameters:.2f} M parameters, {len(source)} images; {config.effective_batch(accelerator.num_processes)}"
    if config.perceptual == "random":
        text += "; LPIPS has a random backbone: its values compare with nothing else"
    return text


def main(config: Config) -> None:
    accelerator = config.accelerator()
    if accelerator.is_fsdp2:
        raise ConfigError("an autoencoder is not divided among processes: launch without FSDP")
    validate(config, accelerator.num_processes)
    side = config.shorter_side or config.resolution
    check_outside(config.output, config.data, flag="--data")
    source = open_source(config.data, channels=config.channels, resolution=side)
    val_source = open_source(config.val_data, channels=config.channels, resolution=side) if config.val_data else source
    state = build(config, accelerator)
    run = Run(config.output, config, free=FREE_ON_RESUME, main=accelerator.is_main_process)
    loop = Loop(run, state.parts(), config, accelerator)
    before = loop.facts.get("number of images", len(source))
    if before != len(source):
        accelerator.print(f"warning: {len(source)} images where there were {before}: from here on in another order")
    loop.facts["number of images"] = len(source)
    if run.main:
        with run.listing_bad_images():
            val_images, met = validation_images(val_source, side=side - side % stride_of(state.bare.vae))
            run.add_bad_images(met)
        val_images, val_inputs = validation_pairs(val_images, config)
    accelerator.print(describe(config, state, source, accelerator))
    with loop:
        for step, batches in loop.steps(lambda step: batches_from(step, source, state.bare.vae, config, accelerator)):
            peaks = {"vae": config.learning_rate, "discriminator": config.disc_learning_rate}
            rates = {name: loop.learning_rate(peak) for name, peak in peaks.items()}
            weights = {n: getattr(state, n).clone() for n in ("adaptive_weight", "kl_weight")}  # the step changes them
            result = train_step(batches, state, config, step=step, learning_rates=rates, accelerator=accelerator)
            loop.finish(healthy=result.healthy, waited=result.waited, bad_images=result.bad_images)
            if loop.logging:
                present = {n: float(w) for n, w in weights.items()} | {"learning_rate": rates["vae"]}
                loop.log_step(result.metrics(accelerator, fixed_deviation=config.prior == "causal") | present)
            if loop.drawing and run.main:
                metrics = draw(run, state, val_images, val_inputs, step=loop.step, accelerator=accelerator)
                loop.log(metrics | {"seconds": loop.facts["seconds"]})
            if loop.saving:
                save(run, state, step=loop.step, facts=loop.facts)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Train a KL-VAE on images."))
