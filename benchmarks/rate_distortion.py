"""Rate and distortion of codecs, side by side, from whole files.

python benchmarks/rate_distortion.py --codec RUN_OR_MODEL [--codec ...] --data PATH --output DIR

Every codec compresses every image, as uint8 RGB at its own size, at each of its settings. Bits per pixel count the
whole file, container included. PSNR is over all RGB values of an image. Curves are means over images; Bjøntegaard
differences are given for the mean curve, and as the mean over images with its 95 % interval.
"""

from __future__ import annotations

import csv
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.others import PILLOW, Codec, installed
from ldm_vae.codec.search import bits_per_pixel
from ldm_vae.data.conversion import to_images
from ldm_vae.data.images import Pixels
from ldm_vae.data.reader import USUAL
from ldm_vae.data.sources import check_finite, open_source
from ldm_vae.data.squares import read_usable
from ldm_vae.data.workers import default_workers
from ldm_vae.errors import ConfigError, LdmVaeError, one_line_errors
from ldm_vae.files import check_writable, write_csv
from ldm_vae.grids import labelled_rows, middle
from ldm_vae.metrics import bjontegaard_rate, mean_with_interval, ms_ssim, psnr, ssimulacra2
from ldm_vae.objectives.perceptual import LPIPSLoss
from ldm_vae.progress import progress
from ldm_vae.report import markdown_table, provenance, write_report
from ldm_vae.runs.config import Range, Reading, check_ranges, parse_flags
from ldm_vae.timing import peak_memory_of

Row = dict[str, Any]
METRICS = {
    "psnr": "PSNR (dB)",
    "ms_ssim_db": "MS-SSIM (dB)",
    "ssimulacra2": "SSIMULACRA2",
    "lpips_alex": "LPIPS (AlexNet)",
}
"""ms_ssim_db: -10 log10(1 - MS-SSIM), which spreads the values near 1. LPIPS is a distance: lower is better."""


@dataclass(frozen=True, kw_only=True)
class Config:
    codec: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Run directory, model folder or hub id with fitted tables; repeat the flag for each."""
    data: str
    output: Path
    steps: Annotated[tuple[float, ...], Range(above=0)] = (0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)
    """The quantiser's, of our codecs."""
    others: tuple[str, ...] = ("jpeg-420", "jpeg-444", "webp", "avif-420", "jpeg2000", "jpeg-xl")
    """Codecs to compare with (also avif-444, avif-420-slowest, avif-444-slowest); one that is not installed is left
    out, with a note."""
    between: tuple[float, float] = (0.15, 0.6)
    """Bits per pixel over which the Bjøntegaard differences are taken."""
    num_images: Annotated[int | None, Range(at_least=1)] = None
    published: Path | None = None
    """CSV (codec, bits_per_pixel, psnr_rgb_db, source) of curves to draw dotted."""
    show: float = 0.3
    """Bits per pixel of the images in the gallery."""
    device: str = "cpu"
    reading: Reading = USUAL


def our_codec(path: str, config: Config) -> Codec:
    codec = LatentCodec.from_pretrained(path, device=config.device)
    return Codec(
        name=path,
        settings=config.steps,
        encode=lambda pixels, step: codec.compress(pixels, step=step),
        decode=lambda data: codec.decompress_picture(data).pixels,
    )


def load_codecs(config: Config) -> list[Codec]:
    if not config.codec and not config.others:
        raise ConfigError("no codec is given: add --codec, or --others")
    codecs = [our_codec(path, config) for path in dict.fromkeys(config.codec)]
    return [*codecs, *installed(config.others)]


def load_images(config: Config) -> dict[str, Pixels]:
    """uint8 (H, W, 3) by name."""
    source = open_source(config.data, options=config.reading)
    check_finite(source, config.data, config.num_images)
    return {source.name(i): pixels for i, pixels in read_usable(source, config.num_images).items()}


def measure(codec: Codec, images: dict[str, Pixels], pool: ProcessPoolExecutor) -> list[Row]:
    """A row for each image and setting. What is timed runs alone, on all cores; fidelities are measured afterwards."""
    rows: list[Row] = []
    first = next(iter(images.values()))
    codec.decode(codec.encode(first, codec.settings[0]))  # loading and compiling are not timed
    for setting in progress(codec.settings, description=codec.name, unit="setting"):
        timed, decoded = [], []
        for name, pixels in images.items():
            began = time.perf_counter()
            data = codec.encode(pixels, setting)
            encoded = time.perf_counter()
            decoded.append(codec.decode(data))
            seconds = {"encode_seconds": encoded - began, "decode_seconds": time.perf_counter() - encoded}
            row = {"codec": codec.name, "setting": setting, "image": name, "bytes": len(data)}
            timed.append(row | {"bpp": bits_per_pixel(data, pixels), **seconds})
        measured = pool.map(fidelities, images.values(), decoded)
        rows += [row | figures for row, figures in zip(timed, measured, strict=True)]
    return rows


def fidelities(pixels: Pixels, decoded: Pixels) -> Row:
    """Every metric of one decoded image. Runs in a process of its own."""
    torch.set_num_threads(1)
    structure = ms_ssim(pixels, decoded)
    row = {
        "psnr": float(psnr(pixels[None], decoded[None])[0]),
        "ms_ssim": structure,
        "ms_ssim_db": -10 * math.log10(max(1 - structure, 1e-6)),  # NaN stays NaN
        "ssimulacra2": ssimulacra2(pixels, decoded),
    }
    lpips = find_lpips()
    if lpips is not None:
        images = [to_images(p)[None] for p in (decoded, pixels)]
        with torch.inference_mode():
            row["lpips_alex"] = float(lpips.distances(*images)[0])
    return row


@cache
def find_lpips() -> LPIPSLoss | None:
    """LPIPS with its pretrained backbone, if that is available."""
    try:
        return LPIPSLoss("alex", pretrained=True)
    except LdmVaeError as error:
        if parent_process() is None:
            print(f"without LPIPS: {' '.join(str(error).split())}")
        return None


def mean_curve(rows: list[Row], metric: str) -> tuple[list[float], list[float]]:
    """Bits per pixel and metric at each setting, means over the images."""
    points = [[row for row in rows if row["setting"] == s] for s in dict.fromkeys(row["setting"] for row in rows)]
    rates, values = ([float(np.mean([row[key] for row in point])) for point in points] for key in ("bpp", metric))
    return rates, values


def rate_difference(rows: list[Row], reference: list[Row], metric: str, between: tuple[float, float]) -> float:
    """Bjøntegaard difference in percent of the mean curves."""
    sign = -1 if metric.startswith("lpips") else 1
    (rates, values), (reference_rates, reference_values) = mean_curve(rows, metric), mean_curve(reference, metric)
    fidelities, reference_fidelities = ([sign * v for v in curve] for curve in (values, reference_values))
    return bjontegaard_rate(rates, fidelities, reference_rates, reference_fidelities, between=between)


def difference(rows: list[Row], reference: list[Row], metric: str, between: tuple[float, float]) -> Row:
    """Bjøntegaard differences in rate, in percent: of the mean curve, and the mean over images with its interval."""
    each = []
    for image in dict.fromkeys(row["image"] for row in rows):
        own, other = ([row for row in part if row["image"] == image] for part in (rows, reference))
        each.append(rate_difference(own, other, metric, between))
    return {"of_means": rate_difference(rows, reference, metric, between), **mean_with_interval(np.array(each))}


def comparable(rows: dict[str, list[Row]], metric: str) -> dict[str, list[Row]]:
    """By codec, the rows of the images for which every codec has a finite figure at every setting.

    An image that is decoded exactly has no PSNR, and MS-SSIM needs 161 pixels.
    """
    everything = [row for own in rows.values() for row in own]
    bad = {row["image"] for row in everything if not math.isfinite(row.get(metric, math.nan))}
    if bad and any(metric in row for row in everything):
        count = len({row["image"] for row in everything})
        print(f"{METRICS[metric]}: {len(bad)} of {count} images have none, and are left out of it")
    return {name: [row for row in own if row["image"] not in bad] for name, own in rows.items()}


def table(rows: dict[str, list[Row]], differences: dict[str, dict[str, dict[str, Row]]], memory: dict[str, Any]) -> str:
    lines = []
    for name, against in differences.items():
        line = {"codec": name}
        for reference, figures in against.items():
            for metric, d in figures.items():
                cell = f"{d['of_means']:+.1f} % ({d['mean']:+.1f} [{d['low']:+.0f}, {d['high']:+.0f}])"
                cell += f", {d['images']} images" if d["images"] < len({r["image"] for r in rows[name]}) else ""
                column = f"{METRICS[metric].split(' (')[0]} against {reference}"
                line[column] = "-" if name == reference or not d["images"] else cell
        for what in ("encode", "decode"):
            line[f"{what} ms"] = f"{1e3 * float(np.median([r[f'{what}_seconds'] for r in rows[name]])):.0f}"
        peak = memory[name]
        lines.append(line | {"peak MiB": "-" if peak is None else f"{peak / 2**20:.0f}"})
    return markdown_table(lines)


def plot(rows: dict[str, list[Row]], metric: str, published: Path | None, file: Path) -> None:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    visible: list[float] = []
    for name, own in rows.items():
        rates, values = mean_curve(own, metric)
        axes.plot(rates, values, marker="o", ms=3.5, lw=1.3 if name in PILLOW else 2.4, label=name)
        visible += [v for r, v in zip(rates, values, strict=True) if 0.05 <= r <= 1.05] or values[:1]
    if published is not None and metric == "psnr":
        curves: dict[str, list[tuple[float, float]]] = {}
        for name, rate, value, *_ in list(csv.reader(published.read_text().splitlines()))[1:]:
            if float(rate) <= 1:
                curves.setdefault(name, []).append((float(rate), float(value)))
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), ls=":", lw=1.2, label=f"{name} (published)")
    axes.set(xlim=(0, 1), ylim=(min(visible), max(visible)))
    axes.set(xlabel="bits per pixel, whole files", ylabel=METRICS[metric])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def gallery(codecs: list[Codec], images: dict[str, Pixels], show: float) -> Image.Image:
    """256 x 256 from the middle of four images: original, and each codec at the setting nearest to `show` bpp."""
    shown = list(images.values())[:: max(len(images) // 4, 1)][:4]
    lines = [("original", np.stack([middle(p, 256) for p in shown]))]
    for codec in codecs:
        tiles, rates = [], []
        for pixels in shown:
            files = [codec.encode(pixels, s) for s in codec.settings]
            nearest = min(files, key=lambda data: abs(bits_per_pixel(data, pixels) - show))
            tiles.append(middle(codec.decode(nearest), 256))
            rates.append(f"{bits_per_pixel(nearest, pixels):.2f}")
        lines.append((f"{codec.name}: {', '.join(rates)} bits per pixel", np.stack(tiles)))
    return labelled_rows(lines)


def peak_memory(codec: Codec, pixels: Pixels) -> int | None:
    """Of compressing and decompressing at the middle setting, in bytes."""
    setting = codec.settings[len(codec.settings) // 2]
    return peak_memory_of(lambda: codec.decode(codec.encode(pixels, setting)), device=torch.device("cpu"))


def main(config: Config) -> None:
    check_ranges(config)
    check_writable(config.output)
    codecs, images = load_codecs(config), load_images(config)
    find_lpips()  # says when it is not there, and downloads it before several processes do
    workers = min(len(images), default_workers() + 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rows = {codec.name: measure(codec, images, pool) for codec in codecs}
    largest = max(images.values(), key=lambda pixels: pixels.size)
    memory = {codec.name: peak_memory(codec, largest) for codec in codecs}
    by_metric = {m: comparable(rows, m) for m in METRICS}
    by_metric = {m: rows_of for m, rows_of in by_metric.items() if all(rows_of.values())}
    references: list[str] = [r for r in ("jpeg-420", "webp", "avif-420") if r in rows] or [codecs[0].name]
    differences = {
        name: {
            r: {m: difference(own[name], own[r], m, config.between) for m, own in by_metric.items()} for r in references
        }
        for name in rows
    }
    write_csv(config.output / "per_image.csv", [row for own in rows.values() for row in own])
    curves = {name: {m: mean_curve(own[name], m) for m, own in by_metric.items()} for name in rows}
    record = {"images": len(images), "differences": differences, "curves": curves}
    origin = provenance(config, torch.device(config.device))
    write_report(config.output, origin, record, table(rows, differences, memory))
    for metric, own in by_metric.items():
        plot(own, metric, config.published, config.output / f"{metric}.png")
    gallery(codecs, images, config.show).save(config.output / "gallery.png")
    print(f"{len(images)} images; figures and plots are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Rate and distortion of codecs, side by side, from whole files."))
