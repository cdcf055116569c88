"""Take the noise out of images by an autoencoder, and by what people use.

python benchmarks/denoising.py --vae RUN --data ../shared/data/kodak --tune-on ../shared/data/photos-val --output DIR

White Gaussian noise, clipped and rounded to 8 bits as a file would hold it, the same for all, by (seed, index).
Settings of the classical methods are chosen on other images (--tune-on), by PSNR, for each noise level. Ours is blind,
and told the noise level. BM3D is left out: of its packages, those that run on a CPU allow no commercial use.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.corruption import Corruption
from ldm_vae.data.images import Pixels
from ldm_vae.data.order import Stream, generator_at
from ldm_vae.data.sources import HeadSource, Source, check_finite, open_source
from ldm_vae.errors import BadImageError, ConfigError, nothing_usable, one_line_errors
from ldm_vae.files import atomic, check_writable, write_csv, write_json
from ldm_vae.grids import labelled_rows
from ldm_vae.metrics import bootstrap_interval, psnr, ssim
from ldm_vae.models.interface import channels_of, fingerprint
from ldm_vae.models.loading import check_device, load_autoencoder
from ldm_vae.models.reconstruction import denoise
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import git_revision, training_seconds, versions
from ldm_vae.timing import describe_machine

Method = Callable[[Pixels, float], Pixels]
"""Noisy pixels and sigma -> pixels."""
Settings = dict[str, Any]
"""Keywords of a classical method."""
Chosen = dict[tuple[str, float], Settings]
"""Of each classical method at each sigma."""
CUT = 256


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the denoising benchmark."""

    vae: str
    """A run of train_vae.py denoise."""
    data: str
    tune_on: str
    """Other images, on which the settings of the classical methods are chosen."""
    output: Path
    sigmas: tuple[float, ...] = (15, 25, 50)
    num_images: int | None = None
    num_tuning: int = 8
    device: str = "cpu"
    seed: int = 0


def eight_bits(source: Source, index: int) -> Pixels:
    """What every method is given, whatever the file has."""
    return to_pixels(to_images(source[index].pixels))


def usable(source: Source) -> list[int]:
    """The places of its images; bad ones are named and left out. Raises DataError if all are bad."""
    good, bad = [], {}
    for index in range(len(source)):
        try:
            eight_bits(source, index)
            good.append(index)
        except BadImageError as error:
            bad[source.name(index)] = str(error)
            print(f"left out: {source.name(index)}: {error}")
    if not good:
        raise nothing_usable(bad)
    return good


def noisy(pixels: Pixels, sigma: float, index: int, seed: int) -> Pixels:
    return Corruption("gaussian", sigma, sigma)(pixels, generator_at(seed, index, Stream.CORRUPTION))[0]


def blur(pixels: Pixels, sigma: float, *, strength: float) -> Pixels:
    """Gaussian, of that deviation in pixels."""
    values = gaussian_filter(pixels.astype(np.float32), (strength, strength, 0))
    return values.round().clip(0, 255).astype(np.uint8)


def non_local_means(pixels: Pixels, sigma: float, *, strength: float, patch: int) -> Pixels:
    """scikit-image's fast one (Buades et al. 2005; Darbon et al. 2008), of a width of `strength` times sigma."""
    from skimage.restoration import denoise_nl_means

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


BLURS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
PATCHES = (3, 5, 7)
CLASSICAL: dict[str, tuple[Callable[..., Pixels], list[Settings]]] = {
    "Gaussian blur": (blur, [{"strength": s} for s in BLURS]),
    "non-local means": (
        non_local_means,
        [{"strength": s, "patch": p} for s, p in itertools.product(STRENGTHS, PATCHES)],
    ),
}
"""Function and the settings to choose from."""


def tuned(config: Config, source: Source) -> Chosen:
    """The settings of each classical method at each sigma that have the best mean PSNR on these images."""
    images = {i: eight_bits(source, i) for i in usable(HeadSource(source, config.num_tuning))}
    chosen = {}
    for (name, (function, offered)), sigma in tqdm(list(itertools.product(CLASSICAL.items(), config.sigmas))):
        pairs = [(p, noisy(p, sigma, i, config.seed + 1)) for i, p in images.items()]
        figures = [
            statistics.fmean(float(psnr(clean[None], function(given, sigma, **o)[None])[0]) for clean, given in pairs)
            for o in offered
        ]
        chosen[name, sigma] = offered[int(np.argmax(figures))]
    return chosen


def methods_for(vae: Any, chosen: Chosen, sigma: float) -> dict[str, Method]:
    methods: dict[str, Method] = {"noisy": lambda pixels, _: pixels}
    for name, (function, _) in CLASSICAL.items():
        methods[name] = partial(function, **chosen[name, sigma])
    methods["ours, blind"] = partial(by_autoencoder, vae, told=False)
    if sigma <= (vae.config.get("noise_level") or 0):
        methods["ours, told sigma"] = partial(by_autoencoder, vae, told=True)
    return methods


def measure(vae: Any, source: Source, images: list[int], chosen: Chosen, config: Config) -> list[dict[str, Any]]:
    rows = []
    for index in tqdm(images, unit="image"):
        clean = eight_bits(source, index)
        for sigma in config.sigmas:
            given = noisy(clean, sigma, index, config.seed)
            for name, method in methods_for(vae, chosen, sigma).items():
                began = time.perf_counter()
                made = method(given, sigma)
                seconds = time.perf_counter() - began
                rows.append(
                    {
                        "image": source.name(index),
                        "sigma": sigma,
                        "method": name,
                        "psnr": float(psnr(clean[None], made[None])[0]),
                        "ssim": ssim(clean, made),
                        "seconds": seconds,
                    }
                )
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a sigma and method: means, the interval of the PSNR, and the median seconds."""
    found = []
    for sigma, name in dict.fromkeys((r["sigma"], r["method"]) for r in rows):
        own = [r for r in rows if (r["sigma"], r["method"]) == (sigma, name)]
        values = np.array([r["psnr"] for r in own])
        low, high = bootstrap_interval(values)
        found.append(
            {
                **{"sigma": sigma, "method": name, "psnr": float(values.mean()), "low": low, "high": high},
                "ssim": statistics.fmean(r["ssim"] for r in own),
                "seconds": statistics.median(r["seconds"] for r in own),
            }
        )
    return found


def table(lines: list[dict[str, Any]]) -> str:
    text = ["| sigma | method | PSNR dB | SSIM | seconds |", "| --- | --- | --- | --- | --- |"]
    for r in lines:
        figure = f"{r['psnr']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        text.append(f"| {r['sigma']:g} | {r['method']} | {figure} | {r['ssim']:.3f} | {r['seconds']:.3f} |")
    return "\n".join(text) + "\n"


def gallery(vae: Any, source: Source, images: list[int], chosen: Chosen, sigma: float, seed: int) -> Image.Image:
    """The middle of four images: clean, noisy, and by each method."""
    shown = images[:: max(len(images) // 4, 1)][:4]

    def cut(pixels: Pixels) -> Pixels:
        y, x = (max((n - CUT) // 2, 0) for n in pixels.shape[:2])
        part = pixels[y : y + CUT, x : x + CUT]
        return np.pad(part, ((0, CUT - part.shape[0]), (0, CUT - part.shape[1]), (0, 0)))

    rows = [("clean", np.stack([cut(eight_bits(source, i)) for i in shown]))]
    for name, method in methods_for(vae, chosen, sigma).items():
        made = [cut(method(noisy(eight_bits(source, i), sigma, i, seed), sigma)) for i in shown]
        rows.append((f"{name}, sigma {sigma:g}", np.stack(made)))
    return labelled_rows(rows)


def training_of(run: Path) -> dict[str, Any] | None:
    """Settings and seconds of the training, where the model lies in its run."""
    if not (run / "metrics.jsonl").is_file():
        return None
    return {"seconds": training_seconds(run), **json.loads((run / "config.json").read_text())}


def main(config: Config) -> None:
    least = min(config.num_tuning, 1 if config.num_images is None else config.num_images)
    if least < 1 or not config.sigmas or min(config.sigmas) <= 0:
        raise ConfigError("--num-images and --num-tuning must be at least 1, and --sigmas above 0")
    check_device(config.device)
    vae = load_autoencoder(config.vae).to(config.device)
    if channels_of(vae) != 3:
        raise ConfigError(f"{config.vae} takes images of {channels_of(vae)} channels: this benchmark is of colours")
    check_writable(config.output)
    source, others = open_source(config.data), open_source(config.tune_on)
    for given, path in ((source, config.data), (others, config.tune_on)):
        check_finite(given, path, config.num_images)
    source = HeadSource(source, len(source) if config.num_images is None else config.num_images)
    images = usable(source)
    chosen = tuned(config, others)
    rows = measure(vae, source, images, chosen, config)
    lines = summarise(rows)
    write_csv(config.output / "per_image.csv", rows)
    record = {
        "config": as_json(config),
        "machine": describe_machine(torch.device(config.device)),
        "versions": versions(),
        "git": git_revision(),
        "images": len(images),
        "model": fingerprint(vae),
        "training": training_of(Path(config.vae)),
        "settings": [{"method": m, "sigma": s, **v} for (m, s), v in chosen.items()],
        "results": lines,
    }
    write_json(config.output / "results.json", record)
    with atomic(config.output / "table.md") as out:
        out.write(table(lines).encode())
    for sigma in config.sigmas:
        gallery(vae, source, images, chosen, sigma, config.seed).save(config.output / f"sigma-{sigma:g}.png")
    print(table(lines))
    print(f"{len(images)} images; figures and pictures are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Take the noise out of images, by several methods."))
