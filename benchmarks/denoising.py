"""Remove noise from images with an autoencoder, and with classical methods.

python benchmarks/denoising.py --vae RUN --data ../shared/data/kodak --tune-on ../shared/data/photos-val --output DIR

White Gaussian noise, clipped and rounded to 8 bits as a file would hold it, the same for all methods, drawn from (seed,
index). The settings of the classical methods are those with the best PSNR on other images (--tune-on), for each noise
level. Our network works blind, and also with the noise level given.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.restoration import denoise_nl_means

from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.corruption import Corruption
from ldm_vae.data.images import Pixels
from ldm_vae.data.order import Stream, generator_at
from ldm_vae.data.reader import USUAL
from ldm_vae.data.sources import Source, check_finite, open_source
from ldm_vae.data.squares import read_usable
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.files import check_writable, write_csv
from ldm_vae.grids import labelled_rows, middle
from ldm_vae.metrics import mean_with_interval, psnr, ssim
from ldm_vae.models.interface import channels_of, fingerprint
from ldm_vae.models.loading import check_device, load_autoencoder
from ldm_vae.models.reconstruction import denoise
from ldm_vae.progress import progress
from ldm_vae.report import markdown_table, provenance, write_report
from ldm_vae.runs.config import Range, Reading, check_ranges, parse_flags

Method = Callable[[Pixels, float], Pixels]
"""Noisy pixels and sigma -> pixels."""
CUT = 256
"""Side of the images in the gallery."""


@dataclass(frozen=True, kw_only=True)
class Config:
    vae: str
    """A run of `train_autoencoder.py denoise`."""
    data: str
    tune_on: str
    """Other images, on which the settings of the classical methods are chosen."""
    output: Path
    sigmas: Annotated[tuple[float, ...], Range(above=0)] = (15, 25, 50)
    num_images: Annotated[int | None, Range(at_least=1)] = None
    num_tuning: Annotated[int, Range(at_least=1)] = 8
    device: str = "cpu"
    seed: int = 0
    reading: Reading = USUAL


def noisy(pixels: Pixels, sigma: float, index: int, seed: int) -> Pixels:
    return Corruption("gaussian", sigma, sigma)(pixels, generator_at(seed, index, Stream.CORRUPTION)).input


def blur(pixels: Pixels, sigma: float, *, strength: float) -> Pixels:
    """Gaussian blur; strength is its standard deviation in pixels."""
    values = gaussian_filter(pixels.astype(np.float32), (strength, strength, 0))
    return values.round().clip(0, 255).astype(np.uint8)


def non_local_means(pixels: Pixels, sigma: float, *, strength: float, patch: int) -> Pixels:
    """scikit-image's fast version (Buades et al. 2005; Darbon et al. 2008), its width `strength` times sigma."""
    values = denoise_nl_means(
        pixels / 255,
        h=strength * sigma / 255,
        sigma=sigma / 255,
        patch_size=patch,
        patch_distance=6,
        fast_mode=True,
        channel_axis=2,
    )
    return (values * 255).round().clip(0, 255).astype(np.uint8)


def by_autoencoder(vae: Any, pixels: Pixels, sigma: float, *, told: bool) -> Pixels:
    images = to_images(pixels)[None].to(next(vae.parameters()).device)
    with torch.inference_mode():
        return to_pixels(denoise(vae, images, sigma=sigma if told else None))[0]


def classical_methods() -> dict[str, list[Method]]:
    """By name, the method with each of the settings to choose from."""
    blurs = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
    strengths, patches = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0), (3, 5, 7)
    return {
        "Gaussian blur": [partial(blur, strength=s) for s in blurs],
        "non-local means": [partial(non_local_means, strength=s, patch=p) for s in strengths for p in patches],
    }


def tune(config: Config, source: Source) -> dict[tuple[str, float], Any]:
    """The setting of each classical method at each sigma that has the best mean PSNR on these images."""
    images = read_usable(source, config.num_tuning)
    best: dict[tuple[str, float], Any] = {}
    tasks = list(itertools.product(classical_methods().items(), config.sigmas))
    for (name, settings), sigma in progress(tasks, unit="method"):
        pairs = [(clean, noisy(clean, sigma, i, config.seed + 1)) for i, clean in images.items()]
        figures = [
            statistics.fmean(float(psnr(clean[None], method(damaged, sigma)[None])[0]) for clean, damaged in pairs)
            for method in settings
        ]
        best[name, sigma] = settings[int(np.argmax(figures))]
    return best


def methods_for(vae: Any, tuned: dict[tuple[str, float], Any], sigma: float) -> dict[str, Method]:
    methods: dict[str, Method] = {"noisy": lambda pixels, _: pixels}
    methods |= {name: method for (name, level), method in tuned.items() if level == sigma}
    methods["ours, blind"] = partial(by_autoencoder, vae, told=False)
    if sigma <= (vae.config.get("noise_level") or 0):
        methods["ours, told sigma"] = partial(by_autoencoder, vae, told=True)
    return methods


def measure(vae: Any, source: Source, images: dict[int, Pixels], tuned: Any, config: Config) -> list[dict[str, Any]]:
    """A row for each image, sigma and method."""
    rows = []
    for (index, clean), sigma in progress(list(itertools.product(images.items(), config.sigmas)), unit="image"):
        damaged = noisy(clean, sigma, index, config.seed)
        for name, method in methods_for(vae, tuned, sigma).items():
            began = time.perf_counter()
            restored = method(damaged, sigma)
            seconds = time.perf_counter() - began
            row = {"image": source.name(index), "sigma": sigma, "method": name, "seconds": seconds}
            rows.append(row | {"psnr": float(psnr(clean[None], restored[None])[0]), "ssim": ssim(clean, restored)})
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each sigma and method: means, the interval of the PSNR, and the median seconds."""
    summary = []
    for sigma, name in dict.fromkeys((row["sigma"], row["method"]) for row in rows):
        own = [row for row in rows if (row["sigma"], row["method"]) == (sigma, name)]
        figure = mean_with_interval(np.array([row["psnr"] for row in own]))
        line = {"sigma": sigma, "method": name, "psnr": figure["mean"], "low": figure["low"], "high": figure["high"]}
        line |= {"ssim": statistics.fmean(row["ssim"] for row in own)}
        summary.append(line | {"seconds": statistics.median(row["seconds"] for row in own)})
    return summary


def table(summary: list[dict[str, Any]]) -> str:
    rows = []
    for line in summary:
        row = {"sigma": f"{line['sigma']:g}", "method": line["method"]}
        row |= {"PSNR dB": f"{line['psnr']:.2f} [{line['low']:.2f}, {line['high']:.2f}]"}
        rows.append(row | {"SSIM": f"{line['ssim']:.3f}", "seconds": f"{line['seconds']:.3f}"})
    return markdown_table(rows)


def gallery(vae: Any, images: dict[int, Pixels], tuned: Any, sigma: float, seed: int) -> Image.Image:
    """The middle of four images: clean, noisy, and restored by each method."""
    shown = list(images.items())[:: max(len(images) // 4, 1)][:4]
    rows = [("clean", np.stack([middle(clean, CUT) for _, clean in shown]))]
    for name, method in methods_for(vae, tuned, sigma).items():
        restored = [middle(method(noisy(clean, sigma, i, seed), sigma), CUT) for i, clean in shown]
        rows.append((f"{name}, sigma {sigma:g}", np.stack(restored)))
    return labelled_rows(rows)


def main(config: Config) -> None:
    check_ranges(config)
    if not config.sigmas:
        raise ConfigError("--sigmas is empty: name at least one noise level")
    check_device(config.device)
    vae = load_autoencoder(config.vae).to(config.device)
    if channels_of(vae) != 3:
        raise ConfigError(f"{config.vae} takes images of {channels_of(vae)} channels: this benchmark is for colour")
    check_writable(config.output)
    source, others = (open_source(path, options=config.reading) for path in (config.data, config.tune_on))
    check_finite(source, config.data, config.num_images)
    check_finite(others, config.tune_on, config.num_tuning)
    images = read_usable(source, config.num_images)
    tuned = tune(config, others)
    rows = measure(vae, source, images, tuned, config)
    summary = summarise(rows)
    write_csv(config.output / "per_image.csv", rows)
    results = {
        "images": len(images),
        "model": fingerprint(vae),
        "settings": [{"method": name, "sigma": sigma, **m.keywords} for (name, sigma), m in tuned.items()],
        "results": summary,
    }
    write_report(config.output, provenance(config, torch.device(config.device)), results, table(summary))
    for sigma in config.sigmas:
        gallery(vae, images, tuned, sigma, config.seed).save(config.output / f"sigma-{sigma:g}.png")
    print(f"{len(images)} images; figures and images are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Remove noise from images, by several methods."))
