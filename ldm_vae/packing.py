"""`ldm-vae shards pack | index`: a folder of images as tar shards, and the index that shards are read by."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import tyro
from tqdm import tqdm
from tyro.conf import Positional

from ldm_vae.errors import BadImageError, ConfigError, nothing_usable
from ldm_vae.files import atomic, check_writable, write_csv


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Copy a folder or .zip of images, byte for byte, into tar shards, and index them."""

    input: Positional[Path]
    output: Positional[Path]
    shard_mib: int = 512
    """Of images in a shard, at most but for one that is larger."""
    overwrite: bool = False
    """Replace shards that are there."""
    workers: int = 0
    """Processes that make the index; 0: one a core."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Index tar shards: once, and again when one of them has changed."""

    shards: Positional[str]
    """A folder of them, or a pattern: images-{0000..0999}.tar, s3://bucket/images-{0000..0999}.tar."""
    workers: int = 0
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
    if command.action.workers < 0:
        raise ConfigError(f"--workers is {command.action.workers}: it must not be negative")
    if isinstance(command.action, Pack):
        pack(command.action)
    else:
        index(command.action.shards, command.action.workers)


def index(path: str, workers: int) -> None:
    from ldm_vae.data.shards import ShardSource, build_index, shards_of

    shards = shards_of(path)
    folder = build_index(shards, workers=workers or os.cpu_count() or 1)
    source = ShardSource(path, channels=3, max_pixels=1 << 62)
    classes = f", {len(source.classes)} classes" if source.classes else ""
    print(f"{len(source)} images in {len(shards)} shards{classes}; the index is {folder}")


def pack(command: Pack) -> None:
    """Raises DataError for no images, ConfigError for what cannot be written."""
    from ldm_vae.data.sources import FileSource, open_source

    if command.shard_mib < 1:
        raise ConfigError(f"--shard-mib is {command.shard_mib}: it must be at least 1")
    source = open_source(str(command.input))
    if not isinstance(source, FileSource):
        raise ConfigError(f"{command.input} is not a folder or .zip of images")
    check_writable(command.output)
    old = sorted(command.output.glob("*.tar"))
    if old and not command.overwrite:
        raise ConfigError(f"{old[0]} is there already: add --overwrite to replace it, or choose another output")
    for file in old:
        file.unlink()
    bad: dict[str, str] = {}
    number = position = 0
    with tqdm(total=len(source), unit="image") as bar:
        while position < len(source):
            with atomic(command.output / f"images-{number:06d}.tar") as out, tarfile.open(fileobj=out, mode="w") as tar:
                packed = 0
                while position < len(source) and packed < command.shard_mib << 20:
                    packed += add(tar, source, position, bad)
                    position += 1
                    bar.update()
            number += 1
    if len(bad) == len(source):
        for file in command.output.glob("*.tar"):
            file.unlink()
        raise nothing_usable(bad)
    if bad:
        write_csv(command.output / "bad_images.csv", [{"name": n, "reason": r} for n, r in bad.items()])
        print(f"{len(bad)} files could not be read and are left out: see {command.output / 'bad_images.csv'}")
    index(str(command.output), command.workers)


def add(tar: tarfile.TarFile, source: Any, position: int, bad: dict[str, str]) -> int:
    """The image's file and what is known of it: bytes taken."""
    name = source.name(position)
    try:
        content = source.content(position)
    except BadImageError as error:
        bad[name] = str(error)
        return 0
    label = source.label(position)
    facts = {"name": name} | ({} if label is None else {"class": source.classes[label]})
    parts = {PurePosixPath(name).suffix.lower()[1:]: content, "json": json.dumps(facts).encode()}
    if label is not None:
        parts["cls"] = str(label).encode()
    for extension, part in parts.items():
        member = tarfile.TarInfo(f"{position:09d}.{extension}")
        member.size = len(part)
        tar.addfile(member, io.BytesIO(part))
    return len(content)
