"""Which files are images, what reading one raises, and what tells a collection of them from another."""

from __future__ import annotations

import hashlib
import lzma
import zipfile
import zlib
from collections.abc import Iterable
from itertools import chain
from pathlib import PurePosixPath

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .tif .tiff .bmp .dib .avif .gif .npy".split()
    + ".jp2 .ppm .pgm .pbm .pnm .tga .ico".split()
)
MAX_FILE_BYTES = 2**30
UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, UnicodeError)
"""What reading a file or a member of a zip raises; RuntimeError is for one that is encrypted."""


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
