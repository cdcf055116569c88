"""Vectors of images by an autoencoder, at equal length beside principal components and random projections.

python benchmarks/studies/embeddings.py --data ../shared/data/fashion-mnist --output DIR

For each length: the squared error of what a decoder makes of the vector again, and how often a class is known from it,
by the 5 nearest neighbours and by a linear probe (logistic regression on standardised vectors), on test images. Ours
are train_vae.py's presets with --global-latent, trained here; the same command goes on with what was trained. A random
projection's decoder is the least-squares one. The map is t-SNE's (van der Maaten & Hinton 2008) of the test vectors,
drawn as what their decoder makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ldm_vae.analysis.embedding import embed
from ldm_vae.data.conversion import to_images
from ldm_vae.data.idx import FASHION, read_fashion_mnist, write_class_zip
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.files import atomic, check_writable, write_json
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import git_revision, training_seconds, versions
from ldm_vae.timing import describe_machine, seconds_of_script

ROOT = Path(__file__).parent.parent.parent
BATCH = 100
NEIGHBOURS = 5
Values = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the embedding benchmark."""

    data: Path
    output: Path
    lengths: tuple[int, ...] = (8, 16, 32, 64)
    preset: str = "plain"
    """Of train_vae.py."""
    steps: int = 6000
    batch_size: int = 64
    num_train: int = 20_000
    """Training images that the probes see; components and networks see all."""
    num_test: int = 10_000
    map_of: int = 32
    """The length whose map is drawn."""
    map_size: int = 2000
    """Images on the map."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Vectors of the training and test images, and the test images made from theirs, (N, 32 * 32) in [0, 1]."""

    train: Values
    test: Values
    restored: Values


def by_autoencoder(train: Values, test: Values, config: Config, length: int) -> tuple[Embedding, float]:
    """Ours, and the seconds of its training, by the trainer: it resumes, or refuses other settings than before."""
    run = config.output / f"run-{length}"
    words: list[object] = [config.preset, "--data", config.output / "train.zip", "--output", run, "--channels", 1]
    words += ["--resolution", 32, "--global-latent", length, "--steps", config.steps, "--seed", config.seed]
    words += ["--batch-size", config.batch_size, "--tracker", "none", "--log-every", 200, "--sample-every", 3000]
    words += ["--no-mirror"]  # boots look to the left
    seconds_of_script(ROOT / "training" / "train_vae.py", *words)
    seconds = training_seconds(run)
    vae = load_autoencoder(str(run))

    def vectors(pixels: Values) -> Values:
        parts = [embed(vae, to_images(p)) for p in np.array_split(pixels, -(-len(pixels) // BATCH))]
        return torch.cat(parts).numpy()

    found = vectors(test)
    with torch.inference_mode():
        parts = torch.from_numpy(found)[:, :, None, None].split(BATCH)
        made = torch.cat([vae.decode(z).sample for z in parts]).add(1).div(2).flatten(1).numpy()
    return Embedding(train=vectors(train), test=found, restored=made), seconds


def by_components(train: Values, test: Values, config: Config, length: int) -> tuple[Embedding, float]:
    from sklearn.decomposition import PCA

    pca = PCA(length, random_state=config.seed).fit(flat(train))
    found = pca.transform(flat(test))
    return Embedding(train=pca.transform(flat(train)), test=found, restored=pca.inverse_transform(found)), 0.0


def by_projection(train: Values, test: Values, config: Config, length: int) -> tuple[Embedding, float]:
    from sklearn.random_projection import GaussianRandomProjection

    projection = GaussianRandomProjection(length, random_state=config.seed).fit(flat(train))
    own, found = projection.transform(flat(train)), projection.transform(flat(test))
    mean = flat(train).mean(axis=0)
    back, *_ = np.linalg.lstsq(own - own.mean(axis=0), flat(train) - mean, rcond=None)
    return Embedding(train=own, test=found, restored=(found - own.mean(axis=0)) @ back + mean), 0.0


def flat(pixels: Values) -> Values:
    return pixels.reshape(len(pixels), -1).astype(np.float32) / 255


METHODS: dict[str, Callable[..., tuple[Embedding, float]]] = {
    "ours": by_autoencoder,
    "PCA": by_components,
    "random projection": by_projection,
}


def figures(embedding: Embedding, labels: Values, test_labels: Values, test: Values) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    seen = embedding.train[: len(labels)]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(seen, labels)
    near = KNeighborsClassifier(NEIGHBOURS).fit(seen, labels)
    return {
        "squared_error": float(np.square(embedding.restored.clip(0, 1) - flat(test)).mean()),
        "nearest_neighbours": float(near.score(embedding.test, test_labels)),
        "linear_probe": float(probe.score(embedding.test, test_labels)),
    }


def draw_map(vectors: Values, pixels: Values, labels: Values, seed: int) -> Image.Image:
    """Thumbnails (N, 32, 32, 1), tinted by class, where t-SNE puts their vectors."""
    from sklearn.manifold import TSNE

    places = TSNE(init="pca", random_state=seed).fit_transform(vectors)
    places = (places - places.min(axis=0)) / np.ptp(places, axis=0)
    side = 1600
    sheet = Image.new("RGB", (side, side), "white")
    for (x, y), thumb, label in zip(places, pixels, labels, strict=True):
        hue = np.asarray(Image.new("HSV", (1, 1), (int(label) * 25, 200, 230)).convert("RGB"))[0, 0] / 255
        ink = thumb[:, :, 0] / 255
        tinted = (255 * (1 - ink[:, :, None] * (1 - hue))).astype(np.uint8)
        place = (int(x * (side - 32)), int(y * (side - 32)))
        sheet.paste(Image.fromarray(tinted), place, Image.fromarray((255 * (ink > 0.05)).astype(np.uint8)))
    return sheet


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{NEIGHBOURS} nearest neighbours"
    lines = [f"| numbers | method | squared error | of PCA's | {head} | linear probe |", "|" + " --- |" * 6]
    for r in rows:
        pca = next(x for x in rows if x["method"] == "PCA" and x["length"] == r["length"])
        error = r["squared_error"]
        lines.append(
            f"| {r['length']} | {r['method']} | {error:.5f} | {error / pca['squared_error']:.2f} "
            f"| {r['nearest_neighbours']:.1%} | {r['linear_probe']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    if not config.lengths or min(*config.lengths, config.num_train, config.num_test, config.steps, config.map_size) < 1:
        raise ConfigError("--lengths, --num-train, --num-test, --steps and --map-size must be at least 1")
    if config.map_of not in config.lengths:
        raise ConfigError(f"--map-of {config.map_of} is none of --lengths")
    check_writable(config.output)
    pixels, labels = read_fashion_mnist(config.data, "train")
    test, test_labels = read_fashion_mnist(config.data, "t10k")
    write_class_zip(config.output / "train.zip", zip(pixels, (FASHION[n] for n in labels), strict=True))
    labels = labels[: config.num_train]
    test, test_labels = test[: config.num_test], test_labels[: config.num_test]
    rows = []
    for length in tqdm(config.lengths, unit="length"):
        for name, method in METHODS.items():
            embedding, seconds = method(pixels, test, config, length)
            found = figures(embedding, labels, test_labels, test)
            rows.append({"length": length, "method": name, **found, "training_seconds": seconds})
            if name == "ours" and length == config.map_of:
                shown = slice(config.map_size)
                made = (embedding.restored[shown].reshape(-1, *test.shape[1:]).clip(0, 1) * 255).astype(np.uint8)
                picture = draw_map(embedding.test[shown], made, test_labels[shown], config.seed)
                picture.save(config.output / "map.png")
    record = {
        "config": as_json(config),
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "git": git_revision(),
        "results": rows,
    }
    write_json(config.output / "results.json", record)
    with atomic(config.output / "table.md") as out:
        out.write(table(rows).encode())
    print(table(rows))
    print(f"figures and the map are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Vectors of images, beside principal components."))
