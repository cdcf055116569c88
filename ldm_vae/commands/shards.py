"""`ldm-vae shards pack | index`: a folder of images as tar shards, and the index that shards are read by."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from ldm_vae.errors import ConfigError, nothing_usable
from ldm_vae.files import LOCK, atomic, check_writable, lock, write_bad_images, write_json
from ldm_vae.progress import progress
from ldm_vae.runs.config import Range, check_ranges

if TYPE_CHECKING:
    from ldm_vae.data.file_sources import FileSource

BEGUN = ".packing"
"""Below the output: shards until all are made."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Copy a folder or .zip of images, byte for byte, into tar shards, and index them."""

    input: Positional[Path]
    output: Positional[Path]
    shard_mib: Annotated[int, Range(at_least=1)] = 512
    """Of images in a shard, at most but for one that is larger."""
    overwrite: bool = False
    """Replace shards that are there."""
    workers: Annotated[int, Range(at_least=0)] = 0
    """Processes that make the index; 0: one a core."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Index tar shards: once, and again when one of them has changed."""

    shards: Positional[str]
    """A folder of them, or a pattern: images-{0000..0999}.tar, s3://bucket/images-{0000..0999}.tar."""
    workers: Annotated[int, Range(at_least=0)] = 0
    """Processes; 0: one a core."""


@dataclass(frozen=True)
class Shards:
    """Tar shards in WebDataset's layout."""

    action: tyro.conf.OmitArgPrefixes[
        tyro.conf.OmitSubcommandPrefixes[
            Annotated[Pack, tyro.conf.subcommand("pack")] | Annotated[Index, tyro.conf.subcommand("index")]
        ]
    ]


def work_on_shards(command: Shards) -> None:
    check_ranges(command.action)
    if isinstance(command.action, Pack):
        pack_shards(command.action)
    else:
        index(command.action.shards, command.action.workers)


def index(path: str, workers: int) -> None:
    from ldm_vae.data.reader import ImageReader
    from ldm_vae.data.shards import ShardSource, build_index, shards_of

    shards = shards_of(path)
    folder = build_index(shards, workers=workers or os.cpu_count() or 1)
    source = ShardSource(path, ImageReader())
    classes = f", {len(source.classes)} classes" if source.classes else ""
    print(f"{len(source)} images in {len(shards)} shards{classes}; the index is {folder}")


def pack_shards(command: Pack) -> None:
    """Shards that were finished before it was stopped are not made again.

    Raises:
        DataError: no images.
        ConfigError: what cannot be packed, or shards that are there.
        RunError: they cannot be written, or another process is at it.
    """
    from ldm_vae.data.file_sources import FileSource
    from ldm_vae.data.sources import open_source

    source = open_source(str(command.input))
    if not isinstance(source, FileSource):
        raise ConfigError(f"{command.input} is not a folder or .zip of images")
    check_writable(command.output)
    begun = command.output / BEGUN
    plan = {"images": source.fingerprint(), "shard_mib": command.shard_mib}
    moving = read_json(begun / "moving.json") == plan  # it was stopped when all were made
    old = [] if moving else sorted(command.output.glob("*.tar"))
    if old and not command.overwrite:
        raise ConfigError(f"{old[0]} is there already: add --overwrite to replace it, or choose another output")
    foreign = [file for file in old if not re.fullmatch(r"images-\d{6,}\.tar", file.name)]
    if foreign:
        raise ConfigError(f"{foreign[0]} is none of ours, and would be indexed with them: choose another output")
    check_writable(begun)
    with lock(begun):
        bad = make_shards(source, begun, plan)
        if len(bad) == len(source):
            shutil.rmtree(begun)
            raise nothing_usable(bad)
        for file in old:
            file.unlink()
        write_json(begun / "moving.json", plan)
        for file in begun.glob("*.tar"):
            os.replace(file, command.output / file.name)
        (command.output / "bad_images.csv").unlink(missing_ok=True)
        if bad:
            file = write_bad_images(command.output, bad)
            print(f"{len(bad)} files could not be read and are left out: see {file}")
        index(str(command.output), command.workers)
        shutil.rmtree(begun)  # at last: what is there before, the same command goes on with


def make_shards(source: FileSource, folder: Path, plan: dict[str, Any]) -> dict[str, str]:
    """Every image of the source into shards; the bad ones. Those that are there are kept, if they are of this plan."""
    if read_json(folder / "plan.json") != plan:
        for file in folder.iterdir():
            if file.name != LOCK:
                file.unlink()
        write_json(folder / "plan.json", plan)
    bad: dict[str, str] = {}
    position = number = 0
    with progress(total=len(source), unit="image") as bar:
        while position < len(source):
            record = folder / f"images-{number:06d}.json"  # written behind its shard
            done = read_json(record)
            if done is None:
                done = make_shard(source, position, record.with_suffix(".tar"), plan["shard_mib"] << 20)
                write_json(record, done)
            bad |= done["bad"]
            bar.update(done["end"] - position)
            position, number = done["end"], number + 1
    return bad


def make_shard(source: FileSource, begin: int, file: Path, size: int) -> dict[str, Any]:
    """Images from `begin` on, to about that size: where it ends, and the bad ones."""
    from ldm_vae.data.sources import usable

    bad: dict[str, str] = {}
    packed = 0
    with atomic(file) as out, tarfile.open(fileobj=out, mode="w") as tar:
        for index, content in usable(source, bad, indices=range(begin, len(source)), read=source.content):
            add(tar, source, index, content)
            packed += len(content)
            if packed >= size:
                return {"end": index + 1, "bad": bad}
    return {"end": len(source), "bad": bad}


def read_json(file: Path) -> Any:
    """None for what is not there or not whole."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def add(tar: tarfile.TarFile, source: FileSource, position: int, content: bytes) -> None:
    """The image's file, and what is known of it."""
    name = source.name(position)
    label = source.label(position)
    facts = {"name": name} | ({} if label is None else {"class": source.classes[label]})
    parts = {PurePosixPath(name).suffix.lower()[1:]: content, "json": json.dumps(facts).encode()}
    if label is not None:
        parts["cls"] = str(label).encode()
    for extension, part in parts.items():
        member = tarfile.TarInfo(f"{position:09d}.{extension}")
        member.size = len(part)
        tar.addfile(member, io.BytesIO(part))
