"""Train a diffusion model on the latents of a VAE.

accelerate launch training/train_diffusion.py PRESET --latents CACHE --output RUN
accelerate launch training/train_diffusion.py PRESET --data PATH --vae RUN_OR_MODEL --output RUN

The same command resumes a run, on any number of processes.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

from ldm_vae.data.order import index_at
from ldm_vae.data.reader import USUAL
from ldm_vae.data.sources import check_outside
from ldm_vae.errors import ConfigError, DataError, ModelError, one_line_errors
from ldm_vae.files import staged_directory, write_csv
from ldm_vae.grids import labelled_rows, visible
from ldm_vae.latents.cache import LatentCache, class_table, in_order_of, labels_among
from ldm_vae.latents.resolution import open_squares
from ldm_vae.latents.rows import DiffusionRows, Squares, collate_rows
from ldm_vae.latents.scaling import has_scale, put_statistics, scale_of
from ldm_vae.latents.statistics import Statistics
from ldm_vae.models.interface import encode_moments, fingerprint, latent_channels_of, stride_of
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.unet import make_denoiser, with_classes
from ldm_vae.objectives.denoising import (
    DenoiserConfig,
    DenoiserState,
    denoiser_step,
    validation_batches,
    validation_loss,
)
from ldm_vae.pipeline import LatentDiffusionPipeline, load_pipeline
from ldm_vae.runs.config import Range, Reading, parse_config
from ldm_vae.runs.loop import FREE_ON_RESUME, Loop, start
from ldm_vae.runs.muon import muon_of
from ldm_vae.runs.run import Checkpoint, Run, saved_facts
from ldm_vae.runs.state import state_tensors
from ldm_vae.sampling import make_scheduler, prediction_of

SAMPLE_STEPS = 25
SAMPLES_A_CLASS = 8
SAMPLED_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Config(DenoiserConfig):
    latents: Path | None = None
    """Cache that training/cache_latents.py made; or --data and --vae, to encode images as they come."""
    data: str | None = None
    """Image folder, .zip, tar shards, Hugging Face dataset, or procedural:NAME."""
    vae: str | None = None
    """Run directory, diffusers folder or hub id; the cache's own unless given."""
    resolution: Annotated[int | None, Range(at_least=1)] = None
    """Of --data: the centred square of each image is resized to this side; the one that the VAE was trained on unless
    given."""
    reading: Reading = USUAL
    flip: bool = False
    """Half of the images mirrored; a cache must hold them."""
    class_conditional: bool = True
    """Learn the classes of the data, if it has any."""
    val_latents: Path | None = None
    """Cache for the validation loss; the first of the training data unless given."""
    init: str | None = None
    """Start from the denoiser of this pipeline (run, diffusers folder, hub id or box:NAME) instead of the preset's;
    classes that it does not know begin as "no class"."""
    denoiser: tyro.conf.Suppress[str] = "tiny"
    guidance_scale: Annotated[float, Range(at_least=0)] = 1.5
    """Of the sample grid."""

    def check(self, num_processes: int) -> None:
        super().check(num_processes)
        if (self.latents is None) == (self.data is None):
            raise ConfigError("give either --latents, a cache, or --data with --vae")
        if self.data is not None and self.vae is None:
            raise ConfigError("--data needs --vae, the autoencoder that encodes it")


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
    "tiny-256": (
        "3 M parameters: images of 256 pixels on a CPU; for latents of stride 8, two by two",
        Config(denoiser="tiny-256", batch_size=32, optimizer="muon", learning_rate=3e-3, steps=20_000),
    ),
    "small": ("43 M parameters: one GPU", Config(denoiser="small", batch_size=256, learning_rate=2e-4)),
    "base": (
        "171 M parameters: several GPUs",
        Config(denoiser="base", batch_size=256, learning_rate=1e-4, ema_decay=0.9999, steps=400_000),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """The VAE, the images or their latents, and what they are."""

    vae: Any
    images: LatentCache | Squares
    fingerprint: str
    latent_shape: tuple[int, int, int]
    """(c, h, w)."""
    classes_of_data: tuple[str, ...]
    """In the order that the run began with, which the images' may differ from."""
    classes: tuple[str, ...]
    """Those that are learned."""

    def identity(self) -> dict[str, Any]:
        """What must not change between resumptions."""
        return {
            "vae": fingerprint(self.vae),
            "data": self.fingerprint,
            "number of images": len(self.images),
            "scale": scale_of(self.vae) if has_scale(self.vae) else None,
            "classes": list(self.classes_of_data),
            "size": list(self.latent_shape),
        }


def classes_of(run: Path) -> list[str]:
    """Those that a run has begun with, in the order of their labels."""
    return list(saved_facts(run).get("made_from", {}).get("classes", []))


def open_cache(folder: Path, accelerator: Accelerator) -> LatentCache:
    """Each process verifies its share of the shards."""
    rank, count = accelerator.process_index, accelerator.num_processes
    return LatentCache(folder, shards_to_verify=lambda shard: shard % count == rank)


def open_latents(config: Config, folder: Path, accelerator: Accelerator) -> Data:
    """Latents that were encoded before."""
    cache = open_cache(folder, accelerator)
    vae = load_autoencoder(config.vae or str(folder)).to(accelerator.device)
    if fingerprint(vae) != cache.plan.vae:
        raise ModelError(
            f"{folder} holds latents of another VAE than {config.vae or folder}: "
            "make the cache anew with this one, or leave out --vae"
        )
    if config.flip and not cache.plan.flip:
        raise ConfigError(f"{folder} has no mirrored images: make the cache with --flip, or leave it out here")
    classes = in_order_of(classes_of(config.output), cache.classes)
    put_statistics(vae, cache.statistics)  # whatever scale a --vae says: these are its latents
    return Data(
        vae=vae,
        images=cache,
        fingerprint=cache.plan.data,
        latent_shape=cache.plan.latent_shape,
        classes_of_data=classes,
        classes=classes if config.class_conditional else (),
    )


def open_data(config: Config, accelerator: Accelerator) -> Data:
    """Raises LdmVaeError for data, caches and VAEs that are missing or do not belong together."""
    if config.latents is not None:
        return open_latents(config, config.latents, accelerator)
    assert config.data is not None
    assert config.vae is not None
    vae = load_autoencoder(config.vae).to(accelerator.device)
    check_outside(config.output, config.data, flag="--data")
    squares = open_squares(config.data, vae, config.vae, config.resolution, options=config.reading)
    accelerator.print(f"images of {squares.resolution} x {squares.resolution} pixels")
    side = squares.resolution // stride_of(vae)
    classes = in_order_of(classes_of(config.output), squares.classes)
    return Data(
        vae=vae,
        images=squares,
        fingerprint=squares.source.fingerprint(),
        latent_shape=(latent_channels_of(vae), side, side),
        classes_of_data=classes,
        classes=classes if config.class_conditional else (),
    )


def open_validation_images(config: Config, data: Data, accelerator: Accelerator) -> LatentCache | Squares:
    """Raises ModelError and DataError for a cache that does not fit the training data."""
    if config.val_latents is None:
        return data.images
    cache = open_cache(config.val_latents, accelerator)
    if cache.plan.vae != fingerprint(data.vae) or cache.plan.latent_shape != data.latent_shape:
        raise ModelError(f"{config.val_latents} holds latents of another VAE or size than the training data")
    if config.class_conditional and sorted(cache.classes) != sorted(data.classes):
        raise DataError(
            f"{config.val_latents} has other classes ({', '.join(cache.classes) or 'none'}) than the training data "
            f"({', '.join(data.classes) or 'none'})"
        )
    return cache


@torch.inference_mode()
def measure_statistics(data: Data, seed: int) -> Statistics:
    """Of the first images in the order of training, for a VAE that says nothing of its scale."""
    statistics = Statistics()
    for position in range(min(len(data.images), 1024)):
        image = data.images.load(index_at(position, size=len(data.images), seed=seed), False)[0]
        if image is not None:
            moments = encode_moments(data.vae, torch.from_numpy(image)[None].to(data.vae.device))
            statistics += Statistics.of(moments.float().cpu().numpy())
    return statistics


def ensure_scale(data: Data, loop: Loop, seed: int) -> None:
    """Measures the scale of the latents if the VAE does not say it; a resumed run takes its checkpoint's."""
    if not has_scale(data.vae):
        record = loop.facts.get("latents") or measure_statistics(data, seed).as_json()
        loop.facts["latents"] = record
        put_statistics(data.vae, Statistics.from_json(record))


def rows_of(images: LatentCache | Squares, data: Data, config: Config) -> DiffusionRows:
    return DiffusionRows(
        images,
        seed=config.seed,
        prediction=config.prediction,
        latent_shape=data.latent_shape,
        label_of=labels_among(data.classes, images.classes) if data.classes else (),
        label_dropout=config.label_dropout if data.classes else 1.0,
        flip=config.flip,
    )


def first_denoiser(config: Config, data: Data) -> UNet2DModel:
    """The preset's, untrained, or that of --init. Raises ModelError for one of other latents, or another prediction."""
    channels, sample_size = data.latent_shape[0], data.latent_shape[1:]
    if config.init is None:
        num_classes = len(data.classes)
        return make_denoiser(
            config.denoiser, latent_channels=channels, sample_size=sample_size, num_classes=num_classes
        )
    pipeline = load_pipeline(config.init)
    if fingerprint(pipeline.vae) != fingerprint(data.vae):
        raise ModelError(
            f"{config.init} knows latents of another VAE: give --vae {config.init}, and make a cache with it"
        )
    prediction = prediction_of(pipeline.scheduler)
    if prediction != config.prediction:
        raise ModelError(f"{config.init} predicts {prediction}: add --prediction {prediction}")
    known = list(pipeline.config.class_names or ())
    classes = [known.index(name) if name in known else None for name in data.classes]
    return with_classes(pipeline.unet, sample_size=sample_size, classes=classes)


def make_optimizer(unet: Any, config: Config) -> Any:
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
    if config.optimizer == "muon":
        return muon_of(unet, outer=(unet.conv_in, unet.conv_out), **options)
    return torch.optim.AdamW(unet.parameters(), **options)


def build(config: Config, data: Data, accelerator: Accelerator) -> DenoiserState:
    """The denoiser and its optimizer, the same in every process."""
    if accelerator.is_fsdp2 and config.optimizer == "muon":
        raise ConfigError("Muon needs whole matrices, which FSDP divides: add --optimizer adamw and its learning rate")
    set_seed(config.seed)
    unet: Any = first_denoiser(config, data)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    layout = torch.contiguous_format if accelerator.is_fsdp2 else torch.channels_last  # FSDP supports no other
    unet = unet.to(accelerator.device, memory_format=layout).train()
    if config.compile:
        unet.compile()
    optimizer = make_optimizer(unet, config)
    copy = None
    if accelerator.is_fsdp2:
        copy = deepcopy(unet).cpu() if accelerator.is_main_process else None
        accelerator.state.fsdp_plugin.mixed_precision_policy = None  # it would round timesteps and gradients to bf16
        prepared, wrapped = accelerator.prepare(unet, optimizer)  # together: sharding replaces the parameters
        optimizer = wrapped.optimizer
    else:
        prepared = accelerator.prepare(unet)
    return DenoiserState(
        unet=prepared,
        bare=unet,
        vae=data.vae,
        ema=EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True),
        optimizer=optimizer,
        copy=copy,
    )


def pipeline_of(unet: Any, data: Data, config: Config) -> LatentDiffusionPipeline:
    scheduler = make_scheduler(config.prediction)
    return LatentDiffusionPipeline(data.vae, unet, scheduler, class_names=list(data.classes) or None)


def save(run: Run, state: DenoiserState, data: Data, config: Config, *, step: int, facts: dict[str, Any]) -> None:
    """The pipeline with averaged weights, then the checkpoint, which thus never exists without its pipeline.

    Called by all processes: each may hold a shard of the network.
    """
    with state.averaged() as unet:
        if run.main:
            with staged_directory(run.directory / "pipeline") as staging:
                pipeline_of(unet, data, config).save_pretrained(staging)
    run.save(Checkpoint(step=step, tensors=state_tensors(state.parts(), keep=run.main), facts=facts))


def draw(run: Run, unet: Any, data: Data, config: Config, *, step: int, accelerator: Accelerator) -> None:
    """The sample grid of the averaged denoiser from fixed seeds, a row per class."""
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


def describe(config: Config, state: DenoiserState, data: Data, accelerator: Accelerator) -> str:
    parameters = sum(p.numel() for p in state.bare.parameters()) / 1e6
    shape = "x".join(map(str, data.latent_shape))
    return (
        f"{parameters:.2f} M parameters, {len(data.images)} images, latents {shape}, {class_table(data.classes)}; "
        f"{config.effective_batch(accelerator.num_processes)}"
    )


def main(config: Config) -> None:
    config, accelerator = start(config)
    data = open_data(config, accelerator)
    val_images = open_validation_images(config, data, accelerator)
    state = build(config, data, accelerator)
    free = (*FREE_ON_RESUME, "resolution")  # the size of the latents stands in for it
    run = Run(config.output, config, free=free, extend=config.extend, main=accelerator.is_main_process)
    loop = Loop(run, state.parts(), config, accelerator, made_from=data.identity())
    ensure_scale(data, loop, config.seed)
    rows = rows_of(data.images, data, config)
    micro_batch = config.batch_size // accelerator.num_processes // config.gradient_accumulation_steps
    val_batches = validation_batches(rows_of(val_images, data, config), micro_batch) if run.main else []
    if run.main and data.classes:
        write_csv(run.directory / "classes.csv", [{"label": i, "class": name} for i, name in enumerate(data.classes)])
    accelerator.print(describe(config, state, data, accelerator))
    with loop:
        for _, batches in loop.steps(rows, collate_rows):
            rate = loop.learning_rate(config.learning_rate)
            step = denoiser_step(batches, state, config, learning_rate=rate, accelerator=accelerator)
            loop.finish(healthy=step.healthy, waited=step.waited, bad_images=step.bad_images)
            if loop.logging:
                loop.log_step(step.metrics(accelerator) | {"learning_rate": rate})
            if loop.drawing:
                with state.averaged() as unet:
                    if run.main:
                        loop.log(validation_loss(unet, val_batches, state, config, accelerator))
                        draw(run, unet, data, config, step=loop.step, accelerator=accelerator)
            if loop.saving:
                save(run, state, data, config, step=loop.step, facts=loop.facts)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Train a diffusion model on the latents of a VAE."))
