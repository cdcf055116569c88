"""Which files are images, what reading one raises, and what tells a collection of them from another."""

from __future__ import annotations

import errno
import hashlib
import lzma
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import PurePosixPath
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
"""What a file system says that does not answer, or a machine that is short of something: nothing of the file."""
RETRY_AFTER = (1.0, 4.0, 16.0)
"""Seconds."""
Read = TypeVar("Read")


def may_pass(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in PASSING


def patiently(read: Callable[[], Read], name: str, *, passes: Callable[[Exception], bool] = may_pass) -> Read:
    """What `read()` gives, asked again where the reason why it did not may pass.

    Raises:
        DataError: it did not pass. Another image in this one's place would make it another run.
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
