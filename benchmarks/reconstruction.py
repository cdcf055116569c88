"""Measure how well autoencoders reconstruct images, by one pinned protocol.

python benchmarks/reconstruction.py --vae RUN_OR_MODEL [--vae ...] --data PATH --output DIR

The protocol: the centred square of an image, resampled to R x R by PIL's bicubic (or --full: the whole image at its
own size), uint8; through the posterior's mean and back; clamped, rounded to uint8; then every metric. One image at a
time, always: in a batch, sums come out in another order, and a pixel between two values can fall on the other side.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object

from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.images import Pixels, centre_square
from ldm_vae.data.sources import Source, check_finite, open_source
from ldm_vae.errors import BadImageError, ConfigError, nothing_usable, one_line_errors
from ldm_vae.files import atomic, check_writable, write_csv, write_json
from ldm_vae.grids import labelled_rows, visible
from ldm_vae.metrics import bootstrap_interval, ms_ssim, psnr, ssim, ssimulacra2
from ldm_vae.models.interface import channels_of, encode_moments, stride_of
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.models.reconstruction import exact_float32, reconstruct
from ldm_vae.objectives.perceptual import SMALLEST_IMAGE, Backbone, PerceptualLoss
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import PATIENCE, versions
from ldm_vae.timing import describe_machine, peak_memory_of, seconds_of


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the reconstruction benchmark."""

    vae: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Run directory, diffusers folder or hub id; give it once for each autoencoder."""
    data: str
    output: Path
    resolution: int = 256
    """Side R of the squares."""
    full: bool = False
    """Whole images at their own size instead."""
    num_images: int | None = None
    """Only the first so many."""
    perceptual: Literal["pretrained", "random", "none"] = "pretrained"
    """LPIPS with pretrained features, with random ones (labelled so), or no LPIPS."""
    lpips_backbone: Backbone = "alex"
    lpips_channels: tuple[int, int, int] | None = None
    """The three channels that LPIPS sees, when the images have neither one nor three."""
    gallery: int = 8
    """How many of the worst images the gallery shows."""


Row = dict[str, Any]


def prepare(source: Source, index: int, config: Config) -> Pixels:
    """Image `index` as the protocol wants it: uint8 (H, W, C). Raises BadImageError."""
    pixels = source[index].pixels
    pixels = pixels if config.full else centre_square(pixels, config.resolution)
    return pixels if pixels.dtype == np.uint8 else to_pixels(to_images(pixels))


@torch.inference_mode()
def reconstruct_pixels(vae: Any, pixels: Pixels, device: torch.device) -> Pixels:
    return to_pixels(reconstruct(vae, to_images(pixels)[None].to(device)))[0]


def measure(pixels: Pixels, other: Pixels, lpips: PerceptualLoss | None, lpips_name: str, least: int) -> Row:
    """Every metric of one image."""
    row: Row = {
        "psnr": float(psnr(pixels[None], other[None])[0]),
        "ssim": ssim(pixels, other),
        "ms_ssim": ms_ssim(pixels, other),
        "ssimulacra2": ssimulacra2(pixels, other),
    }
    if lpips is not None:
        device = next(lpips.parameters()).device
        pair = [to_images(p)[None].to(device) for p in (other, pixels)]
        with torch.inference_mode():
            fits = min(pixels.shape[:2]) >= least
            row[lpips_name] = float(lpips.distances(*pair)[0]) if fits else float("nan")
    return row


def evaluate(vae: Any, source: Source, lpips: PerceptualLoss | None, config: Config, accelerator: Accelerator) -> Any:
    """Rows (one an image), bad images (name -> reason), over this process's share of the images."""
    count = min(len(source), config.num_images or len(source))
    lpips_name = f"lpips_{config.lpips_backbone}" + ("_random" if config.perceptual == "random" else "")
    least = SMALLEST_IMAGE[config.lpips_backbone]
    rows: list[Row] = []
    bad: dict[str, str] = {}
    for index in range(accelerator.process_index, count, accelerator.num_processes):
        try:
            pixels = prepare(source, index, config)
        except BadImageError as error:
            bad[source.name(index)] = str(error)
            continue
        output = reconstruct_pixels(vae, pixels, accelerator.device)
        rows.append({"index": index, "image": source.name(index), **measure(pixels, output, lpips, lpips_name, least)})
    return rows, bad


def cost(vae: Any, config: Config, device: torch.device) -> Row:
    """Parameters, latent shape, and the time and memory of one R x R image."""
    stride = stride_of(vae)
    side = config.resolution - config.resolution % stride
    images = torch.zeros(1, channels_of(vae), side, side, device=device)
    with torch.inference_mode():
        latents = encode_moments(vae, images).chunk(2, dim=1)[0]
        encode = seconds_of(lambda: encode_moments(vae, images), device=device, seconds=1.0)
        decode = seconds_of(lambda: vae.decode(latents), device=device, seconds=1.0)
        memory = peak_memory_of(lambda: reconstruct(vae, images), device=device)
    return {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "latent_shape": list(latents.shape[1:]),
        "encode_ms": 1e3 * statistics.median(encode),
        "decode_ms": 1e3 * statistics.median(decode),
        "peak_memory_mib": None if memory is None else memory / 2**20,
    }


def summarise(rows: list[Row]) -> Row:
    """Mean and 95 % bootstrap interval of each metric over the images that have it."""
    summary: Row = {}
    for name in rows[0]:
        if name not in ("index", "image"):
            values = np.array([r[name] for r in rows], dtype=float)
            values = values[np.isfinite(values)]
            if len(values):
                low, high = bootstrap_interval(values)
                summary[name] = {"mean": float(values.mean()), "low": low, "high": high, "images": len(values)}
    return summary


def table(results: dict[str, Row]) -> str:
    """A Markdown table, a line a model."""
    metrics = list(dict.fromkeys(m for r in results.values() for m in r["metrics"]))
    head = ["model", *metrics, "parameters", "latents", "encode ms", "decode ms", "peak MiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, result in results.items():
        cells = [name]
        for metric in metrics:
            figure = result["metrics"].get(metric)
            cells.append("-" if figure is None else "{mean:.4g} [{low:.4g}, {high:.4g}]".format(**figure))
        memory = result["peak_memory_mib"]
        cells += [f"{result['parameters'] / 1e6:.2f} M", "x".join(map(str, result["latent_shape"]))]
        cells += [
            f"{result['encode_ms']:.1f}",
            f"{result['decode_ms']:.1f}",
            "-" if memory is None else f"{memory:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_gallery(vaes: dict[str, Any], source: Source, rows: list[Row], config: Config, device: torch.device) -> Any:
    """The images with the lowest PSNR of the first model: originals in the first row, then a row a model."""
    worst = sorted(rows, key=lambda r: r["psnr"])[: config.gallery]
    originals = [prepare(source, r["index"], config) for r in worst]
    lines = [("originals, the worst ones", originals)]
    lines += [(name, [reconstruct_pixels(v, p, device) for p in originals]) for name, v in vaes.items()]
    return labelled_rows([(name, np.stack([gallery_tile(p) for p in pixels])) for name, pixels in lines])


def gallery_tile(pixels: Pixels) -> Pixels:
    """The centred square at 256 x 256 in three channels."""
    return visible(to_images(centre_square(pixels, 256))[None])[0]


def main(config: Config) -> None:
    if not config.vae:
        raise ConfigError("no --vae given: name at least one run directory, diffusers folder or hub id")
    if min(config.resolution, config.num_images or 1) < 1:
        raise ConfigError("--resolution and --num-images must be at least 1")
    accelerator = Accelerator(kwargs_handlers=[PATIENCE])
    exact_float32()
    vaes = {path: load_autoencoder(path).to(accelerator.device) for path in dict.fromkeys(config.vae)}
    channels = {channels_of(v) for v in vaes.values()}
    if len(channels) > 1:
        raise ConfigError(f"the autoencoders take images of {sorted(channels)} channels: compare those that agree")
    if not config.full and any(config.resolution < stride_of(v) for v in vaes.values()):
        raise ConfigError(f"--resolution {config.resolution} is less than a model's stride")
    source = open_source(config.data, channels=channels.pop(), resolution=config.resolution)
    check_finite(source, config.data, config.num_images)
    lpips = None
    if config.perceptual != "none":
        with accelerator.local_main_process_first():
            lpips = PerceptualLoss(
                config.lpips_backbone,
                pretrained=config.perceptual == "pretrained",
                image_channels=channels_of(next(iter(vaes.values()))),
                channels=config.lpips_channels,
            ).to(accelerator.device)
    check_writable(config.output)
    results: dict[str, Row] = {}
    all_rows: list[Row] = []
    all_bad: dict[str, str] = {}
    for name, vae in vaes.items():
        rows, bad = evaluate(vae, source, lpips, config, accelerator)
        rows = sorted(gather_object(rows), key=lambda r: r["index"])
        for part in gather_object([bad]):
            all_bad |= part
        if not rows:
            raise nothing_usable(all_bad)
        if accelerator.is_main_process:
            results[name] = {"metrics": summarise(rows), **cost(vae, config, accelerator.device)}
            all_rows += [{"model": name, **r} for r in rows]
        accelerator.wait_for_everyone()  # the times of one model are not taken beside the next one's work
    if accelerator.is_main_process:
        first = [r for r in all_rows if r["model"] == config.vae[0]]
        write_csv(config.output / "per_image.csv", all_rows)
        write_csv(config.output / "bad_images.csv", [{"name": n, "reason": r} for n, r in sorted(all_bad.items())])
        record = {
            "config": as_json(config),
            "machine": describe_machine(accelerator.device),
            "versions": versions(),
            "bad_images": len(all_bad),
            "results": results,
        }
        write_json(config.output / "results.json", record)
        with atomic(config.output / "table.md") as out:
            out.write(table(results).encode())
        if config.gallery > 0:
            draw_gallery(vaes, source, first, config, accelerator.device).save(config.output / "gallery.png")
        print(table(results))
        print(f"{len(first)} images, {len(all_bad)} bad; figures and pictures are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Measure how well autoencoders reconstruct images."))
