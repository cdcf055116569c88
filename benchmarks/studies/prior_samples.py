"""Samples from the latent space of a plain and of a variational autoencoder, by their distance to real images.

python benchmarks/studies/prior_samples.py --data ../shared/data/fashion-mnist --output DIR

Both are train_autoencoder.py's `plain` with one vector per image, and differ only in the posterior and the KL. Latents
are drawn as pipelines/explore.py draws them: from N(0, 1) for the variational one, and for the plain one, which has no
prior, from a normal distribution with the mean and deviation of each number. The distance is Fréchet's in the features
of a classifier of real images (benchmarks/generation.py). The same command resumes the trainings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from ldm_vae.data.idx import FASHION, read_fashion_mnist, write_class_zip
from ldm_vae.errors import one_line_errors
from ldm_vae.files import check_writable
from ldm_vae.grids import labelled_rows
from ldm_vae.report import provenance, write_report
from ldm_vae.runs.config import Range, check_ranges, parse_flags
from ldm_vae.runs.run import training_seconds
from ldm_vae.timing import seconds_of_script

ROWS, ROW = 4, 12
"""Rows of samples of each autoencoder in the image, and samples in a row."""
TITLES = {
    "plain": "plain, latents from each number's mean and deviation",
    "variational": "variational, latents from N(0, 1)",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the comparison."""

    data: Path
    output: Path
    length: Annotated[int, Range(at_least=1)] = 16
    """Numbers of a vector."""
    kl_weight: Annotated[float, Range(above=0)] = 0.3
    """Of the variational one, times nats per pixel."""
    steps: Annotated[int, Range(at_least=1)] = 6000
    batch_size: int = 64
    classifier_epochs: int = 7
    num_samples: Annotated[int, Range(at_least=1)] = 2000
    seed: int = 0


def side_by_side(explored: Path) -> Image.Image:
    """The first samples of both, twice as large."""
    rows = []
    for name, title in TITLES.items():
        files = sorted((explored / name / "samples").glob("*.png"))[: ROWS * ROW]
        pixels = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]).repeat(2, axis=1).repeat(2, axis=2)
        rows += [("" if i else title, pixels[i : i + ROW]) for i in range(0, len(pixels), ROW)]
    return labelled_rows(rows)


def train(config: Config, name: str, data: Path) -> None:
    variational = ["--posterior", "gaussian", "--kl-weight", config.kl_weight] if name == "variational" else []
    seconds_of_script(
        "training/train_autoencoder.py",
        *("plain", "--data", data, "--output", config.output / name, *variational),
        *("--channels", 1, "--resolution", 32, "--global-latent", config.length, "--no-mirror"),
        *("--steps", config.steps, "--batch-size", config.batch_size, "--seed", config.seed),
        *("--tracker", "none", "--log-every", 200, "--sample-every", 3000),
    )


def judge(config: Config, train_zip: Path, test_zip: Path) -> None:
    """Samples of both, and their figures in the features of a classifier."""
    explored, classifier = config.output / "explored", config.output / "classifier"
    vaes = [word for name in TITLES for word in ("--vae", config.output / name)]
    seconds_of_script(
        "pipelines/explore.py",
        *(*vaes, "--data", train_zip, "--output", explored),
        *("--num-samples", config.num_samples, "--seed", config.seed),
    )
    if not (classifier / "results.json").exists():
        seconds_of_script(
            "benchmarks/train_classifier.py",
            *("--data", train_zip, "--val-data", test_zip, "--output", classifier),
            *("--epochs", config.classifier_epochs, "--channels", 1, "--resolution", 32),
        )
    samples = [word for name in TITLES for word in ("--samples", explored / name / "samples")]
    seconds_of_script(
        "benchmarks/generation.py",
        *("--data", test_zip, *samples, "--features", classifier),
        *("--num-images", config.num_samples, "--output", config.output / "judged"),
    )


def main(config: Config) -> None:
    check_ranges(config)
    check_writable(config.output)
    train_zip, test_zip = (config.output / f"{part}.zip" for part in ("train", "t10k"))
    for target in (train_zip, test_zip):
        pixels, labels = read_fashion_mnist(config.data, target.stem)
        write_class_zip(target, zip(pixels, (FASHION[n] for n in labels), strict=True))
    for name in TITLES:
        train(config, name, train_zip)
    judge(config, train_zip, test_zip)
    side_by_side(config.output / "explored").save(config.output / "samples.png")
    results = {
        "training_seconds": {name: training_seconds(config.output / name) for name in TITLES},
        "figures": json.loads((config.output / "judged" / "results.json").read_text())["results"],
    }
    write_report(config.output, provenance(config), results)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Samples of a plain and of a variational autoencoder."))
