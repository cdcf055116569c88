"""What the qualities of other formats look like, and the quantiser's steps that look the same.

python benchmarks/studies/quality_scale.py --codec RUN_OR_MODEL --data PATH --output DIR

For JPEG, WebP and AVIF as Pillow writes them, at each of --qualities: SSIMULACRA2 and bits per pixel, means over the
images. The codec is measured at each of --steps; in between, SSIMULACRA2 is interpolated over the step's logarithm. The
last line has the two numbers of `ldm_vae/codec/quality.py`: a straight line of quality over that logarithm, fitted to
the steps that look like the mean of WebP and AVIF.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.quality import USUAL_QUALITY
from ldm_vae.codec.search import bits_per_pixel
from ldm_vae.data.images import Pixels
from ldm_vae.data.sources import check_finite, open_source
from ldm_vae.data.squares import read_usable
from ldm_vae.errors import one_line_errors
from ldm_vae.files import check_writable
from ldm_vae.metrics import ssimulacra2
from ldm_vae.progress import progress
from ldm_vae.report import markdown_table, provenance, write_report
from ldm_vae.runs.config import Range, check_ranges, parse_flags

FORMATS = ("JPEG", "WEBP", "AVIF")
LIKE = ("WEBP", "AVIF")
"""Those that the scale follows."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    codec: str = "box:codec"
    """Run directory, model folder or hub id with fitted tables."""
    data: str
    output: Path
    qualities: Annotated[tuple[int, ...], Range(at_least=1, at_most=100)] = (30, 50, 75, 90)
    steps: Annotated[tuple[float, ...], Range(above=0)] = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 4.5)
    num_images: Annotated[int | None, Range(at_least=1)] = 10


def by_pillow(file_format: str, quality: int) -> Callable[[Pixels], tuple[bytes, Pixels]]:
    """Pixels (H, W, 3) -> a file, and what it decodes to."""

    def call(pixels: Pixels) -> tuple[bytes, Pixels]:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, file_format, quality=quality)
        return file.getvalue(), np.asarray(Image.open(file).convert("RGB"))

    return call


def by_codec(codec: LatentCodec, step: float) -> Callable[[Pixels], tuple[bytes, Pixels]]:
    def call(pixels: Pixels) -> tuple[bytes, Pixels]:
        data = codec.compress(pixels, step=step)
        return data, codec.decompress_picture(data).pixels

    return call


def looks(call: Callable[[Pixels], tuple[bytes, Pixels]], images: list[Pixels]) -> dict[str, float]:
    """SSIMULACRA2 and bits per pixel, means over the images."""
    pairs = [(pixels, *call(pixels)) for pixels in images]
    scores = [ssimulacra2(pixels, decoded) for pixels, _, decoded in pairs]
    rates = [bits_per_pixel(data, pixels) for pixels, data, _ in pairs]
    return {"ssimulacra2": float(np.mean(scores)), "bpp": float(np.mean(rates))}


def step_like(score: float, ours: list[Row]) -> float:
    """The step with that SSIMULACRA2; NaN for one that no step has."""
    ascending = sorted(ours, key=lambda row: row["ssimulacra2"])
    scores, steps = ([row[key] for row in ascending] for key in ("ssimulacra2", "step"))
    return float(np.exp2(np.interp(score, scores, np.log2(steps), left=np.nan, right=np.nan)))


def fitted_scale(others: list[Row], ours: list[Row]) -> dict[str, float]:
    """USUAL_STEP and HALVING, by least squares over the qualities whose looks the codec has; none for less than two."""
    qualities = sorted({row["quality"] for row in others})
    scores = [
        np.mean([r["ssimulacra2"] for r in others if r["quality"] == q and r["format"] in LIKE]) for q in qualities
    ]
    octaves = np.log2([step_like(float(score), ours) for score in scores])
    known = np.isfinite(octaves)
    if known.sum() < 2:
        return {}
    slope, at_usual = np.polyfit(np.array(qualities)[known] - USUAL_QUALITY, octaves[known], 1)
    return {"usual_step": float(2**at_usual), "halving": float(-1 / slope)}


def main(config: Config) -> None:
    check_ranges(config)
    check_writable(config.output)
    codec, source = LatentCodec.from_pretrained(config.codec), open_source(config.data, channels=3)
    check_finite(source, config.data, config.num_images)
    images = list(read_usable(source, config.num_images).values())
    steps = progress(config.steps, description=config.codec, unit="step")
    ours = [{"step": step} | looks(by_codec(codec, step), images) for step in steps]
    settings = [(file_format, quality) for file_format in FORMATS for quality in config.qualities]
    others = [
        {"format": file_format, "quality": quality} | looks(by_pillow(file_format, quality), images)
        for file_format, quality in progress(settings, description="others", unit="setting")
    ]
    for row in others:
        step = step_like(row["ssimulacra2"], ours)
        row |= {"step": step} if np.isfinite(step) else {}
    names = [f"{row['format']} {row['quality']}" for row in others] + [f"step {row['step']:g}" for row in ours]
    table = [
        {"setting": name, "SSIMULACRA2": f"{r['ssimulacra2']:.1f}", "bits per pixel": f"{r['bpp']:.3f}"}
        | ({"step that looks the same": f"{r['step']:.2f}"} if "step" in r else {})
        for name, r in zip(names, others + ours, strict=True)
    ]
    scale = fitted_scale(others, ours)
    record = {"images": len(images), "ours": ours, "others": others, "scale": scale}
    write_report(config.output, provenance(config), record, markdown_table(table))
    if scale:
        print(f"USUAL_STEP = {scale['usual_step']:.3g}, HALVING = {scale['halving']:.3g}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="What qualities look like, and the steps that look the same."))
