"""Images from a pipeline, image i from seed S + i alone, whatever the number of processes and the batch size.

Each is a PNG that says how it was made; the same command makes those that are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.utils import logging
from PIL import Image

from ldm_vae.commands.jobs import GenerateConfig, Job, jobs_of
from ldm_vae.commands.resumable import CONTACT_SHEET, read_png, share_work, write_png
from ldm_vae.data.conversion import check_viewable, to_images, to_pixels
from ldm_vae.data.file_sources import FolderSource
from ldm_vae.data.image_files import is_image
from ldm_vae.data.images import Pixels, centre_square, resize
from ldm_vae.data.pil import formats
from ldm_vae.data.reader import ImageReader
from ldm_vae.data.sources import Source, check_finite, check_outside, open_source, usable
from ldm_vae.errors import nothing_usable
from ldm_vae.files import atomic, check_writable, sha256, write_bad_images
from ldm_vae.grids import labelled_rows, visible
from ldm_vae.models.interface import channels_of, stride_of
from ldm_vae.models.reconstruction import exact_float32
from ldm_vae.pipeline import LatentDiffusionPipeline, fingerprint_of, load_pipeline
from ldm_vae.progress import progress
from ldm_vae.runs.processes import PATIENCE
from ldm_vae.sampling import adds_noise, make_scheduler, prediction_of

TILE_SIDE, TILES = 256, 10
"""Of the contact sheet: pixels of a tile, and tiles each way."""


def open_pipeline(config: GenerateConfig) -> LatentDiffusionPipeline:
    pipeline = load_pipeline(config.model)
    check_viewable(channels_of(pipeline.vae))
    pipeline.set_progress_bar_config(disable=True)
    if config.scheduler:
        pipeline.scheduler = make_scheduler(prediction_of(pipeline.scheduler), config.scheduler)
    return pipeline


def open_starts(config: GenerateConfig, channels: int) -> Source | None:
    """What --image names: one file, or a source of many."""
    if config.image is None:
        return None
    file = Path(config.image)
    if file.is_file() and is_image(file.name):
        return FolderSource(file.parent, ImageReader(channels=channels), names=[file.name])
    check_outside(config.output, config.image, flag="--image")
    source = open_source(config.image, channels=channels)
    check_finite(source, config.image, config.num_images)
    return source


def settings_of(config: GenerateConfig, pipeline: LatentDiffusionPipeline, images: Source | None) -> dict[str, str]:
    """What an image depends on besides its seed and class, as text for its PNG."""
    settings = {
        "model": fingerprint_of(pipeline),
        "steps": str(config.steps),
        "scheduler": type(pipeline.scheduler).__name__ + (", SDE" if adds_noise(pipeline.scheduler) else ""),
        "guidance": f"{config.guidance_scale:g}",
        "guidance_interval": "{:g} to {:g}".format(*config.guidance_interval),
        "precision": "bf16" if config.mixed_precision == "bf16" else "float32",
    }
    if images is None:
        height, width = (n * stride_of(pipeline.vae) for n in pipeline.latent_size(config.height, config.width, None))
        return settings | {"size": f"{height}x{width}"}
    return settings | {
        "images": images.fingerprint(),
        "first_seed": str(config.seed),
        "mask": "none" if config.mask is None else sha256(config.mask),
        "strength": f"{config.strength:g}",
    }


def batches_of(
    jobs: Sequence[Job], images: Source | None, batch_size: int, bad_images: dict[str, str]
) -> Iterator[tuple[list[Job], list[Pixels] | None]]:
    """Jobs to do together, with the images that they start from, of one size; bad images are noted and left out."""
    for start in range(0, len(jobs), batch_size):
        batch = list(jobs[start : start + batch_size])
        if images is None:
            yield batch, None
            continue
        by_size: dict[tuple[int, ...], list[tuple[Job, Pixels]]] = {}
        samples = dict(usable(images, bad_images, indices=(job.position for job in batch)))
        for job in batch:
            if job.position in samples:
                pixels = samples[job.position].pixels
                by_size.setdefault(tuple(pixels.shape), []).append((job, pixels))
        for pairs in by_size.values():
            yield [job for job, _ in pairs], [pixels for _, pixels in pairs]


def images_of_jobs(
    pipeline: LatentDiffusionPipeline,
    jobs: list[Job],
    images: list[Pixels] | None,
    mask: Image.Image | None,
    config: GenerateConfig,
) -> Pixels:
    """The images of some jobs, uint8 (N, H, W, C)."""
    generated = pipeline(
        [job.label for job in jobs if job.label is not None] or None,
        num_images=len(jobs),
        height=config.height,
        width=config.width,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        guidance_interval=config.guidance_interval,
        generator=[job.seed for job in jobs],
        image=images,
        mask_image=mask,
        strength=config.strength,
        output_type="pt",
    ).images
    return to_pixels(generated * 2 - 1)


def contact_sheet(output: Path, jobs: Sequence[Job]) -> Image.Image:
    """Up to 10 x 10 of the images: a row per class or, without classes, in the order of their seeds."""
    groups: dict[str, list[Job]] = {}
    for i, job in enumerate(jobs):
        label = f"seeds from {jobs[i - i % TILES].seed}" if job.label is None else job.facts["class"]
        groups.setdefault(label, []).append(job)
    rows = {k: [read_png(output / job.file) for job in v[:TILES]] for k, v in list(groups.items())[:TILES]}
    same_size = len({pixels.shape[:2] for row in rows.values() for pixels in row}) == 1
    tiles = {label: [tile_of(pixels, whole=same_size) for pixels in row] for label, row in rows.items()}
    columns = max(len(row) for row in tiles.values())
    return labelled_rows(
        [(label, np.stack(row + [np.full_like(row[0], 255)] * (columns - len(row)))) for label, row in tiles.items()]
    )


def tile_of(pixels: Pixels, *, whole: bool) -> Pixels:
    """The image, at most TILE_SIDE pixels high and wide; unless `whole`, its centred square."""
    height, width = pixels.shape[:2]
    longer = max(height, width)
    if not whole:
        pixels = centre_square(pixels, TILE_SIDE // 2)
    elif longer > TILE_SIDE:
        pixels = resize(pixels, (max(height * TILE_SIDE // longer, 1), max(width * TILE_SIDE // longer, 1)))
    return visible(to_images(pixels)[None])[0]


def report(output: Path, jobs: dict[str, Job], bad_images: dict[str, str]) -> None:
    """Writes the contact sheet and the list of bad images. Raises DataError when there is no image at all."""
    if bad_images:
        write_bad_images(output, bad_images)
    finished = [job for job in jobs.values() if (output / job.file).exists()]
    if not finished:
        raise nothing_usable(bad_images)
    with atomic(output / CONTACT_SHEET) as out:
        contact_sheet(output, finished).save(out, "PNG")
    left_out = f", {len(bad_images)} left out: see {output / 'bad_images.csv'}" if bad_images else ""
    print(f"{len(finished)} images are there{left_out}; look at {output / CONTACT_SHEET}")


def generate_all(config: GenerateConfig) -> None:
    """Makes the images that are missing, on all processes of the launch, and a contact sheet of all.

    Raises:
        ConfigError, ModelError, DataError: flags, a model or images that cannot be used.
        RunError: the folder has images of other settings.
    """
    config.check()
    logging.disable_progress_bar()
    exact_float32()
    accelerator = Accelerator(kwargs_handlers=[PATIENCE], mixed_precision=config.mixed_precision)
    pipeline = open_pipeline(config)
    images = open_starts(config, channels_of(pipeline.vae))
    mask = None if config.mask is None else Image.open(config.mask, formats=formats())
    settings = settings_of(config, pipeline, images)
    jobs = jobs_of(config, pipeline, images, settings)
    check_writable(config.output)
    files, num_finished = share_work(config.output, jobs, settings, accelerator)
    accelerator.print(f"{len(jobs)} images in {config.output}, {num_finished} of them there already")
    pipeline.to(accelerator.device)
    bad_images: dict[str, str] = {}
    with progress(total=len(files), unit="image", show=accelerator.is_main_process) as bar:
        batches = batches_of([jobs[file] for file in files], images, config.batch_size, bad_images)
        for batch, start_images in batches:
            with accelerator.autocast():
                pixels = images_of_jobs(pipeline, batch, start_images, mask, config)
            for job, image in zip(batch, pixels, strict=True):
                write_png(config.output / job.file, image, job.facts)
            bar.update(len(batch))
    for part in gather_object([bad_images]):
        bad_images |= part
    if accelerator.is_main_process:
        report(config.output, jobs, bad_images)
    accelerator.end_training()
