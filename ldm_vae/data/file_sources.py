"""Images in folders and in .zip files."""

from __future__ import annotations

import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ldm_vae.data.image_files import (
    HEAD_BYTES,
    MAX_FILE_BYTES,
    UNREADABLE,
    digest_of,
    images_among,
    images_below,
    in_natural_order,
    patiently,
)
from ldm_vae.data.images import Sample
from ldm_vae.data.reader import ImageReader
from ldm_vae.errors import BadImageError, DataError


class FileSource(ABC):
    """Image files under one root; the first folder of a name is its class."""

    not_read = ""
    """Kinds of files there that are no images, in one line; empty when all are."""

    def __init__(self, names: Iterable[str], reader: ImageReader) -> None:
        self.names, self.reader = sorted(names), reader
        folders = {folder for name in self.names if (folder := class_of(name))}
        self.classes: tuple[str, ...] = tuple(sorted(folders, key=in_natural_order))
        self.label_of = {folder: label for label, folder in enumerate(self.classes)}

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file's bytes. Raises BadImageError, or one of UNREADABLE."""

    @abstractmethod
    def mark(self, name: str) -> str:
        """What tells a file from another one, without reading it."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def fingerprint(self) -> str:
        """sha256 of all names and sizes (of a zip: checksums, too), in their order; the files are not read.

        The order of the classes changes nothing.
        """
        lines = (f"{name} {self.mark(name)}" for name in self.names)
        return digest_of([str(self.reader), *sorted(self.classes)], lines)

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

    def path_or_content(self, index: int) -> Path | bytes:
        """The path of a file on its own, whose bytes need not lie in memory; otherwise its bytes."""
        return self.content(index)

    def __getitem__(self, index: int) -> Sample:
        found = None if self.reader.scratch is None else self.reader.large(self.path_or_content(index))
        found = found or self.reader(self.content(index))
        return self.reader.sample(found, label=self.label(index), name=self.name(index))


def class_of(name: str) -> str | None:
    """The first folder of a name; None for a file at the top."""
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else None


def check_bytes(size: int) -> None:
    """Raises BadImageError for a file that is too large."""
    if size > MAX_FILE_BYTES:
        raise BadImageError(f"file larger than {MAX_FILE_BYTES} bytes")


class FolderSource(FileSource):
    """Every image below a folder, or those named."""

    def __init__(self, root: Path, reader: ImageReader, *, names: Iterable[str] | None = None) -> None:
        self.root = root
        if names is None:
            listing = images_below(root)
            names, self.not_read = listing.names, str(listing)
        super().__init__(names, reader)

    def read(self, name: str) -> bytes:
        path = self.root / name
        check_bytes(path.stat().st_size)
        return path.read_bytes()

    def mark(self, name: str) -> str:
        try:
            return str((self.root / name).stat().st_size)
        except OSError:
            return "not there"

    def path_or_content(self, index: int) -> Path | bytes:
        return self.root / self.names[index]


class ZipSource(FileSource):
    """Every image in a zip of a folder; the file is opened anew in each process that reads."""

    def __init__(self, path: Path, reader: ImageReader) -> None:
        self.path = path
        self.archive: zipfile.ZipFile | None = None
        self.process = 0
        try:
            files = [name for name in self.open().namelist() if not name.endswith("/")]
            listing = images_among(files, self.head)
        except UNREADABLE as error:
            raise DataError(f"{path} is not a zip that can be read: {error}") from None
        self.not_read = str(listing)
        super().__init__(listing.names, reader)

    def head(self, name: str) -> bytes:
        with self.open().open(name) as member:
            return member.read(HEAD_BYTES)

    def open(self) -> zipfile.ZipFile:
        if self.archive is None or self.process != os.getpid():
            self.archive, self.process = zipfile.ZipFile(self.path), os.getpid()
        return self.archive

    def read(self, name: str) -> bytes:
        info = self.open().getinfo(name)
        check_bytes(info.file_size)
        return self.open().read(info)

    def mark(self, name: str) -> str:
        info = self.open().getinfo(name)
        return f"{info.file_size} {info.CRC}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"archive": None}
