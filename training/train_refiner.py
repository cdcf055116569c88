"""Train a refiner: a denoiser of the latents that a codec has quantised, for `ldm-vae decompress --refine`.

accelerate launch training/train_refiner.py PRESET --codec RUN_OR_MODEL --data PATH --output RUN

The same command resumes a run, on any number of processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm_vae.codec.codec import tables_folder
from ldm_vae.codec.refine import FOLDER, HIGHEST, LOWEST, Facts, Refiner, make_refiner, velocity
from ldm_vae.codec.tables import Tables, load_tables
from ldm_vae.config import parse_config
from ldm_vae.data.loader import Batch, CropDataset, MicroBatches, collate, default_workers, load_batches
from ldm_vae.data.order import Stream, generator_at, noise_at
from ldm_vae.data.sources import Source, open_source
from ldm_vae.errors import ConfigError, ModelMismatchError, nothing_usable, one_line_errors
from ldm_vae.files import staged_directory
from ldm_vae.latents.statistics import Statistics, put_statistics, scale_latents
from ldm_vae.loop import FREE_ON_RESUME, Loop, Training, check
from ldm_vae.models.pretrained import (
    channels_of,
    check_resolution,
    encode_moments,
    fingerprint,
    latent_channels_of,
    load_autoencoder,
    stride_of,
)
from ldm_vae.models.unet import multiple_of
from ldm_vae.objectives.step import averaged, parameters_of, set_learning_rate
from ldm_vae.runs import Checkpoint, Run
from ldm_vae.state import state_tensors

MEASURED_IMAGES = 256
VALIDATION_IMAGES = 32
VALIDATION_QUALITIES = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """Flags of the refiner's trainer."""

    codec: str = tyro.MISSING
    """Run directory, diffusers folder or hub id of a VAE with fitted tables."""
    data: str = tyro.MISSING
    """Image folder, .zip, Hugging Face dataset, or procedural:NAME."""
    val_data: str | None = None
    """Images for the validation loss; the first of --data unless given."""
    resolution: int = 128
    """Side of the training crops, in pixels."""
    quality_range: tuple[float, float] = (0.5, 4.0)
    """Qualities that it is trained for, one drawn for each image."""
    denoiser: tyro.conf.Suppress[str] = "tiny"
    cache_gib: float = 1.0
    """Decoded images that each training process may keep in memory."""


PRESETS = {
    "tiny": ("11 M parameters: a CPU", Config(denoiser="tiny", batch_size=16, learning_rate=5e-4, steps=5000)),
    "small": ("43 M parameters: one GPU", Config(denoiser="small", batch_size=64, learning_rate=2e-4)),
}


@dataclass(frozen=True, kw_only=True)
class Quantiser:
    """The codec's, on tensors."""

    means: Tensor
    steps: Tensor
    """(c, 1, 1), at quality 1; 0 for a channel that is not coded."""

    @classmethod
    def of(cls, tables: Tables, device: torch.device) -> Quantiser:
        steps = torch.zeros(len(tables.sigma))
        steps[list(tables.channels)] = torch.from_numpy(math.sqrt(12) * tables.sigma[list(tables.channels)]).float()
        means = torch.from_numpy(tables.means).float()
        return cls(means=means[:, None, None].to(device), steps=steps[:, None, None].to(device))

    def __call__(self, latents: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """True latents (B, c, h, w) at qualities (B,) -> quantised ones, and errors in deviations of a uniform one."""
        coded = self.steps > 0
        steps = quality[:, None, None, None] * torch.where(coded, self.steps, 1.0)
        quantised = torch.where(coded, self.means + ((latents - self.means) / steps).round() * steps, self.means)
        return quantised, torch.where(coded, (latents - quantised) / steps * math.sqrt(12), 0.0)


@dataclass(kw_only=True)
class State:
    """What training changes, and what it leaves alone. `unet` may be wrapped by DDP."""

    unet: nn.Module
    bare: Any
    vae: Any
    tables: Tables
    quantiser: Quantiser
    ema: EMAModel
    optimizer: torch.optim.Optimizer

    def parts(self) -> dict[str, Any]:
        """Everything that a checkpoint holds."""
        return {"unet": self.bare, "ema": self.ema, "optimizer": self.optimizer}


def validate(config: Config, num_processes: int) -> None:
    """Raises ConfigError for flags that cannot work."""
    check(config, num_processes, at_least_1=("resolution",), at_least_0=("cache_gib",))
    low, high = config.quality_range
    if not LOWEST <= low <= high <= HIGHEST:
        raise ConfigError(f"--quality-range is {low:g} {high:g}: it must ascend within {LOWEST:g} to {HIGHEST:g}")


def draws_at(positions: list[int], config: Config) -> tuple[Tensor, Tensor]:
    """Quality (B,), log-uniform, and time (B,) of each image, by (seed, position).

    Half of the times are 1, where every refinement begins and that in one step ends; the others are uniform.
    """
    low, high = (math.log(q) for q in config.quality_range)
    shares = [generator_at(config.seed, p, Stream.QUALITY).random() for p in positions]
    pairs = [generator_at(config.seed, p, Stream.TIME).random(2) for p in positions]
    times = torch.tensor([1.0 if first < 0.5 else float(t) for first, t in pairs])
    return torch.tensor([math.exp(low + (high - low) * s) for s in shares]), times


def error_of(
    unet: nn.Module, state: State, latents: Tensor, noise: Tensor, quality: Tensor, times: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared errors of the predicted velocity, and rounding errors squared, of the coded channels (N,)."""
    quantised, error = state.quantiser(latents, quality)
    coded = (state.quantiser.steps > 0).expand_as(latents)
    noise = noise * coded
    noisy = error.lerp(noise, times[:, None, None, None])
    condition = scale_latents(state.vae, quantised)
    found = velocity(unet, noisy, condition, times, quality, multiple=multiple_of(state.bare))
    return (found - (noise - error)).square()[coded], error.square()[coded]


@torch.no_grad()
def latents_of(images: Tensor, vae: Any) -> Tensor:
    """The posterior's mean, float32: what the codec quantises."""
    return encode_moments(vae, images).float().chunk(2, dim=1)[0]


def train_step(
    batches: Iterator[Batch], state: State, config: Config, *, learning_rate: float, accelerator: Accelerator
) -> tuple[dict[str, Tensor], float, bool, dict[str, str]]:
    """One global batch, and its metrics, the seconds that it waited, whether it was finite, and bad images."""
    total, waited = torch.zeros((), device=accelerator.device), 0.0
    bad_images: dict[str, str] = {}
    for _ in range(config.gradient_accumulation_steps):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        bad_images |= batch.bad_images
        latents = latents_of(batch.images.to(accelerator.device), state.vae)
        noise = torch.from_numpy(noise_at(config.seed, batch.positions, latents.shape[1:], Stream.NOISE))
        quality, times = (d.to(accelerator.device) for d in draws_at(batch.positions, config))
        with accelerator.accumulate(state.unet):
            loss = error_of(state.unet, state, latents, noise.to(latents.device), quality, times)[0].mean()
            accelerator.backward(loss)
        total += loss.detach() / config.gradient_accumulation_steps
    norm = nn.utils.clip_grad_norm_(parameters_of(state.optimizer), config.max_grad_norm)
    healthy = bool(accelerator.reduce(total + norm, "sum").isfinite())
    if healthy:
        set_learning_rate(state.optimizer, learning_rate)
        state.optimizer.step()
        state.ema.step(state.bare.parameters())
    state.optimizer.zero_grad()
    return {"loss": total, "grad_norm": norm}, waited, healthy, bad_images


# Main -----------------------------------------------------------------------------------------------------------------


def open_codec(config: Config, accelerator: Accelerator) -> tuple[Any, Tables]:
    """The VAE and its tables. Raises LdmVaeError for what is not there or does not belong together."""
    vae = load_autoencoder(config.codec)
    tables = load_tables(tables_folder(config.codec))
    if tables.vae != fingerprint(vae):
        raise ModelMismatchError(f"the tables of {config.codec} were fitted for another autoencoder: fit them anew")
    check_resolution(config.resolution, vae)
    return vae.to(accelerator.device).eval().requires_grad_(False), tables


def build(config: Config, vae: Any, tables: Tables, accelerator: Accelerator) -> State:
    """The network and its optimizer, the same in every process."""
    set_seed(config.seed)
    side = config.resolution // stride_of(vae)
    unet = make_refiner(config.denoiser, latent_channels=latent_channels_of(vae), side=side)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet = unet.to(accelerator.device, memory_format=torch.channels_last).train()
    if config.compile:
        unet.compile()
    return State(
        unet=accelerator.prepare(unet),
        bare=unet,
        vae=vae,
        tables=tables,
        quantiser=Quantiser.of(tables, accelerator.device),
        ema=EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True),
        optimizer=torch.optim.AdamW(
            unet.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        ),
    )


def first_crops(source: Source, config: Config, count: int) -> tuple[list[Tensor], dict[str, str]]:
    """The first crops of an epoch, (1, C, R, R) each, and the bad images met. Raises DataError for none."""
    crops = CropDataset(source, seed=config.seed, resolution=config.resolution)
    bad: dict[str, str] = {}
    found = []
    for position in range(min(len(source), count)):
        row = crops[position]
        bad |= row.bad_images
        if row.image is None:
            raise nothing_usable(bad)
        found.append(row.image[None])
    return found, bad


def measured(crops: list[Tensor], vae: Any) -> Statistics:
    statistics = Statistics()
    for crop in crops:
        statistics += Statistics.of(encode_moments(vae, crop.to(vae.device)))
    return statistics


def batches_from(step: int, source: Source, config: Config, accelerator: Accelerator) -> Iterator[Batch]:
    """This process's micro-batches from `step` on."""
    num_workers = default_workers() if config.num_workers is None else config.num_workers
    cache_bytes = int(config.cache_gib * 2**30) // max(num_workers, 1)
    crops = CropDataset(source, seed=config.seed, resolution=config.resolution, cache_bytes=cache_bytes)
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


@torch.inference_mode()
def validation_loss(state: State, latents: list[Tensor], accelerator: Accelerator) -> dict[str, float]:
    """The share of the squared rounding error that one step of the averaged network leaves: 1 is as good as none."""
    metrics = {}
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(x.shape, generator=generator).to(x.device) for x in latents]
    with averaged(state.bare, state.ema) as unet, accelerator.autocast():
        for value in VALIDATION_QUALITIES:
            quality, one = (torch.full((1,), v, device=accelerator.device) for v in (value, 1.0))
            pairs = [error_of(unet, state, x, e, quality, one) for x, e in zip(latents, noise, strict=True)]
            left, whole = (torch.stack([p[i].mean() for p in pairs]).mean() for i in (0, 1))
            metrics[f"val_left/quality={value:g}"] = float(left / whole)
    return {"val_left": sum(metrics.values()) / len(metrics), **metrics}


def save(run: Run, state: State, config: Config, *, step: int, facts: dict[str, Any]) -> None:
    """The averaged network and what it is for, and then the checkpoint."""
    if run.main:
        with averaged(state.bare, state.ema) as unet, staged_directory(run.directory / FOLDER) as staging:
            statistics = Statistics.from_json(facts["latents"])
            trained_for = Facts(
                vae=state.tables.vae,
                tables=state.tables.digest.hex(),
                latents_mean=statistics.mean.tolist(),
                latents_std=statistics.std.tolist(),
                quality_range=config.quality_range,
            )
            Refiner(unet, trained_for).save(staging)
        run.save(Checkpoint(step=step, tensors=state_tensors(state.parts()), facts=facts))


def main(config: Config) -> None:
    accelerator = config.accelerator()
    validate(config, accelerator.num_processes)
    vae, tables = open_codec(config, accelerator)
    source = open_source(config.data, channels=channels_of(vae), resolution=config.resolution)
    val_source = source
    if config.val_data:
        val_source = open_source(config.val_data, channels=channels_of(vae), resolution=config.resolution)
    state = build(config, vae, tables, accelerator)
    run = Run(config.output, config, free=FREE_ON_RESUME, main=accelerator.is_main_process)
    made_from = {"vae": tables.vae, "tables": tables.digest.hex(), "data": source.fingerprint()}
    loop = Loop(run, state.parts(), config, accelerator, made_from=made_from)
    with run.listing_bad_images():
        crops, met = first_crops(source, config, MEASURED_IMAGES)
        val_crops, val_met = first_crops(val_source, config, VALIDATION_IMAGES)
        run.add_bad_images(met | val_met)
    known = loop.facts.get("latents")
    statistics = Statistics.from_json(known) if known else measured(crops, vae)
    put_statistics(vae, statistics)
    loop.facts["latents"] = statistics.as_json()
    val_latents = [latents_of(c.to(accelerator.device), vae) for c in val_crops] if run.main else []
    parameters = sum(p.numel() for p in state.bare.parameters()) / 1e6
    batch = config.effective_batch(accelerator.num_processes)
    accelerator.print(f"{parameters:.2f} M parameters, {len(source)} images; {batch}")
    with loop:
        for _, batches in loop.steps(lambda step: batches_from(step, source, config, accelerator)):
            rate = loop.learning_rate(config.learning_rate)
            metrics, waited, healthy, bad_images = train_step(
                batches, state, config, learning_rate=rate, accelerator=accelerator
            )
            loop.finish(healthy=healthy, waited=waited, bad_images=bad_images)
            if loop.logging:
                means = {name: float(accelerator.reduce(value, "mean")) for name, value in metrics.items()}
                loop.log_step(means | {"learning_rate": rate})
            if loop.drawing and run.main:
                loop.log(validation_loss(state, val_latents, accelerator))
            if loop.saving:
                save(run, state, config, step=loop.step, facts=loop.facts)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Train a refiner of a codec's latents."))
