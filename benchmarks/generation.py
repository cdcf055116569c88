"""Measure generated images against a data set, and how long they take to make, by one pinned protocol.

python benchmarks/generation.py --data PATH --samples PATH [--samples ...] [--real PATH] --output DIR
python benchmarks/generation.py --data PATH --pipeline RUN_OR_MODEL --num-images N --output DIR
python benchmarks/generation.py --pipeline RUN_OR_MODEL --time --output DIR

The protocol: the centred square of an image, resampled to R x R with PIL's bicubic filter, uint8; its features, in
batches of one shape; distances in float64. Both sides always have the same number of images N, and beside each figure
stands that of N real images against the N of the reference: what a perfect generator would get. Which N of a larger set
are taken depends on the seed alone. One process; measure times on an idle machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from diffusers.utils import logging
from torch import Tensor

from ldm_vae.commands.resumable import CONTACT_SHEET
from ldm_vae.data.conversion import to_pixels
from ldm_vae.data.file_sources import FileSource
from ldm_vae.data.images import Pixels, centre_square, convert_channels
from ldm_vae.data.reader import USUAL
from ldm_vae.data.sources import Source, check_finite, open_source
from ldm_vae.data.squares import shuffled_squares
from ldm_vae.errors import ConfigError, DataError, one_line_errors
from ldm_vae.files import check_writable
from ldm_vae.metrics import SMALLEST_SET, frechet_distance, kernel_distance, mean_with_interval, precision_recall
from ldm_vae.models.features import NetworkInput, load_features
from ldm_vae.pipeline import LatentDiffusionPipeline, load_pipeline
from ldm_vae.report import markdown_table, provenance, with_interval, write_report
from ldm_vae.runs.config import Range, Reading, check_ranges, parse_flags
from ldm_vae.sampling import SCHEDULERS, make_scheduler, prediction_of
from ldm_vae.timing import seconds_of

REAL = "real against real"


@dataclass(frozen=True, kw_only=True)
class Config:
    output: Path
    data: str | None = None
    """The reference: real images."""
    samples: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Generated images, in any source, in class folders or not; repeat the flag for each set."""
    pipeline: str | None = None
    """Run directory, pipeline folder or hub id, to make --num-images images with, or to time."""
    real: str | None = None
    """Other real images, for real against real; by default the reference is halved."""
    features: str | None = None
    """efficientnet-lite0 (pip install 'ldm-vae[features]'), a classifier's folder, an exported module (.pt2) or a
    TorchScript one; by default Inception."""
    features_input: NetworkInput = "images"
    """What a module of --features takes: float32 in -1..1 (images) or uint8 (pixels), both (B, C, R, R)."""
    num_images: Annotated[int | None, Range(at_least=1)] = None
    """N; by default as many as all sets have."""
    resolution: Annotated[int | None, Range(at_least=1)] = None
    """Side R of the squares; by default what the classifier was trained on, or 256."""
    channels: Annotated[int | None, Range(at_least=1)] = None
    """Of the squares; by default those of the features, or 3."""
    batch_size: Annotated[int, Range(at_least=1)] = 32
    seed: Annotated[int, Range(at_least=0)] = 0
    """Chooses the images of larger sets; image i of --pipeline has this seed + i."""
    num_inference_steps: Annotated[int, Range(at_least=1)] = 50
    guidance_scale: float = 1.0
    time: bool = False
    """Time --pipeline with each scheduler that fits it."""
    time_steps: Annotated[tuple[int, ...], Range(at_least=1)] = (10, 20, 50, 250)
    time_batch_size: Annotated[int, Range(at_least=1)] = 1
    time_seconds: float = 1.0
    """Least time for each measurement, after a warm-up; at least three calls are timed."""
    reading: Reading = USUAL


Row = dict[str, Any]
Square = tuple[Pixels, str | None]
"""uint8 (R, R, C) and the name of its class."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Of N images: features (N, D), the names of their classes, and the classes that a classifier gives them."""

    features: Tensor
    classes: list[str | None]
    recognised: list[int]

    def part(self, start: int, stop: int) -> ImageSet:
        part = slice(start, stop)
        return ImageSet(features=self.features[part], classes=self.classes[part], recognised=self.recognised[part])


class Protocol:
    """Turns images of any kind into an ImageSet: which squares, how many channels, which features."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.extract = load_features(config.features, network_input=config.features_input, device=device)
        self.channels = config.channels or self.extract.channels or 3
        if self.extract.channels not in (None, self.channels):
            raise ConfigError(f"--channels is {self.channels}: {self.extract.name} takes {self.extract.channels}")
        self.resolution = config.resolution or self.extract.resolution or 256
        self.reading = config.reading
        self.seed, self.batch_size = config.seed, config.batch_size
        self.bad_images: dict[str, dict[str, str]] = {}
        noise = np.random.default_rng(0).integers(256, size=(self.batch_size, *[self.resolution] * 2, self.channels))
        self.num_features = self.extract(noise.astype(np.uint8))[0].shape[1]  # also finds errors before any work

    def open(self, path: str) -> Source:
        """A source without the contact sheet that pipelines/generate.py puts beside its images."""
        source = open_source(path, channels=self.channels, resolution=self.resolution, options=self.reading)
        if isinstance(source, FileSource):
            source.names = [n for n in source.names if n != CONTACT_SHEET]
        return source

    def measure_source(self, name: str, source: Source, limit: int | None) -> ImageSet:
        """The first `limit` usable images in the order that the seed gives; all of them without a limit."""
        bad = self.bad_images.setdefault(name, {})
        limit = limit or len(source)
        samples = shuffled_squares(source, resolution=self.resolution, seed=self.seed, limit=limit, bad_images=bad)
        return self.measure((s.pixels, None if s.label is None else source.classes[s.label]) for s in samples)

    def measure(self, squares: Iterator[Square]) -> ImageSet:
        features, classes, recognised = [torch.empty(0, self.num_features, dtype=torch.float64)], [], []
        while batch := list(islice(squares, self.batch_size)):
            pixels = np.stack([p for p, _ in batch])
            missing = self.batch_size - len(batch)  # exported modules may take one batch size only
            output, labels = self.extract(np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)]))
            features.append(output[: len(batch)])
            classes += [c for _, c in batch]
            recognised += [] if labels is None else labels[: len(batch)].tolist()
        return ImageSet(features=torch.cat(features), classes=classes, recognised=recognised)

    def generate(self, pipeline: LatentDiffusionPipeline, config: Config) -> Iterator[Square]:
        """The images that pipelines/generate.py makes: image i from seed + i, all classes in turn."""
        num_classes, names = pipeline.num_classes, pipeline.config.class_names
        all_numbers = range(config.num_images or 0)
        for start in all_numbers[:: self.batch_size]:
            numbers = all_numbers[start : start + self.batch_size]
            labels = [i % num_classes for i in numbers] if num_classes else None
            images = pipeline(
                labels,
                num_images=len(numbers),
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                generator=[config.seed + i for i in numbers],
                output_type="pt",
            ).images  # (B, C, H, W) in [0, 1]
            for i, pixels in enumerate(to_pixels(images * 2 - 1)):
                name = None if labels is None else names[labels[i]] if names else str(labels[i])
                yield centre_square(convert_channels(pixels, self.channels), self.resolution), name


def compare(data: str, pipeline: LatentDiffusionPipeline | None, config: Config, device: torch.device) -> Row:
    """All sets against the reference, and real images against it."""
    protocol = Protocol(config, device)
    reference, sets = measure_sets(data, pipeline, config, protocol)
    count = min(len(images.features) for images in (reference, *sets.values()))
    if count < SMALLEST_SET:
        raise DataError(f"{count} images on each side are too few: at least {SMALLEST_SET} are needed")
    reference, names = reference.part(0, count), protocol.extract.class_names
    return {
        "images": count,
        "features": {"name": protocol.extract.name, "number": protocol.num_features},
        "resolution": protocol.resolution,
        "channels": protocol.channels,
        "bad_images": {name: bad for name, bad in protocol.bad_images.items() if bad},
        "results": {name: figures(reference, s.part(0, count), names, config.seed) for name, s in sets.items()},
    }


def measure_sets(
    data: str, pipeline: LatentDiffusionPipeline | None, config: Config, protocol: Protocol
) -> tuple[ImageSet, dict[str, ImageSet]]:
    """The reference, as many real images as the smallest generated set has; and by name other real ones and each set.

    Raises:
        DataError: fewer images than --num-images.
    """
    sources = {name: protocol.open(name) for name in dict.fromkeys([*config.samples, data, config.real or data])}
    for name, source in sources.items():
        check_finite(source, name, config.num_images)
        check_count(name, len(source), config, halved=name == data and config.real is None)

    def images_of(name: str, limit: int | None, *, halved: bool = False) -> ImageSet:
        images = protocol.measure_source(name, sources[name], limit)
        check_count(name, len(images.features), config, halved=halved)
        return images

    sets = {name: images_of(name, config.num_images) for name in dict.fromkeys(config.samples)}
    if pipeline is not None:
        guidance = f", guidance {config.guidance_scale:g}" if config.guidance_scale != 1 else ""
        name = f"{config.pipeline} ({config.num_inference_steps} steps{guidance})"
        sets[name] = protocol.measure(protocol.generate(pipeline, config))
    count = min(len(images.features) for images in sets.values())
    if config.real is None:
        both = images_of(data, 2 * count, halved=True)
        count = min(count, len(both.features) // 2)
        return both.part(0, count), {REAL: both.part(count, 2 * count), **sets}
    return images_of(data, count), {REAL: images_of(config.real, count), **sets}


def check_count(name: str, count: int, config: Config, *, halved: bool = False) -> None:
    """Raises DataError when a set has fewer images than --num-images."""
    needed = (config.num_images or 0) * (2 if halved else 1)
    if count < needed:
        why = ", for it is halved: --real PATH would spare that" if halved else ""
        raise DataError(f"{name} has {count} usable images, --num-images {config.num_images} needs {needed}{why}")


def figures(reference: ImageSet, images: ImageSet, class_names: tuple[str, ...], seed: int) -> Row:
    """Every figure of one set of images."""
    precision, recall = precision_recall(reference.features, images.features)
    return {
        "frechet": frechet_distance(reference.features, images.features),
        "kernel": kernel_distance(reference.features, images.features, seed=seed),
        "precision": precision,
        "recall": recall,
        "recognised": recognised_as_their_class(images, class_names),
    }


def recognised_as_their_class(images: ImageSet, class_names: tuple[str, ...]) -> Row | None:
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


@torch.inference_mode()
def time_pipeline(pipeline: LatentDiffusionPipeline, config: Config, device: torch.device) -> list[Row]:
    """Seconds an image, and milliseconds an image and step, with each scheduler and number of steps: medians."""
    batch_size, prediction = config.time_batch_size, prediction_of(pipeline.scheduler)
    labels = [i % pipeline.num_classes for i in range(batch_size)] if pipeline.num_classes else None

    sample = partial(
        pipeline,
        labels,
        num_images=batch_size,
        guidance_scale=config.guidance_scale,
        generator=list(range(batch_size)),
        output_type="latent",
    )

    def median_seconds(call: Callable[[], object]) -> float:
        return statistics.median(seconds_of(call, device=device, seconds=config.time_seconds, warmup=1))

    decoding = median_seconds(partial(pipeline.decode, sample(num_inference_steps=2).images))
    rows = []
    for name in SCHEDULERS[prediction]:
        pipeline.scheduler = make_scheduler(prediction, name)
        for steps in config.time_steps:
            denoising = median_seconds(partial(sample, num_inference_steps=steps))
            row = {"scheduler": name, "steps": steps, "seconds_per_image": (denoising + decoding) / batch_size}
            rows.append(row | {"milliseconds_per_step": 1e3 * denoising / steps / batch_size})
    return rows


def comparison_table(comparison: Row) -> str:
    """A line a set, then the classes that have a figure, and what to know of the figures."""
    results, count, number = comparison["results"], comparison["images"], comparison["features"]["number"]
    rows, judged = [], {}
    for name, r in results.items():
        row = {"images": name, "Fréchet distance": f"{r['frechet']:.4g}"}
        row |= {"kernel distance x 1000": f"{1e3 * r['kernel']:.4g}"}
        row |= {"precision": f"{r['precision']:.3f}", "recall": f"{r['recall']:.3f}", "recognised as their class": "-"}
        if r["recognised"]:
            row["recognised as their class"] = with_interval(r["recognised"], ".1%")
            judged[name] = r["recognised"]["of_class"]
        rows.append(row)
    text = f"{count} images a set, {number} features of {comparison['features']['name']}\n\n" + markdown_table(rows)
    if count <= number:
        text += f"\n{count} images do not span {number} features: the distances compare with real against real alone\n"
    classes = sorted({c for of_class in judged.values() for c in of_class})
    cells = [{"recognised, of class": c, **{n: f"{j[c]:.1%}" for n, j in judged.items() if c in j}} for c in classes]
    return text + ("\n" + markdown_table(cells) if cells else "")


def timing_table(rows: list[Row], config: Config) -> str:
    names = {"seconds_per_image": "seconds an image", "milliseconds_per_step": "ms an image and step"}
    cells = [{names.get(k, k): v if isinstance(v, str) else f"{v:.4g}" for k, v in row.items()} for row in rows]
    return f"{config.time_batch_size} images at once\n\n" + markdown_table(cells)


def check_flags(config: Config) -> None:
    """Raises ConfigError for flags that cannot work, alone or together."""
    check_ranges(config)
    if not config.samples and config.pipeline is None:
        raise ConfigError("nothing to measure: give --samples PATH or --pipeline RUN_OR_MODEL")
    if config.time and config.pipeline is None:
        raise ConfigError("--time needs the --pipeline to time")
    if config.data is None and (config.samples or not config.time):
        raise ConfigError("no --data given: name the real images to compare with")
    if config.data and config.pipeline and config.num_images is None:
        raise ConfigError("how many images should --pipeline make? add --num-images 1000, say")
    if config.real is not None and config.real == config.data:
        raise ConfigError("--real is --data: leave it out, and the reference is halved")


def main(config: Config) -> None:
    logging.disable_progress_bar()
    check_flags(config)
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ConfigError("this benchmark is for one process: run it with plain python")
    check_writable(config.output)
    pipeline = None
    if config.pipeline is not None:
        pipeline = load_pipeline(config.pipeline).to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
    results: Row = {}
    tables = []
    if config.data is not None:
        results |= compare(config.data, pipeline, config, accelerator.device)
        tables.append(comparison_table(results))
    if config.time and pipeline is not None:
        results["timing"] = time_pipeline(pipeline, config, accelerator.device)
        tables.append(timing_table(results["timing"], config))
    write_report(config.output, provenance(config, accelerator.device), results, "\n".join(tables))
    num_bad = sum(len(bad) for bad in results.get("bad_images", {}).values())
    print(f"{num_bad} bad images; the figures are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Measure generated images, and how long they take to make."))
