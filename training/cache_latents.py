"""Encode every image of a data set once, for training a diffusion model on the latents.

accelerate launch training/cache_latents.py --vae RUN_OR_MODEL --data PATH --output CACHE

The same command goes on with a cache that was not finished, on any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm_vae.config import parse_flags
from ldm_vae.data.images import centre_square, to_images
from ldm_vae.data.loader import default_workers, leave_signals_to_the_trainer
from ldm_vae.data.sources import Source, open_source
from ldm_vae.errors import BadImageError, ConfigError, one_line_errors
from ldm_vae.files import check_writable, staged_directory, write_csv
from ldm_vae.latents.cache import Plan, begin, summarise, unfinished, write_index, write_shard
from ldm_vae.latents.statistics import put_statistics
from ldm_vae.models.pretrained import (
    channels_of,
    encode_moments,
    fingerprint,
    latent_channels_of,
    load_autoencoder,
    stride_of,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the caching of latents."""

    vae: str
    """Run directory, diffusers folder or hub id."""
    data: str
    """Image folder, .zip, Hugging Face dataset, or procedural:NAME."""
    output: Path
    """The cache."""
    resolution: int = 256
    """The centred square of each image is resized to this side."""
    flip: bool = False
    """Encode the mirrored images, too."""
    num_images: int | None = None
    """Only the first so many."""
    batch_size: int = 32
    """Images that each process encodes at once; changes nothing but the speed."""
    num_workers: int | None = None
    """Processes that decode images, for each process; up to 8, as the cores allow, unless given."""
    shard_size: int = 1024
    """Images a file."""


class SquaresInOrder(Dataset[tuple[Tensor | None, int | None, str]]):
    """The centred square of each image, its label, and "" or why it is bad."""

    def __init__(self, source: Source, resolution: int) -> None:
        self.source, self.resolution = source, resolution

    def __getitem__(self, index: int) -> tuple[Tensor | None, int | None, str]:
        try:
            sample = self.source[index]
        except BadImageError as error:
            return None, None, str(error)
        return to_images(centre_square(sample.pixels, self.resolution)), sample.label, ""


def plan_of(config: Config, vae: Any, source: Source) -> Plan:
    """Raises ConfigError for flags that cannot work."""
    for name in ("resolution", "batch_size", "shard_size", "num_images"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    stride = stride_of(vae)
    if config.resolution % stride:
        nearest = max(config.resolution // stride, 1) * stride
        raise ConfigError(f"--resolution {config.resolution} is not a multiple of {stride}: try {nearest}")
    if len(source) > 10**9 and not config.num_images:
        raise ConfigError(f"{config.data} has no end: add --num-images 10000, say")
    side = config.resolution // stride
    return Plan(
        vae=fingerprint(vae),
        data=source.fingerprint(),
        num_images=min(len(source), config.num_images or len(source)),
        resolution=config.resolution,
        flip=config.flip,
        latent_shape=(latent_channels_of(vae), side, side),
        classes=source.classes,
        shard_size=config.shard_size,
    )


@torch.inference_mode()
def encode_shard(
    indices: range, vae: Any, squares: SquaresInOrder, config: Config, device: torch.device
) -> dict[str, Any]:
    """What `write_shard` writes of these images of the source."""
    num_workers = default_workers() if config.num_workers is None else config.num_workers
    loader = DataLoader(
        squares,
        sampler=indices,
        batch_size=config.batch_size,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=leave_signals_to_the_trainer if num_workers else None,
    )
    moments: list[Tensor] = []
    kept: list[int] = []
    labels: list[int] = []
    bad_images: dict[str, str] = {}
    for rows, here in zip(loader, batches_of(indices, config.batch_size), strict=True):
        good = [(row[0], row[1], index) for row, index in zip(rows, here, strict=True) if row[0] is not None]
        bad_images |= {
            squares.source.name(i): why for (square, _, why), i in zip(rows, here, strict=True) if square is None
        }
        if not good:
            continue
        images = torch.stack([square for square, _, _ in good]).to(device, memory_format=torch.channels_last)
        entries = [images, images.flip(-1)] if config.flip else [images]
        moments.append(torch.stack([encode_moments(vae, entry).float().cpu() for entry in entries], dim=1))
        labels += [-1 if label is None else label for _, label, _ in good]
        kept += [index for _, _, index in good]
    together = torch.cat(moments) if moments else torch.empty(0)
    return {"moments": together, "indices": kept, "labels": labels, "bad_images": bad_images}


def batches_of(indices: range, size: int) -> list[range]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def main(config: Config) -> None:
    accelerator = Accelerator()
    vae = load_autoencoder(config.vae).to(accelerator.device)
    source = open_source(config.data, channels=channels_of(vae), resolution=config.resolution)
    plan = plan_of(config, vae, source)
    check_writable(config.output)
    with accelerator.main_process_first():
        plan = begin(config.output, plan)
    todo = unfinished(config.output, plan)
    accelerator.wait_for_everyone()  # before any shard is finished: all must have seen the same list
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    squares = SquaresInOrder(source, config.resolution)
    for shard in tqdm(mine, unit="shard", disable=not accelerator.is_main_process):
        encoded = encode_shard(plan.indices(shard), vae, squares, config, accelerator.device)
        write_shard(config.output, shard, **encoded)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not (config.output / "index.json").exists():
        complete(config, plan, vae)
    accelerator.end_training()


def complete(config: Config, plan: Plan, vae: Any) -> None:
    """The VAE with its statistics beside the shards, and then the index that makes them a cache."""
    summary = summarise(config.output, plan)
    statistics, bad_images = summary.statistics, summary.bad_images
    put_statistics(vae, statistics)
    with staged_directory(config.output / "vae") as staging:
        vae.save_pretrained(staging)
    if bad_images:
        write_csv(config.output / "bad_images.csv", [{"name": n, "reason": r} for n, r in sorted(bad_images.items())])
        print(f"{len(bad_images)} bad images: see {config.output / 'bad_images.csv'}")
    write_index(config.output, summary)
    kib = sum(f.stat().st_size for f in config.output.glob("shard-*.safetensors")) / plan.num_images / 2**10
    mean, std = (", ".join(f"{v:.3g}" for v in vector) for vector in (statistics.mean, statistics.std))
    print(f"{plan.num_images} images, {kib:.1f} KiB each; per channel mean {mean}; deviation {std}; in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Encode every image of a data set once."))
