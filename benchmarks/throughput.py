"""Measure speed and memory: a training step and a reconstruction, beside diffusers' autoencoders in the same run.

python benchmarks/throughput.py --output DIR [--mixed-precision bf16] [--compile]

Every model is trained with the same losses on the same batch of random images, and the models take turns, several
rounds long, so that a slow moment of the machine does not fall on one of them alone. Figures are medians.
"""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
import tyro
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

from ldm_vae.config import as_json, parse_flags
from ldm_vae.data.loader import Batch
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.files import check_writable, write_json
from ldm_vae.models.autoencoder import ARCHITECTURES, PatchAutoencoderKL
from ldm_vae.models.discriminator import PatchDiscriminator
from ldm_vae.models.tiling import reconstruct
from ldm_vae.objectives.autoencoding import Objective, State, TrainableVAE, train_step
from ldm_vae.objectives.perceptual import PerceptualLoss
from ldm_vae.runs import versions
from ldm_vae.timing import describe_machine, peak_flops, peak_memory_of, seconds_of


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the throughput benchmark."""

    output: Path
    models: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ("f8c4", "AutoencoderKL-small", "AutoencoderTiny")
    """Presets of train_vae.py, and those two of diffusers'."""
    resolution: int = 64
    """Side of the training crops."""
    batch_size: int = 16
    reconstruction_resolution: int = 256
    losses: Literal["l1-kl", "all"] = "l1-kl"
    """all adds LPIPS (vgg, random weights: they cost the same) and the adversarial loss."""
    mixed_precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    rounds: int = 3
    seconds: float = 4.0
    """Per measurement, in each round."""


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


def training_state(vae: Any, objective: Objective, accelerator: Accelerator) -> State:
    bare = TrainableVAE(vae, learned_logvar=False).to(accelerator.device).to(memory_format=torch.channels_last)
    trained = [p for p in bare.parameters() if p.requires_grad]
    optimizers: dict[str, torch.optim.Optimizer] = {"vae": torch.optim.AdamW(trained, 1e-4, fused=True)}
    discriminator = lpips = None
    if objective.adversarial != "none":
        discriminator = PatchDiscriminator().to(accelerator.device, memory_format=torch.channels_last)
        optimizers["discriminator"] = torch.optim.AdamW(discriminator.parameters(), 1e-4, fused=True)
        discriminator = accelerator.prepare(discriminator)
    if objective.perceptual != "none":
        lpips = PerceptualLoss("vgg", pretrained=False).to(accelerator.device).to(memory_format=torch.channels_last)
    return State(
        vae=accelerator.prepare(bare),
        discriminator=discriminator,
        lpips=lpips,
        ema=EMAModel(vae.parameters(), foreach=True),
        optimizers=optimizers,
        adaptive_weight=torch.ones((), device=accelerator.device),
        kl_weight=torch.tensor(objective.kl_weight, device=accelerator.device),
        bare=bare,
    )


def main(config: Config) -> None:
    check_writable(config.output)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    device = accelerator.device
    everything = config.losses == "all"
    objective = Objective(
        perceptual="random" if everything else "none", adversarial="hinge" if everything else "none", disc_start=0
    )
    images = torch.rand(config.batch_size, 3, config.resolution, config.resolution) * 2 - 1
    batch = Batch(images=images, positions=list(range(config.batch_size)), bad_images={})
    large = (torch.rand(1, 3, *[config.reconstruction_resolution] * 2) * 2 - 1).to(device)
    large = large.to(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    peak = peak_flops(device, dtype, seconds=config.seconds / 2)
    states = {}
    for name in config.models:
        vae = build(name)
        states[name] = training_state(vae, objective, accelerator)
        if config.compile and isinstance(vae, PatchAutoencoderKL):
            vae.compile_repeated_blocks()
        elif config.compile:
            vae.encoder.compile()
            vae.decoder.compile()
    rates = {"vae": 1e-4, "discriminator": 1e-4}
    steps: dict[str, list[float]] = {name: [] for name in states}
    forwards: dict[str, list[float]] = {name: [] for name in states}
    results: dict[str, dict[str, Any]] = {}

    def step(state: State) -> None:
        train_step(itertools.repeat(batch), state, objective, step=0, learning_rates=rates, accelerator=accelerator)

    def forward(state: State) -> None:
        with torch.inference_mode(), accelerator.autocast():
            reconstruct(state.bare.vae, large)

    for name, state in states.items():
        step(state)
        with FlopCounterMode(display=False) as counter:
            step(state)
        results[name] = {
            "parameters": sum(p.numel() for p in state.bare.vae.parameters()),
            "step_gflop": counter.get_total_flops() / 1e9,
            "step_peak_memory_mib": mebibytes(peak_memory_of(partial(step, state), device=device)),
            "reconstruction_peak_memory_mib": mebibytes(peak_memory_of(partial(forward, state), device=device)),
        }
    for _ in range(config.rounds):
        for name, state in states.items():
            state.bare.train()
            steps[name] += seconds_of(partial(step, state), device=device, seconds=config.seconds)
            state.bare.eval()
            forwards[name] += seconds_of(partial(forward, state), device=device, seconds=config.seconds / 2)
    first = config.models[0]
    for name, result in results.items():
        seconds = statistics.median(steps[name])
        result["train_images_per_second"] = config.batch_size / seconds
        result["train_spread"] = spread(steps[name])
        result["reconstruction_ms"] = 1e3 * statistics.median(forwards[name])
        result["reconstruction_spread"] = spread(forwards[name])
        result["share_of_peak"] = result["step_gflop"] * 1e9 / seconds / peak
        result[f"{first}_trains_times_as_fast"] = seconds / statistics.median(steps[first])
        result[f"{first}_reconstructs_times_as_fast"] = statistics.median(forwards[name]) / statistics.median(
            forwards[first]
        )
    record = {
        "config": as_json(config),
        "machine": describe_machine(device),
        "versions": versions(),
        "peak_gflops": peak / 1e9,
        "results": results,
    }
    name = (
        f"throughput-{device.type}-{config.mixed_precision}-{config.losses}{'-compile' if config.compile else ''}.json"
    )
    write_json(config.output / name, record)
    print(json.dumps(record["results"], indent=1))
    print(f"{record['machine']}; {peak / 1e9:.0f} GFLOP/s at best; written to {config.output / name}")


def mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def spread(durations: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(durations, n=4)
    return (high - low) / 2 / middle


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Measure speed and memory."))
