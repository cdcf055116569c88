"""Train a diffusion model on the latents of a VAE.

accelerate launch training/train_diffusion.py PRESET --latents CACHE --output RUN
accelerate launch training/train_diffusion.py PRESET --data PATH --vae RUN_OR_MODEL --output RUN

The same command resumes a run, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor

from ldm_vae.data.loader import MicroBatches, load_batches
from ldm_vae.data.order import index_at
from ldm_vae.data.sources import check_outside, open_source
from ldm_vae.data.workers import default_workers
from ldm_vae.errors import ConfigError, DataError, ModelError, one_line_errors
from ldm_vae.files import staged_directory
from ldm_vae.grids import labelled_rows, visible
from ldm_vae.latents.cache import LatentCache
from ldm_vae.latents.rows import CachedMoments, DiffusionBatch, DiffusionRows, Inputs, Squares, collate_rows
from ldm_vae.latents.scaling import has_scale, put_statistics, scale_of
from ldm_vae.latents.statistics import Statistics
from ldm_vae.latents.timesteps import NUM_TIMESTEPS
from ldm_vae.models.interface import (
    channels_of,
    check_resolution,
    encode_moments,
    fingerprint,
    latent_channels_of,
    stride_of,
)
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.unet import make_denoiser
from ldm_vae.objectives.denoising import (
    VALIDATION_TIMES,
    Objective,
    State,
    check_objective,
    losses_of,
    scaled_latents_of,
    train_step,
    validation_batches,
)
from ldm_vae.pipeline import LatentDiffusionPipeline
from ldm_vae.runs.config import Range, parse_config
from ldm_vae.runs.loop import FREE_ON_RESUME, Loop, start
from ldm_vae.runs.run import Checkpoint, Run
from ldm_vae.runs.state import state_tensors
from ldm_vae.sampling import make_scheduler

# Config ---------------------------------------------------------------------------------------------------------------

SAMPLE_STEPS = 25
SAMPLES_A_CLASS = 8
SAMPLED_CLASSES = 10
MEASURED_IMAGES = 1024


@dataclass(frozen=True, kw_only=True)
class Config(Objective):
    """Flags of the diffusion model's trainer."""

    latents: Path | None = None
    """Cache that training/cache_latents.py made; or --data and --vae, to encode images as they come."""
    data: str | None = None
    """Image folder, .zip, tar shards, Hugging Face dataset, or procedural:NAME."""
    vae: str | None = None
    """Run directory, diffusers folder or hub id; the cache's own unless given."""
    resolution: Annotated[int, Range(at_least=1)] = 256
    """Of --data: the centred square of each image is resized to this side. A cache knows its own."""
    flip: bool = False
    """Half of the images mirrored; a cache must hold them."""
    class_conditional: bool = True
    """Learn the classes of the data, if it has any."""
    val_latents: Path | None = None
    """Cache for the validation loss; the first of the training data unless given."""
    denoiser: tyro.conf.Suppress[str] = "tiny"
    guidance_scale: Annotated[float, Range(at_least=0)] = 1.5
    """Of the sample grid."""


PRESETS = {
    "demo": (
        "3 M parameters: minutes on two CPU cores",
        Config(
            denoiser="demo",
            batch_size=64,
            learning_rate=2e-3,
            steps=1000,
            mixed_precision="no",
            num_workers=0,
            checkpoint_every=250,
            ema_decay=0.995,
        ),
    ),
    "tiny": (
        "11 M parameters: small latents on a CPU",
        Config(denoiser="tiny", batch_size=64, learning_rate=1e-3, steps=5000),
    ),
    "small": ("43 M parameters: one GPU", Config(denoiser="small", batch_size=256, learning_rate=2e-4)),
    "base": (
        "171 M parameters: several GPUs",
        Config(denoiser="base", batch_size=256, learning_rate=1e-4, ema_decay=0.9999, steps=400_000),
    ),
}


def validate(config: Config, num_processes: int) -> None:
    """Raises ConfigError for flags that cannot work."""
    config.check(num_processes)
    check_objective(config)
    if (config.latents is None) == (config.data is None):
        raise ConfigError("give either --latents, a cache, or --data with --vae")
    if config.data is not None and config.vae is None:
        raise ConfigError("--data needs --vae, the autoencoder that encodes it")


# Main -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Data:
    """The VAE, the images or their latents, and what they are."""

    vae: Any
    images: Inputs
    encoded: bool
    latent_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    val_images: Inputs
    made_from: dict[str, Any]
    """What a resumed run must find unchanged."""


def open_cache(folder: Path, accelerator: Accelerator) -> LatentCache:
    """Each process verifies its share of the shards."""
    rank, count = accelerator.process_index, accelerator.num_processes
    return LatentCache(folder, shards_to_verify=lambda shard: shard % count == rank)


def open_data(config: Config, accelerator: Accelerator) -> Data:
    """Raises LdmVaeError for data, caches and VAEs that are not there or do not belong together."""
    images: Inputs
    if config.latents is None:
        assert config.vae is not None
        assert config.data is not None
        vae = load_autoencoder(config.vae)
        check_resolution(config.resolution, vae)
        check_outside(config.output, config.data, flag="--data")
        source = open_source(config.data, channels=channels_of(vae), resolution=config.resolution)
        side = config.resolution // stride_of(vae)
        shape, fingerprint_of_data = (latent_channels_of(vae), side, side), source.fingerprint()
        classes, images = source.classes, Squares(source, config.resolution)
    else:
        cache = open_cache(config.latents, accelerator)
        vae = load_autoencoder(config.vae or str(config.latents))
        if fingerprint(vae) != cache.plan.vae:
            raise ModelError(
                f"{config.latents} holds latents of another VAE than {config.vae or config.latents}: "
                "make the cache anew with this one, or leave out --vae"
            )
        if config.flip and not cache.plan.flip:
            raise ConfigError(
                f"{config.latents} has no mirrored images: make the cache with --flip, or leave it out here"
            )
        shape, classes, images = cache.plan.latent_shape, cache.plan.classes, CachedMoments(cache)
        fingerprint_of_data = cache.plan.data
        put_statistics(vae, cache.statistics)  # whatever scale a --vae says: these are its latents
    val_images = images
    if config.val_latents is not None:
        val_cache = open_cache(config.val_latents, accelerator)
        if val_cache.plan.vae != fingerprint(vae) or val_cache.plan.latent_shape != shape:
            raise ModelError(f"{config.val_latents} holds latents of another VAE or size than the training data")
        if config.class_conditional and val_cache.plan.classes != classes:
            raise DataError(
                f"{config.val_latents} has other classes ({', '.join(val_cache.plan.classes) or 'none'}) than the "
                f"training data ({', '.join(classes) or 'none'}): labels are their places in these lists"
            )
        val_images = CachedMoments(val_cache)
    return Data(
        vae=vae.to(accelerator.device),
        images=images,
        encoded=config.latents is not None,
        latent_shape=shape,
        classes=classes if config.class_conditional else (),
        val_images=val_images,
        made_from={
            "vae": fingerprint(vae),
            "data": fingerprint_of_data,
            "number of images": len(images),
            "scale": scale_of(vae),
            "classes": list(classes),
            "size": list(shape),
        },
    )


@torch.inference_mode()
def measured(vae: Any, images: Inputs, seed: int) -> Statistics:
    """The statistics of some images, in the order of training, where there is no cache that has those of all."""
    statistics = Statistics()
    for position in range(min(len(images), MEASURED_IMAGES)):
        image = images.load(index_at(position, size=len(images), seed=seed), False)[0]
        if image is not None:
            moments = encode_moments(vae, torch.from_numpy(image)[None].to(vae.device))
            statistics += Statistics.of(moments.float().cpu().numpy())
    return statistics


def build(config: Config, data: Data, accelerator: Accelerator) -> State:
    """The denoiser and its optimizer, the same in every process."""
    set_seed(config.seed)
    channels, height, width = data.latent_shape
    unet = make_denoiser(
        config.denoiser, latent_channels=channels, sample_size=(height, width), num_classes=len(data.classes)
    )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    layout = torch.contiguous_format if accelerator.is_fsdp2 else torch.channels_last  # FSDP takes no other
    unet = unet.to(accelerator.device, memory_format=layout).train()
    if config.compile:
        unet.compile()
    optimizer: Any = torch.optim.AdamW(
        unet.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    whole = None
    if accelerator.is_fsdp2:
        whole = deepcopy(unet).cpu() if accelerator.is_main_process else None
        accelerator.state.fsdp_plugin.mixed_precision_policy = None  # it would round timesteps and gradients to bf16
        prepared, wrapped = accelerator.prepare(unet, optimizer)  # both at once: the parameters become others
        optimizer = wrapped.optimizer
    else:
        prepared = accelerator.prepare(unet)
    return State(
        unet=prepared,
        bare=unet,
        vae=data.vae,
        encoded=data.encoded,
        ema=EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True),
        optimizer=optimizer,
        copy=whole,
    )


def rows_of(images: Inputs, data: Data, config: Config) -> DiffusionRows:
    return DiffusionRows(
        images,
        seed=config.seed,
        prediction=config.prediction,
        latent_shape=data.latent_shape,
        num_classes=len(data.classes),
        label_dropout=config.label_dropout if data.classes else 1.0,
        flip=config.flip,
    )


def batches_from(step: int, data: Data, config: Config, accelerator: Accelerator) -> Iterator[DiffusionBatch[Tensor]]:
    """This process's micro-batches from `step` on."""
    order = MicroBatches(
        first_step=step,
        last_step=config.steps,
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        accumulation=config.gradient_accumulation_steps,
    )
    return load_batches(
        rows_of(data.images, data, config),
        order,
        collate=collate_rows,
        num_workers=default_workers() if config.num_workers is None else config.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def pipeline_of(unet: Any, data: Data, config: Config) -> LatentDiffusionPipeline:
    scheduler = make_scheduler(config.prediction)
    return LatentDiffusionPipeline(data.vae, unet, scheduler, class_names=list(data.classes) or None)


def save(run: Run, state: State, data: Data, config: Config, *, step: int, facts: dict[str, Any]) -> None:
    """The pipeline with averaged weights, and then the checkpoint: where it is, the pipeline of its step is, too.

    Called by all processes: each may have a part of the network.
    """
    with state.averaged() as unet:
        if run.main:
            with staged_directory(run.directory / "pipeline") as staging:
                pipeline_of(unet, data, config).save_pretrained(staging)
    run.save(Checkpoint(step=step, tensors=state_tensors(state.parts(), keep=run.main), facts=facts))


@torch.inference_mode()
def validation_loss(
    unet: Any, state: State, batches: list[DiffusionBatch[Tensor]], config: Config, accelerator: Accelerator
) -> dict[str, float]:
    """The averaged denoiser's loss on fixed (image, time, noise), weighted as in training, in all and by time."""
    losses: dict[float, list[Tensor]] = {time: [] for time in VALIDATION_TIMES}
    for batch in batches:
        here = batch.to(accelerator.device)
        encoded = config.val_latents is not None or state.encoded
        scaled_latents = scaled_latents_of(here, state.vae, encoded=encoded)  # in float32, as in training
        for time, found in losses.items():
            timed = replace(here, timesteps=torch.full_like(here.timesteps, time * NUM_TIMESTEPS))
            with accelerator.autocast():
                found.append(losses_of(unet, scaled_latents, timed, config, unet))
    metrics = {f"val_loss/t={time:.3f}": float(torch.cat(found).mean()) for time, found in losses.items()}
    return {"val_loss": sum(metrics.values()) / len(metrics), **metrics}


def draw(run: Run, unet: Any, data: Data, config: Config, *, step: int, accelerator: Accelerator) -> None:
    """Samples of the averaged denoiser from fixed seeds, a row a class."""
    names = data.classes[:SAMPLED_CLASSES] or ("samples",)
    rows = []
    with accelerator.autocast():
        pipeline = pipeline_of(unet, data, config)
        pipeline.set_progress_bar_config(disable=True)
        for label, name in enumerate(names):
            samples = pipeline(
                class_labels=label if data.classes else None,
                num_images=SAMPLES_A_CLASS,
                num_inference_steps=SAMPLE_STEPS,
                guidance_scale=config.guidance_scale if data.classes else 1.0,
                generator=[torch.Generator().manual_seed(i) for i in range(SAMPLES_A_CLASS)],
                output_type="pt",
            ).images
            rows.append((name, visible(samples.float().cpu() * 2 - 1)))
    labelled_rows(rows).save(run.directory / "samples" / f"step-{step}.png")


def describe(config: Config, state: State, data: Data, accelerator: Accelerator) -> str:
    parameters = sum(p.numel() for p in state.bare.parameters()) / 1e6
    shape = "x".join(map(str, data.latent_shape))
    shown = ", ".join(data.classes[:SAMPLED_CLASSES]) + (", ..." if len(data.classes) > SAMPLED_CLASSES else "")
    classes = f"{len(data.classes)} classes ({shown})" if data.classes else "no classes"
    return (
        f"{parameters:.2f} M parameters, {len(data.images)} images, latents {shape}, {classes}; "
        f"{config.effective_batch(accelerator.num_processes)}"
    )


def main(config: Config) -> None:
    config, accelerator = start(config)
    validate(config, accelerator.num_processes)
    data = open_data(config, accelerator)
    state = build(config, data, accelerator)
    run = Run(config.output, config, free=FREE_ON_RESUME, main=accelerator.is_main_process)
    loop = Loop(run, state.parts(), config, accelerator, made_from=data.made_from)
    if not has_scale(data.vae):
        known = loop.facts.get("latents")
        statistics = Statistics.from_json(known) if known else measured(data.vae, data.images, config.seed)
        put_statistics(data.vae, statistics)
        loop.facts["latents"] = statistics.as_json()
    micro = config.batch_size // accelerator.num_processes // config.gradient_accumulation_steps
    val_batches = validation_batches(rows_of(data.val_images, data, config), micro) if run.main else []
    accelerator.print(describe(config, state, data, accelerator))
    with loop:
        for _, batches in loop.steps(lambda step: batches_from(step, data, config, accelerator)):
            rate = loop.learning_rate(config.learning_rate)
            result = train_step(batches, state, config, learning_rate=rate, accelerator=accelerator)
            loop.finish(healthy=result.healthy, waited=result.waited, bad_images=result.bad_images)
            if loop.logging:
                loop.log_step(result.metrics(accelerator) | {"learning_rate": rate})
            if loop.drawing:
                with state.averaged() as unet:
                    if run.main:
                        loop.log(validation_loss(unet, state, val_batches, config, accelerator))
                        draw(run, unet, data, config, step=loop.step, accelerator=accelerator)
            if loop.saving:
                save(run, state, data, config, step=loop.step, facts=loop.facts)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Train a diffusion model on the latents of a VAE."))
