"""Samples from the latent space of a plain and of a variational autoencoder, by how near to real images they are.

python benchmarks/studies/prior_samples.py --data ../shared/data/fashion-mnist --output DIR

Both are train_vae.py's `plain` with one vector an image, alike but for the posterior and the KL. Latents are drawn as
pipelines/explore.py draws them: from N(0, 1) for the variational one, and for the plain one, which has no prior, from a
normal distribution with each number's mean and deviation, which is the best that can be done for it that simply. The
distance is Fréchet's in the features of a classifier that saw real images alone (benchmarks/generation.py). The
same command goes on with what was trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm_vae.data.idx import FASHION, read_fashion_mnist, write_class_zip
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.files import check_writable, write_json
from ldm_vae.grids import labelled_rows
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import git_revision, training_seconds, versions
from ldm_vae.timing import describe_machine, seconds_of_script

ROOT = Path(__file__).parent.parent.parent
SHOWN, SHOWN_A_ROW = 4, 12
"""Rows of samples on the picture."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the comparison."""

    data: Path
    output: Path
    length: int = 16
    """Numbers of a vector."""
    kl_weight: float = 0.3
    """Of the variational one, times nats per pixel."""
    steps: int = 6000
    batch_size: int = 64
    classifier_epochs: int = 7
    num_samples: int = 2000
    seed: int = 0


def script(name: Any, *words: Any) -> None:
    seconds_of_script(ROOT / name, *words)


def side_by_side(explored: Path) -> Image.Image:
    """The first samples of both."""
    rows = []
    titles = {
        "plain": "plain, latents from each number's mean and deviation",
        "variational": "variational, latents from N(0, 1)",
    }
    for name, title in titles.items():
        files = sorted((explored / name / "samples").glob("*.png"))[: SHOWN * SHOWN_A_ROW]
        pixels = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]).repeat(2, axis=1).repeat(2, axis=2)
        for first in range(0, len(pixels), SHOWN_A_ROW):
            rows.append(("" if first else title, pixels[first : first + SHOWN_A_ROW]))
    return labelled_rows(rows)


def main(config: Config) -> None:
    if min(config.length, config.steps, config.num_samples) < 1 or config.kl_weight <= 0:
        raise ConfigError("--length, --steps, --num-samples and --kl-weight must be above 0")
    check_writable(config.output)
    zips = {part: config.output / f"{part}.zip" for part in ("train", "t10k")}
    for part, target in zips.items():
        pixels, labels = read_fashion_mnist(config.data, part)
        write_class_zip(target, zip(pixels, (FASHION[n] for n in labels), strict=True))
    variants = {"plain": [], "variational": ["--posterior", "gaussian", "--kl-weight", config.kl_weight]}
    for name, own in variants.items():
        script(
            *("training/train_vae.py", "plain", "--data", zips["train"], "--output", config.output / name, *own),
            *("--channels", 1, "--resolution", 32, "--global-latent", config.length, "--no-mirror"),
            *("--steps", config.steps, "--batch-size", config.batch_size, "--seed", config.seed),
            *("--tracker", "none", "--log-every", 200, "--sample-every", 3000),
        )
    vaes = [word for name in variants for word in ("--vae", config.output / name)]
    explored = config.output / "explored"
    shown = ("--data", zips["train"], "--output", explored, "--num-samples", config.num_samples, "--seed", config.seed)
    script("pipelines/explore.py", *vaes, *shown)
    side_by_side(explored).save(config.output / "samples.png")
    classifier = config.output / "classifier"
    if not (classifier / "results.json").exists():
        given = ("--data", zips["train"], "--val-data", zips["t10k"], "--output", classifier)
        size = ("--epochs", config.classifier_epochs, "--channels", 1, "--resolution", 32)
        script("benchmarks/train_classifier.py", *given, *size)
    samples = [word for name in variants for word in ("--samples", explored / name / "samples")]
    judged = config.output / "judged"
    script(
        *("benchmarks/generation.py", "--data", zips["t10k"], *samples, "--features", classifier),
        *("--num-images", config.num_samples, "--output", judged),
    )
    record = {
        "config": as_json(config),
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "git": git_revision(),
        "training_seconds": {name: training_seconds(config.output / name) for name in variants},
        "figures": json.loads((judged / "results.json").read_text())["results"],
    }
    write_json(config.output / "results.json", record)
    print((judged / "table.md").read_text())


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Samples of a plain and of a variational autoencoder."))
