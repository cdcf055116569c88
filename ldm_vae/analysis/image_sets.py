"""Sets of images as features: how two sets compare, and how near to the training images a set comes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.images import Pixels, centre_square, convert_channels
from ldm_vae.files import atomic
from ldm_vae.grids import labelled_rows, visible
from ldm_vae.metrics import (
    exact_distances,
    frechet_distance,
    kernel_distance,
    mean_with_interval,
    precision_recall,
    ratio_of_medians,
)
from ldm_vae.models.features import FeatureExtractor
from ldm_vae.models.interface import channels_of
from ldm_vae.models.reconstruction import reconstruct
from ldm_vae.report import markdown_table, with_interval

REAL, RECONSTRUCTIONS = "real against real", "reconstructions"
SHOWN = 8
"""Images of a set that are closest to training images, and as many others, beside those."""
AT_ONCE = 8
"""Images that go through an autoencoder together."""
ROWS = 64
"""Images whose distances to all training images are computed at a time."""

Square = tuple[Pixels, str | None]
"""uint8 (R, R, C) and the name of its class."""
Squares = Callable[..., Iterator[Square]]
"""The images of a set in their order, from the first one at each call; those of a source also at another R, as
`resolution`."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Of N images: features (N, D), the names of their classes, and the classes that a classifier gives them."""

    squares: Squares
    features: Tensor
    classes: list[str | None]
    recognised: list[int]

    def part(self, start: int, stop: int) -> ImageSet:
        def squares(**options: Any) -> Iterator[Square]:
            return islice(self.squares(**options), start, stop)

        part = slice(start, stop)
        return ImageSet(
            squares=squares,
            features=self.features[part],
            classes=self.classes[part],
            recognised=self.recognised[part],
        )


def measure(extract: FeatureExtractor, squares: Squares, batch_size: int) -> ImageSet:
    """Every batch has the same shape: exported modules may take one batch size only."""
    features, classes, recognised = [torch.empty(0, 0, dtype=torch.float64)], [], []
    images = squares()
    while batch := list(islice(images, batch_size)):
        pixels = np.stack([p for p, _ in batch])
        missing = batch_size - len(batch)
        output, labels = extract(np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)]))
        features.append(output[: len(batch)])
        classes += [c for _, c in batch]
        recognised += [] if labels is None else labels[: len(batch)].tolist()
    return ImageSet(
        squares=squares, features=torch.cat(features[1:] or features), classes=classes, recognised=recognised
    )


@torch.inference_mode()
def reconstructed(vae: Any, originals: Squares, channels: int, resolution: int) -> Iterator[Square]:
    """Images through an autoencoder at their own size, then as squares of these channels and this side."""
    images = originals()
    while batch := list(islice(images, AT_ONCE)):
        pixels = to_images(np.stack([convert_channels(p, channels_of(vae)) for p, _ in batch])).to(vae.device)
        for p, (_, name) in zip(to_pixels(reconstruct(vae, pixels)), batch, strict=True):
            yield centre_square(convert_channels(p, channels), resolution), name


def figures(reference: ImageSet, images: ImageSet, class_names: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Every figure of one set of images beside another."""
    precision, recall = precision_recall(reference.features, images.features)
    return {
        "frechet": frechet_distance(reference.features, images.features),
        "kernel": kernel_distance(reference.features, images.features, seed=seed),
        "precision": precision,
        "recall": recall,
        "recognised": recognised_as_their_class(images, class_names),
    }


def recognised_as_their_class(images: ImageSet, class_names: tuple[str, ...]) -> dict[str, Any] | None:
    """The share of images to which a classifier gives their own class; None without classes that it knows."""
    labels = [label_of(name, class_names) for name in images.classes]
    if not images.recognised or None in labels:
        return None
    own = np.array(labels)
    right = (own == np.array(images.recognised)).astype(float)
    of_class = {class_names[k]: float(right[own == k].mean()) for k in sorted(set(own.tolist()))}
    return {**mean_with_interval(np.sort(right)), "of_class": of_class}  # sorted: the order of the images has no effect


def label_of(name: str | None, class_names: tuple[str, ...]) -> int | None:
    """From a folder's name as pipelines/generate.py writes it: the name of the class, or its number."""
    plain = unquote(name or "")
    if plain in class_names:
        return class_names.index(plain)
    return int(plain) if plain.isdecimal() and int(plain) < len(class_names) else None


def relative_figures(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """A set's figures as shares of the real images' and, of the Fréchet distance, of the reconstructions'."""
    real = rows[REAL]
    shares = {key: row[key] / real[key] for key in ("precision", "recall") if real[key] > 0}
    if row["recognised"] and real["recognised"]["mean"] > 0:
        shares["recognised"] = row["recognised"]["mean"] / real["recognised"]["mean"]
    if RECONSTRUCTIONS in rows and rows[RECONSTRUCTIONS]["frechet"] > 0:
        shares["frechet"] = row["frechet"] / rows[RECONSTRUCTIONS]["frechet"]
    return shares


def comparison_table(comparison: dict[str, Any]) -> str:
    """A line a set, then the classes that have a figure, and what to know of the figures."""
    results, count, number = comparison["results"], comparison["images"], comparison["features"]["number"]
    text = f"{count} images a set, {number} features of {comparison['features']['name']}\n\n" + figures_table(results)
    if count <= number:
        text += f"\n{count} images do not span {number} features: the distances compare with real against real alone\n"
    if compared := comparison.get("compared"):
        text += f"\nThe first {compared['images']} images of each number of steps\n\n"
        text += figures_table(compared["results"])
    judged = {name: r["recognised"]["of_class"] for name, r in results.items() if r["recognised"]}
    classes = sorted({c for of_class in judged.values() for c in of_class})
    cells = [{"recognised, of class": c, **{n: f"{j[c]:.1%}" for n, j in judged.items() if c in j}} for c in classes]
    return text + ("\n" + markdown_table(cells) if cells else "")


def figures_table(results: dict[str, Any]) -> str:
    """A line a set; in brackets the shares that `relative_figures` gives."""
    rows = []
    for name, r in results.items():
        relative = {key: f" ({value:.2f}x)" for key, value in r["relative"].items() if name != REAL}
        row = {"images": name, "Fréchet distance": f"{r['frechet']:.4g}{relative.get('frechet', '')}"}
        row |= {"kernel distance x 1000": f"{1e3 * r['kernel']:.4g}"}
        row |= {key: f"{r[key]:.3f}{relative.get(key, '')}" for key in ("precision", "recall")}
        row["recognised as their class"] = "-"
        if r["recognised"]:
            row["recognised as their class"] = with_interval(r["recognised"], ".1%") + relative.get("recognised", "")
        if "nearest" in r:
            ratio = r["nearest"]["ratio"]
            row["to the nearest training image"] = "{ratio:.3f}x [{low:.3f}, {high:.3f}]".format(**ratio)
        rows.append(row)
    shares = "\nIn brackets: times the reconstructions' distance, and times the real images' figure\n"
    return markdown_table(rows) + (shares if len(rows) > 1 else "")


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Of each of N images: the distance to its nearest training image, (N,), and which that is."""

    distances: np.ndarray
    indices: np.ndarray

    def beside(self, held_out: Nearest) -> dict[str, Any]:
        """The median distance, and its ratio to that of held-out images: well below 1 where images are copied."""
        return {
            "median": float(np.median(self.distances)),
            "ratio": ratio_of_medians(self.distances, held_out.distances),
        }


def nearest_training(images: ImageSet, training: ImageSet) -> Nearest:
    """By the Euclidean distance of features."""
    found = [exact_distances(rows, training.features).min(dim=1) for rows in images.features.split(ROWS)]
    distances, indices = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return Nearest(distances=distances, indices=indices)


def beside_training(
    sets: dict[str, ImageSet], held_out: ImageSet, training: ImageSet, folder: Path
) -> dict[str, dict[str, Any]]:
    """`Nearest.beside` of each set, and a picture of each in the folder."""
    folder.mkdir(exist_ok=True)
    usual = nearest_training(held_out, training)
    found = {name: nearest_training(images, training) for name, images in sets.items()}
    wanted = {int(nearest.indices[i]) for nearest in found.values() for i in shown_of(nearest)}
    training_images = chosen_squares(training.squares(), wanted)
    for i, (name, nearest) in enumerate(found.items()):
        with atomic(folder / f"{i} {Path(name).name}.png") as out:
            nearest_grid(sets[name], training_images, nearest, usual).save(out, "PNG")
    return {name: nearest.beside(usual) for name, nearest in found.items()}


def shown_of(nearest: Nearest) -> list[int]:
    """The images that come closest to a training image, then the first of the set."""
    closest = np.argsort(nearest.distances, kind="stable")[:SHOWN]
    return [*closest.tolist(), *range(len(nearest.distances))[:SHOWN]]


def nearest_grid(images: ImageSet, training: dict[int, Pixels], nearest: Nearest, held_out: Nearest) -> Image.Image:
    """The images of `shown_of`, each above its nearest training image."""
    positions = shown_of(nearest)
    shown = chosen_squares(images.squares(), set(positions))
    median, half, rows = np.median(held_out.distances), len(positions) // 2, []
    for label, part in (("the closest to a training image", positions[:half]), ("the first ones", positions[half:])):
        distances = " ".join(f"{d / median:.2f}" for d in nearest.distances[part])
        rows += [
            (f"{label}; distances, of held-out images' median: {distances}", [shown[i] for i in part]),
            ("their nearest training images", [training[i] for i in nearest.indices[part]]),
        ]
    return labelled_rows([(label, visible(to_images(np.stack(pixels)))) for label, pixels in rows])


def chosen_squares(squares: Iterator[Square], positions: Collection[int]) -> dict[int, Pixels]:
    return {i: pixels for i, (pixels, _) in enumerate(islice(squares, max(positions) + 1)) if i in positions}
