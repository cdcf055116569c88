"""What a generator makes of photos: variations, filled holes, and what lies between two of them.

python benchmarks/studies/editing.py --model RUN_OR_MODEL --data PATH --output DIR

Writes a sheet of each, of some photos a class: `strengths.png`, `holes.png` and `between.png`; and `results.json` with
how visible the edge of a filled hole is: the mean absolute difference of the pixels on its two sides, relative to that
in the reconstruction. Beside it stands what a hole has that is filled with a part of another photo.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from ldm_vae.data.conversion import to_images
from ldm_vae.data.images import centre_square
from ldm_vae.data.sources import Source, check_finite, open_source, shuffled
from ldm_vae.errors import ConfigError, DataError, one_line_errors
from ldm_vae.files import check_writable, write_json
from ldm_vae.grids import labelled_rows, visible
from ldm_vae.models.interface import stride_of
from ldm_vae.pipeline import LatentDiffusionPipeline, load_pipeline
from ldm_vae.report import provenance
from ldm_vae.runs.config import Range, check_ranges, parse_flags

STRENGTHS = (0.4, 0.6, 0.8)
HOLE = 0.5
"""Side of the square hole, in the middle, as a share of the image's."""
FRAMES = 7


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "box:flowers"
    """Run directory, pipeline folder or hub id; class-conditional."""
    data: str
    output: Path
    steps: int = 20
    guidance_scale: float = 2.0
    photos_a_class: Annotated[int, Range(at_least=2)] = 2
    seed: int = 0


def photos_of(source: Source, classes: int, count: int, side: int, seed: int) -> tuple[Tensor, list[int]]:
    """`count` photos of each class, in the order of the classes: (N, C, side, side) in [-1, 1], and their labels."""
    found: dict[int, list[Tensor]] = {label: [] for label in range(classes)}
    for index in shuffled(source, seed):
        sample = source[index]
        if sample.label is not None and len(found[sample.label]) < count:
            found[sample.label].append(to_images(centre_square(sample.pixels, side)))
        if all(len(photos) == count for photos in found.values()):
            break
    return torch.cat([torch.stack(photos) for photos in found.values()]), [k for k in found for _ in found[k]]


def edge_contrast(images: Tensor, hole: slice) -> Tensor:
    """(N,): mean absolute difference of the pixels on the two sides of a square hole's edge, in 255ths."""
    before, after = hole.start, hole.stop
    pairs = [
        images[:, :, before - 1, hole] - images[:, :, before, hole],
        images[:, :, after, hole] - images[:, :, after - 1, hole],
        images[:, :, hole, before - 1] - images[:, :, hole, before],
        images[:, :, hole, after] - images[:, :, hole, after - 1],
    ]
    return torch.cat(pairs, dim=2).abs().mean(dim=(1, 2)) * 127.5


@torch.inference_mode()
def main(config: Config) -> None:
    check_ranges(config)
    check_writable(config.output)
    pipeline: LatentDiffusionPipeline = load_pipeline(config.model)
    pipeline.set_progress_bar_config(disable=True)
    if not pipeline.num_classes:
        raise ConfigError(f"{config.model} has no classes")
    source = open_source(config.data)
    check_finite(source, config.data, config.photos_a_class)
    names = pipeline.config.class_names or list(map(str, range(pipeline.num_classes)))
    if list(source.classes) != list(names):
        raise DataError(f"{config.data} has other classes than {config.model}, which knows {', '.join(names)}")
    height, width = pipeline.latent_size(None, None, None)
    side = min(height, width) * stride_of(pipeline.vae)
    photos, labels = photos_of(source, pipeline.num_classes, config.photos_a_class, side, config.seed)
    options: dict[str, Any] = {"num_inference_steps": config.steps, "guidance_scale": config.guidance_scale}
    options |= {"output_type": "pt", "generator": torch.Generator().manual_seed(config.seed)}
    given = (photos + 1) / 2

    def shown(images: Tensor) -> np.ndarray:
        return visible(images * 2 - 1)

    reconstructions = (pipeline.decode(pipeline.encode(photos)).float().clamp(-1, 1) + 1) / 2
    rows = [("photos", shown(given)), ("reconstructions", shown(reconstructions))]
    varied = [pipeline(labels, image=given, strength=s, **options).images for s in STRENGTHS]
    strengths = [(f"strength {s}", shown(images)) for s, images in zip(STRENGTHS, varied, strict=True)]
    labelled_rows(rows + strengths).save(config.output / "strengths.png")

    hole = slice(round(side * (1 - HOLE) / 2), round(side * (1 + HOLE) / 2))
    mask = torch.zeros(1, 1, side, side)
    mask[:, :, hole, hole] = 1
    cut = torch.where(mask > 0, 0.5, given)
    filled = pipeline(labels, image=given, mask_image=mask, strength=1.0, **options).images
    labelled_rows([*rows[:1], ("a hole", shown(cut)), ("filled", shown(filled))]).save(config.output / "holes.png")
    pasted = torch.where(mask > 0, reconstructions.roll(1, 0), reconstructions)
    contrasts = [edge_contrast(2 * images - 1, hole) for images in (reconstructions, filled, pasted)]

    pairs = range(0, len(photos), config.photos_a_class)
    between = [
        pipeline.interpolate_images(
            given[i], given[i + 1], FRAMES, class_labels=labels[i], strength=0.6, **options
        ).images
        for i in pairs
    ]
    ends = zip(pairs, between, strict=True)
    lines = [(names[labels[i]], shown(torch.cat([given[i][None], images, given[i + 1][None]]))) for i, images in ends]
    labelled_rows(lines).save(config.output / "between.png")

    results = dict(zip(("reconstruction", "filled", "pasted"), [float(c.mean()) for c in contrasts], strict=True))
    results["filled, relative to the reconstruction"] = float((contrasts[1] / contrasts[0]).median())
    results["pasted, relative to the reconstruction"] = float((contrasts[2] / contrasts[0]).median())
    write_json(config.output / "results.json", {"edge": results, **provenance(config)})
    print(results)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="What a generator makes of photos."))
