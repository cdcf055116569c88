"""Where images come from: random access by index, `len(source)` and `source[i]`, whatever lies behind."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ldm_vae.data.image_files import EXTENSIONS, MAX_FILE_BYTES, UNREADABLE, digest_of, is_image, patiently
from ldm_vae.data.images import MAX_PIXELS, Sample, large_pixels, read_pixels
from ldm_vae.data.procedural import PROCEDURAL, ProceduralSource
from ldm_vae.data.shards import ShardSource, is_shards
from ldm_vae.errors import BadImageError, ConfigError, DataError
from ldm_vae.files import is_hub_id

HELD_OUT_EVERY = 10
ENDLESS = 10**9
SPLITS = {"#train": False, "#held-out": True}


class Source(Protocol):
    """Images with random access. `source[i]` raises BadImageError for one that cannot be used."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def name(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...


class Reader(Protocol):
    """The bytes of a file by its name, and what tells it from another one without reading it."""

    def __call__(self, name: str) -> bytes: ...
    def mark(self, name: str) -> str: ...


class FileSource:
    """Files under one root, each read by `read(name)`; the first folder of a name is its class."""

    def __init__(
        self, names: list[str], read: Reader, *, channels: int, max_pixels: int, scratch: Path | None = None
    ) -> None:
        self.names = sorted(names)
        self.read = read
        self.channels = channels
        self.max_pixels, self.scratch = max_pixels, scratch
        folders = {class_of(n) for n in self.names} - {None}
        self.classes: tuple[str, ...] = tuple(sorted(f for f in folders if f))
        self.label_of = {folder: label for label, folder in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def fingerprint(self) -> str:
        """sha256 of all names and sizes (of a zip: checksums, too), in their order; the files are not read."""
        lines = (f"{name} {self.read.mark(name)}" for name in self.names)
        return digest_of([f"{self.channels} channels, at most {self.max_pixels} pixels", *self.classes], lines)

    def label(self, index: int) -> int | None:
        folder = class_of(self.names[index])
        return self.label_of[folder] if folder else None

    def content(self, index: int) -> bytes:
        """The file's bytes. Raises BadImageError."""
        try:
            return patiently(lambda: self.read(self.names[index]), self.names[index])
        except UNREADABLE as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise BadImageError(f"cannot be read: {reason}") from None

    def __getitem__(self, index: int) -> Sample:
        options: dict[str, Any] = {"channels": self.channels, "max_pixels": self.max_pixels}
        pixels = None
        if self.scratch is not None:
            in_folder = isinstance(self.read, FolderReader)  # then its bytes need not be in memory, either
            given = self.read.root / self.names[index] if in_folder else self.content(index)  # type: ignore[attr-defined]
            pixels = large_pixels(given, scratch=self.scratch, **options)
        if pixels is None:
            pixels = read_pixels(self.content(index), **options)
        return Sample(pixels=pixels, label=self.label(index), name=self.name(index))


def class_of(name: str) -> str | None:
    """The first folder of a name; None for a file at the top."""
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else None


def listed(folder: Path) -> list[os.DirEntry[str]]:
    return list(os.scandir(folder))


def files_below(root: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Names of the files below a folder, but for hidden folders. Links to folders are followed, each real one once on
    a path.

    Raises:
        DataError: it cannot be listed.
    """
    names = []
    pending: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while pending:
        prefix, above = pending.pop()
        try:
            entries = patiently(partial(listed, root / prefix), str(root / prefix))
        except OSError as error:
            if not prefix:
                raise DataError(f"cannot list {root}: {error.strerror}") from None
            continue
        for entry in entries:
            name = prefix + entry.name
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself, for instance
                is_folder = False
            if is_folder:
                real = os.path.realpath(entry.path)
                if real not in above and not entry.name.startswith("."):
                    pending.append((name + "/", (*above, real)))
            elif wanted(name):
                names.append(name)
    return names


def folder_source(root: Path, *, channels: int, max_pixels: int, scratch: Path | None) -> FileSource:
    """Every image below a folder."""
    names = files_below(root, is_image)
    return FileSource(names, FolderReader(root), channels=channels, max_pixels=max_pixels, scratch=scratch)


@dataclass(frozen=True)
class FolderReader:
    root: Path

    def __call__(self, name: str) -> bytes:
        path = self.root / name
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadImageError(f"file larger than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()

    def mark(self, name: str) -> str:
        try:
            return str((self.root / name).stat().st_size)
        except OSError:
            return "not there"


class ZipReader:
    """Members of a zip by name; the file is opened anew in each process that reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.archive: zipfile.ZipFile | None = None
        self.process = 0

    def open(self) -> zipfile.ZipFile:
        if self.archive is None or self.process != os.getpid():
            self.archive, self.process = zipfile.ZipFile(self.path), os.getpid()
        return self.archive

    def __call__(self, name: str) -> bytes:
        info = self.open().getinfo(name)
        if info.file_size > MAX_FILE_BYTES:
            raise BadImageError(f"file larger than {MAX_FILE_BYTES} bytes")
        return self.open().read(info)

    def mark(self, name: str) -> str:
        info = self.open().getinfo(name)
        return f"{info.file_size} {info.CRC}"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "archive": None, "process": 0}


def zip_source(path: Path, *, channels: int, max_pixels: int, scratch: Path | None) -> FileSource:
    """Every image in a zip of a folder."""
    reader = ZipReader(path)
    try:
        names = [n for n in reader.open().namelist() if is_image(n)]
    except UNREADABLE as error:
        raise DataError(f"{path} is not a zip that can be read: {error}") from None
    return FileSource(names, reader, channels=channels, max_pixels=max_pixels, scratch=scratch)


class HuggingFaceSource:
    """The image column of a Hugging Face dataset; labels from its ClassLabel column when it has one.

    Rows that name a file are read below `roots` alone: elsewhere they may name anything.
    """

    def __init__(self, dataset: Any, *, channels: int, max_pixels: int, roots: tuple[str | Path, ...] = ()) -> None:
        import datasets

        images = [k for k, v in dataset.features.items() if isinstance(v, datasets.Image)]
        labels = [k for k, v in dataset.features.items() if isinstance(v, datasets.ClassLabel)]
        if not images:
            raise DataError(f"the data set has no image column: its columns are {', '.join(dataset.column_names)}")
        self.image, self.label = images[0], labels[0] if labels else None
        self.classes: tuple[str, ...] = tuple(dataset.features[self.label].names) if self.label else ()
        self.dataset = dataset.cast_column(self.image, datasets.Image(decode=False))
        self.channels, self.max_pixels = channels, max_pixels
        self.roots = {name(root) for root in roots for name in (os.path.abspath, os.path.realpath)}

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{index:08d}"

    def fingerprint(self) -> str:
        """Of what the `datasets` library says its content is."""
        return digest_of([f"{self.channels} channels, at most {self.max_pixels} pixels"], [self.dataset._fingerprint])

    def __getitem__(self, index: int) -> Sample:
        row = self.dataset[index]
        stored = row[self.image] or {}
        data, path = stored.get("bytes"), stored.get("path")
        if data is None and path:
            inside = any(Path(os.path.abspath(path)).is_relative_to(root) for root in self.roots)
            if not inside or not os.path.isfile(path):
                raise BadImageError("names a file that is not in the data set")
            data = patiently(Path(path).read_bytes, path)
        pixels = read_pixels(data or b"", channels=self.channels, max_pixels=self.max_pixels)
        label = row[self.label] if self.label else None
        label = label if label is not None and label >= 0 else None  # the library's -1 is "not labelled"
        return Sample(pixels=pixels, label=label, name=self.name(index))


def hugging_face_source(path: str, *, channels: int, max_pixels: int) -> HuggingFaceSource:
    """A hub id, a parquet file, a folder of parquet files, what `save_to_disk` wrote, or imagefolder:FOLDER."""
    try:
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        raise DataError(f"{path} is a Hugging Face dataset: pip install 'ldm-vae[datasets]' to read it") from None
    local = Path(path)
    roots: tuple[str, ...] = ()
    try:
        if path.startswith("imagefolder:"):
            folder = path.removeprefix("imagefolder:")
            dataset = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
            roots = (folder,)
        elif local.is_file():
            dataset = datasets.load_dataset("parquet", data_files=str(local), split="train")
        elif (local / "state.json").is_file():
            dataset = datasets.load_from_disk(str(local))
        elif local.is_dir():
            dataset = datasets.load_dataset("parquet", data_dir=str(local), split="train")
        else:
            dataset = datasets.load_dataset(path, split="train")
            roots = (str(datasets.config.HF_DATASETS_CACHE), HF_HUB_CACHE)  # where the library puts files
    except Exception as error:  # the library raises many kinds: offline, unknown, damaged, no train split
        raise DataError(f"cannot load the Hugging Face dataset {path}: {type(error).__name__}: {error}") from None
    return HuggingFaceSource(dataset, channels=channels, max_pixels=max_pixels, roots=roots)


class SplitSource:
    """Every tenth image of a source (held out), or the other nine tenths (train): arithmetic, no list."""

    def __init__(self, source: Source, *, held_out: bool) -> None:
        self.source, self.held_out = source, held_out
        self.classes = source.classes

    def __len__(self) -> int:
        held_out = -(-len(self.source) // HELD_OUT_EVERY)
        return held_out if self.held_out else len(self.source) - held_out

    def inner(self, index: int) -> int:
        return index * HELD_OUT_EVERY if self.held_out else index + index // (HELD_OUT_EVERY - 1) + 1

    def name(self, index: int) -> str:
        return self.source.name(self.inner(index))

    def fingerprint(self) -> str:
        return digest_of([f"held out: {self.held_out}"], [self.source.fingerprint()])

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.inner(index)]


class HeadSource:
    """The first images of a source."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count = source, min(count, len(source))
        self.classes = source.classes

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return self.source.name(index)

    def fingerprint(self) -> str:
        return digest_of([f"the first {self.count}"], [self.source.fingerprint()])

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]


def check_finite(source: Source, path: str, num_images: int | None) -> None:
    """Raises ConfigError for going through all images of a source without end."""
    if len(source) > ENDLESS and num_images is None:
        raise ConfigError(f"{path} has no end: add --num-images 1000, where the command has it, or name other images")


def check_outside(output: Path, given: str, *, flag: str) -> None:
    """Raises ConfigError where what a command writes would be among the images that it reads."""
    for suffix in SPLITS:
        given = given.removesuffix(suffix)
    named = given.removeprefix("imagefolder:")
    folder = Path(named)
    if not folder.is_dir() or is_shards(named) or (named == given and is_hugging_face_folder(folder)):
        return
    if output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"--output {output} is inside {flag} {folder}: its files would be images of it, too")


def is_hugging_face_folder(path: Path) -> bool:
    if (path / "state.json").is_file():
        return True
    return any(path.glob("*.parquet")) or any((path / "data").glob("*.parquet"))


def open_source(
    path: str,
    *,
    channels: int = 3,
    resolution: int = 256,
    max_pixels: int = MAX_PIXELS,
    scratch: Path | None = None,
) -> Source:
    """The images that `path` names: a folder, a .zip, tar shards, a Hugging Face dataset or `procedural:NAME[@SEED]`.

    With `#held-out` behind it, every tenth of them; with `#train`, the others.

    Args:
        channels: of the pixels; what a file has is converted where that makes sense.
        resolution: side of procedural images; other sources give what they hold.
        max_pixels: images with more are bad images.
        scratch: folder for large images, see `large_pixels`; for folders and .zip.

    Raises:
        DataError: nothing there, or nothing in it that is an image.
    """
    for suffix, held_out in SPLITS.items():
        if path.endswith(suffix):
            whole = open_source(
                path.removesuffix(suffix),
                channels=channels,
                resolution=resolution,
                max_pixels=max_pixels,
                scratch=scratch,
            )
            split = SplitSource(whole, held_out=held_out)
            if len(split) == 0:
                raise DataError(f"{path} is empty: the {len(whole)} images of the whole are too few to be split")
            return split
    if path.startswith("procedural:"):
        match = re.fullmatch(r"procedural:([a-z-]+)(?:@(\d+))?", path)
        if not match or match[1] not in PROCEDURAL:
            raise DataError(f"{path} is not known: try {', '.join(f'procedural:{n}' for n in PROCEDURAL)}")
        return ProceduralSource(match[1], seed=int(match[2] or 0), size=resolution, channels=channels)
    local = Path(path)
    source: Source
    if path.startswith("imagefolder:"):
        if not Path(path.removeprefix("imagefolder:")).is_dir():
            raise DataError(f"no such folder: {path.removeprefix('imagefolder:')}")
        source = hugging_face_source(path, channels=channels, max_pixels=max_pixels)
    elif is_shards(path):
        source = ShardSource(path, channels=channels, max_pixels=max_pixels)
    elif local.is_dir():
        if is_hugging_face_folder(local):
            source = hugging_face_source(path, channels=channels, max_pixels=max_pixels)
        else:
            source = folder_source(local, channels=channels, max_pixels=max_pixels, scratch=scratch)
    elif local.is_file():
        if local.suffix.lower() == ".parquet":
            source = hugging_face_source(path, channels=channels, max_pixels=max_pixels)
        elif zipfile.is_zipfile(local):
            source = zip_source(local, channels=channels, max_pixels=max_pixels, scratch=scratch)
        else:
            raise DataError(f"{path} is a file, but neither a .zip nor a .parquet: give the folder of images")
    elif is_hub_id(path):
        source = hugging_face_source(path, channels=channels, max_pixels=max_pixels)
    else:
        raise DataError(f"no such folder or file: {path}")
    if len(source) == 0:
        if local.is_dir() and any(local.glob("*.tar")):
            raise DataError(f"the shards of {path} have no index: run `ldm-vae shards index {path}`")
        raise DataError(f"no images in {path}: looked for {' '.join(sorted(EXTENSIONS))}")
    return source
