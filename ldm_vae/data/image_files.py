"""Files of images: which they are, listing them, reading past what goes wrong for a moment, and their fingerprint."""

from __future__ import annotations

import errno
import hashlib
import lzma
import os
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ldm_vae.errors import DataError

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .tif .tiff .bmp .dib .avif .gif .npy".split()
    + ".jp2 .ppm .pgm .pbm .pnm .tga .ico".split()
)
MAX_FILE_BYTES = 2**30
UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, UnicodeError)
"""What reading a file or a member of a zip raises; RuntimeError is for one that is encrypted."""

PASSING = frozenset(
    getattr(errno, name)
    for name in "EIO ESTALE ENOTCONN ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ECONNRESET ECONNABORTED "
    "ECONNREFUSED EREMOTEIO EAGAIN ENOMEM EMFILE ENFILE".split()
    if hasattr(errno, name)
)
"""Errors of a file system that does not answer, or a machine short of resources: they say nothing about the file."""
RETRY_AFTER = (1.0, 4.0, 16.0)
"""Seconds."""
Read = TypeVar("Read")


def may_pass(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in PASSING


def patiently(read: Callable[[], Read], name: str, *, passes: Callable[[Exception], bool] = may_pass) -> Read:
    """The result of `read()`, which is tried again after errors that may pass.

    Raises:
        DataError: the error stayed. To replace the image by another one would change the run.
    """
    for pause in (*RETRY_AFTER, None):
        try:
            return read()
        except Exception as error:
            if not passes(error):
                raise
            if pause is None:
                raise DataError(f"{name} cannot be read: {type(error).__name__}: {error}") from None
            time.sleep(pause)
    raise AssertionError


def in_natural_order(name: str) -> tuple[list[str | int], str]:
    """A key to sort names by, with numbers in them by their value: 2 before 10, and class-9 before class-10."""
    parts = re.split(r"([0-9]+)", name)  # text and digits take turns
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def digest_of(settings: Iterable[str], lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in chain(settings, [""], lines):
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def is_image(name: str) -> bool:
    """By its extension; hidden files, and what archivers of macOS leave behind, are not."""
    parts = PurePosixPath(name).parts
    hidden = any(p.startswith(".") or p == "__MACOSX" for p in parts)
    return not hidden and PurePosixPath(name).suffix.lower() in EXTENSIONS


def listed(folder: Path) -> list[os.DirEntry[str]]:
    return list(os.scandir(folder))


def files_below(root: Path, accept: Callable[[str], bool]) -> list[str]:
    """Names of the files below a folder that `accept` takes, but for hidden folders.

    Links to folders are followed, each real folder once on a path.

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
            elif accept(name):
                names.append(name)
    return names
