"""Measure speed and memory of every stage, beside diffusers' autoencoders in the same run.

python benchmarks/throughput.py --output DIR [--mixed-precision bf16] [--compile] [--compare EARLIER.json]

The stages take turns for several rounds, so that a slow moment of the machine does not fall on one of them alone; all
of a kind do the same work on the same random images. Figures are medians. Each run adds a line to DIR/history.jsonl.
--compare names the stages that became slower than in an earlier run, and then ends with exit code 2.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
import tyro
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

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
from ldm_vae.models.interface import encode_moments, latent_channels_of, stride_of
from ldm_vae.models.reconstruction import encode_mean
from ldm_vae.models.unet import make_denoiser
from ldm_vae.objectives.autoencoding import TrainableVAE
from ldm_vae.objectives.denoising import DenoiserConfig, DenoiserState, denoiser_step
from ldm_vae.objectives.vae import VAEConfig, VAEState, vae_step
from ldm_vae.pipeline import LatentDiffusionPipeline
from ldm_vae.report import markdown_table, provenance
from ldm_vae.runs.config import Range, check_ranges, parse_flags
from ldm_vae.sampling import make_scheduler
from ldm_vae.timing import peak_flops, peak_memory_of, seconds_of

SAMPLES, SAMPLING_STEPS = 8, 10
CACHED = 64
PHOTOS = 16
COMPARED = ("models", "resolution", "batch_size", "side", "mixed_precision", "compile")
MARGIN = 0.1
"""A stage became slower when it takes this share longer, beyond the spreads of both runs."""
BASELINES = ("AutoencoderKL-small", "AutoencoderTiny")


@dataclass(frozen=True, kw_only=True)
class Config:
    output: Path
    models: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ("f8c4", *BASELINES)
    """Presets of train_vae.py, and diffusers' autoencoders. Stages other than an autoencoder's use the first."""
    resolution: int = 64
    """Side of the training crops."""
    batch_size: int = 16
    side: int = 256
    """Of the images that are encoded and decoded."""
    mixed_precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    rounds: Annotated[int, Range(at_least=1)] = 6
    seconds: Annotated[float, Range(above=0)] = 1.0
    """Per stage, in each round."""
    compare: Path | None = None
    """The record of an earlier run on the same machine."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A call, and the number of images that it handles."""

    call: Callable[[], Any]
    images: int
    on_device: bool = True
    """Whether the work is the network's, whose operations are counted, and not that of files."""


def build(name: str) -> Any:
    """An autoencoder with random weights."""
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
    if name not in ARCHITECTURES:
        raise ConfigError(f"no model {name}: try {', '.join([*ARCHITECTURES, *BASELINES])}")
    return PatchAutoencoderKL(**ARCHITECTURES[name])


def autoencoder_stages(config: Config, accelerator: Accelerator) -> dict[str, Stage]:
    """A training step with L1 and KL, encoding and decoding of each model."""
    objective = VAEConfig(perceptual="none", adversarial="none")
    images = torch.rand(config.batch_size, 3, config.resolution, config.resolution) * 2 - 1
    images = images.pin_memory() if accelerator.device.type == "cuda" else images  # as the trainer's loader does
    batches = itertools.repeat(Batch(images=images, positions=list(range(config.batch_size)), bad_images={}))
    large = (torch.rand(1, 3, config.side, config.side) * 2 - 1).to(accelerator.device)
    large = large.to(memory_format=torch.channels_last)

    def step(state: VAEState) -> None:
        state.bare.train()
        vae_step(batches, state, objective, step=0, learning_rates={"vae": 1e-4}, accelerator=accelerator)

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
        vae = build(name)
        if config.compile and isinstance(vae, PatchAutoencoderKL):
            vae.compile_repeated_blocks()
        elif config.compile:
            vae.encoder.compile()
            vae.decoder.compile()
        state = VAEState.of(TrainableVAE(vae), objective, accelerator)
        stages[f"{name}: step"] = Stage(call=partial(step, state), images=config.batch_size)
        stages[f"{name}: encode"] = Stage(call=partial(encode, vae), images=1)
        stages[f"{name}: decode"] = Stage(call=partial(decode, vae, encode(vae)), images=1)
    return stages


def diffusion_stages(config: Config, accelerator: Accelerator) -> dict[str, Stage]:
    """A training step of the small denoiser on latents of the crops, and sampling with it."""
    vae = build(config.models[0]).to(accelerator.device).eval()
    channels, side = latent_channels_of(vae), config.resolution // stride_of(vae)
    torch.manual_seed(0)
    unet = make_denoiser("tiny", latent_channels=channels, sample_size=(side, side), num_classes=2)
    unet = unet.to(accelerator.device, memory_format=torch.channels_last)
    state = DenoiserState(
        unet=accelerator.prepare(unet),
        bare=unet,
        vae=vae,
        ema=EMAModel(unet.parameters(), foreach=True),
        optimizer=torch.optim.AdamW(unet.parameters(), 1e-4, fused=True),
    )
    shape = (config.batch_size, channels, side, side)
    batch = DiffusionBatch(
        inputs=torch.randn(config.batch_size, 2 * channels, side, side),
        encoded=True,
        labels=torch.zeros(config.batch_size, dtype=torch.long),
        timesteps=torch.rand(config.batch_size) * 999,
        noise=torch.randn(shape),
        posterior_noise=torch.randn(shape),
        bad_images={},
    )
    objective = DenoiserConfig()
    sampler = LatentDiffusionPipeline(vae, unet, make_scheduler(objective.prediction))
    sampler.set_progress_bar_config(disable=True)

    def step() -> None:
        unet.train()
        denoiser_step(itertools.repeat(batch), state, objective, learning_rate=1e-4, accelerator=accelerator)

    def sample() -> None:
        unet.eval()
        with accelerator.autocast():
            sampler(class_labels=0, num_images=SAMPLES, num_inference_steps=SAMPLING_STEPS, output_type="pt")

    return {
        "denoiser: step": Stage(call=step, images=config.batch_size),
        f"denoiser: sampling in {SAMPLING_STEPS} steps": Stage(call=sample, images=SAMPLES),
    }


def file_stages(config: Config, accelerator: Accelerator, work: Path) -> dict[str, Stage]:
    """Encoding images into a cache of latents, the codec in both directions, and the loader alone."""
    source = open_source("procedural:dead-leaves", resolution=config.side)
    photos = [source[i].pixels for i in range(PHOTOS)]
    for i, pixels in enumerate(photos):
        Image.fromarray(pixels).save(work / f"{i}.png")
    torch.manual_seed(0)
    coder = PatchAutoencoderKL(**ARCHITECTURES["f8c32"] | {"latent_channels": 8}).to(accelerator.device)
    with torch.no_grad():
        coder.encoder.conv_out.bias[latent_channels_of(coder) :] = -5.0  # about as narrow as a trained posterior
    codec = LatentCodec(coder, fit_tables(coder, source, num_images=4, steps=(1,)))
    compressed = codec.compress(photos[0], step=1.0)
    crops = CropDataset(open_source(str(work)), seed=0, resolution=config.resolution, cache_bytes=0)
    order = MicroBatches(
        first_step=0, last_step=10**6, batch_size=config.batch_size, rank=0, num_processes=1, accumulation=1
    )
    loaded = load_batches(crops, order, collate=collate, num_workers=0, pin_memory=False)
    vae = build(config.models[0]).to(accelerator.device).eval()
    images = torch.rand(CACHED, 3, config.resolution, config.resolution, device=accelerator.device) * 2 - 1

    @torch.inference_mode()
    def cache() -> None:
        parts = [encode_moments(vae, i) for i in images.split(config.batch_size)]
        moments, indices = torch.cat(parts).float().cpu()[:, None], list(range(CACHED))
        write_shard(work, 0, moments=as_stored(moments).numpy(), indices=indices, labels=indices, bad_images={})

    return {
        "caching": Stage(call=cache, images=CACHED),
        "codec: compress": Stage(call=partial(codec.compress, photos[0], step=1.0), images=1),
        "codec: decompress": Stage(call=partial(codec.decompress, compressed), images=1),
        "loader, in one process": Stage(call=lambda: next(loaded), images=config.batch_size, on_device=False),
    }


def convolution_backward_flops(
    grad_shape: Any, input_shape: Any, weight_shape: Any, *options: Any, out_shape: Any, **named: Any
) -> int:
    """torch's own count takes a depthwise convolution's weight gradient for that of all channels with all."""
    *_, transposed, _, _, wanted = options
    return conv_flop_count(input_shape, weight_shape, grad_shape, transposed) * sum(wanted[:2])


BACKWARD_FLOPS = {torch.ops.aten.convolution_backward: convolution_backward_flops}


def measure(
    stages: dict[str, Stage], config: Config, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, dict[str, Any]], float]:
    """images/s, spread, GFLOP of a call, share of the peak and MiB of each stage; and the peak of the best round."""
    results: dict[str, dict[str, Any]] = {}
    for name, stage in stages.items():
        stage.call()
        with FlopCounterMode(display=False, custom_mapping=BACKWARD_FLOPS) as counter:
            stage.call()
        memory = peak_memory_of(stage.call, device=device)
        results[name] = {
            "gflop": counter.get_total_flops() / 1e9 if stage.on_device else 0.0,
            "peak_memory_mib": None if memory is None else memory / 2**20,
        }
    durations: dict[str, list[float]] = {name: [] for name in stages}
    peak = 0.0
    for _ in range(config.rounds):
        peak = max(peak, peak_flops(device, dtype, seconds=config.seconds / 2))
        for name, stage in stages.items():
            durations[name] += seconds_of(stage.call, device=device, seconds=config.seconds)
    for name, result in results.items():
        low, median, high = statistics.quantiles(durations[name], n=4)
        result["images_per_second"] = stages[name].images / median
        result["spread"] = (high - low) / 2 / median  # half the interquartile range, as a share of the median
        result["share_of_peak"] = result["gflop"] * 1e9 / median / peak
    return results, peak


def earlier_results(file: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """Results of an earlier run. Raises ConfigError for another file, machine or setting."""
    try:
        earlier = json.loads(file.read_text())
        results = earlier["results"]
        for result in results.values():
            float(result["images_per_second"]), float(result["spread"])
        differing = [k for k in COMPARED if origin["config"].get(k) != earlier["config"].get(k)]
        differing += ["machine"] if origin["machine"] != earlier["machine"] else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--compare {file} is no record of this benchmark: {type(error).__name__}: {error}") from None
    if differing:
        raise ConfigError(f"--compare {file} does not compare: {', '.join(differing)} differ")
    return dict(results)


def slower(results: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """The stages that became slower, in words."""
    messages = []
    for name in results.keys() & earlier.keys():
        now, before = results[name], earlier[name]
        ratio = before["images_per_second"] / now["images_per_second"]
        if ratio > 1 + MARGIN + before["spread"] + now["spread"]:
            messages.append(f"{name} takes {ratio:.2f} times as long")
    return sorted(messages)


def table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, r in results.items():
        row = {"stage": name, "images/s": f"{r['images_per_second']:.4g}", "spread": f"{100 * r['spread']:.0f} %"}
        row |= {"share of peak": f"{100 * r['share_of_peak']:.0f} %" if r["gflop"] else ""}
        memory = r["peak_memory_mib"]
        rows.append(row | {"MiB": "" if memory is None else f"{memory:.0f}"})
    return markdown_table(rows)


def main(config: Config) -> None:
    check_ranges(config)
    check_writable(config.output)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    device = accelerator.device
    origin = provenance(config, device)
    earlier = {} if config.compare is None else earlier_results(config.compare, origin)  # it may be overwritten below
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as work:
        stages = autoencoder_stages(config, accelerator) | diffusion_stages(config, accelerator)
        stages |= file_stages(config, accelerator, Path(work))
        results, peak = measure(stages, config, device, dtype)
    kind = f"{device.type}-{config.mixed_precision}{'-compile' if config.compile else ''}"
    file = config.output / f"throughput-{kind}.json"
    write_json(file, {**origin, "peak_gflops": peak / 1e9, "results": results})
    rates = {name: round(r["images_per_second"], 3) for name, r in results.items()}
    with open(config.output / "history.jsonl", "a") as history:
        line = {key: origin[key] for key in ("date", "git", "machine")} | {"kind": kind, "images_per_second": rates}
        history.write(json.dumps(line) + "\n")
    print(table(results))
    print(f"{origin['machine']}; {peak / 1e9:.0f} GFLOP/s at best; in {file}")
    regressions = slower(results, earlier)
    if regressions:
        raise RunError(f"slower than in {config.compare}: {'; '.join(regressions)}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Measure speed and memory."))
