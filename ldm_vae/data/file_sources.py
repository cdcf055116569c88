"""Images in folders and in .zip files."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ldm_vae.data.image_files import MAX_FILE_BYTES, UNREADABLE, digest_of, files_below, is_image, patiently
from ldm_vae.data.images import Sample
from ldm_vae.data.large import read_large
from ldm_vae.data.reader import read_pixels
from ldm_vae.errors import BadImageError, DataError


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
        pixels = None
        if self.scratch is not None:
            in_folder = isinstance(self.read, FolderReader)  # then the file's bytes need not lie in memory, either
            image_file = self.read.root / self.names[index] if in_folder else self.content(index)  # type: ignore[attr-defined]
            pixels = read_large(image_file, self.scratch, channels=self.channels, max_pixels=self.max_pixels)
        if pixels is None:
            pixels = read_pixels(self.content(index), channels=self.channels, max_pixels=self.max_pixels)
        return Sample(pixels=pixels, label=self.label(index), name=self.name(index))


def class_of(name: str) -> str | None:
    """The first folder of a name; None for a file at the top."""
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else None


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
