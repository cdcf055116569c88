"""Measure speed and memory of every stage, beside diffusers' autoencoders in the same run.

python benchmarks/throughput.py --output DIR [--mixed-precision bf16] [--compile] [--compare EARLIER.json]

The stages take turns, several rounds long, so that a slow moment of the machine does not fall on one of them alone; all
of a kind do the same work on the same random images. Figures are medians. A line of each run is kept in
DIR/history.jsonl, and --compare says what got slower than in an earlier run, and ends with exit code 2 if anything did.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
import tyro
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.fit_tables import fit_tables
from ldm_vae.data.loader import Batch, CropDataset, MicroBatches, collate, load_batches
from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError, RunError, one_line_errors
from ldm_vae.files import check_writable, write_json
from ldm_vae.latents.cache import write_shard
from ldm_vae.latents.rows import DiffusionBatch
from ldm_vae.latents.scaling import as_stored
from ldm_vae.models.autoencoder import ARCHITECTURES, PatchAutoencoderKL
from ldm_vae.models.discriminator import PatchDiscriminator
from ldm_vae.models.interface import encode_moments, latent_channels_of, stride_of
from ldm_vae.models.reconstruction import encode_mean
from ldm_vae.models.unet import make_denoiser
from ldm_vae.objectives import denoising
from ldm_vae.objectives.autoencoding import Objective, State, TrainableVAE, train_step
from ldm_vae.objectives.perceptual import PerceptualLoss
from ldm_vae.pipeline import LatentDiffusionPipeline
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import git_revision, versions
from ldm_vae.sampling import make_scheduler
from ldm_vae.timing import describe_machine, peak_flops, peak_memory_of, seconds_of

SAMPLES, SAMPLING_STEPS = 8, 10
CACHED = 64
PHOTOS = 16
MEASURES = {
    "channels_last": {"memory_format": torch.contiguous_format},
    "fused AdamW": {"fused": False},
    "foreach EMA": {"foreach": False},
}
"""What a training step has, and how it is left out."""
COMPARED = ("models", "resolution", "batch_size", "side", "losses", "mixed_precision", "compile")
MARGIN = 0.1
"""A stage got slower when it is by so much, beyond the spreads of both runs."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the throughput benchmark."""

    output: Path
    models: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ("f8c4", "AutoencoderKL-small", "AutoencoderTiny")
    """Presets of train_vae.py, and those two of diffusers'. What is not an autoencoder's is measured with the first."""
    resolution: int = 64
    """Side of the training crops."""
    batch_size: int = 16
    side: int = 256
    """Of the images that are encoded and decoded."""
    losses: Literal["l1-kl", "all"] = "l1-kl"
    """all adds LPIPS (vgg, random weights: they cost the same) and the adversarial loss."""
    mixed_precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    rounds: int = 6
    seconds: float = 1.0
    """Per stage, in each round."""
    compare: Path | None = None
    """What an earlier run wrote, on the same machine."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One call of it makes so many images."""

    call: Callable[[], Any]
    images: int
    on_device: bool = True
    """Whether its operations are counted: where it is the network's, not files'."""


# Autoencoders ---------------------------------------------------------------------------------------------------------


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "AutoencoderKL-small":
        return diffusers.AutoencoderKL(
            block_out_channels=(32, 64, 128, 128),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
        )
    if name == "AutoencoderTiny":
        return diffusers.AutoencoderTiny()
    if name == "AutoencoderKL-SD":
        return diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"no model {name}: try {', '.join([*ARCHITECTURES, 'AutoencoderKL-small', 'AutoencoderTiny'])}"
        )
    return PatchAutoencoderKL(**ARCHITECTURES[name])


def training_state(
    vae: Any,
    objective: Objective,
    accelerator: Accelerator,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    fused: bool = True,
    foreach: bool = True,
) -> State:
    bare = TrainableVAE(vae, learned_logvar=False).to(accelerator.device).to(memory_format=memory_format)
    trained = [p for p in bare.parameters() if p.requires_grad]
    optimizers: dict[str, torch.optim.Optimizer] = {"vae": torch.optim.AdamW(trained, 1e-4, fused=fused)}
    discriminator = lpips = None
    if objective.adversarial != "none":
        discriminator = PatchDiscriminator().to(accelerator.device, memory_format=memory_format)
        optimizers["discriminator"] = torch.optim.AdamW(discriminator.parameters(), 1e-4, fused=fused)
        discriminator = accelerator.prepare(discriminator)
    if objective.perceptual != "none":
        lpips = PerceptualLoss("vgg", pretrained=False).to(accelerator.device).to(memory_format=memory_format)
    return State(
        vae=accelerator.prepare(bare),
        discriminator=discriminator,
        lpips=lpips,
        ema=EMAModel(vae.parameters(), foreach=foreach),
        optimizers=optimizers,
        adaptive_weight=torch.ones((), device=accelerator.device),
        kl_weight=torch.tensor(objective.kl_weight, device=accelerator.device),
        bare=bare,
    )


def compiled(vae: Any) -> Any:
    if isinstance(vae, PatchAutoencoderKL):
        vae.compile_repeated_blocks()
    else:
        vae.encoder.compile()
        vae.decoder.compile()
    return vae


def autoencoder_stages(config: Config, accelerator: Accelerator) -> dict[str, Stage]:
    """A training step, encoding and decoding of each model; of the first also steps without each of MEASURES."""
    everything = config.losses == "all"
    objective = Objective(
        perceptual="random" if everything else "none", adversarial="hinge" if everything else "none", disc_start=0
    )
    images = torch.rand(config.batch_size, 3, config.resolution, config.resolution) * 2 - 1
    images = images.pin_memory() if accelerator.device.type == "cuda" else images  # as the trainer's loader does
    batch = Batch(images=images, positions=list(range(config.batch_size)), bad_images={})
    large = (torch.rand(1, 3, config.side, config.side) * 2 - 1).to(accelerator.device)
    large = large.to(memory_format=torch.channels_last)
    rates = {"vae": 1e-4, "discriminator": 1e-4}

    def step(state: State) -> None:
        state.bare.train()
        train_step(itertools.repeat(batch), state, objective, step=0, learning_rates=rates, accelerator=accelerator)

    @torch.inference_mode()
    def encode(vae: Any) -> torch.Tensor:
        with accelerator.autocast():
            return encode_mean(vae.eval(), large)

    @torch.inference_mode()
    def decode(vae: Any, latents: torch.Tensor) -> None:
        with accelerator.autocast():
            vae.eval().decode(latents)

    stages: dict[str, Stage] = {}
    for name in config.models:
        vae = compiled(build(name)) if config.compile else build(name)
        state = training_state(vae, objective, accelerator)
        stages[f"{name}: step"] = Stage(call=partial(step, state), images=config.batch_size)
        stages[f"{name}: encode"] = Stage(call=partial(encode, vae), images=1)
        stages[f"{name}: decode"] = Stage(call=partial(decode, vae, encode(vae)), images=1)
    first = config.models[0]
    for measure, without in MEASURES.items():
        state = training_state(build(first), objective, accelerator, **without)  # type: ignore[arg-type]
        stages[f"{first}: step without {measure}"] = Stage(call=partial(step, state), images=config.batch_size)
    if not config.compile:
        state = training_state(compiled(build(first)), objective, accelerator)
        stages[f"{first}: step, compiled"] = Stage(call=partial(step, state), images=config.batch_size)
    return stages


# The rest -------------------------------------------------------------------------------------------------------------


def diffusion_stages(config: Config, accelerator: Accelerator) -> dict[str, Stage]:
    """A training step of the small denoiser on latents of the crops, and sampling with it."""
    vae = build(config.models[0]).to(accelerator.device).eval()
    channels, side = latent_channels_of(vae), config.resolution // stride_of(vae)
    torch.manual_seed(0)
    unet = make_denoiser("tiny", latent_channels=channels, sample_size=(side, side), num_classes=2)
    unet = unet.to(accelerator.device, memory_format=torch.channels_last)
    state = denoising.State(
        unet=accelerator.prepare(unet),
        bare=unet,
        vae=vae,
        encoded=True,
        ema=EMAModel(unet.parameters(), foreach=True),
        optimizer=torch.optim.AdamW(unet.parameters(), 1e-4, fused=True),
    )
    shape = (config.batch_size, channels, side, side)
    batch = DiffusionBatch(
        inputs=torch.randn(config.batch_size, 2 * channels, side, side),
        labels=torch.zeros(config.batch_size, dtype=torch.long),
        timesteps=torch.rand(config.batch_size) * 999,
        noise=torch.randn(shape),
        posterior_noise=torch.randn(shape),
        bad_images={},
    )
    objective = denoising.Objective()
    sampler = LatentDiffusionPipeline(vae, unet, make_scheduler(objective.prediction))
    sampler.set_progress_bar_config(disable=True)

    def step() -> None:
        unet.train()
        batches = itertools.repeat(batch)
        denoising.train_step(batches, state, objective, learning_rate=1e-4, accelerator=accelerator)

    def sample() -> None:
        unet.eval()
        with accelerator.autocast():
            sampler(class_labels=0, num_images=SAMPLES, num_inference_steps=SAMPLING_STEPS, output_type="pt")

    return {
        "denoiser: step": Stage(call=step, images=config.batch_size),
        f"denoiser: sampling in {SAMPLING_STEPS} steps": Stage(call=sample, images=SAMPLES),
    }


def file_stages(config: Config, accelerator: Accelerator, work: Path) -> dict[str, Stage]:
    """The cache's encoding and writing, the codec there and back, and the loader alone."""
    vae = build(config.models[0]).to(accelerator.device).eval()
    images = torch.rand(CACHED, 3, config.resolution, config.resolution, device=accelerator.device) * 2 - 1

    @torch.inference_mode()
    def cache() -> None:
        parts = [encode_moments(vae, i) for i in images.split(config.batch_size)]
        moments, indices = torch.cat(parts).float().cpu()[:, None], list(range(CACHED))
        write_shard(work, 0, moments=as_stored(moments).numpy(), indices=indices, labels=indices, bad_images={})

    source = open_source("procedural:dead-leaves", resolution=config.side)
    photos = [source[i].pixels for i in range(PHOTOS)]
    for i, pixels in enumerate(photos):
        Image.fromarray(pixels).save(work / f"{i}.png")
    coder = build("f8c8-codec").to(accelerator.device)
    with torch.no_grad():
        coder.encoder.conv_out.bias[latent_channels_of(coder) :] = -5.0  # as narrow as a trained posterior, about
    codec = LatentCodec(coder, fit_tables(coder, source, num_images=4, qualities=(1,)))
    packed = codec.compress(photos[0])
    crops = CropDataset(open_source(str(work)), seed=0, resolution=config.resolution, cache_bytes=0)

    def batches() -> Iterator[Batch[torch.Tensor]]:
        order = MicroBatches(
            first_step=0, last_step=10**6, batch_size=config.batch_size, rank=0, num_processes=1, accumulation=1
        )
        return load_batches(crops, order, collate=collate, num_workers=0, pin_memory=False)

    loaded = batches()
    return {
        "caching": Stage(call=cache, images=CACHED),
        "codec: compress": Stage(call=partial(codec.compress, photos[0]), images=1),
        "codec: decompress": Stage(call=partial(codec.decompress, packed), images=1),
        "loader, in one process": Stage(call=lambda: next(loaded), images=config.batch_size, on_device=False),
    }


# Measuring ------------------------------------------------------------------------------------------------------------


def measured(
    stages: dict[str, Stage], config: Config, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, dict[str, Any]], float]:
    """images/s, spread, GFLOP of a call, share of the peak and MiB of each stage; and the best round's peak."""
    results: dict[str, dict[str, Any]] = {}
    for name, stage in stages.items():
        stage.call()
        with FlopCounterMode(display=False) as counter:
            stage.call()
        results[name] = {"gflop": counter.get_total_flops() / 1e9 if stage.on_device else 0.0}
        results[name]["peak_memory_mib"] = mebibytes(peak_memory_of(stage.call, device=device))
    durations: dict[str, list[float]] = {name: [] for name in stages}
    peaks = []
    for _ in range(config.rounds):
        peaks.append(peak_flops(device, dtype, seconds=config.seconds / 2))
        for name, stage in stages.items():
            durations[name] += seconds_of(stage.call, device=device, seconds=config.seconds)
    for name, result in results.items():
        seconds = statistics.median(durations[name])
        result["images_per_second"] = stages[name].images / seconds
        result["spread"] = spread(durations[name])
        result["share_of_peak"] = result["gflop"] * 1e9 / seconds / max(peaks)
    return results, max(peaks)


def mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def spread(durations: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(durations, n=4)
    return (high - low) / 2 / middle


def earlier_run(file: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier run. Raises ConfigError for what is none, or does not compare."""
    try:
        then = json.loads(file.read_text())
        results = then["results"]
        for result in results.values():
            float(result["images_per_second"]), float(result["spread"])
        differing = [k for k in COMPARED if now["config"].get(k) != then["config"].get(k)]
        differing += ["machine"] if now["machine"] != then["machine"] else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--compare {file} is no record of this benchmark: {type(error).__name__}: {error}") from None
    if differing:
        raise ConfigError(f"--compare {file} does not compare: {', '.join(differing)} differ")
    return dict(results)


def slower(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """What got slower, in words."""
    found = []
    for name, result in now.items():
        before = then.get(name)
        if before is None:
            continue
        times = before["images_per_second"] / result["images_per_second"]
        if times > 1 + MARGIN + before["spread"] + result["spread"]:
            found.append(f"{name} takes {times:.2f} times as long")
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| stage | images/s | spread | share of peak | MiB |", "| --- | --- | --- | --- | --- |"]
    for name, r in results.items():
        share = f"{100 * r['share_of_peak']:.0f} %" if r["gflop"] else ""
        memory = "" if r["peak_memory_mib"] is None else f"{r['peak_memory_mib']:.0f}"
        lines.append(f"| {name} | {r['images_per_second']:.4g} | {100 * r['spread']:.0f} % | {share} | {memory} |")
    return "\n".join(lines)


def main(config: Config) -> None:
    check_writable(config.output)
    if config.rounds < 1 or not 0 < config.seconds < math.inf:
        raise ConfigError("--rounds must be at least 1, and --seconds more than 0")
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    device = accelerator.device
    facts = {"config": as_json(config), "machine": describe_machine(device)}
    earlier = None if config.compare is None else earlier_run(config.compare, facts)  # before it may be written over
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as work:
        stages = autoencoder_stages(config, accelerator) | diffusion_stages(config, accelerator)
        stages |= file_stages(config, accelerator, Path(work))
        results, peak = measured(stages, config, device, dtype)
    record = facts | {
        "versions": versions(),
        "git": git_revision(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "peak_gflops": peak / 1e9,
        "results": results,
    }
    kind = f"{device.type}-{config.mixed_precision}-{config.losses}{'-compile' if config.compile else ''}"
    write_json(config.output / f"throughput-{kind}.json", record)
    rates = {name: round(r["images_per_second"], 3) for name, r in results.items()}
    with open(config.output / "history.jsonl", "a") as history:
        line = {k: record[k] for k in ("date", "git", "machine")} | {"kind": kind, "images_per_second": rates}
        history.write(json.dumps(line) + "\n")
    print(table(results))
    print(f"{record['machine']}; {peak / 1e9:.0f} GFLOP/s at best; in {config.output / f'throughput-{kind}.json'}")
    found = [] if earlier is None else slower(results, earlier)
    if found:
        raise RunError(f"slower than in {config.compare}: {'; '.join(found)}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Measure speed and memory."))
