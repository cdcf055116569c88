"""Where images come from: random access by index, `len(source)` and `source[i]`, whatever lies behind."""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ldm_vae.data.file_sources import FileSource, FolderSource, ZipSource
from ldm_vae.data.hugging_face import hugging_face_source, is_hugging_face_folder
from ldm_vae.data.image_files import EXTENSIONS, digest_of
from ldm_vae.data.images import Sample
from ldm_vae.data.order import index_at
from ldm_vae.data.procedural import PROCEDURAL, ProceduralSource
from ldm_vae.data.reader import MAX_PIXELS, USUAL, ImageReader, ReadOptions
from ldm_vae.data.shards import ShardSource, is_shards
from ldm_vae.errors import BadImageError, ConfigError, DataError
from ldm_vae.hub import is_hub_id

HELD_OUT_EVERY = 10
ENDLESS = 10**9
SPLITS = {"#train": False, "#held-out": True}
MAX_TRIES = 1_000_000
BadImages = dict[str, str]
"""Name -> reason."""


class Source(Protocol):
    """Images with random access. `source[i]` raises BadImageError for one that cannot be used."""

    @property
    def classes(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def name(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...


def usable(
    source: Source,
    bad_images: BadImages,
    *,
    indices: Iterable[int] | None = None,
    read: Callable[[int], Any] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Index and sample of each image that can be used; the others are put into `bad_images`.

    Args:
        indices: of the images, in the order wanted; all of the source unless given.
        read: of an index, what is yielded in place of the sample; it raises BadImageError for an image of no use.
    """
    for index in range(len(source)) if indices is None else indices:
        try:
            value = source[index] if read is None else read(index)
        except BadImageError as error:
            bad_images[source.name(index)] = str(error)
        else:
            yield index, value


def first_usable(
    source: Source, index: int, known_bad: dict[int, str], *, read: Callable[[int], Any]
) -> tuple[Any, BadImages]:
    """read(index), or that of the next index whose image can be used, and the bad images met; None if all are bad.

    Args:
        known_bad: reasons by index, of this call and those before: a bad image is read once.
        read: raises BadImageError.
    """
    bad_images: BadImages = {}
    for _ in range(min(len(source), MAX_TRIES)):
        if index not in known_bad:
            try:
                return read(index), bad_images
            except BadImageError as error:
                known_bad[index] = str(error)
        bad_images[source.name(index)] = known_bad[index]
        index = (index + 1) % len(source)
    return None, bad_images


def shuffled(source: Source, seed: int) -> Iterator[int]:
    """All indices of a source in a keyed permutation: any part of sorted data is then a fair part."""
    return (index_at(position, size=len(source), seed=seed) for position in range(len(source)))


@dataclass(frozen=True)
class PartSource:
    """Some of a source's images, chosen by arithmetic: image i of the part is image `index_of(i)` of the source."""

    source: Source
    description: str
    count: int
    index_of: Callable[[int], int]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return self.source.name(self.index_of(index))

    def fingerprint(self) -> str:
        return digest_of([self.description], [self.source.fingerprint()])

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.index_of(index)]


@dataclass(frozen=True)
class MixSource:
    """Several sources as one, in which an image of the one with weight 2 is there twice."""

    sources: tuple[Source, ...]
    weights: tuple[int, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return sum(len(source) * weight for source, weight in zip(self.sources, self.weights, strict=True))

    def place(self, index: int) -> tuple[Source, int]:
        for source, weight in zip(self.sources, self.weights, strict=True):
            if index < len(source) * weight:
                return source, index % len(source)
            index -= len(source) * weight
        raise IndexError(index)

    def name(self, index: int) -> str:
        source, place = self.place(index)
        return source.name(place)

    def fingerprint(self) -> str:
        return digest_of([str(weight) for weight in self.weights], [source.fingerprint() for source in self.sources])

    def __getitem__(self, index: int) -> Sample:
        source, place = self.place(index)
        return source[place]


def open_mix(paths: Iterable[str], open_one: Callable[[str], Source]) -> Source:
    """The images of one or several paths, of which `PATH:2` counts each image twice.

    Args:
        open_one: opens a path, such as `open_source`.
    """
    sources, weights = [], []
    for path in paths:
        name, colon, weight = path.rpartition(":")
        weighted = bool(colon) and weight.isdecimal() and int(weight) > 0
        sources.append(open_one(name if weighted else path))
        weights.append(int(weight) if weighted else 1)
    return sources[0] if len(sources) == 1 else MixSource(tuple(sources), tuple(weights))


def every_tenth(index: int) -> int:
    return index * HELD_OUT_EVERY


def all_but_every_tenth(index: int) -> int:
    return index + index // (HELD_OUT_EVERY - 1) + 1


def split(source: Source, *, held_out: bool) -> PartSource:
    """Every tenth image of a source (held out), or the other nine tenths."""
    count = -(-len(source) // HELD_OUT_EVERY)
    if held_out:
        return PartSource(source, "held out: True", count, every_tenth)
    return PartSource(source, "held out: False", len(source) - count, all_but_every_tenth)


def check_finite(source: Source, path: str, num_images: int | None) -> None:
    """Raises ConfigError for going through all images of a source without end."""
    if len(source) > ENDLESS and num_images is None:
        raise ConfigError(f"{path} has no end: add --num-images 1000, where the command has it, or name other images")


def check_outside(output: Path, path: str, *, flag: str) -> None:
    """Raises ConfigError where what a command writes would be among the images that it reads, those of `path`."""
    for suffix in SPLITS:
        path = path.removesuffix(suffix)
    name = path.removeprefix("imagefolder:")
    folder = Path(name)
    if not folder.is_dir() or is_shards(name) or (name == path and is_hugging_face_folder(folder)):
        return
    if output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"--output {output} is inside {flag} {folder}: its files would be images of it, too")


def open_source(
    path: str,
    *,
    channels: int = 3,
    resolution: int = 256,
    max_pixels: int = MAX_PIXELS,
    keep_alpha: bool = False,
    options: ReadOptions = USUAL,
    scratch: Path | None = None,
) -> Source:
    """The images that `path` names: a folder, a .zip, tar shards, a Hugging Face dataset or `procedural:NAME[@SEED]`.

    With `#held-out` behind it, every tenth of them; with `#train`, the others.

    Args:
        channels: of the pixels; what a file has is converted where that makes sense.
        resolution: side of procedural images; other sources give what they hold.
        max_pixels: images with more are bad images.
        keep_alpha: pixels with as many channels as the file has, and metadata, as `read_image` gives them.
        options: how files are understood.
        scratch: folder for large images, see `read_large`; for folders and .zip.

    Raises:
        DataError: nothing there, or nothing in it that is an image.
    """
    suffix = next((suffix for suffix in SPLITS if path.endswith(suffix)), "")
    reader = ImageReader(
        channels=channels, keep_alpha=keep_alpha, max_pixels=max_pixels, options=options, scratch=scratch
    )
    whole = open_whole(path.removesuffix(suffix), reader, resolution)
    if not suffix:
        return whole
    part = split(whole, held_out=SPLITS[suffix])
    if len(part) == 0:
        raise DataError(f"{path} is empty: the {len(whole)} images of the whole are too few to be split")
    return part


def open_whole(path: str, reader: ImageReader, resolution: int) -> Source:
    """What `open_source` gives, of a path without a split."""
    if path.startswith("procedural:"):
        match = re.fullmatch(r"procedural:([a-z-]+)(?:@(\d+))?", path)
        if not match or match[1] not in PROCEDURAL:
            raise DataError(f"{path} is not known: try {', '.join(f'procedural:{n}' for n in PROCEDURAL)}")
        return ProceduralSource(match[1], seed=int(match[2] or 0), size=resolution, channels=reader.channels)
    source: Source
    local = Path(path.removeprefix("imagefolder:"))
    if path.startswith("imagefolder:"):
        if not local.is_dir():
            raise DataError(f"no such folder: {local}")
        source = hugging_face_source(path, reader)
    elif is_shards(path):
        source = ShardSource(path, reader)
    elif local.is_dir():
        source = hugging_face_source(path, reader) if is_hugging_face_folder(local) else FolderSource(local, reader)
    elif local.is_file():
        if local.suffix.lower() == ".parquet":
            source = hugging_face_source(path, reader)
        elif zipfile.is_zipfile(local):
            source = ZipSource(local, reader)
        else:
            raise DataError(f"{path} is a file, but neither a .zip nor a .parquet: give the folder of images")
    elif is_hub_id(path):
        source = hugging_face_source(path, reader)
    else:
        raise DataError(f"no such folder or file: {path}")
    if len(source) == 0:
        if local.is_dir() and any(local.glob("*.tar")):
            raise DataError(f"the shards of {path} have no index: run `ldm-vae shards index {path}`")
        others = f" ({source.not_read})" if isinstance(source, FileSource) and source.not_read else ""
        raise DataError(f"no images in {path}{others}: looked for {' '.join(sorted(EXTENSIONS))}")
    if isinstance(source, FileSource) and source.not_read:
        print(f"{path}: {source.not_read}", file=sys.stderr)
    return source
