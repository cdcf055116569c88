"""Train a VAE, a diffusion model and a classifier on labelled images, and judge the samples.

python benchmarks/studies/class_conditional.py fashion-mnist --data ../shared/data/fashion-mnist --output DIR
python benchmarks/studies/class_conditional.py flowers64 --data ../shared/data/flowers64 --output DIR

Only the two trainings and the caching between them count as training time. Every figure is in the features of a
classifier that saw real training images alone. The reference is one half of the test images; real against real, and the
reconstructions, are of the other half, so that neither has an image of the reference. The same command goes on after
the last part that was finished, and with other guidance or steps judges anew what was trained; a part of the training
that was stopped is refused, as its time is not known.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from accelerate import Accelerator

from ldm_vae.data.idx import FASHION, read_fashion_mnist, write_class_zip
from ldm_vae.errors import ConfigError, RunError, one_line_errors
from ldm_vae.files import atomic, check_writable, write_json
from ldm_vae.models.unet import DENOISERS
from ldm_vae.objectives.denoising import Objective, check_objective
from ldm_vae.runs.config import as_json, differences, parse_config
from ldm_vae.runs.run import git_revision, versions
from ldm_vae.sampling import SCHEDULERS, make_scheduler
from ldm_vae.timing import describe_machine, seconds_of_script

ROOT = Path(__file__).parent.parent.parent
DEFAULT_SCHEDULER = next(iter(SCHEDULERS["flow"]))
FREE_WHEN_JUDGED_ANEW = (
    *("output", "data", "guidance_scales", "interval_scales", "guidance_interval"),
    *("scheduler", "sampling_steps", "compared_steps"),
)
"""The places, and what is in the name of each set of samples."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the class-conditional benchmark."""

    data: Path = tyro.MISSING
    """The folder of the data set as it is distributed."""
    output: Path = tyro.MISSING
    dataset: tyro.conf.Suppress[str] = "fashion-mnist"
    channels: int = 1
    resolution: int = 32
    vae: str = "f4c3"
    """Preset of the VAE."""
    vae_steps: int = 3000
    vae_batch_size: int = 64
    kl_weight: float = 1e-3
    denoiser: str = "tiny"
    steps: int = 5000
    """Of the diffusion model."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    min_snr_gamma: float | None = None
    label_dropout: float = 0.1
    num_workers: int = 0
    """Of the diffusion model's training; on a GPU a step is over before one process has read the next batch."""
    flip: bool = False
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Of the trainings and of sampling: processors differ in which is faster."""
    classifier_widths: tuple[int, ...] = (32, 64, 128)
    classifier_erase: float = 0.0
    classifier_epochs: int = 12
    num_images: int = 2000
    """Samples of each kind."""
    guidance_scales: tuple[float, ...] = (1.0, 1.125, 1.25, 1.375, 1.5, 2.0)
    """At all times."""
    interval_scales: tuple[float, ...] = (1.25, 1.5, 1.75, 2.0, 3.0)
    """In the guidance interval only."""
    guidance_interval: tuple[float, float] = (0.3, 0.8)
    scheduler: str = "sde-dpmsolver++"
    """At each guidance scale."""
    sampling_steps: int = 20
    compared_steps: tuple[int, ...] = (10, 20, 250)
    """Of the default scheduler, without guidance."""
    seed: int = 0


PRESETS = {
    "fashion-mnist": (
        "28x28 grey clothes padded to 32x32, 10 classes",
        Config(
            vae_steps=2000,
            denoiser="demo",
            steps=6400,
            learning_rate=2e-3,
            min_snr_gamma=5.0,
            label_dropout=0.03,
            mixed_precision="no",
            classifier_widths=(64, 128, 256),
            classifier_erase=0.5,
            classifier_epochs=16,
        ),
    ),
    "flowers64": (
        "64x64 photos of flowers, 5 classes",
        Config(
            dataset="flowers64",
            channels=3,
            resolution=64,
            vae_batch_size=32,
            steps=3200,
            flip=True,
            num_images=360,
        ),
    ),
}


def zips(config: Config) -> tuple[str, str]:
    """The training and the test images, as zips of class folders."""
    if config.dataset == "flowers64":
        return str(config.data / "flowers64-train.zip"), str(config.data / "flowers64-val.zip")
    return write_fashion_mnist(config, "train"), write_fashion_mnist(config, "t10k")


def write_fashion_mnist(config: Config, part: str) -> str:
    """A zip of PNG, 28x28 padded with black to 32x32, from the idx files (Xiao et al. 2017)."""
    target = config.output / f"{part}.zip"
    if not target.exists():
        pixels, labels = read_fashion_mnist(config.data, part)
        write_class_zip(target, zip(pixels, (FASHION[label] for label in labels), strict=True))
    return str(target)


def halves(config: Config, test: str) -> tuple[str, str]:
    """Every other test image in each of two zips: the reference, and the other real images."""
    targets = (config.output / "reference.zip", config.output / "other.zip")
    with zipfile.ZipFile(test) as archive:
        names = sorted(n for n in archive.namelist() if Path(n).suffix in (".png", ".jpg"))
        for start, target in enumerate(targets):
            if not target.exists():
                with atomic(target) as out, zipfile.ZipFile(out, "w") as half:
                    for name in names[start::2]:
                        half.writestr(name, archive.read(name))
    return str(targets[0]), str(targets[1])


def script(name: Any, *words: object) -> float:
    return seconds_of_script(ROOT / name, *words)


def train(config: Config, data: str, test: str) -> dict[str, float]:
    """Seconds of each part of the training; what was done before is read from the record of then."""
    file = config.output / "seconds.json"
    seconds = json.loads(file.read_text()) if file.exists() else {}
    vae, cache, run = (config.output / name for name in ("vae", "cache", "diffusion"))
    every = ("--tracker", "none", "--seed", config.seed, "--log-every", 50, "--mixed-precision", config.mixed_precision)
    parts: dict[str, tuple[Any, ...]] = {
        "vae": (
            *("training/train_vae.py", config.vae, "--data", data, "--val-data", test, "--output", vae),
            *("--channels", config.channels, "--resolution", config.resolution, "--steps", config.vae_steps),
            *("--batch-size", config.vae_batch_size, "--kl-weight", config.kl_weight, "--learning-rate", 2e-3),
            *("--perceptual", "none", "--adversarial", "none", "--sample-every", 1000, *every),
        ),
        "cache": (
            *("training/cache_latents.py", "--vae", vae, "--data", data, "--output", cache),
            *("--resolution", config.resolution, *(["--flip"] if config.flip else [])),
        ),
        "diffusion": (
            *("training/train_diffusion.py", config.denoiser, "--latents", cache, "--output", run),
            *("--steps", config.steps, "--batch-size", config.batch_size, "--learning-rate", config.learning_rate),
            *("--num-workers", config.num_workers, "--label-dropout", config.label_dropout),
            *("--sample-every", 1000, *every),
            *(["--flip"] if config.flip else []),
            *(["--min-snr-gamma", config.min_snr_gamma] if config.min_snr_gamma is not None else []),
        ),
    }
    for part, folder in {"vae": vae, "cache": cache, "diffusion": run}.items():
        if part not in seconds:
            if folder.exists():
                raise RunError(f"{folder} was not finished: its time is not known; remove it to make it anew")
            seconds[part] = script(*parts[part])
            write_json(file, seconds)
    return seconds


def judge(config: Config, data: str, test: str) -> None:
    """Samples at each guidance scale and number of steps, reconstructions, and the table of them all."""
    classifier = config.output / "classifier"
    if not (classifier / "results.json").exists():
        words = ("--data", data, "--val-data", test, "--output", classifier, "--epochs", config.classifier_epochs)
        size = ("--channels", config.channels, "--resolution", config.resolution, "--widths", *config.classifier_widths)
        script("benchmarks/train_classifier.py", *words, *size, "--erase", config.classifier_erase)
    reference, other = halves(config, test)
    sets = [config.output / "reconstructions"]
    script("pipelines/reconstruct.py", "--vae", config.output / "vae", "--input", other, "--output", sets[0])
    low, high = config.guidance_interval
    guided = [(f"guidance {s:g}", s, (0.0, 1.0)) for s in config.guidance_scales]
    guided += [(f"guidance {s:g} in {low:g} to {high:g}", s, (low, high)) for s in config.interval_scales]
    settings = [(*one, config.sampling_steps, config.scheduler) for one in guided]
    settings += [("guidance 1", 1.0, (0.0, 1.0), steps, DEFAULT_SCHEDULER) for steps in config.compared_steps]
    once = dict.fromkeys(settings)  # with the default scheduler, one is there twice
    for name, scale, interval, steps, scheduler in once:
        sets.append(config.output / f"{name}, {steps} steps of {scheduler}")
        script(
            *("pipelines/generate.py", "--model", config.output / "diffusion", "--output", sets[-1]),
            *("--num-images", config.num_images, "--guidance-scale", scale, "--guidance-interval", *interval),
            *("--steps", steps, "--scheduler", scheduler, "--seed", config.seed, "--batch-size", 100),
            *("--mixed-precision", config.mixed_precision),
        )
    named = [word for folder in sets for word in ("--samples", folder)]
    script(
        *("benchmarks/generation.py", "--data", reference, "--real", other, *named),
        *("--features", classifier, "--num-images", config.num_images, "--output", config.output / "figures"),
    )


def remember(config: Config) -> None:
    """Writes the configuration, or compares it: what was made by another one is not judged as this one's."""
    file = config.output / "config.json"
    if not file.exists() and (config.output / "seconds.json").exists():
        raise RunError(f"{config.output} was made with settings that are not known: choose another --output")
    if file.exists():
        changed = differences(json.loads(file.read_text()), config, free=FREE_WHEN_JUDGED_ANEW)
        if changed:
            raise RunError(
                f"{config.output} was made with other settings ({'; '.join(changed)}): choose another --output"
            )
    write_json(file, as_json(config))


def last_of(run: Path, metric: str) -> float:
    """The last value in the log of a run."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return float([line[metric] for line in lines if metric in line][-1])


def validate(config: Config) -> None:
    """Raises ValueError or ConfigError for what would be seen after the VAE's training only."""
    make_scheduler("flow", config.scheduler)
    if config.denoiser not in DENOISERS:
        raise ConfigError(f"no denoiser {config.denoiser}: try {', '.join(DENOISERS)}")
    check_objective(Objective(min_snr_gamma=config.min_snr_gamma, label_dropout=config.label_dropout))


def main(config: Config) -> None:
    validate(config)
    check_writable(config.output)
    remember(config)
    data, test = zips(config)
    seconds = train(config, data, test)
    judge(config, data, test)
    record = {
        "config": as_json(config),
        "machine": describe_machine(Accelerator().device),
        "versions": versions(),
        "git": git_revision(),
        "vae_val_psnr": last_of(config.output / "vae", "val_psnr"),
        "training_seconds": seconds | {"all": sum(seconds.values())},
        "classifier": json.loads((config.output / "classifier" / "results.json").read_text()),
        "figures": json.loads((config.output / "figures" / "results.json").read_text()),
    }
    write_json(config.output / "results.json", record)
    print((config.output / "figures" / "table.md").read_text())
    print(f"trained in {sum(seconds.values()) / 60:.1f} minutes; pictures and figures are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Train on labelled images, and judge the samples."))
