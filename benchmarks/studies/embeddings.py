"""Vectors of images by an autoencoder, beside principal components and random projections of the same length.

python benchmarks/studies/embeddings.py --data ../shared/data/fashion-mnist --output DIR

For each length: the squared error of the images decoded from the vectors, and how often the class is recognised from
the vector, by the 5 nearest neighbours and by a linear probe (logistic regression on standardised vectors), on test
images. Ours are train_autoencoder.py's presets with --global-latent; the same command resumes their training. A random
projection is decoded by least squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from ldm_vae.analysis.embedding import embed
from ldm_vae.data.conversion import to_images
from ldm_vae.data.idx import FASHION, read_fashion_mnist, write_class_zip
from ldm_vae.errors import one_line_errors
from ldm_vae.files import check_writable
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.progress import progress
from ldm_vae.report import markdown_table, provenance, write_report
from ldm_vae.runs.config import Range, check_ranges, parse_flags
from ldm_vae.runs.run import training_seconds
from ldm_vae.timing import seconds_of_script

BATCH = 100
NEIGHBOURS = 5
Values = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the embedding benchmark."""

    data: Path
    output: Path
    lengths: Annotated[tuple[int, ...], Range(at_least=1)] = (8, 16, 32, 64)
    preset: str = "plain"
    """Of train_autoencoder.py."""
    steps: Annotated[int, Range(at_least=1)] = 6000
    batch_size: int = 64
    num_train: Annotated[int, Range(at_least=1)] = 20_000
    """Training images that the classifiers see; components and networks see all."""
    num_test: Annotated[int, Range(at_least=1)] = 10_000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Vectors of the training and the test images, and the test images decoded, (N, 32 * 32) in [0, 1]."""

    train: Values
    test: Values
    decoded: Values
    training_seconds: float = 0.0


def by_autoencoder(train: Values, test: Values, config: Config, length: int) -> Embedding:
    run = config.output / f"run-{length}"
    seconds_of_script(
        *("training/train_autoencoder.py", config.preset, "--data", config.output / "train.zip", "--output", run),
        *("--channels", 1, "--resolution", 32, "--global-latent", length, "--steps", config.steps),
        *("--seed", config.seed, "--batch-size", config.batch_size, "--tracker", "none"),
        *("--log-every", 200, "--sample-every", 3000, "--no-mirror"),  # boots look to the left
    )
    vae = load_autoencoder(str(run))

    def vectors(pixels: Values) -> Values:
        parts = [embed(vae, to_images(p)) for p in np.array_split(pixels, -(-len(pixels) // BATCH))]
        return torch.cat(parts).numpy()

    test_vectors = vectors(test)
    with torch.inference_mode():
        parts = torch.from_numpy(test_vectors)[:, :, None, None].split(BATCH)
        decoded = torch.cat([vae.decode(z).sample for z in parts]).add(1).div(2).flatten(1).numpy()
    return Embedding(train=vectors(train), test=test_vectors, decoded=decoded, training_seconds=training_seconds(run))


def by_components(train: Values, test: Values, config: Config, length: int) -> Embedding:
    from sklearn.decomposition import PCA

    pca = PCA(length, random_state=config.seed).fit(flat(train))
    vectors = pca.transform(flat(test))
    return Embedding(train=pca.transform(flat(train)), test=vectors, decoded=pca.inverse_transform(vectors))


def by_projection(train: Values, test: Values, config: Config, length: int) -> Embedding:
    from sklearn.random_projection import GaussianRandomProjection

    projection = GaussianRandomProjection(length, random_state=config.seed).fit(flat(train))
    train_vectors, vectors = projection.transform(flat(train)), projection.transform(flat(test))
    mean, mean_vector = flat(train).mean(axis=0), train_vectors.mean(axis=0)
    back, *_ = np.linalg.lstsq(train_vectors - mean_vector, flat(train) - mean, rcond=None)
    return Embedding(train=train_vectors, test=vectors, decoded=(vectors - mean_vector) @ back + mean)


def flat(pixels: Values) -> Values:
    """uint8 (N, H, W, C) -> (N, H * W * C) in [0, 1]."""
    return pixels.reshape(len(pixels), -1).astype(np.float32) / 255


METHODS: dict[str, Callable[[Values, Values, Config, int], Embedding]] = {
    "ours": by_autoencoder,
    "PCA": by_components,
    "random projection": by_projection,
}


def figures(embedding: Embedding, labels: Values, test_labels: Values, test: Values) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors = embedding.train[: len(labels)]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(vectors, labels)
    nearest = KNeighborsClassifier(NEIGHBOURS).fit(vectors, labels)
    return {
        "squared_error": float(np.square(embedding.decoded.clip(0, 1) - flat(test)).mean()),
        "nearest_neighbours": float(nearest.score(embedding.test, test_labels)),
        "linear_probe": float(probe.score(embedding.test, test_labels)),
        "training_seconds": embedding.training_seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    pca = {row["length"]: row["squared_error"] for row in rows if row["method"] == "PCA"}
    return markdown_table(
        [
            {
                "numbers": str(row["length"]),
                "method": row["method"],
                "squared error": f"{row['squared_error']:.5f}",
                "of PCA's": f"{row['squared_error'] / pca[row['length']]:.2f}",
                f"{NEIGHBOURS} nearest neighbours": f"{row['nearest_neighbours']:.1%}",
                "linear probe": f"{row['linear_probe']:.1%}",
            }
            for row in rows
        ]
    )


def main(config: Config) -> None:
    check_ranges(config)
    check_writable(config.output)
    pixels, labels = read_fashion_mnist(config.data, "train")
    test, test_labels = read_fashion_mnist(config.data, "t10k")
    write_class_zip(config.output / "train.zip", zip(pixels, (FASHION[n] for n in labels), strict=True))
    labels = labels[: config.num_train]
    test, test_labels = test[: config.num_test], test_labels[: config.num_test]
    rows = []
    for length in progress(config.lengths, unit="length"):
        for name, method in METHODS.items():
            embedding = method(pixels, test, config, length)
            rows.append({"length": length, "method": name, **figures(embedding, labels, test_labels, test)})
    write_report(config.output, provenance(config), {"results": rows}, table(rows))
    print(f"figures are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Vectors of images, beside principal components."))
