"""Encode every image of a data set once, for training a diffusion model on the latents.

accelerate launch training/cache_latents.py --vae RUN_OR_MODEL --data PATH --output CACHE

The same command continues an unfinished cache, on any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ldm_vae.data.loader import with_tensors
from ldm_vae.data.reader import USUAL
from ldm_vae.data.sources import check_finite
from ldm_vae.data.workers import default_workers, made_ahead
from ldm_vae.errors import one_line_errors
from ldm_vae.files import check_writable, lock, staged_directory, write_bad_images
from ldm_vae.latents.cache import (
    Plan,
    begin,
    class_table,
    labels_among,
    summarise,
    unfinished,
    write_index,
    write_shard,
)
from ldm_vae.latents.resolution import open_squares
from ldm_vae.latents.rows import EncoderBatch, Squares, squares_of
from ldm_vae.latents.scaling import as_stored, put_statistics
from ldm_vae.models.interface import encode_moments, fingerprint, latent_channels_of, stride_of
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.progress import progress
from ldm_vae.runs.config import Range, Reading, check_ranges, parse_flags
from ldm_vae.runs.processes import PATIENCE


@dataclass(frozen=True, kw_only=True)
class Config:
    vae: str
    """Run directory, diffusers folder or hub id."""
    data: str
    """Image folder, .zip, tar shards, Hugging Face dataset, or procedural:NAME."""
    output: Path
    """The cache."""
    resolution: Annotated[int | None, Range(at_least=1)] = None
    """The centred square of each image is resized to this side; the one that the VAE's run was trained on unless
    given."""
    flip: bool = False
    """Encode the mirrored images, too."""
    num_images: Annotated[int | None, Range(at_least=1)] = None
    """Only the first so many."""
    batch_size: Annotated[int, Range(at_least=1)] = 32
    """Images that each process encodes at once; changes nothing but the speed."""
    num_workers: Annotated[int | None, Range(at_least=0)] = None
    """Processes that decode images, for each process; up to 8, as the cores allow, unless given."""
    shard_size: Annotated[int, Range(at_least=1)] = 1024
    """Images a file."""
    reading: Reading = USUAL


@torch.inference_mode()
def encode(batch: EncoderBatch[Tensor], vae: Any, squares: Squares, *, flip: bool) -> EncoderBatch[Tensor]:
    """The moments of a batch; an image whose moments are not finite counts as bad."""
    if not len(batch.tensors):
        return batch
    images = batch.tensors.to(vae.device, memory_format=torch.channels_last, non_blocking=True)
    entries = [images, images.flip(-1)] if flip else [images]
    moments = torch.stack([encode_moments(vae, entry).float().cpu() for entry in entries], dim=1)
    finite = moments.flatten(1).isfinite().all(dim=1).tolist()
    failed = [squares.source.name(i) for i, ok in zip(batch.indices, finite, strict=True) if not ok]
    return EncoderBatch(
        tensors=moments[finite],
        indices=list(compress(batch.indices, finite)),
        labels=list(compress(batch.labels, finite)),
        bad_images=batch.bad_images | dict.fromkeys(failed, "the VAE makes no finite latents of it"),
    )


def make_shards(shards: list[int], plan: Plan, vae: Any, squares: Squares, config: Config, *, show: bool) -> None:
    """Encodes and writes these shards, one after the other, with the same workers for all of them."""
    batches = {shard: batches_of(plan.indices(shard), config.batch_size) for shard in shards}
    order = [batch for shard in shards for batch in batches[shard]]
    num_workers = default_workers() if config.num_workers is None else config.num_workers
    images = made_ahead(partial(squares_of, squares), order, num_workers=num_workers)
    label_of = [*labels_among(plan.classes, squares.classes), -1]  # the last one stays: no label
    loaded = (with_tensors(batch, pin_memory=vae.device.type == "cuda") for batch in images)
    for shard in progress(shards, unit="shard", show=show):
        encoded = [encode(batch, vae, squares, flip=config.flip) for batch in islice(loaded, len(batches[shard]))]
        moments = [batch.tensors for batch in encoded if len(batch.tensors)]
        write_shard(
            config.output,
            shard,
            moments=as_stored(torch.cat(moments)).numpy() if moments else np.empty(0),
            indices=[i for batch in encoded for i in batch.indices],
            labels=[label_of[label] for batch in encoded for label in batch.labels],
            bad_images={name: reason for batch in encoded for name, reason in batch.bad_images.items()},
        )


def batches_of(indices: range, size: int) -> list[range]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def main(config: Config) -> None:
    check_ranges(config)
    accelerator = Accelerator(kwargs_handlers=[PATIENCE])
    vae = load_autoencoder(config.vae).to(accelerator.device)
    squares = open_squares(config.data, vae, config.vae, config.resolution, options=config.reading)
    accelerator.print(f"images of {squares.resolution} x {squares.resolution} pixels")
    source, side = squares.source, squares.resolution // stride_of(vae)
    check_finite(source, config.data, config.num_images)
    plan = Plan(
        vae=fingerprint(vae),
        data=source.fingerprint(),
        num_images=min(len(source), config.num_images or len(source)),
        resolution=squares.resolution,
        flip=config.flip,
        latent_shape=(latent_channels_of(vae), side, side),
        classes=source.classes,
        shard_size=config.shard_size,
    )
    check_writable(config.output)
    output_lock = lock(config.output) if accelerator.is_main_process else None
    with accelerator.main_process_first():
        plan = begin(config.output, plan)
    accelerator.print(class_table(plan.classes))
    todo = unfinished(config.output, plan)
    accelerator.wait_for_everyone()  # before a shard is finished: all must have seen the same list
    if accelerator.is_main_process:
        for left in config.output.glob(".shard-*"):  # half-written files of a killed job
            left.unlink()
        if todo:
            (config.output / "index.json").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    make_shards(mine, plan, vae, squares, config, show=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not (config.output / "index.json").exists():
        complete(config, plan, vae)
    if output_lock is not None:
        output_lock.close()
    accelerator.end_training()


def complete(config: Config, plan: Plan, vae: Any) -> None:
    """Writes the VAE with its statistics beside the shards, and then the index that makes them a cache."""
    summary = summarise(config.output, plan)
    statistics, bad_images = summary.statistics, summary.bad_images
    put_statistics(vae, statistics)
    with staged_directory(config.output / "vae") as staging:
        vae.save_pretrained(staging)
    if bad_images:
        print(f"{len(bad_images)} bad images: see {write_bad_images(config.output, bad_images)}")
    write_index(config.output, summary)
    kib = sum(f.stat().st_size for f in config.output.glob("shard-*.safetensors")) / plan.num_images / 2**10
    mean, std = (", ".join(f"{v:.3g}" for v in vector) for vector in (statistics.mean, statistics.std))
    print(f"{plan.num_images} images, {kib:.1f} KiB each; per channel mean {mean}; deviation {std}; in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Encode every image of a data set once."))
