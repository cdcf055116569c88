"""Tar shards in WebDataset's layout: `KEY.jpg`, with `KEY.cls` or `KEY.json` beside it, read at random by an index.

The index has one row a sample: its shard, its label, and where its bytes are. It is built once (`ldm-vae shards index`)
and lies beside the shards, or for remote ones in the user's cache. Rows are read one at a time from its file, which is
not mapped into memory: pages that were touched at random would count as the process's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]
from fsspec.core import url_to_fs

from ldm_vae.data.image_files import MAX_FILE_BYTES, digest_of, in_natural_order, is_image, patiently
from ldm_vae.data.images import Sample
from ldm_vae.data.reader import ImageReader
from ldm_vae.errors import BadImageError, DataError
from ldm_vae.files import check_writable, staged_directory, write_json

ROW = np.dtype([("shard", "<u4"), ("label", "<i4"), ("offset", "<u8"), ("size", "<u8")])
ROWS, FACTS = "rows.npy", "shards.json"
VERSION = 1
HEADER = tarfile.BLOCKSIZE
Class = int | str
"""As a shard says it: its number, or its name."""
MAX_LABEL_BYTES = 1 << 20
MAX_CLASSES = 1_000_000
REMOTE_AT_ONCE = 32


def shards_of(path: str) -> list[str]:
    """The .tar files that a folder, or a pattern such as `s3://bucket/images-{0000..0999}.tar`, names.

    Raises:
        DataError: none, or a pattern that is not one.
    """
    try:
        shards = tars_in(path) if Path(path).is_dir() else list(braceexpand(path))
    except UnbalancedBracesError as error:
        raise DataError(f"{path} is not a pattern: {error}") from None
    if not shards:
        raise DataError(f"no .tar in {path}")
    return shards


def tars_in(folder: str) -> list[str]:
    return sorted(str(p) for p in Path(folder).glob("*.tar"))


def is_shards(path: str) -> bool:
    """A folder is shards when these are indexed: one of images may hold a .tar, too."""
    if not Path(path).is_dir():
        return path.endswith(".tar")
    shards = tars_in(path)
    return bool(shards) and (index_folder(shards) / FACTS).is_file()


def index_folder(shards: Sequence[str]) -> Path:
    """Where the index of these shards lies: it may move with them."""
    if any("://" in s for s in shards):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm-vae"
        return cache / f"shards-{short_digest(shards)}"
    folder = os.path.dirname(os.path.abspath(shards[0]))
    return Path(folder) / f"index-{short_digest([os.path.relpath(s, folder) for s in shards])}"


def short_digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]


def marks_of(shards: Sequence[str]) -> list[list[Any]]:
    """Size and time, or what else its server says of its version, of each shard. Raises DataError for one not there."""

    def mark(shard: str) -> list[Any]:
        try:
            fs, path = url_to_fs(shard)
            info = fs.info(path)
        except Exception as error:  # each file system has its own
            raise DataError(f"no such shard: {shard} ({type(error).__name__}: {error})") from None
        version = next((info[k] for k in ("ETag", "etag", "mtime", "LastModified", "updated") if info.get(k)), "")
        return [info["size"], str(version)]

    with ThreadPoolExecutor(REMOTE_AT_ONCE) as pool:
        return list(pool.map(mark, shards))


@dataclass(frozen=True)
class Scan:
    """A shard's samples in their order: rows whose `label` is an index into `classes`, or -1."""

    rows: np.ndarray
    classes: list[Class]
    left_out: int
    """Images beside another one of the same key: a sample has one, the first."""
    example: str
    """Of those left out."""


def scan(shard: str) -> Scan:
    """Raises DataError where it is no tar, or cut."""
    places: dict[str, tuple[int, int]] = {}
    class_of: dict[str, Class] = {}
    left_out, example = 0, ""
    try:
        fs, path = url_to_fs(shard)
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg() or member.issparse():
                    continue
                key, extension = key_of(member.name)
                if is_image(member.name):
                    if key in places:
                        left_out, example = left_out + 1, example or member.name
                    places.setdefault(key, (member.offset_data, member.size))
                elif extension in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
                    content = tar.extractfile(member)
                    named = class_in(content.read() if content else b"", extension)
                    if named is not None and (extension == "json" or key not in class_of):
                        class_of[key] = named
                tar.members.clear()  # type: ignore[attr-defined]  # the library keeps them all
    except DataError:
        raise
    except Exception as error:  # tarfile and file systems have many kinds
        raise DataError(f"{shard} cannot be read: {type(error).__name__}: {error}") from None
    classes = sorted(set(class_of.values()), key=lambda c: (str(type(c)), c))
    label_of = {name: i for i, name in enumerate(classes)}
    rows = np.zeros(len(places), ROW)
    for row, (key, (offset, size)) in zip(rows, places.items(), strict=True):
        row["label"] = label_of[class_of[key]] if key in class_of else -1
        row["offset"], row["size"] = offset, size
    return Scan(rows, classes, left_out, example)


def key_of(name: str) -> tuple[str, str]:
    """`a/b.seg.png` -> `a/b` and `seg.png`: WebDataset's."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}", extension.lower()


def class_in(content: bytes, extension: str) -> Class | None:
    """What a .cls says, or a .json under `class` or `label`; None where it says nothing.

    A number is the class's, a text its name. Digits are a number in a .cls, which has no other way to say one; what a
    .json has in quotes is a name.
    """
    text = content.decode(errors="replace").strip()
    if extension == "json":
        try:
            facts = json.loads(text)
        except ValueError:
            return None
        if not isinstance(facts, dict):
            return None
        named = facts.get("class", facts.get("label"))
        if isinstance(named, str):
            return named or None
        text = str(named) if isinstance(named, int) else ""
    is_number = text.isdecimal() and text.isascii() and len(text) <= 7
    return int(text) if is_number else text or None


def build_index(shards: Sequence[str], *, workers: int = 1) -> Path:
    """Reads the headers of all shards, in that many processes, and writes their index.

    Raises:
        DataError: a shard that is not there or damaged, no images, or too many classes.
    """
    target = index_folder(shards)
    marks = marks_of(shards)
    check_writable(target.parent)
    with staged_directory(target) as staging:
        part = staging / "rows.part"
        digest, count, label_of = hashlib.sha256(), 0, dict[Class, int]()
        left_out, example = 0, ""
        with open(part, "wb") as out:
            for number, shard in enumerate(scanned(shards, workers)):
                labels = np.array([label_of.setdefault(c, len(label_of)) for c in shard.classes] + [-1], np.int32)
                shard.rows["label"] = labels[shard.rows["label"]]
                shard.rows["shard"] = number
                out.write(shard.rows.tobytes())
                count += len(shard.rows)
                left_out, example = left_out + shard.left_out, example or shard.example
        if not count:
            raise DataError(f"no images in {shards[0]}" + (f" and {len(shards) - 1} more" if len(shards) > 1 else ""))
        classes, order = ordered(list(label_of))
        with open(staging / ROWS, "wb") as out:
            np.lib.format.write_array_header_2_0(
                out, {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (count,)}
            )
            for rows in in_parts(part):
                rows["label"] = order[rows["label"]]
                digest.update(rows.tobytes())
                out.write(rows.tobytes())
        part.unlink()
        facts = {"version": VERSION, "samples": count, "classes": classes, "rows": digest.hexdigest(), "marks": marks}
        write_json(staging / FACTS, facts)
    if left_out:
        warnings.warn(
            f"{left_out} images are left out, such as {example}: a sample has one, the first of those whose "
            "names are alike up to their first dot",
            stacklevel=2,
        )
    return target


def scanned(shards: Sequence[str], workers: int) -> Iterator[Scan]:
    if min(workers, len(shards)) <= 1:
        yield from map(scan, shards)
        return
    with ProcessPoolExecutor(min(workers, len(shards)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(scan, shards)


def ordered(classes: list[Class]) -> tuple[list[str], np.ndarray]:
    """Names of the classes, by number where all are numbers and else by name; and each one's place, with -1 for -1."""
    if len(classes) > MAX_CLASSES:
        raise DataError(f"{len(classes)} classes are more than {MAX_CLASSES}")
    numbers = [number for number in classes if isinstance(number, int)]
    if numbers and len(numbers) == len(classes):
        if max(numbers) >= MAX_CLASSES:
            raise DataError(f"class {max(numbers)} is more than {MAX_CLASSES}")
        return [str(i) for i in range(max(numbers) + 1)], np.array(numbers + [-1], np.int32)
    names = sorted({str(name) for name in classes}, key=in_natural_order)
    label_of = {name: i for i, name in enumerate(names)}
    return names, np.array([label_of[str(name)] for name in classes] + [-1], np.int32)


def in_parts(file: Path, rows: int = 1 << 16) -> Iterator[np.ndarray]:
    with open(file, "rb") as data:
        while content := data.read(rows * ROW.itemsize):
            yield np.frombuffer(content, ROW).copy()


def local_content(shard: str, begin: int, end: int) -> bytes:
    with open(shard, "rb") as file:
        return os.pread(file.fileno(), end - begin, begin)


def remote_content(shard: str, begin: int, end: int) -> bytes:
    """Bytes begin..end of what a server has. Raises DataError when it does not give them, asked several times."""

    def fetch() -> bytes:
        fs, path = url_to_fs(shard)
        return bytes(fs.cat_file(path, start=begin, end=end))

    return patiently(fetch, shard, passes=lambda _: True)  # each file system has errors of its own


class ShardSource:
    """The samples of indexed shards.

    Raises:
        DataError: there is no index, it is damaged, or a shard has changed since it was made.
    """

    def __init__(self, path: str, reader: ImageReader) -> None:
        self.shards, self.reader = shards_of(path), reader
        folder = index_folder(self.shards)
        advice = f"run `ldm-vae shards index '{path}'`"
        if not (folder / FACTS).is_file():
            raise DataError(f"{path} has no index: {advice}")
        try:
            facts = json.loads((folder / FACTS).read_text())
            if facts["version"] != VERSION:
                raise ValueError(f"version {facts['version']}")
            rows = np.load(folder / ROWS, mmap_mode="r")  # not read yet
            if rows.dtype != ROW or rows.ndim != 1:
                raise ValueError(f"{folder / ROWS} does not hold rows")
            self.rows_file, self.count, self.begin = folder / ROWS, len(rows), rows.offset
            self.classes: tuple[str, ...] = tuple(facts["classes"])
            self.digest: str = facts["rows"]
            self.marks: list[list[Any]] = facts["marks"]
            if self.count != facts["samples"] or len(self.marks) != len(self.shards):
                raise ValueError("its parts do not belong together")
        except Exception as error:  # damaged arrays raise many kinds
            raise DataError(f"the index {folder} is damaged ({error}): {advice}") from None
        for shard, then, now in zip(self.shards, self.marks, marks_of(self.shards), strict=True):
            if then != now:
                raise DataError(f"{shard} has changed since it was indexed: {advice}")

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        """Of the shards' names and sizes, and all rows; the shards are not read."""
        lines = [f"{PurePosixPath(s).name} {size}" for s, (size, _) in zip(self.shards, self.marks, strict=True)]
        return digest_of([str(self.reader), *self.classes], [self.digest, *lines])

    def content(self, shard: str, begin: int, end: int) -> bytes:
        """Raises BadImageError, or DataError where a server does not answer: that says nothing of the image."""
        if "://" in shard:
            return remote_content(shard, begin, end)
        try:
            return patiently(lambda: local_content(shard, begin, end), shard)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from None

    def header(self, shard: str, offset: int, content: bytes, size: int) -> str:
        """The member's name. Raises BadImageError where there is no such member."""
        try:
            member = tarfile.TarInfo.frombuf(content[:HEADER], tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError:
            member = None
        if member is None or (member.size != size and member.size != 0):  # 0: the size is in a record before
            raise BadImageError(f"there is no image at byte {offset} of {shard}: it has changed since it was indexed")
        return f"{PurePosixPath(shard).name}/{member.name}"

    def place(self, index: int) -> tuple[str, int, int, int]:
        """Shard, offset, size and label. Raises DataError for a row that cannot be."""
        begin = self.begin + index * ROW.itemsize
        row = np.fromfile(self.rows_file, ROW, 1, offset=begin)[0]
        number, offset, size, label = (int(row[name]) for name in ("shard", "offset", "size", "label"))
        known = 0 <= number < len(self.shards) and -1 <= label < len(self.classes)
        if not known or not HEADER <= offset < 1 << 62 or size < 0:
            raise DataError(
                f"the index of {self.shards[0]} is damaged at row {index}: run `ldm-vae shards index` again"
            )
        return self.shards[number], offset, size, label

    def name(self, index: int) -> str:
        shard, offset, size, _ = self.place(index)
        try:
            return self.header(shard, offset, self.content(shard, offset - HEADER, offset), size)
        except BadImageError:
            return f"{PurePosixPath(shard).name}/{offset}"

    def __getitem__(self, index: int) -> Sample:
        shard, offset, size, label = self.place(index)
        if size > MAX_FILE_BYTES:
            raise BadImageError(f"file larger than {MAX_FILE_BYTES} bytes")
        content = self.content(shard, offset - HEADER, offset + size)
        name = self.header(shard, offset, content, size)
        return self.reader.sample(self.reader(content[HEADER:]), label=label if label >= 0 else None, name=name)
