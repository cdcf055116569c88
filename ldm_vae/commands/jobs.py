"""What is to be generated, one job an image: which class, which seed, which file, and the image that it starts from.

Nothing slow is imported here, for the sake of the other commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import UseAppendAction, arg

from ldm_vae.errors import ConfigError
from ldm_vae.runs.config import Range, check_ranges

if TYPE_CHECKING:
    from ldm_vae.data.sources import Source
    from ldm_vae.pipeline import LatentDiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What is generated, and how."""

    model: str = "box:flowers"
    """Run directory, pipeline folder, hub id or box:NAME."""
    output: Annotated[Path, arg(aliases=["-o"])]
    num_images: Annotated[int | None, Range(at_least=1)] = None
    """With --image, one for each of them unless given."""
    class_label: Annotated[tuple[str, ...], UseAppendAction, arg(aliases=["--class"])] = ()
    """Name or number of a class; given several times, the images take turns. Unless given: all classes in turn, or,
    with --image, none."""
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times in which guidance is applied: 1 is pure noise."""
    steps: Annotated[int, Range(at_least=1)] = 50
    scheduler: str | None = None
    """dpmsolver++, sde-dpmsolver++, euler, heun, unipc or ddim, what fits the model; the model's own unless given."""
    height: int | None = None
    width: int | None = None
    seed: Annotated[int, Range(at_least=0)] = 0
    batch_size: Annotated[int, Range(at_least=1)] = 16
    image: str | None = None
    """A file, or a folder or other source of images: image-to-image, image i from the i-th of them."""
    mask: Path | None = None
    """White is generated, the rest of --image is kept."""
    strength: Annotated[float, Range(at_least=0, at_most=1)] = 0.8
    mixed_precision: Literal["no", "bf16"] = "no"

    def check(self) -> None:
        """Raises ConfigError for flags that cannot work, alone or together."""
        check_ranges(self)
        if self.image is None and self.num_images is None:
            raise ConfigError("how many images? add --num-images 16, say")
        if self.mask is not None and self.image is None:
            raise ConfigError("--mask needs the --image that it is for")
        if self.image is not None and (self.height or self.width):
            raise ConfigError("--height and --width are the image's own with --image")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image to make."""

    file: str
    """Below the output."""
    seed: int
    label: int | None
    facts: dict[str, str]
    position: int
    """In --image, of the image that it starts from."""


def jobs_of(
    config: GenerateConfig, pipeline: LatentDiffusionPipeline, images: Source | None, settings: dict[str, str]
) -> dict[str, Job]:
    """All images of the command, by their files."""
    labels: Sequence[int | None] = [None]
    chosen = pipeline.labels_for(config.class_label or None)
    if chosen is not None:
        labels = chosen.tolist()
    elif images is None and pipeline.num_classes:
        labels = range(pipeline.num_classes)
    jobs = {}
    for i in range(config.num_images or len(images or ())):
        label, seed = labels[i % len(labels)], config.seed + i
        name = class_name(pipeline, label)
        facts = {"seed": str(seed), "class": name or "none"}
        position = 0 if images is None else i % len(images)
        if images is not None:
            facts["image"] = images.name(position)
        file = f"{folder_of(name)}/{seed:08d}.png" if name else f"{seed:08d}.png"
        jobs[file] = Job(file=file, seed=seed, label=label, facts=facts | settings, position=position)
    return jobs


def class_name(pipeline: LatentDiffusionPipeline, label: int | None) -> str | None:
    if label is None:
        return None
    names = pipeline.config.class_names
    return str(names[label]) if names else f"{label:04d}"


def folder_of(name: str) -> str:
    """A class's name as a folder's: characters that would lead elsewhere, or hide it, are escaped as in a URL."""
    safe = "".join(f"%{ord(c):02X}" if c in "%/\\\0" else c for c in name)
    return f"%2E{safe[1:]}" if safe.startswith(".") else safe
