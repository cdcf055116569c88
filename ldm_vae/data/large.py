"""Images that are not to lie in memory as a whole: libvips reads and writes them a strip at a time.

Between the two they are in files without a name, in a folder of the caller's choice.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyvips
import tifffile

from ldm_vae.errors import BadImageError

LARGE = 1 << 25
"""Pixels: images with more go by way of the disk."""
STRIP = 1 << 22
"""Pixels at a time."""
MAX_LARGE_PIXELS = 1 << 28
"""16,384 x 16,384, unless somebody asks for more."""
DTYPES = {"uchar": np.uint8, "ushort": np.uint16}
INTERPRETATIONS = {
    **{("uint8", False): "b-w", ("uint8", True): "srgb"},
    **{("uint16", False): "grey16", ("uint16", True): "rgb16"},
}
"""libvips', by the values' type and whether they are colours."""
Pixels = np.ndarray[Any, Any]
"""(H, W, C) of uint8, uint16 or float32 in [0, 1]."""
pyvips.block_untrusted_set(True)  # of its decoders only those that libvips calls fit for files from anywhere
pyvips.cache_set_max(0)


def strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    """(top, bottom) of parts of about STRIP pixels."""
    rows = max(STRIP // width, 1)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def read_large(
    given: bytes | Path, folder: Path, *, max_pixels: int, convert: Callable[[Pixels], Pixels]
) -> Pixels | None:
    """convert(pixels) of an image, on disk: (H, W, C) of uint8 or uint16, where strips were converted one by one.

    `given` are a file's bytes or, so that these are not in memory either, its path.

    None for what is not large, and for what is left to other readers: floats, inks, palettes, what EXIF turns, bands
    and pages of a TIFF that are channels.

    Raises:
        BadImageError: it is damaged, or has too many pixels.
        OSError: the folder has no room for it.
    """
    try:
        image = opened(given)
    except (pyvips.Error, OSError):
        return None
    if image.width * image.height <= LARGE:
        return None
    if image.width * image.height > max_pixels:
        raise BadImageError(f"{image.width}x{image.height} is more than the limit of {max_pixels} pixels")
    plain = image.interpretation in ("b-w", "srgb", "grey16", "rgb16") and image.bands in (1, 2, 3, 4)
    turned = image.get_typeof("orientation") and image.get("orientation") != 1
    if image.format not in DTYPES or not plain or turned:
        return None
    if image.get("vips-loader").startswith("tiff") and not is_one_picture(given):
        return None
    region, whole = pyvips.Region.new(image), None
    for top, bottom in strips(image.height, image.width):
        try:
            content = region.fetch(0, top, image.width, bottom - top)
        except pyvips.Error as error:
            raise BadImageError(f"cannot be decoded: {' '.join(str(error).split())[:200]}") from None
        strip = np.frombuffer(content, DTYPES[image.format]).reshape(bottom - top, image.width, image.bands)
        strip = convert(strip)
        if whole is None:
            whole = on_disk((image.height, *strip.shape[1:]), strip.dtype, folder)
        whole[top:bottom] = strip
        let_go(whole)
    return whole


def is_one_picture(given: bytes | Path) -> bool:
    """Whether the first page of a TIFF is the image, and what it has beside colours is transparency."""
    try:
        with tifffile.TiffFile(io.BytesIO(given) if isinstance(given, bytes) else given) as tiff:
            page = tiff.pages[0]
            alike = len(tiff.pages) > 1 and len({p.shape + (p.dtype,) for p in tiff.pages}) == 1
            return not alike and (page.samplesperpixel not in (2, 4) or 2 in page.extrasamples)
    except Exception:  # damaged files raise many kinds; who reads it in its place will say so
        return False


def read_deep(data: bytes) -> tuple[Pixels, int]:
    """A PNG of 16 bits as it is stored, with as many channels as it has, and what EXIF says of its orientation.

    Raises:
        BadImageError: it is damaged.
    """
    try:
        image = opened(data)
        stored = image.write_to_memory()
    except pyvips.Error as error:
        raise BadImageError(f"cannot be decoded: {' '.join(error.detail.split())[:200] or 'damaged'}") from None
    pixels = np.frombuffer(stored, DTYPES[image.format]).reshape(image.height, image.width, image.bands)
    return pixels, image.get("orientation") if image.get_typeof("orientation") else 1


def opened(given: bytes | Path) -> Any:
    """libvips' image, to be read from top to bottom. Raises pyvips.Error, or OSError."""
    options = {"access": "sequential", "fail_on": "truncated"}
    if isinstance(given, Path):
        try:
            return pyvips.Image.new_from_file(str(given.absolute()), **options)
        except UnicodeEncodeError:  # a name that is no text
            given = given.read_bytes()
    return pyvips.Image.new_from_buffer(given, "", **options)


def metadata_of(given: bytes | Path) -> tuple[bytes, bytes]:
    """ICC profile and EXIF of a large image, as they are in the file; nothing for what cannot be read."""
    try:
        image = opened(given)
        found = [image.get(n) if image.get_typeof(n) else b"" for n in ("icc-profile-data", "exif-data")]
    except (pyvips.Error, OSError):
        return b"", b""
    return bytes(found[0]), bytes(found[1])


def on_disk(shape: tuple[int, ...], dtype: Any, folder: Path) -> Pixels:
    """Room for an array, reserved: a mapped page that the disk has no place for would end the process."""
    with tempfile.TemporaryFile(dir=folder) as file:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype, "r+", shape=shape)


def let_go(pixels: Pixels) -> None:
    """Takes what was read or written so far of an array on disk out of this process's memory; the file keeps it."""
    if isinstance(pixels, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        pixels._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def write_large(
    out: IO[bytes],
    parts: Iterable[Pixels],
    shape: tuple[int, int, int],
    *,
    folder: Path,
    icc: bytes = b"",
    exif: bytes = b"",
    text: Mapping[str, str] | None = None,
) -> None:
    """A PNG from its strips, pixels (h, W, C) of uint8 or uint16 from top to bottom.

    Args:
        out: the file, with a descriptor.
        shape: of the whole.
        folder: for as many bytes as the pixels have, while it is being written.
        exif: without a prefix.
        text: for chunks of it.

    Raises:
        OSError: it cannot be written.
    """
    with nameless(folder) as between:
        dtype = write_strips(between, parts, shape)  # of a TIFF, which libvips reads as it comes and does not map
        try:
            between.seek(0)
            source = pyvips.Source.new_from_descriptor(between.fileno())
            image = pyvips.Image.new_from_source(source, "", access="sequential")
            image = image.copy(interpretation=INTERPRETATIONS[dtype, shape[2] > 2])
            if icc:
                image.set_type(pyvips.GValue.blob_type, "icc-profile-data", icc)
            for i, (key, value) in enumerate((text or {}).items()):
                ascii_only = value.encode("ascii", "backslashreplace").decode()
                image.set_type(pyvips.GValue.gstr_type, f"png-comment-{i}-{key}", ascii_only)
            failed: list[OSError] = []
            out.flush()
            image.write_to_target(png_target(out, exif, failed), ".png")
        except pyvips.Error as error:
            raise failed[0] if failed else OSError(" ".join(str(error).split())) from None


def png_target(out: IO[bytes], exif: bytes, failed: list[OSError]) -> Any:
    """What libvips writes a PNG to, with this EXIF and without what it makes up: EXIF of its own, and a resolution.

    An error of `out` is added to `failed`, as libvips has a text of its own for it.
    """
    head: bytearray | None = bytearray()  # up to the first chunk of pixels

    def write(data: Any) -> int:
        nonlocal head
        parts = [bytes(data)]
        if head is not None:
            head += parts[0]
            found = chunks_before_pixels(head)
            if found is None:
                return len(data)
            chunks, pixels = found
            kept = [c for c in chunks if c[4:8] not in (b"eXIf", b"pHYs")]
            own = [chunk(b"eXIf", exif)] if exif else []
            parts = [PNG_SIGNATURE, kept[0], *own, *kept[1:], pixels]
            head = None
        try:
            left = memoryview(b"".join(parts))
            while left:
                left = left[os.write(out.fileno(), left) :]
        except OSError as error:
            failed.append(error)
            return -1
        return len(data)

    target = pyvips.TargetCustom()
    target.on_write(write)
    return target


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG (third edition, 5.3)."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chunks_before_pixels(png: bytes | bytearray) -> tuple[list[bytes], bytes] | None:
    """Whole chunks up to IDAT, and all from there on; None where a PNG's beginning does not go so far."""
    chunks: list[bytes] = []
    at = len(PNG_SIGNATURE)
    while at + 8 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        if png[at + 4 : at + 8] == b"IDAT":
            return chunks, bytes(png[at:])
        chunks.append(bytes(png[at : at + 12 + length]))
        at += 12 + length
    return None


@contextmanager
def nameless(folder: Path) -> Iterator[IO[bytes]]:
    """A file that is gone when it is closed, whatever ends the process; its `name` is a text, as tifffile wants it."""
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        try:
            with suppress(OSError):  # Windows keeps what is open
                os.unlink(file.name)
            yield file
        finally:
            file.close()
            Path(file.name).unlink(missing_ok=True)


def write_strips(out: IO[bytes], parts: Iterable[Pixels], shape: tuple[int, int, int]) -> str:
    """The parts as an uncompressed TIFF; the type of their values."""
    parts = iter(parts)
    first = next(parts)
    height, width, bands = shape
    rows = max((1 << 18) // width, 1)
    tifffile.imwrite(
        out,
        (np.ascontiguousarray(p).tobytes() for p in of_height(chain([first], parts), rows)),
        shape=(height, width) if bands == 1 else shape,
        dtype=first.dtype,
        bigtiff=True,
        photometric="rgb" if bands > 2 else "minisblack",
        planarconfig="contig" if bands > 1 else None,
        extrasamples=["unassalpha"] if bands in (2, 4) else None,
        rowsperstrip=rows,
        metadata=None,
        software=False,
    )
    out.flush()
    return str(first.dtype)


def of_height(parts: Iterable[Pixels], rows: int) -> Iterator[Pixels]:
    """The same rows in parts of `rows`; the last one has what is left."""
    left: Pixels | None = None
    for part in parts:
        whole = part if left is None else np.concatenate([left, part])
        even = len(whole) // rows * rows
        for top in range(0, even, rows):
            yield whole[top : top + rows]
        left = whole[even:]
    if left is not None and len(left):
        yield left
