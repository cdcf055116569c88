"""What each effort of `compress` gains at equal quality, and the seconds that it takes.

python benchmarks/studies/effort.py --codec RUN_OR_MODEL --tune psnr --data PATH --output DIR

Each image is compressed with every effort at each of --steps. For PSNR and SSIMULACRA2: Bjøntegaard's difference in the
bytes of whole files against effort 0, the mean over the images with its 95 % interval. Seconds are medians over images
and steps, of one compression each in a process that has started, network included, on one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np
import torch

from ldm_vae.codec.codec import EFFORTS, LatentCodec
from ldm_vae.codec.search import bits_per_pixel
from ldm_vae.data.images import Pixels
from ldm_vae.data.sources import check_finite, open_source
from ldm_vae.data.squares import read_usable
from ldm_vae.errors import one_line_errors
from ldm_vae.files import check_writable
from ldm_vae.metrics import bjontegaard_rate, mean_with_interval, psnr, ssimulacra2
from ldm_vae.progress import progress
from ldm_vae.report import markdown_table, provenance, with_interval, write_report
from ldm_vae.runs.config import Range, check_ranges, parse_flags

METRICS = {"psnr": "PSNR", "ssimulacra2": "SSIMULACRA2"}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    codec: str = "box:codec"
    """Run directory, model folder or hub id with fitted tables."""
    tune: Literal["visual", "psnr"] = "visual"
    data: str
    output: Path
    steps: Annotated[tuple[float, ...], Range(above=0)] = (0.3, 0.5, 0.85, 1.4)
    num_images: Annotated[int | None, Range(at_least=1)] = 8


def measured(codec: LatentCodec, pixels: Pixels, step: float, effort: int) -> Row:
    begun = perf_counter()
    data = codec.compress(pixels, step=step, effort=effort)
    seconds = perf_counter() - begun
    decoded = codec.decompress_picture(data).pixels
    return {
        "step": step,
        "effort": effort,
        "bpp": bits_per_pixel(data, pixels),
        "psnr": float(psnr(pixels[None], decoded[None])[0]),
        "ssimulacra2": ssimulacra2(pixels, decoded),
        "seconds": seconds,
    }


def gain(rows: list[Row], effort: int, metric: str) -> dict[str, float]:
    """Bjøntegaard's difference in rate against effort 0, in percent: mean over the images, and its interval."""

    def curve(image: str, effort: int) -> tuple[list[float], list[float]]:
        points = [row for row in rows if (row["image"], row["effort"]) == (image, effort)]
        return [row["bpp"] for row in points], [row[metric] for row in points]

    images = dict.fromkeys(row["image"] for row in rows)
    each = [bjontegaard_rate(*curve(image, effort), *curve(image, 0)) for image in images]
    return mean_with_interval(np.array(each))


def main(config: Config) -> None:
    check_ranges(config)
    check_writable(config.output)
    torch.set_num_threads(1)
    codec = LatentCodec.from_pretrained(config.codec, tune=config.tune)
    source = open_source(config.data, channels=3)
    check_finite(source, config.data, config.num_images)
    images = list(read_usable(source, config.num_images).items())
    measured(codec, images[0][1], config.steps[0], EFFORTS[-1])  # compiles, and imports torch's optimiser
    rows = [
        {"image": source.name(index)} | measured(codec, pixels, step, effort)
        for index, pixels in progress(images, description="compressing", unit="image")
        for step in config.steps
        for effort in EFFORTS
    ]
    figures: list[Row] = []
    for effort in EFFORTS:
        seconds = float(np.median([row["seconds"] for row in rows if row["effort"] == effort]))
        gains = {metric: gain(rows, effort, metric) for metric in METRICS} if effort else {}
        figures.append({"effort": effort, "seconds": seconds} | gains)
    table = [
        {"effort": str(f["effort"]), "seconds": f"{f['seconds']:.2g}"}
        | {f"bytes at equal {t}, %": with_interval(f[metric], "+.1f") for metric, t in METRICS.items() if metric in f}
        for f in figures
    ]
    write_report(config.output, provenance(config), {"efforts": figures, "rows": rows}, markdown_table(table))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="What each effort gains at equal quality, and the seconds that it takes."))
