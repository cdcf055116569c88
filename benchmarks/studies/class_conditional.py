"""Train a VAE, a diffusion model and a classifier on labelled images, and judge the samples.

python benchmarks/studies/class_conditional.py fashion-mnist --data ../shared/data/fashion-mnist --output DIR
python benchmarks/studies/class_conditional.py flowers64 --data ../shared/data/flowers64 --output DIR

Only the two trainings and the caching between them count as training time. Every figure is in the features of a
classifier that saw real training images alone. The reference is one half of the test images; real against real, and the
reconstructions, use the other half. The same command resumes after the last part that was finished, and with other
guidance or steps judges the trained model again; a part of the training that was interrupted is refused, because its
time is unknown.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from accelerate import Accelerator

from ldm_vae.data.fashion_mnist import FASHION, read_fashion_mnist, write_class_zip
from ldm_vae.errors import ConfigError, RunError, one_line_errors
from ldm_vae.files import atomic, check_writable, write_json
from ldm_vae.models.unet import DENOISERS
from ldm_vae.objectives.denoising import DenoiserConfig
from ldm_vae.report import logged_values, provenance, write_report
from ldm_vae.runs.config import MixedPrecision, as_json, check_ranges, differences, parse_config
from ldm_vae.runs.loop import fast_precision
from ldm_vae.sampling import SCHEDULERS, make_scheduler
from ldm_vae.timing import seconds_of_script

DEFAULT_SCHEDULER = next(iter(SCHEDULERS["flow"]))
FREE_WHEN_JUDGED_ANEW = (
    *("output", "data", "guidance_scales", "interval_scales", "guidance_interval"),
    *("scheduler", "sampling_steps", "compared_steps"),
)
"""Folders, and what the name of each set of samples says."""


@dataclass(frozen=True, kw_only=True)
class Config:
    data: Path = tyro.MISSING
    """Folder of the data set as it is distributed."""
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
    """Of the diffusion model's training; on a GPU one process reads more slowly than the model trains."""
    flip: bool = False
    mixed_precision: MixedPrecision = "auto"
    """Of the trainings and of sampling."""
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
    """Of the default scheduler, at the first guidance scale."""
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


def archives(config: Config) -> tuple[str, str]:
    """The training and the test images, as zips of class folders."""
    if config.dataset == "flowers64":
        return str(config.data / "flowers64-train.zip"), str(config.data / "flowers64-val.zip")
    return write_fashion_mnist(config, "train"), write_fashion_mnist(config, "t10k")


def write_fashion_mnist(config: Config, part: str) -> str:
    """A zip of PNG, 28x28 padded with black to 32x32, from the idx files (Xiao et al. 2017)."""
    target = config.output / f"{part}.zip"
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


def train(config: Config, data: str, test: str) -> dict[str, float]:
    """Seconds of each part of the training, from its record where it was finished before."""
    file = config.output / "seconds.json"
    seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    vae, cache, run = (config.output / name for name in ("vae", "cache", "diffusion"))
    shared = ["--tracker", "none", "--seed", config.seed, "--log-every", 50, "--sample-every", 1000]
    shared += ["--mixed-precision", config.mixed_precision]
    flip = ["--flip"] if config.flip else []
    gamma = [] if config.min_snr_gamma is None else ["--min-snr-gamma", config.min_snr_gamma]
    parts: dict[Path, tuple[Any, ...]] = {
        vae: (
            *("training/train_vae.py", config.vae, "--data", data, "--val-data", test, "--output", vae),
            *("--channels", config.channels, "--resolution", config.resolution, "--steps", config.vae_steps),
            *("--batch-size", config.vae_batch_size, "--kl-weight", config.kl_weight, "--learning-rate", 2e-3),
            *("--perceptual", "none", "--adversarial", "none", *shared),
        ),
        cache: (
            *("training/cache_latents.py", "--vae", vae, "--data", data, "--output", cache),
            *("--resolution", config.resolution, *flip),
        ),
        run: (
            *("training/train_diffusion.py", config.denoiser, "--latents", cache, "--output", run),
            *("--steps", config.steps, "--batch-size", config.batch_size, "--learning-rate", config.learning_rate),
            *("--num-workers", config.num_workers, "--label-dropout", config.label_dropout, *flip, *gamma, *shared),
        ),
    }
    for folder, words in parts.items():
        if folder.name not in seconds:
            if folder.exists():
                raise RunError(f"{folder} was not finished: its time is not known; remove it to train it again")
            seconds[folder.name] = seconds_of_script(*words)
            write_json(file, seconds)
    return seconds


def judge(config: Config, data: str, test: str) -> None:
    """A classifier, and by it samples at each guidance scale and number of steps, and reconstructions."""
    classifier = config.output / "classifier"
    if not (classifier / "results.json").exists():
        seconds_of_script(
            "benchmarks/train_classifier.py",
            *("--data", data, "--val-data", test, "--output", classifier),
            *("--epochs", config.classifier_epochs, "--channels", config.channels, "--resolution", config.resolution),
            *("--widths", *config.classifier_widths, "--erase", config.classifier_erase),
        )
    reference, other = halves(config, test)
    scheduler = [] if config.scheduler == DEFAULT_SCHEDULER else ["--scheduler", config.scheduler]
    precision = config.mixed_precision
    if precision == "auto":
        precision = fast_precision(Accelerator().device)
    seconds_of_script(
        "benchmarks/generation.py",
        *("--data", reference, "--real", other, "--pipeline", config.output / "diffusion"),
        *("--features", classifier, "--num-images", config.num_images, "--output", config.output / "figures"),
        *("--guidance-scale", *config.guidance_scales, "--interval-scale", *config.interval_scales),
        *("--guidance-interval", *config.guidance_interval, "--num-inference-steps", config.sampling_steps),
        *(*scheduler, "--compared-steps", *config.compared_steps, "--seed", config.seed, "--batch-size", 100),
        *("--mixed-precision", precision),
    )


def check_config(config: Config) -> None:
    """Writes the configuration to the output folder, or compares: results of different settings are not mixed.

    Raises:
        RunError: the folder has results of other settings.
    """
    file = config.output / "config.json"
    changed = differences(json.loads(file.read_text()), config, free=FREE_WHEN_JUDGED_ANEW) if file.exists() else []
    if changed:
        raise RunError(f"{config.output} was made with other settings ({'; '.join(changed)}): choose another --output")
    write_json(file, as_json(config))


def validate(config: Config) -> None:
    """Raises ValueError or ConfigError for what would otherwise be found out after the VAE's training."""
    make_scheduler("flow", config.scheduler)
    if config.denoiser not in DENOISERS:
        raise ConfigError(f"no denoiser {config.denoiser}: try {', '.join(DENOISERS)}")
    check_ranges(DenoiserConfig(min_snr_gamma=config.min_snr_gamma, label_dropout=config.label_dropout))


def main(config: Config) -> None:
    validate(config)
    check_writable(config.output)
    check_config(config)
    data, test = archives(config)
    seconds = train(config, data, test)
    judge(config, data, test)
    results = {
        "vae_val_psnr": logged_values(config.output / "vae", "val_psnr")[-1][1],
        "training_seconds": seconds | {"all": sum(seconds.values())},
        "classifier": json.loads((config.output / "classifier" / "results.json").read_text()),
        "figures": json.loads((config.output / "figures" / "results.json").read_text()),
    }
    write_report(config.output, provenance(config, Accelerator().device), results)
    print(f"trained in {sum(seconds.values()) / 60:.1f} minutes; images and figures are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Train on labelled images, and judge the samples."))
