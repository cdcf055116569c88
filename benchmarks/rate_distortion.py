"""Rate and distortion of codecs, side by side, from whole files.

python benchmarks/rate_distortion.py --codec RUN_OR_MODEL [--codec ...] --data PATH --output DIR

Every codec compresses every image, as uint8 RGB at its own size, at each of its settings. Bits per pixel are those of
the whole file, container and all. PSNR is over all RGB values of an image. Curves are means over images; Bjøntegaard
differences are given for the mean curve, and as the mean over images with its 95 % interval.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image, features
from tqdm import tqdm

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.images import Pixels
from ldm_vae.data.sources import check_finite, open_source
from ldm_vae.data.workers import default_workers
from ldm_vae.errors import BadImageError, ConfigError, LdmVaeError, nothing_usable, one_line_errors
from ldm_vae.files import atomic, check_writable, write_csv, write_json
from ldm_vae.grids import labelled_rows
from ldm_vae.metrics import bjontegaard_rate, bootstrap_interval, ms_ssim, psnr, ssimulacra2
from ldm_vae.objectives.perceptual import PerceptualLoss
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import git_revision, versions
from ldm_vae.timing import describe_machine, peak_memory_of

Row = dict[str, Any]
Other = Literal[
    "jpeg-420",
    "jpeg-444",
    "webp",
    "avif-420",
    "avif-444",
    "avif-420-slowest",
    "avif-444-slowest",
    "jpeg2000",
    "jpeg-xl",
]
METRICS = {
    "psnr": "PSNR (dB)",
    "ms_ssim_db": "MS-SSIM (dB)",
    "ssimulacra2": "SSIMULACRA2",
    "lpips_alex": "LPIPS (AlexNet)",
}
"""ms_ssim_db: -10 log10(1 - MS-SSIM), which spreads the values near 1."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the rate-distortion benchmark."""

    codec: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Run directory, model folder or hub id with fitted tables; give it once for each."""
    data: str
    output: Path
    qualities: tuple[float, ...] = (0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)
    """Of our codecs."""
    others: tuple[Other, ...] = ("jpeg-420", "jpeg-444", "webp", "avif-420", "jpeg2000", "jpeg-xl")
    """Codecs to compare with; those that are not installed are left out, and said so."""
    between: tuple[float, float] = (0.15, 0.6)
    """Bits per pixel that the Bjøntegaard differences are over."""
    num_images: int | None = None
    published: Path | None = None
    """CSV (codec, bits_per_pixel, psnr_rgb_db, source) of curves to draw dotted."""
    show: float = 0.3
    """Bits per pixel of the pictures in the gallery."""
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Something that makes bytes of pixels (H, W, 3), and pixels of bytes, at several settings."""

    name: str
    settings: Sequence[Any]
    encode: Callable[[Pixels, Any], bytes]
    decode: Callable[[bytes], Pixels]


def by_pillow(pixels: Pixels, setting: Any, *, kind: str, key: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **{key: setting}, **options)
    return file.getvalue()


def open_by_pillow(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pillow_codec(name: str) -> Codec | None:
    """None for one that this Pillow cannot write."""
    jpeg = (5, 8, 12, 17, 23, 30, 40, 50, 60, 70, 80)
    avif = (20, 30, 38, 45, 52, 60, 68, 76)
    kind = name.split("-")[0]
    options: dict[str, Any] = {}
    settings: Sequence[Any] = jpeg
    key = "quality"
    match kind:
        case "jpeg" if name != "jpeg-xl":
            options = {"optimize": True, "subsampling": 2 if name.endswith("420") else 0}
        case "jpeg":
            try:
                import pillow_jxl  # noqa: F401  # registers itself
            except ImportError:
                return None
            kind, settings = "jxl", (15, 25, 35, 45, 55, 65, 75, 85)
            options = {"effort": 7}
        case "webp":
            settings, options = (0, 5, 12, 22, 35, 50, 65, 78, 86), {"method": 6}
        case "avif":
            settings = avif
            options = {"speed": 0 if "slowest" in name else 6, "subsampling": "4:2:0" if "420" in name else "4:4:4"}
        case "jpeg2000":
            settings, key = [[24 / rate] for rate in (0.07, 0.1, 0.15, 0.22, 0.32, 0.46, 0.68, 1.0)], "quality_layers"
            options = {"quality_mode": "rates", "irreversible": True, "mct": 1}
    available = {"webp": "webp", "avif": "avif", "jpeg2000": "jpg_2000"}.get(kind)
    if available and not features.check(available):
        return None
    encode: Callable[[Pixels, Any], bytes] = partial(by_pillow, kind=kind.upper(), key=key, **options)
    return Codec(name=name, settings=settings, encode=encode, decode=open_by_pillow)


def our_codec(path: str, config: Config) -> Codec:
    codec = LatentCodec.from_pretrained(path, device=config.device)
    return Codec(
        name=path,
        settings=config.qualities,
        encode=lambda pixels, quality: codec.compress(pixels, quality=quality),
        decode=lambda data: codec.decompress_picture(data).pixels,
    )


def load_images(config: Config) -> dict[str, Pixels]:
    if config.num_images is not None and config.num_images < 1:
        raise ConfigError(f"--num-images is {config.num_images}: it must be at least 1")
    source = open_source(config.data)
    check_finite(source, config.data, config.num_images)
    images: dict[str, Pixels] = {}
    bad: dict[str, str] = {}
    for i in range(min(len(source), config.num_images or len(source))):
        try:
            pixels = source[i].pixels
            images[source.name(i)] = pixels if pixels.dtype == np.uint8 else to_pixels(to_images(pixels))
        except BadImageError as error:
            bad[source.name(i)] = str(error)
    for name, reason in bad.items():
        print(f"left out: {name}: {reason}")
    if not images:
        raise nothing_usable(bad)
    return images


def measure(codec: Codec, images: dict[str, Pixels], pool: ProcessPoolExecutor) -> list[Row]:
    """A row for each image and setting. What is timed runs alone, on all cores; fidelities are measured after that."""
    rows: list[Row] = []
    first = next(iter(images.values()))
    codec.decode(codec.encode(first, codec.settings[0]))  # what is loaded or compiled at first is not timed
    for setting in tqdm(codec.settings, desc=codec.name, unit="setting"):
        timed, pairs = [], []
        for name, pixels in images.items():
            began = time.perf_counter()
            data = codec.encode(pixels, setting)
            encoded = time.perf_counter()
            decoded = codec.decode(data)
            done = time.perf_counter()
            timed.append(
                {
                    "codec": codec.name,
                    "setting": setting[0] if isinstance(setting, list) else setting,
                    "image": name,
                    "bytes": len(data),
                    "bpp": 8 * len(data) / (pixels.shape[0] * pixels.shape[1]),
                    "encode_seconds": encoded - began,
                    "decode_seconds": done - encoded,
                }
            )
            pairs.append((pixels, decoded))
        rows += [row | found for row, found in zip(timed, pool.map(fidelities, pairs), strict=True)]
    return rows


def fidelities(pair: tuple[Pixels, Pixels]) -> Row:
    """Of an image and its copy, in a process of its own."""
    torch.set_num_threads(1)
    pixels, decoded = pair
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


def mean_curve(rows: list[Row], metric: str) -> tuple[list[float], list[float]]:
    """Rate and fidelity at each setting, means over the images. LPIPS turned over, as it falls."""
    settings = list(dict.fromkeys(r["setting"] for r in rows))
    points = [[r for r in rows if r["setting"] == s] for s in settings]
    sign = -1.0 if metric.startswith("lpips") else 1.0
    return (
        [float(np.mean([r["bpp"] for r in p])) for p in points],
        [sign * float(np.mean([r[metric] for r in p])) for p in points],
    )


def difference(rows: list[Row], reference: list[Row], metric: str, between: tuple[float, float]) -> Row:
    """Bjøntegaard differences in rate, in percent: of the mean curve, and the mean over images with its interval."""
    of_means = bjontegaard_rate(*mean_curve(rows, metric), *mean_curve(reference, metric), between=between)
    each = []
    for image in dict.fromkeys(r["image"] for r in rows):
        own, others = ([r for r in found if r["image"] == image] for found in (rows, reference))
        each.append(bjontegaard_rate(*mean_curve(own, metric), *mean_curve(others, metric), between=between))
    known = np.array([e for e in each if math.isfinite(e)])
    low, high = bootstrap_interval(known) if len(known) else (math.nan, math.nan)
    mean = float(known.mean()) if len(known) else math.nan
    return {"of_means": of_means, "mean": mean, "low": low, "high": high, "images": len(known)}


def usable(rows: dict[str, list[Row]], metric: str) -> dict[str, list[Row]]:
    """The rows of the images for which every codec has a finite figure at every setting, by codec.

    An image that comes back exactly has no PSNR, and MS-SSIM needs 161 pixels.
    """
    bad = {r["image"] for found in rows.values() for r in found if not math.isfinite(r.get(metric, math.nan))}
    return {name: [r for r in found if r["image"] not in bad] for name, found in rows.items()}


def table(rows: dict[str, list[Row]], differences: dict[str, dict[str, dict[str, Row]]], memory: dict[str, Any]) -> str:
    references = list(next(iter(differences.values())))
    metrics = list(next(iter(differences[next(iter(differences))].values())))
    head = ["codec", *(f"{METRICS[m].split(' (')[0]} against {r}" for r in references for m in metrics)]
    head += ["encode ms", "decode ms", "peak MiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, found in differences.items():
        cells = [name]
        for reference in references:
            for metric in metrics:
                d = found[reference][metric]
                figure = f"{d['of_means']:+.1f} % ({d['mean']:+.1f} [{d['low']:+.0f}, {d['high']:+.0f}])"
                fewer = f", {d['images']} images" if d["images"] < len({r["image"] for r in rows[name]}) else ""
                cells.append("-" if name == reference or not d["images"] else figure + fewer)
        for key in ("encode_seconds", "decode_seconds"):
            cells.append(f"{1e3 * float(np.median([r[key] for r in rows[name]])):.0f}")
        peak = memory[name]
        lines.append("| " + " | ".join([*cells, "-" if peak is None else f"{peak / 2**20:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, list[Row]], metric: str, published: Path | None, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for name, found in rows.items():
        rates, values = mean_curve(found, metric)
        sign = -1 if metric.startswith("lpips") else 1
        ours = name not in Other.__args__  # type: ignore[attr-defined]
        axes.plot(rates, [sign * v for v in values], marker="o", ms=3.5, lw=2.4 if ours else 1.3, label=name)
    axes.set_xlim(0, 1)
    if published is not None and metric == "psnr":
        curves: dict[str, list[tuple[float, float]]] = {}
        for line in published.read_text().splitlines()[1:]:
            name, rate, value = line.split(",")[:3]
            curves.setdefault(name, []).append((float(rate), float(value)))
        for name, points in curves.items():
            inside = [p for p in points if p[0] <= 1]
            axes.plot(*zip(*inside, strict=True), ls=":", lw=1.2, label=f"{name} (published)")
    low, high = zip(*((min(v), max(v)) for v in [visible_values(f, metric) for f in rows.values()]), strict=True)
    axes.set_ylim(min(low), max(high))
    axes.set_xlabel("bits per pixel, whole files")
    axes.set_ylabel(METRICS[metric])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def visible_values(rows: list[Row], metric: str) -> list[float]:
    rates, values = mean_curve(rows, metric)
    sign = -1 if metric.startswith("lpips") else 1
    return [sign * v for r, v in zip(rates, values, strict=True) if 0.05 <= r <= 1.05] or [sign * values[0]]


def gallery(codecs: list[Codec], images: dict[str, Pixels], rows: dict[str, list[Row]], config: Config) -> Image.Image:
    """256 x 256 cut from the middle of a few images, original and each codec at the setting nearest to a rate."""
    shown = [images[n] for n in list(images)[:: max(len(images) // 4, 1)][:4]]

    def cut(pixels: Pixels) -> Pixels:
        y, x = (max((n - 256) // 2, 0) for n in pixels.shape[:2])
        part = pixels[y : y + 256, x : x + 256]
        return np.pad(part, ((0, 256 - part.shape[0]), (0, 256 - part.shape[1]), (0, 0)))

    lines = [("original", np.stack([cut(p) for p in shown]))]
    for codec in codecs:
        parts, rates = [], []
        for pixels in shown:
            files = [codec.encode(pixels, s) for s in codec.settings]
            sizes = [8 * len(f) / (pixels.shape[0] * pixels.shape[1]) for f in files]
            best = int(np.argmin(np.abs(np.array(sizes) - config.show)))
            parts.append(cut(codec.decode(files[best])))
            rates.append(sizes[best])
        lines.append((f"{codec.name}: " + ", ".join(f"{r:.2f}" for r in rates) + " bits per pixel", np.stack(parts)))
    return labelled_rows(lines)


def there_and_back(codec: Codec, pixels: Pixels) -> Pixels:
    """At the middle setting."""
    return codec.decode(codec.encode(pixels, codec.settings[len(codec.settings) // 2]))


@cache
def find_lpips() -> PerceptualLoss | None:
    """LPIPS with its pretrained backbone, when that is at hand."""
    try:
        return PerceptualLoss("alex", pretrained=True)
    except LdmVaeError as error:
        if parent_process() is None:
            print(f"without LPIPS: {' '.join(str(error).split())}")
        return None


def main(config: Config) -> None:
    if not config.codec and not config.others:
        raise ConfigError("no codec is given: add --codec, or --others")
    check_writable(config.output)
    paths = list(dict.fromkeys(config.codec))
    codecs = [our_codec(path, config) for path in paths]
    for name in dict.fromkeys(config.others):
        codec = pillow_codec(name)
        if codec is None:
            print(f"left out: {name} is not installed")
        else:
            codecs.append(codec)
    images = load_images(config)
    find_lpips()  # says so when it is not there, or downloads it before several processes do
    workers = min(len(images), default_workers() + 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rows = {codec.name: measure(codec, images, pool) for codec in codecs}
    largest = max(images.values(), key=lambda p: p.size)
    memory = {c.name: peak_memory_of(partial(there_and_back, c, largest), device=torch.device("cpu")) for c in codecs}
    every = [r for found in rows.values() for r in found]
    by_metric = {m: usable(rows, m) for m in METRICS}
    metrics = [m for m in METRICS if all(by_metric[m].values())]
    for m in METRICS:
        left_out = len(images) - len({r["image"] for found in by_metric[m].values() for r in found})
        if left_out and any(m in r for r in every):
            print(f"{METRICS[m]}: {left_out} of {len(images)} images have none, and are left out of it")
    references: list[str] = [r for r in ("jpeg-420", "webp", "avif-420") if r in rows] or [codecs[0].name]
    differences = {
        name: {
            r: {m: difference(by_metric[m][name], by_metric[m][r], m, config.between) for m in metrics}
            for r in references
        }
        for name in rows
    }
    text = table(rows, differences, memory)
    write_csv(config.output / "per_image.csv", every)
    write_json(
        config.output / "results.json",
        {
            "config": as_json(config),
            "machine": describe_machine(torch.device(config.device)),
            "versions": versions(),
            "git": git_revision(),
            "images": len(images),
            "differences": differences,
            "curves": {n: {m: mean_curve(by_metric[m][n], m) for m in metrics} for n in rows},
        },
    )
    with atomic(config.output / "table.md") as out:
        out.write(text.encode())
    for metric in metrics:
        plot(by_metric[metric], metric, config.published, config.output / f"{metric}.png")
    gallery(codecs, images, rows, config).save(config.output / "gallery.png")
    print(text)
    print(f"{len(images)} images; figures and plots are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Rate and distortion of codecs, side by side, from whole files."))
