"""Everything that wants a GPU, in one call: is it right there, how fast is it, and what do trained models look like.

python benchmarks/gpu_check.py --photos DIR --val-photos DIR --fashion-mnist DIR --flowers64 DIR --output OUT

On a machine without a GPU it does the same on the CPU. What was finished is not done again, so that a call that ran out
of time can be repeated with the same output, and parts can be done in calls of their own.
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
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import git_revision, versions
from ldm_vae.sampling import make_scheduler
from ldm_vae.timing import describe_machine, peak_flops, seconds_of_script

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the check on a GPU."""

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
    """Of measurements of speed."""
    seconds: float = 0.3
    """Of each, in each round."""


# Is it right? ---------------------------------------------------------------------------------------------------------


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float().cpu() - b.float().cpu()).abs().max().item()


def networks() -> tuple[PatchAutoencoderKL, Any]:
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(**ARCHITECTURES["f8c4"]).eval()
    return vae, make_denoiser("tiny", latent_channels=4, sample_size=(8, 8), num_classes=2).eval()


@torch.inference_mode()
def correctness(device: torch.device) -> dict[str, float]:
    """Largest differences: of the device from the CPU, of bf16 and of torch.compile from plain float32."""
    (vae, unet), (own, own_unet) = networks(), networks()
    own, own_unet = own.to(device, memory_format=torch.channels_last), own_unet.to(device)
    images = torch.rand(2, 3, 128, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    here = images.to(device, memory_format=torch.channels_last)
    expected, plain = reconstruct(vae, images), reconstruct(own, here)
    found = {"vae: device - CPU": largest(plain, expected)}
    with torch.autocast(device.type, torch.bfloat16):
        found["vae: bf16 - float32"] = largest(reconstruct(own, here), plain)
    latents = torch.randn(1, 4, 40, 24, generator=torch.Generator().manual_seed(1)).to(device)
    whole = own.decode(latents).sample
    own.enable_tiling(16)
    found["vae: tiled - whole"] = largest(own.decode(latents).sample, whole)
    own.disable_tiling()
    own.compile_repeated_blocks()
    found["vae: compiled - plain"] = largest(reconstruct(own, here), plain)
    samples = []
    for a, b in ((vae, unet), (networks()[0].to(device), own_unet)):
        pipeline = LatentDiffusionPipeline(a, b, make_scheduler("flow"))
        pipeline.set_progress_bar_config(disable=True)
        options: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 2.0, "output_type": "pt"}
        samples.append(pipeline(class_labels=[0, 1], generator=[1, 2], **options).images)
    found["pipeline: device - CPU"] = largest(*samples)
    return found


# How fast is it, and what does it look like? --------------------------------------------------------------------------


def script(name: str, *words: object) -> None:
    seconds_of_script(ROOT / name, *words)


def speed(folder: Path, config: Config, *words: str) -> dict[str, Any]:
    """benchmarks/throughput.py with these flags."""
    size = ("--resolution", 256, "--batch-size", 16) if torch.cuda.is_available() else ("--batch-size", 2)
    times = ("--rounds", config.rounds, "--seconds", config.seconds)
    script("benchmarks/throughput.py", "--output", folder, *size, *times, *words)
    (file,) = folder.glob("throughput-*.json")
    result: dict[str, Any] = json.loads(file.read_text())["results"]
    return result


def speeds_of(run: Path) -> list[tuple[int, float]]:
    """(step, images/s since the line before) of each line of a run's log."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["images_per_second"]) for m in lines if "images_per_second" in m]


def photos(config: Config) -> dict[str, Any]:
    """f8c4 trained with L1, KL and the adversarial loss on 128x128 crops, and its reconstructions of unseen photos."""
    run, figures = config.output / "vae", config.output / "reconstruction"
    starts = config.vae_steps // 2
    script(
        *("training/train_vae.py", "f8c4", "--data", config.photos, "--val-data", config.val_photos, "--output", run),
        *("--steps", config.vae_steps, "--batch-size", 32, "--resolution", 128, "--shorter-side", 256),
        *("--learning-rate", 1e-3, "--perceptual", "none", "--disc-start", starts),
        *("--adversarial-weight", 0.1, "--cache-gib", 8, "--sample-every", 2000, "--tracker", "none"),
    )
    words = ("--vae", run, "--data", config.val_photos, "--perceptual", "none", "--output", figures)
    script("benchmarks/reconstruction.py", *words)
    result = json.loads((figures / "results.json").read_text())["results"][str(run)]
    halves = {
        "without the discriminator": [v for step, v in speeds_of(run) if step <= starts],
        "with it": [v for step, v in speeds_of(run) if step > starts],
    }
    # the first line of each has the first calls
    return {"images_per_second": {k: statistics.median(v[1:] or v) for k, v in halves.items()}, **result}


def classes(config: Config, preset: str, data: str, *words: object) -> dict[str, Any]:
    """The study `class_conditional` with a larger denoiser; its sheets, by names that can be copied anywhere."""
    folder = config.output / preset
    file = folder / "seconds.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    for part in ("vae", "cache", "diffusion"):
        if part not in known:  # a call was cut in it, and its time is not known
            shutil.rmtree(folder / part, ignore_errors=True)
    script(
        *("benchmarks/studies/class_conditional.py", preset, "--data", data, "--output", folder, "--denoiser", "small"),
        *("--steps", config.diffusion_steps, "--batch-size", 256, "--learning-rate", 5e-4, "--num-workers", 8),
        *("--mixed-precision", "bf16", "--vae-steps", 3000, *words),
    )
    for sheet in folder.glob("*/contact_sheet.png"):
        shutil.copy(sheet, config.output / f"{preset}-{re.sub('[ ,+]+', '-', sheet.parent.name)}.png")
    result: dict[str, Any] = json.loads((folder / "results.json").read_text())
    rate = statistics.median([v for _, v in speeds_of(folder / "diffusion")][1:])
    return {"diffusion_images_per_second": rate} | {k: result[k] for k in ("training_seconds", "figures")}


def main(config: Config) -> None:
    check_writable(config.output)
    device = Accelerator().device
    exact_float32()
    file = config.output / "gpu_check.json"
    record = json.loads(file.read_text()) if file.exists() else {"config": as_json(config), "versions": versions()}
    record |= {"machine": describe_machine(device), "git": git_revision()}
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
