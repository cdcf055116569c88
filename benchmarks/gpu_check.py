"""Everything that needs a GPU, in one call: are results right there, how fast is it, how good are trained models.

python benchmarks/gpu_check.py --photos DIR --val-photos DIR --fashion-mnist DIR --flowers64 DIR --output OUT

Without a GPU it does the same on the CPU. Parts that were finished are not repeated: a call that ran out of time can be
repeated with the same output, and parts can be run in calls of their own.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm_vae.errors import one_line_errors
from ldm_vae.files import check_writable, write_json
from ldm_vae.models.autoencoder import ARCHITECTURES, PatchAutoencoderKL
from ldm_vae.models.reconstruction import exact_float32, reconstruct
from ldm_vae.models.unet import make_denoiser
from ldm_vae.pipeline import LatentDiffusionPipeline
from ldm_vae.report import logged_values, provenance
from ldm_vae.runs.config import parse_flags
from ldm_vae.sampling import make_scheduler
from ldm_vae.timing import peak_flops, seconds_of_script


@dataclass(frozen=True, kw_only=True)
class Config:
    output: Path
    photos: str | None = None
    """Training photos; without them, no VAE is trained."""
    val_photos: str | None = None
    fashion_mnist: str | None = None
    """Fashion-MNIST's folder; without it, no diffusion model is trained on it."""
    flowers64: str | None = None
    """The same for the flowers."""
    vae_steps: int = 8000
    diffusion_steps: int = 8000
    rounds: int = 2
    """Of the measurements of speed."""
    seconds: float = 0.3
    """Of each measurement, in each round."""


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float().cpu() - b.float().cpu()).abs().max().item()


def networks() -> tuple[Any, Any]:
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(**ARCHITECTURES["f8c4"]).eval()
    return vae, make_denoiser("tiny", latent_channels=4, sample_size=(8, 8), num_classes=2).eval()


@torch.inference_mode()
def correctness(device: torch.device) -> dict[str, float]:
    """Largest differences: between the device and the CPU, bf16 and float32, tiled and whole, compiled and plain."""
    (vae, unet), (device_vae, device_unet) = networks(), networks()
    device_vae = device_vae.to(device).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 128, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    device_images = images.to(device, memory_format=torch.channels_last)
    plain = reconstruct(device_vae, device_images)
    differences = {"vae: device - CPU": largest_difference(plain, reconstruct(vae, images))}
    with torch.autocast(device.type, torch.bfloat16):
        differences["vae: bf16 - float32"] = largest_difference(reconstruct(device_vae, device_images), plain)
    latents = torch.randn(1, 4, 40, 24, generator=torch.Generator().manual_seed(1)).to(device)
    whole = device_vae.decode(latents).sample
    device_vae.enable_tiling(16)
    differences["vae: tiled - whole"] = largest_difference(device_vae.decode(latents).sample, whole)
    device_vae.disable_tiling()
    device_vae.compile_repeated_blocks()
    differences["vae: compiled - plain"] = largest_difference(reconstruct(device_vae, device_images), plain)
    samples = [sample(vae, unet), sample(networks()[0].to(device), device_unet.to(device))]
    differences["pipeline: device - CPU"] = largest_difference(*samples)
    return differences


def sample(vae: Any, unet: Any) -> torch.Tensor:
    pipeline = LatentDiffusionPipeline(vae, unet, make_scheduler("flow"))
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline([0, 1], generator=[1, 2], num_inference_steps=10, guidance_scale=2.0, output_type="pt")
    images: torch.Tensor = output.images
    return images


def speed(folder: Path, config: Config, *words: str) -> dict[str, Any]:
    """benchmarks/throughput.py with these flags."""
    size = ("--resolution", 256, "--batch-size", 16) if torch.cuda.is_available() else ("--batch-size", 2)
    times = ("--rounds", config.rounds, "--seconds", config.seconds)
    seconds_of_script("benchmarks/throughput.py", "--output", folder, *size, *times, *words)
    (file,) = folder.glob("throughput-*.json")
    result: dict[str, Any] = json.loads(file.read_text())["results"]
    return result


def photos(config: Config) -> dict[str, Any]:
    """f8c4 trained with L1, KL and the adversarial loss on 128x128 crops, and its reconstructions of unseen photos."""
    run, figures = config.output / "vae", config.output / "reconstruction"
    starts = config.vae_steps // 2
    seconds_of_script(
        *("training/train_vae.py", "f8c4", "--data", config.photos, "--val-data", config.val_photos, "--output", run),
        *("--steps", config.vae_steps, "--batch-size", 32, "--resolution", 128, "--shorter-side", 256),
        *("--learning-rate", 1e-3, "--perceptual", "none", "--disc-start", starts),
        *("--adversarial-weight", 0.1, "--cache-gib", 8, "--sample-every", 2000, "--tracker", "none"),
    )
    words = ("--vae", run, "--data", config.val_photos, "--perceptual", "none", "--output", figures)
    seconds_of_script("benchmarks/reconstruction.py", *words)
    result = json.loads((figures / "results.json").read_text())["results"][str(run)]
    speeds = logged_values(run, "images_per_second")
    halves = {
        "without the discriminator": [speed for step, speed in speeds if step <= starts],
        "with it": [speed for step, speed in speeds if step > starts],
    }
    # the first line of each half includes the first calls
    return {"images_per_second": {k: statistics.median(v[1:] or v) for k, v in halves.items()}, **result}


def classes(config: Config, preset: str, data: str, *words: object) -> dict[str, Any]:
    """The study `class_conditional` with a larger denoiser; its contact sheets, with names for any file system."""
    folder = config.output / preset
    file = folder / "seconds.json"
    seconds = json.loads(file.read_text()) if file.exists() else {}
    for part in ("vae", "cache", "diffusion"):
        if part not in seconds:  # interrupted: its time is unknown
            shutil.rmtree(folder / part, ignore_errors=True)
    seconds_of_script(
        *("benchmarks/studies/class_conditional.py", preset, "--data", data, "--output", folder, "--denoiser", "small"),
        *("--steps", config.diffusion_steps, "--batch-size", 256, "--learning-rate", 5e-4, "--num-workers", 8),
        *("--mixed-precision", "bf16", "--vae-steps", 3000, *words),
    )
    for sheet in folder.glob("*/contact_sheet.png"):
        shutil.copy(sheet, config.output / f"{preset}-{re.sub('[ ,+]+', '-', sheet.parent.name)}.png")
    result: dict[str, Any] = json.loads((folder / "results.json").read_text())
    rate = statistics.median([speed for _, speed in logged_values(folder / "diffusion", "images_per_second")][1:])
    return {"diffusion_images_per_second": rate} | {k: result[k] for k in ("training_seconds", "figures")}


def main(config: Config) -> None:
    check_writable(config.output)
    device = Accelerator().device
    exact_float32()
    file = config.output / "gpu_check.json"
    record = (json.loads(file.read_text()) if file.exists() else {}) | provenance(config, device)
    parts: dict[str, Callable[[], Any]] = {"correctness": partial(correctness, device)}
    for dtype in (torch.float32, torch.bfloat16):
        parts[f"peak_flops_{dtype}"] = partial(peak_flops, device, dtype, seconds=config.seconds)
    bf16 = ("--mixed-precision", "bf16")
    for name, words in {"float32": (), "bf16": bf16, "bf16 compiled": (*bf16, "--compile")}.items():
        folder = config.output / "throughput" / name.replace(" ", "-")
        parts[f"throughput, {name}"] = partial(speed, folder, config, *words)
    if config.photos and config.val_photos:
        parts["photos"] = partial(photos, config)
    if config.fashion_mnist:
        parts["fashion-mnist"] = partial(classes, config, "fashion-mnist", config.fashion_mnist)
    if config.flowers64:
        parts["flowers64"] = partial(classes, config, "flowers64", config.flowers64)
    for name, part in parts.items():
        if name not in record:
            record[name] = part()
            write_json(file, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Everything that wants a GPU, in one call."))
