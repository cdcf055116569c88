"""Train f8c4 and diffusers' autoencoders for the same time on the same photos, and compare their reconstructions.

python benchmarks/studies/equal_time.py --data TRAIN_FOLDER --val-data VAL_FOLDER --output DIR

Each model is trained by training/train_vae.py with L1 and KL on 64x64 crops, 16 a step, in the precision that it is
faster in on this machine. Its learning rate is the best of RATES after --sweep-seconds, judged on held-out *training*
photos; the validation photos are only measured on. Evaluations and checkpoints are not counted as training time.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import matplotlib.pyplot as plt
import torch

from ldm_vae.errors import one_line_errors
from ldm_vae.files import check_writable, write_json
from ldm_vae.runs.config import parse_flags
from ldm_vae.runs.run import git_revision, versions
from ldm_vae.timing import describe_machine, seconds_of_script

ROOT = Path(__file__).parent.parent.parent
RATES = (5e-4, 1e-3, 2e-3)
TRIAL_STEPS = {"f8c4": 600, "AutoencoderKL": 30, "AutoencoderTiny": 40}
"""Enough steps to measure the speed by, once the photos are decoded."""
BATCH_SIZE = 16
PRECISIONS = ("no", "bf16")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the comparison at equal training time."""

    data: str
    val_data: str
    output: Path
    seconds: float = 600
    """Training time of each model."""
    sweep_seconds: float = 60
    """Training time for each learning rate that is tried."""


def make_baselines(folder: Path) -> None:
    """Untrained diffusers autoencoders with the latents of f8c4."""
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
    ).save_pretrained(folder / "AutoencoderKL")
    diffusers.AutoencoderTiny().save_pretrained(folder / "AutoencoderTiny")


def train(
    name: str,
    config: Config,
    output: Path,
    *,
    data: str,
    val_data: str,
    precision: str,
    steps: int,
    rate: float,
    evaluations: int,
) -> list[dict[str, Any]]:
    """One run of the trainer, warming up over 5 % of its steps: its metrics."""
    words: list[object] = ["f8c4", "--data", data, "--val-data", val_data, "--output", output, "--steps", steps]
    words += ["--batch-size", BATCH_SIZE, "--resolution", 64, "--shorter-side", 256, "--perceptual", "none"]
    words += ["--adversarial", "none", "--tracker", "none", "--learning-rate", rate, "--log-every", 10]
    words += ["--mixed-precision", precision, "--sample-every", max(steps // evaluations, 1)]
    words += ["--checkpoint-every", max(steps // 4, 1), "--warmup-steps", max(steps // 20, 1)]
    if name != "f8c4":
        words += ["--init", config.output / "init" / name]
    if name == "AutoencoderTiny":
        words += ["--kl-weight", 0]  # it has no posterior
    seconds_of_script(ROOT / "training" / "train_vae.py", *words)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def main(config: Config) -> None:
    check_writable(config.output)
    make_baselines(config.output / "init")
    curves, facts = {}, {}
    for name, few in TRIAL_STEPS.items():
        split = {"data": f"{config.data}#train", "val_data": f"{config.data}#held-out"}
        speeds = {}
        for precision in PRECISIONS:
            folder = config.output / "speed" / f"{name}-{precision}"
            options = split | {"precision": precision}
            trial = train(name, config, folder, steps=few, rate=1e-3, evaluations=1, **options)
            measured = [m["images_per_second"] for m in trial if "images_per_second" in m]
            speeds[precision] = statistics.median(measured[len(measured) // 2 :])
        precision = max(speeds, key=speeds.__getitem__)
        options = split | {"precision": precision}
        trial_steps = int(config.sweep_seconds * speeds[precision] / BATCH_SIZE)
        scores, seconds = {}, 0.0
        for rate in RATES:
            folder = config.output / "sweep" / f"{name}-{rate:g}"
            lines = train(name, config, folder, steps=trial_steps, rate=rate, evaluations=1, **options)
            scores[rate] = [m["val_psnr"] for m in lines if "val_psnr" in m][-1]
            seconds += [m["seconds"] for m in lines if "seconds" in m][-1]
            print(name, rate, scores[rate], flush=True)
        best = max(scores, key=scores.__getitem__)
        steps = int(config.seconds * len(RATES) * trial_steps / seconds)  # at the pace of all of these
        lines = train(
            name,
            config,
            config.output / name,
            data=config.data,
            val_data=config.val_data,
            precision=precision,
            steps=steps,
            rate=best,
            evaluations=12,
        )
        curves[name] = [(m["seconds"], m["val_psnr"]) for m in lines if "val_psnr" in m]
        facts[name] = {
            "steps": steps,
            "learning_rate": best,
            "held_out_psnr_of_the_sweep": {f"{rate:g}": score for rate, score in scores.items()},
            "precision": precision,
            "images_per_second_of_the_trial": speeds,
            "training_seconds": curves[name][-1][0],
            "curve_seconds_and_psnr_of_32_validation_photos": curves[name],
        }
        print(name, facts[name], flush=True)
    record = {
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "git": git_revision(),
        "models": facts,
    }
    write_json(config.output / "equal_time.json", record)
    plot(curves, config.output / "psnr_against_time.png")


def plot(curves: dict[str, list[tuple[float, float]]], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, curve in curves.items():
        axes.plot([t for t, _ in curve], [p for _, p in curve], marker="o", markersize=3, label=name)
    axes.set(xlabel="training time (s)", ylabel="PSNR (dB), 32 validation photos at 256", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Compare autoencoders after equal training time."))
