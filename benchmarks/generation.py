"""Measure generated images against a data set, and how long it takes to make them, by one pinned protocol.

python benchmarks/generation.py --data PATH --samples PATH [--samples ...] [--real PATH] --output DIR
python benchmarks/generation.py --data PATH --pipeline RUN_OR_MODEL --num-images N --output DIR
python benchmarks/generation.py --pipeline RUN_OR_MODEL --time --output DIR

The protocol: the centred square of an image, resampled to R x R by PIL's bicubic, uint8; features of that, in batches
of one shape; distances in float64. The same number of images N on each side, always, and beside each figure that of
N real images against the N of the reference: what a perfect generator would get. Which N of a larger set are taken
depends on the seed alone. One process; times want a machine with nothing else to do.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
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

from ldm_vae.commands.png import SHEET
from ldm_vae.data.conversion import to_pixels
from ldm_vae.data.file_sources import FileSource
from ldm_vae.data.images import Pixels, centre_square, convert_channels
from ldm_vae.data.sources import Source, check_finite, open_source
from ldm_vae.data.squares import shuffled_squares
from ldm_vae.errors import ConfigError, DataError, one_line_errors
from ldm_vae.files import atomic, check_writable, write_json
from ldm_vae.metrics import SMALLEST_SET, bootstrap_interval, frechet_distance, kernel_distance, precision_recall
from ldm_vae.models.features import FeatureExtractor, NetworkInput, load_features
from ldm_vae.pipeline import LatentDiffusionPipeline, load_pipeline
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import versions
from ldm_vae.sampling import SCHEDULERS, make_scheduler, prediction_of
from ldm_vae.timing import describe_machine, seconds_of

REAL = "real against real"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the generation benchmark."""

    output: Path
    data: str | None = None
    """The reference: real images."""
    samples: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Generated images, in any source, by classes in folders or not; give it once for each set."""
    pipeline: str | None = None
    """Run directory, pipeline folder or hub id that makes --num-images images, or that --time is about."""
    real: str | None = None
    """Other real images, for real against real; unless given, the reference is halved for it."""
    features: str | None = None
    """A classifier's folder, an exported module (.pt2) or a TorchScript one; unless given, Inception."""
    features_input: NetworkInput = "images"
    """What a module of --features takes: float32 in -1..1 (images) or uint8 (pixels), both (B, C, R, R)."""
    num_images: int | None = None
    """N; as many as all sets have unless given."""
    resolution: int | None = None
    """Side R of the squares; what the classifier was trained on, or 256, unless given."""
    channels: int | None = None
    """Of the squares; those of the features, or 3, unless given."""
    batch_size: int = 32
    seed: int = 0
    """Chooses the images of larger sets; image i of --pipeline has this seed + i."""
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    time: bool = False
    """Time --pipeline with each scheduler that fits it."""
    time_steps: tuple[int, ...] = (10, 20, 50, 250)
    time_batch_size: int = 1
    time_seconds: float = 1.0
    """Least time for each measurement, after a warm-up; there are three calls at least."""


Row = dict[str, Any]
Square = tuple[Pixels, str | None]
"""uint8 (R, R, C) and the name of the class that it should be of."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """What is kept of N images: features (N, D), the classes that they should be of, those that a classifier sees."""

    features: Tensor
    classes: list[str | None]
    seen: list[int]

    def part(self, start: int, stop: int) -> ImageSet:
        chosen = slice(start, stop)
        return ImageSet(features=self.features[chosen], classes=self.classes[chosen], seen=self.seen[chosen])


class Protocol:
    """Images of any kind -> an ImageSet: which squares, of how many channels, through which features."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.extract: FeatureExtractor = load_features(
            config.features, network_input=config.features_input, device=device
        )
        self.channels = config.channels or self.extract.channels or 3
        if self.extract.channels not in (None, self.channels):
            raise ConfigError(f"--channels is {self.channels}: {self.extract.name} takes {self.extract.channels}")
        self.resolution = config.resolution or self.extract.resolution or 256
        self.seed, self.batch_size = config.seed, config.batch_size
        self.bad_images: dict[str, dict[str, str]] = {}
        noise = np.random.default_rng(0).integers(256, size=(self.batch_size, *[self.resolution] * 2, self.channels))
        self.num_features = self.extract(noise.astype(np.uint8))[0].shape[1]  # an error comes before any work

    def open(self, path: str) -> Source:
        """A source without the contact sheet that pipelines/generate.py puts beside its images."""
        source = open_source(path, channels=self.channels, resolution=self.resolution)
        if isinstance(source, FileSource):
            source.names = [n for n in source.names if n != SHEET]
        return source

    def measure_source(self, name: str, source: Source, limit: int | None) -> ImageSet:
        """The first `limit` usable images in the order of the seed; all of them without a limit."""
        bad = self.bad_images.setdefault(name, {})
        count = min(len(source), limit or len(source))
        samples = shuffled_squares(source, resolution=self.resolution, seed=self.seed, limit=count, bad_images=bad)
        return self.measure((s.pixels, None if s.label is None else source.classes[s.label]) for s in samples)

    def measure(self, squares: Iterator[Square]) -> ImageSet:
        features, classes, seen = [torch.empty(0, self.num_features, dtype=torch.float64)], [], []
        while batch := list(islice(squares, self.batch_size)):
            pixels = np.stack([p for p, _ in batch])
            missing = self.batch_size - len(batch)  # exported modules may have been exported for one batch size
            given, recognised = self.extract(np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)]))
            features.append(given[: len(batch)])
            classes += [c for _, c in batch]
            seen += [] if recognised is None else recognised[: len(batch)].tolist()
        return ImageSet(features=torch.cat(features), classes=classes, seen=seen)

    def generate(self, pipeline: LatentDiffusionPipeline, config: Config) -> Iterator[Square]:
        """The images that pipelines/generate.py makes: image i of seed + i, all classes in turn."""
        num_classes, names = pipeline.num_classes, pipeline.config.class_names
        for start in range(0, config.num_images or 0, self.batch_size):
            numbers = range(start, min(start + self.batch_size, config.num_images or 0))
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
    sources = {name: protocol.open(name) for name in dict.fromkeys([*config.samples, data, config.real or data])}
    for name, source in sources.items():
        check_finite(source, name, config.num_images)
        enough(name, len(source), config, halved=name == data and config.real is None)
    sets = {n: protocol.measure_source(n, sources[n], config.num_images) for n in dict.fromkeys(config.samples)}
    if pipeline is not None:
        sets[generated_name(config)] = protocol.measure(protocol.generate(pipeline, config))
    count = min(len(s.features) for s in sets.values())
    if config.real is None:
        whole = protocol.measure_source(data, sources[data], 2 * count)
        enough(data, len(whole.features), config, halved=True)
        count = min(count, len(whole.features) // 2)
        reference, real = whole.part(0, count), whole.part(count, 2 * count)
    else:
        reference = protocol.measure_source(data, sources[data], count)
        real = protocol.measure_source(config.real, sources[config.real], count)
    for name, images in {**sets, data: reference, config.real or data: real}.items():
        enough(name, len(images.features), config)
        count = min(count, len(images.features))
    if count < SMALLEST_SET:
        raise DataError(f"{count} images on each side are too few: at least {SMALLEST_SET} are needed")
    sets = {name: images.part(0, count) for name, images in {REAL: real, **sets}.items()}
    reference, names = reference.part(0, count), protocol.extract.class_names
    return {
        "images": count,
        "features": {"name": protocol.extract.name, "number": protocol.num_features},
        "resolution": protocol.resolution,
        "channels": protocol.channels,
        "bad_images": {name: bad for name, bad in protocol.bad_images.items() if bad},
        "results": {name: figures(reference, images, names, config.seed) for name, images in sets.items()},
    }


def enough(name: str, found: int, config: Config, *, halved: bool = False) -> None:
    """Raises DataError when a set has fewer images than were asked for."""
    needed = (config.num_images or 0) * (2 if halved else 1)
    if found < needed:
        why = ", for it is halved: --real PATH would spare that" if halved else ""
        raise DataError(f"{name} has {found} usable images, --num-images {config.num_images} needs {needed}{why}")


def generated_name(config: Config) -> str:
    guidance = f", guidance {config.guidance_scale:g}" if config.guidance_scale != 1 else ""
    return f"{config.pipeline} ({config.num_inference_steps} steps{guidance})"


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
    """The share of images that a classifier gives their own class; None without classes that it knows."""
    labels = [label_of(name, class_names) for name in images.classes]
    if not images.seen or None in labels:
        return None
    own = np.array(labels)
    right = (own == np.array(images.seen)).astype(float)
    low, high = bootstrap_interval(np.sort(right))  # whatever the order of the images
    of_class = {class_names[k]: float(right[own == k].mean()) for k in sorted(set(own.tolist()))}
    return {"mean": float(right.mean()), "low": low, "high": high, "of_class": of_class}


def label_of(name: str | None, class_names: tuple[str, ...]) -> int | None:
    """Of a folder's name as pipelines/generate.py writes it: the class's name, or its number where it has none."""
    plain = unquote(name or "")
    if plain in class_names:
        return class_names.index(plain)
    return int(plain) if plain.isdecimal() and int(plain) < len(class_names) else None


@torch.inference_mode()
def time_pipeline(pipeline: LatentDiffusionPipeline, config: Config, device: torch.device) -> list[Row]:
    """Seconds an image, and milliseconds an image and step, with each scheduler and number of steps: medians."""
    batch_size, prediction = config.time_batch_size, prediction_of(pipeline.scheduler)
    labels = [i % pipeline.num_classes for i in range(batch_size)] if pipeline.num_classes else None
    options: Row = {"guidance_scale": config.guidance_scale, "generator": list(range(batch_size))}
    options |= {"num_images": batch_size, "output_type": "latent"}
    latents = pipeline(labels, num_inference_steps=2, **options).images
    durations = partial(seconds_of, device=device, seconds=config.time_seconds, warmup=1)
    decoding = statistics.median(durations(lambda: pipeline.decode(latents)))
    rows = []
    for name in SCHEDULERS[prediction]:
        pipeline.scheduler = make_scheduler(prediction, name)
        for steps in config.time_steps:
            call = partial(pipeline, labels, num_inference_steps=steps, **options)
            denoising = statistics.median(durations(call))
            row = {"scheduler": name, "steps": steps, "seconds_per_image": (denoising + decoding) / batch_size}
            rows.append(row | {"milliseconds_per_step": 1e3 * denoising / steps / batch_size})
    return rows


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def comparison_table(comparison: Row) -> str:
    """A line a set, then the classes that have a figure, and what to know of the figures."""
    results, count, number = comparison["results"], comparison["images"], comparison["features"]["number"]
    rows = []
    for name, r in results.items():
        share = r["recognised"]
        interval = "-" if share is None else "{mean:.1%} [{low:.1%}, {high:.1%}]".format(**share)
        cells = [name, f"{r['frechet']:.4g}", f"{1e3 * r['kernel']:.4g}", f"{r['precision']:.3f}", f"{r['recall']:.3f}"]
        rows.append([*cells, interval])
    head = ["images", "Fréchet distance", "kernel distance x 1000", "precision", "recall", "recognised as their class"]
    text = f"{count} images a set, {number} features of {comparison['features']['name']}\n\n" + markdown(head, rows)
    if count <= number:
        text += f"\n{count} images do not span {number} features: the distances compare with real against real alone\n"
    judged = {name: r["recognised"]["of_class"] for name, r in results.items() if r["recognised"]}
    if judged:
        classes = sorted({c for of_class in judged.values() for c in of_class})
        cells = [[c, *(f"{j[c]:.1%}" if c in j else "-" for j in judged.values())] for c in classes]
        text += "\n" + markdown(["recognised, of class", *judged], cells)
    return text


def timing_table(rows: list[Row], config: Config) -> str:
    head = ["scheduler", "steps", "seconds an image", "ms an image and step"]
    cells = [
        [r["scheduler"], str(r["steps"]), f"{r['seconds_per_image']:.4g}", f"{r['milliseconds_per_step']:.4g}"]
        for r in rows
    ]
    return f"{config.time_batch_size} images at once\n\n" + markdown(head, cells)


def check_flags(config: Config) -> None:
    """Raises ConfigError for flags that cannot work."""
    names = ("num_images", "resolution", "channels", "batch_size", "num_inference_steps", "time_batch_size")
    for name in names:
        if (getattr(config, name) or 1) < 1 or getattr(config, name) == 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}: it must be at least 1")
    if min(config.time_steps, default=0) < 1:
        raise ConfigError("--time-steps must be numbers of at least 1")
    if config.seed < 0:
        raise ConfigError(f"--seed is {config.seed}: it must be at least 0")
    if not config.samples and config.pipeline is None:
        raise ConfigError("nothing to measure: give --samples PATH or --pipeline RUN_OR_MODEL")
    if config.time and config.pipeline is None:
        raise ConfigError("--time needs the --pipeline that is to be timed")
    if config.data is None and (config.samples or not config.time):
        raise ConfigError("no --data given: name the real images that the generated ones are measured against")
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
    record: Row = {
        "config": as_json(config),
        "machine": describe_machine(accelerator.device),
        "versions": versions(),
    }
    tables = []
    if config.data is not None:
        comparison = compare(config.data, pipeline, config, accelerator.device)
        record |= comparison
        tables.append(comparison_table(comparison))
    if config.time and pipeline is not None:
        record["timing"] = time_pipeline(pipeline, config, accelerator.device)
        tables.append(timing_table(record["timing"], config))
    write_json(config.output / "results.json", record)
    text = "\n".join(tables)
    with atomic(config.output / "table.md") as out:
        out.write(text.encode())
    print(text)
    num_bad = sum(len(bad) for bad in record.get("bad_images", {}).values())
    print(f"{num_bad} bad images; the figures are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Measure generated images, and how long it takes to make them."))
