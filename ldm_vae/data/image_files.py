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
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ldm_vae.errors import DataError

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .tif .tiff .bmp .dib .avif .avifs .gif .npy".split()
    + ".jp2 .j2k .jpf .jpx .ppm .pgm .pbm .pnm .tga .ico .jxl".split()
)
HEIF_EXTENSIONS = frozenset((".heic", ".heif", ".hif"))
"""Read where pillow-heif is installed."""
HEIF_ADVICE = "pip install 'ldm-vae[heic]' to read it"
HEIC_UNNAMED = "HEIC without extension"
NUMPY, JPEG_XL, TIFF, HEIC = ".npy", "JPEG XL", "TIFF", "HEIC"
BEGINNINGS = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "GIF": rb"GIF8[79]a",
    "WebP": rb"RIFF.{4}WEBP",
    "JPEG 2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "BMP": rb"BM.{12}[\x0c\x10(48@l|]\0\0\0",  # the sizes that its header can have
    "PNM": rb"P[1-6]\s\s*[\d#]",
    "ICO": rb"\0\0\x01\0[^\0]",
    TIFF: rb"II[*+]\0|MM\0[*+]",
    JPEG_XL: rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
    NUMPY: rb"\x93NUMPY",
}
"""What files of these kinds begin with; TGA has no beginning of its own."""
NOT_READ = {
    "PAM": rb"P7\s",
    "PFM in colour": rb"PF\s",
    "PSD": rb"8BPS",
    "OpenEXR": rb"v/1\x01",
    "Radiance HDR": rb"#\?R",
    "QOI": rb"qoif",
    "DDS": rb"DDS ",
    "PDF": rb"%PDF",
    "PostScript": rb"%!PS",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?<svg",
    "a compressed file (.ldi)": rb"\x89LDI",
}
"""What files of other kinds begin with, which are refused by name."""
PATTERNS = {kind: re.compile(beginning, re.DOTALL) for kind, beginning in BEGINNINGS.items()}
UNREAD = "unsupported (?!marker)|not supported|not implemented|not a known|could not import"
CAUSES = (
    (re.compile("MAX_TEXT|in text chunks"), "{} with a text of more than 16 MiB"),
    (re.compile(UNREAD, re.IGNORECASE), "{} of a variety that is not read"),
    (re.compile("truncat|EOF|MORE_INPUT|expected to read|failed to read", re.IGNORECASE), "truncated {}"),
)
"""By what libraries say of a file: what we say."""
PYTHONS = (TypeError, AttributeError, LookupError)
"""What libraries raise by mistake, on damaged files."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
HEAD_BYTES = 64
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


def is_hidden(name: str) -> bool:
    """Hidden files, and what archivers of macOS leave behind."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def is_image(name: str) -> bool:
    """By its extension; hidden files are not."""
    suffix = PurePosixPath(name).suffix.lower()
    return not is_hidden(name) and (suffix in EXTENSIONS or (suffix in HEIF_EXTENSIONS and heif_is_there()))


@cache
def heif_is_there() -> bool:
    return find_spec("pillow_heif") is not None


def brands_in(head: bytes) -> set[bytes]:
    """What an ISO base media file says that it is (ISO/IEC 14496-12, 4.3); nothing for other files."""
    if head[4:8] != b"ftyp":
        return set()
    size = min(int.from_bytes(head[:4], "big"), HEAD_BYTES)
    return {head[8:12], *(head[i : i + 4] for i in range(16, size, 4))}


def kind_of(head: bytes) -> str:
    """Of a file, by its first HEAD_BYTES bytes; empty where it is not known."""
    brands = brands_in(head)
    if brands:
        return "AVIF" if not brands.isdisjoint(AVIF_BRANDS) else HEIC if not brands.isdisjoint(HEIF_BRANDS) else ""
    return next((kind for kind, pattern in PATTERNS.items() if pattern.match(head)), "")


def reason_of(error: Exception | None, head: bytes) -> str:
    """One sentence, the same in every run, of an error that a library raised for a file that begins so.

    None stands for one whose text says nothing of this file.
    """
    kind, text = kind_of(head[:HEAD_BYTES]), "" if isinstance(error, PYTHONS) else str(error)
    if not kind and "cannot identify" in text:
        other = next((other for other, pattern in NOT_READ.items() if re.match(pattern, head)), "")
        return f"{other} is not read" if other else "cannot be decoded: cannot identify image file"
    cause = next((words for pattern, words in CAUSES if pattern.search(text)), "damaged {}")
    return f"cannot be decoded: {cause.format(kind or 'image')}"


@dataclass(frozen=True)
class Listing:
    """Names of images, and how many files of other kinds there are, by their extension."""

    names: list[str]
    not_read: Counter[str]

    def __str__(self) -> str:
        """`not read: 3 .heic (pip install ...), 1 .psd`; empty where all are images."""
        parts = []
        for kind, count in self.not_read.most_common():
            advice = f" ({HEIF_ADVICE})" if kind in (*HEIF_EXTENSIONS, HEIC_UNNAMED) else ""
            parts.append(f"{count} {kind}{advice}")
        return f"not read: {', '.join(parts)}" if parts else ""


def images_among(names: Iterable[str], head_of: Callable[[str], bytes]) -> Listing:
    """Which of the names are images: by extension, or where there is none by what the file begins with.

    Args:
        head_of: of a name, the first HEAD_BYTES of its file; it may raise one of UNREADABLE.
    """
    images, not_read = [], Counter[str]()
    for name in names:
        if is_hidden(name):
            continue
        suffix = PurePosixPath(name).suffix.lower()
        kind = "" if suffix else kind_of(head_or_nothing(name, head_of))
        if kind == HEIC and not heif_is_there():
            not_read[HEIC_UNNAMED] += 1
        elif kind or is_image(name):
            images.append(name)
        else:
            not_read[suffix or "without extension"] += 1
    return Listing(images, not_read)


def head_or_nothing(name: str, head_of: Callable[[str], bytes]) -> bytes:
    try:
        return head_of(name)
    except UNREADABLE:
        return b""


def images_below(root: Path) -> Listing:
    """The images below a folder. Raises DataError where it cannot be listed."""

    def head_of(name: str) -> bytes:
        if not (root / name).is_file():  # a pipe would wait for somebody to write
            return b""
        with open(root / name, "rb") as file:
            return file.read(HEAD_BYTES)

    return images_among(files_below(root, lambda _: True), head_of)


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
