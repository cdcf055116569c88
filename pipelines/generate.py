"""Generate images with a trained pipeline.

python pipelines/generate.py --model RUN --output DIR --num-images N

Image i has seed S + i and depends on nothing else, however many processes and however large batches make it. Each is a
PNG that says how it was made; run again, the command makes what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.utils import logging
from PIL import Image
from tqdm import tqdm

from ldm_vae.commands.png import SHEET, finished, own_share, read_png, write_png
from ldm_vae.data.conversion import check_viewable, to_images, to_pixels
from ldm_vae.data.file_sources import FileSource, FolderReader
from ldm_vae.data.image_files import is_image
from ldm_vae.data.images import MAX_PIXELS, Pixels, centre_square, formats, resize
from ldm_vae.data.sources import Source, check_finite, check_outside, open_source
from ldm_vae.errors import BadImageError, ConfigError, nothing_usable, one_line_errors
from ldm_vae.files import atomic, check_writable, sha256, write_csv
from ldm_vae.grids import labelled_rows, visible
from ldm_vae.models.interface import channels_of, stride_of
from ldm_vae.models.reconstruction import exact_float32
from ldm_vae.pipeline import LatentDiffusionPipeline, fingerprint_of, load_pipeline
from ldm_vae.runs.config import parse_flags
from ldm_vae.runs.processes import PATIENCE
from ldm_vae.sampling import Sampling, adds_noise, make_scheduler, prediction_of

SHEET_SIDE, SHEET_CELLS = 256, 10


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the generator."""

    model: str
    """Run directory, pipeline folder or hub id."""
    output: Path
    num_images: int | None = None
    """With --image, one for each of them unless given."""
    class_label: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Name or number of a class; given several times, the images take turns. Unless given: all classes in turn, or,
    with --image, none."""
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times in which guidance is applied: 1 is pure noise."""
    steps: int = 50
    scheduler: str | None = None
    """dpmsolver++, sde-dpmsolver++, euler, heun, unipc or ddim, what fits the model; the model's own unless given."""
    height: int | None = None
    width: int | None = None
    seed: int = 0
    batch_size: int = 16
    image: str | None = None
    """A file, or a folder or other source of images: image-to-image, image i from the i-th of them."""
    mask: Path | None = None
    """White is made anew, the rest of --image is kept."""
    strength: float = 0.8
    mixed_precision: Literal["no", "bf16"] = "no"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image to make."""

    name: str
    seed: int
    label: int | None
    facts: dict[str, str]
    position: int
    """Which of the images given it starts from."""


def validate(config: Config, pipeline: LatentDiffusionPipeline) -> None:
    """Raises ValueError or ConfigError for what can be seen to be wrong before anything is made."""
    for flag, value in (("--num-images", config.num_images), ("--batch-size", config.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} is {value}: it must be at least 1")
    if config.seed < 0:
        raise ConfigError(f"--seed is {config.seed}: it must be at least 0")
    if config.image is None and config.num_images is None:
        raise ConfigError("how many images? add --num-images 16, say")
    if config.mask is not None and config.image is None:
        raise ConfigError("--mask needs the --image that it is for")
    if config.image is not None and (config.height or config.width):
        raise ConfigError("--height and --width are the image's own with --image")
    if config.image is None:
        pipeline.latent_size(config.height, config.width, None)
    check_viewable(channels_of(pipeline.vae))
    Sampling(
        num_inference_steps=config.steps,
        strength=config.strength,
        guidance_scale=config.guidance_scale,
        guidance_interval=config.guidance_interval,
    )


def open_images(config: Config, channels: int) -> Source | None:
    """What --image names: one file, or a source of many."""
    if config.image is None:
        return None
    file = Path(config.image)
    if file.is_file() and is_image(file.name):
        return FileSource([file.name], FolderReader(file.parent), channels=channels, max_pixels=MAX_PIXELS)
    check_outside(config.output, config.image, flag="--image")
    source = open_source(config.image, channels=channels)
    check_finite(source, config.image, config.num_images)
    return source


def settings_of(config: Config, pipeline: LatentDiffusionPipeline, images: Source | None) -> dict[str, str]:
    """What decides an image besides its seed and class, as text for its PNG."""
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
    mask = "none" if config.mask is None else sha256(config.mask)
    given = {"images": images.fingerprint(), "first_seed": str(config.seed), "mask": mask}
    return settings | given | {"strength": f"{config.strength:g}"}


def jobs_of(
    config: Config, pipeline: LatentDiffusionPipeline, images: Source | None, settings: dict[str, str]
) -> dict[str, Job]:
    """All images of the command, by the names of their files."""
    given = [pipeline.label_of(c) for c in config.class_label] if pipeline.num_classes else []
    if config.class_label and not given:
        pipeline.labels_for(config.class_label)  # says that there are none
    labels: Sequence[int | None] = given or (range(pipeline.num_classes) if images is None else ()) or [None]
    jobs = {}
    for i in range(config.num_images or len(images or ())):
        label, seed = labels[i % len(labels)], config.seed + i
        name = class_name(pipeline, label)
        own = {"seed": str(seed), "class": name or "none"}
        position = 0
        if images is not None:
            position = i % len(images)
            own["image"] = images.name(position)
        file = f"{folder_of(name)}/{seed:08d}.png" if name else f"{seed:08d}.png"
        jobs[file] = Job(name=file, seed=seed, label=label, facts=own | settings, position=position)
    return jobs


def class_name(pipeline: LatentDiffusionPipeline, label: int | None) -> str | None:
    if label is None:
        return None
    names = pipeline.config.class_names
    return str(names[label]) if names else f"{label:04d}"


def folder_of(name: str) -> str:
    """A class's name as that of a folder: what would lead elsewhere, or hide it, is written as in a URL."""
    safe = "".join(f"%{ord(c):02X}" if c in "%/\\\0" else c for c in name)
    return f"%2E{safe[1:]}" if safe.startswith(".") else safe


def batches_of(
    jobs: Sequence[Job], images: Source | None, batch_size: int, bad_images: dict[str, str]
) -> Iterator[tuple[list[Job], list[Pixels] | None]]:
    """Jobs that go together, with the images that they start from, of one size; bad images are noted and left out."""
    for start in range(0, len(jobs), batch_size):
        batch = list(jobs[start : start + batch_size])
        if images is None:
            yield batch, None
            continue
        ready: dict[tuple[int, ...], list[tuple[Job, Pixels]]] = {}
        for job in batch:
            try:
                given = images[job.position].pixels
            except BadImageError as error:
                bad_images[images.name(job.position)] = str(error)
                continue
            ready.setdefault(tuple(given.shape), []).append((job, given))
        for group in ready.values():
            yield [job for job, _ in group], [given for _, given in group]


def contact_sheet(output: Path, jobs: Sequence[Job]) -> Image.Image:
    """Up to 10 x 10 of the images: a row a class or, without classes, in the order of their seeds."""
    groups: dict[str, list[Job]] = {}
    for i, job in enumerate(jobs):
        in_order = f"seeds from {jobs[i - i % SHEET_CELLS].seed}"
        groups.setdefault(in_order if job.label is None else job.facts["class"], []).append(job)
    rows = {k: [read_png(output / j.name) for j in v[:SHEET_CELLS]] for k, v in list(groups.items())[:SHEET_CELLS]}
    sizes = {p.shape[:2] for row in rows.values() for p in row}
    columns = max(len(row) for row in rows.values())
    drawn = []
    for label, row in rows.items():
        tiles = [tile_of(p, sizes) for p in row]
        blank = [np.full_like(tiles[0], 255)] * (columns - len(tiles))
        drawn.append((label, np.stack(tiles + blank)))
    return labelled_rows(drawn)


def tile_of(pixels: Pixels, sizes: set[tuple[int, ...]]) -> Pixels:
    """At most SHEET_SIDE pixels high and wide; when the images have different sizes, the centred square."""
    height, width = pixels.shape[:2]
    longer = max(height, width)
    if len(sizes) > 1:
        pixels = centre_square(pixels, SHEET_SIDE // 2)
    elif longer > SHEET_SIDE:
        scaled = [max(round(n * SHEET_SIDE / longer), 1) for n in (height, width)]
        pixels = resize(pixels, (scaled[0], scaled[1]))
    return visible(to_images(pixels)[None])[0]


def main(config: Config) -> None:
    logging.disable_progress_bar()
    exact_float32()
    accelerator = Accelerator(kwargs_handlers=[PATIENCE], mixed_precision=config.mixed_precision)
    share = {"part": accelerator.process_index, "parts": accelerator.num_processes}
    pipeline = load_pipeline(config.model)
    if config.scheduler:
        pipeline.scheduler = make_scheduler(prediction_of(pipeline.scheduler), config.scheduler)
    validate(config, pipeline)
    images = open_images(config, channels_of(pipeline.vae))
    mask = None if config.mask is None else Image.open(config.mask, formats=formats())
    settings = settings_of(config, pipeline, images)
    jobs = jobs_of(config, pipeline, images, settings)
    check_writable(config.output)
    done = finished(config.output, jobs, settings, **share)
    mine = [jobs[name] for name in own_share(jobs, done, **share)]
    accelerator.print(f"{len(jobs)} images in {config.output}, {len(done)} of them there already")
    pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    bad: dict[str, str] = {}
    with tqdm(total=len(mine), unit="image", disable=not accelerator.is_main_process) as bar:
        for batch, given in batches_of(mine, images, config.batch_size, bad):
            with accelerator.autocast():
                made = pipeline(
                    [job.label for job in batch if job.label is not None] or None,
                    num_images=len(batch),
                    height=config.height,
                    width=config.width,
                    num_inference_steps=config.steps,
                    guidance_scale=config.guidance_scale,
                    guidance_interval=config.guidance_interval,
                    generator=[job.seed for job in batch],
                    image=given,
                    mask_image=mask,
                    strength=config.strength,
                    output_type="pt",
                ).images
            for job, pixels in zip(batch, to_pixels(made * 2 - 1), strict=True):
                write_png(config.output / job.name, pixels, job.facts)
            bar.update(len(batch))
    for part in gather_object([bad]):
        bad |= part
    if accelerator.is_main_process:
        if bad:
            write_csv(config.output / "bad_images.csv", [{"name": n, "reason": r} for n, r in sorted(bad.items())])
        there = [job for job in jobs.values() if (config.output / job.name).exists()]
        if not there:
            raise nothing_usable(bad)
        with atomic(config.output / SHEET) as out:
            contact_sheet(config.output, there).save(out, "PNG")
        worse = f", {len(bad)} left out: see {config.output / 'bad_images.csv'}" if bad else ""
        print(f"{len(there)} images are there{worse}; look at {config.output / SHEET}")
    accelerator.end_training()


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Generate images with a trained pipeline."))
