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
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm_vae.codec.codec import tables_folder
from ldm_vae.codec.refine import FOLDER, HIGHEST, LOWEST, NUM_LEVELS, level_of, rounding_error
from ldm_vae.codec.tables import Tables, load_tables
from ldm_vae.config import parse_config
from ldm_vae.data.images import to_images
from ldm_vae.data.loader import Batch, CropDataset, MicroBatches, collate, default_workers, load_batches
from ldm_vae.data.order import Stream, generator_at, index_at
from ldm_vae.data.sources import Source, open_source
from ldm_vae.errors import BadImageError, ConfigError, ModelMismatchError, nothing_usable, one_line_errors
from ldm_vae.files import staged_directory
from ldm_vae.loop import FREE_ON_RESUME, Loop, Training, check
from ldm_vae.models.pretrained import channels_of, check_resolution, encode_moments, fingerprint, load_autoencoder
from ldm_vae.models.unet import make_denoiser
from ldm_vae.objectives.step import averaged, parameters_of, set_learning_rate
from ldm_vae.runs import Checkpoint, Run
from ldm_vae.state import state_tensors

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
    """The codec's, on tensors: what each channel is rounded to."""

    means: Tensor
    steps: Tensor
    """(c, 1, 1), at quality 1; 0 for a channel that is not coded."""

    @classmethod
    def of(cls, tables: Tables, device: torch.device) -> Quantiser:
        steps = torch.zeros(len(tables.sigma))
        steps[list(tables.channels)] = torch.from_numpy(math.sqrt(12) * tables.sigma[list(tables.channels)]).float()
        means = torch.from_numpy(tables.means).float()
        return cls(means=means[:, None, None].to(device), steps=steps[:, None, None].to(device))

    def deviation(self, quality: Tensor) -> Tensor:
        """Of a uniform rounding error, (B, c, 1, 1), for qualities (B,)."""
        return quality[:, None, None, None] * self.steps / math.sqrt(12)

    def quantised(self, latents: Tensor, quality: Tensor) -> Tensor:
        steps = quality[:, None, None, None] * self.steps
        coded = steps > 0
        safe = torch.where(coded, steps, 1.0)
        return torch.where(coded, self.means + ((latents - self.means) / safe).round() * safe, self.means)


@dataclass(kw_only=True)
class State:
    """What training changes, and what it leaves alone. `unet` may be wrapped by DDP."""

    unet: nn.Module
    bare: Any
    vae: Any
    quantiser: Quantiser
    scale: tuple[Tensor, Tensor]
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
    """Quality (B,), log-uniform, and time (B,), uniform in (0, 1], of each image, by (seed, position)."""
    low, high = (math.log(q) for q in config.quality_range)
    shares = [generator_at(config.seed, p, Stream.QUALITY).random() for p in positions]
    times = [1 - generator_at(config.seed, p, Stream.TIME).random() for p in positions]
    return torch.tensor([math.exp(low + (high - low) * s) for s in shares]), torch.tensor(times)


def loss_of(unet: nn.Module, state: State, latents: Tensor, quality: Tensor, times: Tensor) -> Tensor:
    """Mean squared error of the rounding error, in its own deviations, over the coded channels. latents: true ones."""
    quantised, deviation = state.quantiser.quantised(latents, quality), state.quantiser.deviation(quality)
    coded = (deviation > 0).expand_as(latents)
    target = torch.where(coded, (latents - quantised) / torch.where(deviation > 0, deviation, 1.0), 0.0)
    between = latents.lerp(quantised, times[:, None, None, None])
    found = rounding_error(unet, between, times, level_of(quality), state.scale)
    return (found - target).square()[coded].mean()


@torch.no_grad()
def latents_of(images: Tensor, state: State) -> Tensor:
    return encode_moments(state.vae, images).float().chunk(2, dim=1)[0]


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
        latents = latents_of(batch.images.to(accelerator.device), state)
        quality, times = (d.to(accelerator.device) for d in draws_at(batch.positions, config))
        with accelerator.accumulate(state.unet):
            loss = loss_of(state.unet, state, latents, quality, times)
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


def build(config: Config, accelerator: Accelerator) -> tuple[State, Source]:
    """The networks, the same in every process, and the images."""
    vae = load_autoencoder(config.codec)
    tables = load_tables(tables_folder(config.codec))
    if tables.vae != fingerprint(vae):
        raise ModelMismatchError(f"the tables of {config.codec} were fitted for another autoencoder: fit them anew")
    check_resolution(config.resolution, vae)
    source = open_source(config.data, channels=channels_of(vae), resolution=config.resolution)
    vae = vae.to(accelerator.device).eval().requires_grad_(False)
    quantiser = Quantiser.of(tables, accelerator.device)
    crops = CropDataset(source, seed=config.seed, resolution=config.resolution)
    known = [c for c in (crops[i][0] for i in range(min(len(source), 256))) if c is not None]
    if not known:
        raise nothing_usable({source.name(i): why for i, why in crops.bad.items()})
    with torch.no_grad():
        latents = torch.cat([encode_moments(vae, c[None].to(accelerator.device)).chunk(2, dim=1)[0] for c in known])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)).clamp(min=1e-6)
    set_seed(config.seed)
    side = latents.shape[-1]
    unet = make_denoiser(
        config.denoiser, latent_channels=latents.shape[1], sample_size=(side, side), num_classes=NUM_LEVELS
    )
    unet.register_to_config(vae=tables.vae, latents_mean=mean.tolist(), latents_std=std.tolist())
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet = unet.to(accelerator.device, memory_format=torch.channels_last).train()
    if config.compile:
        unet.compile()
    state = State(
        unet=accelerator.prepare(unet),
        bare=unet,
        vae=vae,
        quantiser=quantiser,
        scale=(mean[:, None, None], std[:, None, None]),
        ema=EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True),
        optimizer=torch.optim.AdamW(
            unet.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        ),
    )
    return state, source


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


def validation_latents(source: Source, state: State, config: Config) -> list[Tensor]:
    """Of the middles of some images, (c, h, w) each."""
    found: list[Tensor] = []
    bad: dict[str, str] = {}
    for i in range(len(source)):
        if len(found) == VALIDATION_IMAGES:
            break
        position = index_at(i, size=len(source), seed=config.seed)
        try:
            pixels = source[position].pixels
        except BadImageError as error:
            bad[source.name(position)] = str(error)
            continue
        height, width = pixels.shape[:2]
        side = config.resolution
        if min(height, width) >= side:
            top, left = (height - side) // 2, (width - side) // 2
            images = to_images(pixels[top : top + side, left : left + side])[None]
            found.append(latents_of(images.to(state.scale[0].device), state))
    if not found:
        raise nothing_usable(bad)
    return found


@torch.inference_mode()
def validation_loss(state: State, latents: list[Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Of the averaged denoiser at time 1, where decoding starts: 1 is what rounding leaves."""
    metrics = {}
    with averaged(state.bare, state.ema) as unet, accelerator.autocast():
        for quality in VALIDATION_QUALITIES:
            q, one = torch.tensor([quality]).to(accelerator.device), torch.ones(1, device=accelerator.device)
            losses = [float(loss_of(unet, state, x, q, one)) for x in latents]
            metrics[f"val_loss/quality={quality:g}"] = sum(losses) / len(losses)
    return {"val_loss": sum(metrics.values()) / len(metrics), **metrics}


def save(run: Run, state: State, *, step: int, facts: dict[str, Any]) -> None:
    """The averaged denoiser in diffusers' layout, and then the checkpoint."""
    if run.main:
        with averaged(state.bare, state.ema) as unet, staged_directory(run.directory / FOLDER) as staging:
            UNet2DModel.save_pretrained(unet, staging)
        run.save(Checkpoint(step=step, tensors=state_tensors(state.parts()), facts=facts))


def main(config: Config) -> None:
    accelerator = config.accelerator()
    validate(config, accelerator.num_processes)
    state, source = build(config, accelerator)
    val_source = source
    if config.val_data:
        val_source = open_source(config.val_data, channels=channels_of(state.vae), resolution=config.resolution)
    run = Run(config.output, config, free=FREE_ON_RESUME, main=accelerator.is_main_process)
    loop = Loop(run, state.parts(), config, accelerator, made_from={"codec": state.bare.config.vae})
    val_latents = validation_latents(val_source, state, config) if run.main else []
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
                save(run, state, step=loop.step, facts=loop.facts)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Train a refiner of a codec's latents."))
