"""Measure diffusion training from cached latents, beside encoding on the fly, and beside no loading at all.

python benchmarks/studies/latent_speed.py --data PATH --output DIR

The same training step of the same denoiser, on batches that come in three ways, in turns: from a cache, through the
loader; from the images, which the VAE encodes in the step; and one batch of random latents that is there already, again
and again. VAEs have random weights: they cost the same. Figures are medians.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
import tyro
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ldm_vae.data.loader import MicroBatches, load_batches
from ldm_vae.data.sources import open_source
from ldm_vae.data.workers import default_workers
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.files import atomic, check_writable, write_json
from ldm_vae.latents.cache import LatentCache
from ldm_vae.latents.rows import CachedMoments, DiffusionBatch, DiffusionRows, Inputs, Squares, collate_rows
from ldm_vae.models.autoencoder import ARCHITECTURES, PatchAutoencoderKL
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.unet import DENOISERS, make_denoiser
from ldm_vae.objectives.denoising import Objective, State, train_step
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import versions
from ldm_vae.timing import describe_machine, seconds_of, seconds_of_script

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the latents' speed benchmark."""

    data: str
    output: Path
    vae: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ("f8c4", "AutoencoderKL-SD")
    """Presets of train_vae.py, and diffusers' with the layout of Stable Diffusion's."""
    denoiser: str = "tiny"
    resolution: int = 256
    batch_size: int = 8
    num_images: int = 64
    """Of the data, in the cache."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    rounds: int = 3
    seconds: float = 10.0
    """Per measurement, in each round."""


def make_cache(name: str, config: Config) -> Path:
    """A VAE of this name, untrained, and the cache that training/cache_latents.py makes with it."""
    torch.manual_seed(0)
    vae: Any
    if name == "AutoencoderKL-SD":
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    elif name in ARCHITECTURES:
        vae = PatchAutoencoderKL(**ARCHITECTURES[name])
    else:
        raise ConfigError(f"no VAE {name}: try {', '.join([*ARCHITECTURES, 'AutoencoderKL-SD'])}")
    vae.save_pretrained(config.output / name / "vae")
    cache = config.output / name / "cache"
    seconds_of_script(
        *(ROOT / "training" / "cache_latents.py", "--vae", config.output / name, "--data", config.data),
        *("--output", cache, "--resolution", config.resolution, "--num-images", config.num_images),
        *("--batch-size", config.batch_size),
    )
    return cache


def batches_of(images: Inputs, cache: LatentCache, config: Config) -> Iterator[DiffusionBatch[torch.Tensor]]:
    rows = DiffusionRows(
        images,
        seed=0,
        prediction="flow",
        latent_shape=cache.plan.latent_shape,
        num_classes=0,
        label_dropout=1.0,
        flip=False,
    )
    order = MicroBatches(
        first_step=0, last_step=10**9, batch_size=config.batch_size, rank=0, num_processes=1, accumulation=1
    )
    on_gpu = torch.cuda.is_available()
    return load_batches(rows, order, collate=collate_rows, num_workers=default_workers(), pin_memory=on_gpu)


def training_state(cache: LatentCache, config: Config, accelerator: Accelerator, *, encoded: bool) -> State:
    channels, height, width = cache.plan.latent_shape
    unet = make_denoiser(config.denoiser, latent_channels=channels, sample_size=(height, width), num_classes=0)
    unet = unet.to(accelerator.device, memory_format=torch.channels_last)
    return State(
        unet=accelerator.prepare(unet),
        bare=unet,
        vae=load_autoencoder(str(cache.folder)).to(accelerator.device),
        encoded=encoded,
        ema=EMAModel(unet.parameters(), foreach=True),
        optimizer=torch.optim.AdamW(unet.parameters(), fused=True),
    )


def measure(name: str, config: Config, accelerator: Accelerator) -> dict[str, Any]:
    """Images a second of each way, and the ratios that matter."""
    cache = LatentCache(make_cache(name, config))
    cached, encoding = (training_state(cache, config, accelerator, encoded=e) for e in (True, False))
    from_cache = batches_of(CachedMoments(cache), cache, config)
    source = open_source(config.data, resolution=config.resolution)
    from_images = batches_of(Squares(source, config.resolution, config.num_images), cache, config)
    ready = next(from_cache)
    ways: dict[str, tuple[State, Iterator[DiffusionBatch[torch.Tensor]]]] = {
        "random": (cached, itertools.repeat(ready)),
        "cache": (cached, from_cache),
        "on_the_fly": (encoding, from_images),
    }
    durations: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(config.rounds):
        for way, (state, batches) in ways.items():
            durations[way] += seconds_of(
                lambda state=state, batches=batches: train_step(  # type: ignore[misc]
                    batches, state, Objective(), learning_rate=1e-4, accelerator=accelerator
                ),
                device=accelerator.device,
                seconds=config.seconds,
                warmup=1,
            )
    speed = {f"{way}_images_per_second": config.batch_size / statistics.median(d) for way, d in durations.items()}
    return {
        **speed,
        "cache_over_on_the_fly": speed["cache_images_per_second"] / speed["on_the_fly_images_per_second"],
        "cache_over_random": speed["cache_images_per_second"] / speed["random_images_per_second"],
        "latent_shape": list(cache.plan.latent_shape),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    head = "| VAE | from the cache, images/s | on the fly | cache / on the fly | random latents | cache / random |"
    lines = [head, "|" + " --- |" * 6]
    for name, r in results.items():
        lines.append(
            f"| {name} | {r['cache_images_per_second']:.1f} | {r['on_the_fly_images_per_second']:.2f} | "
            f"{r['cache_over_on_the_fly']:.1f}x | {r['random_images_per_second']:.1f} | {r['cache_over_random']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    check_writable(config.output)
    if config.denoiser not in DENOISERS:
        raise ConfigError(f"no denoiser {config.denoiser}: try {', '.join(DENOISERS)}")
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    results = {name: measure(name, config, accelerator) for name in config.vae}
    record = {"config": as_json(config), "machine": describe_machine(accelerator.device), "versions": versions()}
    write_json(config.output / "results.json", {**record, "results": results})
    with atomic(config.output / "table.md") as out:
        out.write(table(results).encode())
    print(table(results))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Measure diffusion training from cached latents."))
