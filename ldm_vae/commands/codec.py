"""`ldm-vae compress | decompress | info | fit-codec`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path, PurePath
from typing import Any, TypeVar

from tqdm import tqdm
from tyro.conf import Positional

from ldm_vae.codec import bitstream
from ldm_vae.codec.bitstream import Limits
from ldm_vae.errors import CompressedFileError, ConfigError, DataError, LdmVaeError
from ldm_vae.files import atomic, check_writable
from ldm_vae.hub import is_hub_id

EXTENSION = ".ldi"
MODEL_VARIABLE = "LDM_VAE_MODEL"
STREAM = "-"
Command = TypeVar("Command", "Compress", "Decompress")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """From a file, a folder or standard input (-) to the same kind."""

    input: Positional[str]
    output: Positional[str]
    model: str = os.environ.get(MODEL_VARIABLE, "")
    """Run directory, model folder or hub id with fitted tables; $LDM_VAE_MODEL unless given."""
    device: str = "cpu"
    workers: int = 0
    """Processes for a folder's files, or for the tiles of one large image; 0: one a core."""
    overwrite: bool = False
    """Replace files that are there; without it, a folder's are skipped, and a single one is an error."""
    max_pixels: int = Limits().max_pixels
    max_side: int = Limits().max_side

    def limits(self) -> Limits:
        return Limits(max_pixels=self.max_pixels, max_side=self.max_side)


@dataclass(frozen=True, kw_only=True)
class Compress(Transfer):
    """Compress images to .ldi files."""

    quality: float = 1.0
    """Step of the quantiser: 0.5 is fine, 4 is coarse."""
    target_bpp: float | None = None
    """The best quality with at most so many bits per pixel, instead of --quality."""
    target_psnr: float | None = None
    """The smallest file with at least so many dB, instead of --quality."""
    strip: bool = False
    """Leave out ICC profile and EXIF."""


@dataclass(frozen=True, kw_only=True)
class Decompress(Transfer):
    """Make images of .ldi files again."""

    region: tuple[int, int, int, int] | None = None
    """Left, top, width and height in pixels: only this part."""
    salvage: bool = False
    """Decode what is whole of a damaged file, and mark the rest."""
    extension: str = ".png"
    """Of a folder's images, and of standard output."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Say what an .ldi file holds, and whether it is whole. Needs no model."""

    file: Positional[str]


@dataclass(frozen=True, kw_only=True)
class FitCodec:
    """Measure a VAE's posterior over images, fit the codec's tables, and write them beside the VAE (codec/)."""

    vae: str
    """Run directory, model folder or hub id."""
    data: str
    """Image folder, .zip, tar shards, Hugging Face dataset, or procedural:NAME."""
    output: Path | None = None
    """Folder for a copy of the VAE with its tables; beside --vae unless given."""
    num_images: int = 400
    qualities: tuple[float, ...] | None = None
    """At which tables are fitted; 0.5 to 4 unless given."""
    overwrite: bool = False
    """Replace tables that are there: files that were written with them cannot be read any more."""
    device: str = "cpu"


# One file ------------------------------------------------------------------------------------------------------------


@cache
def load_codec(model: str, device: str, workers: int) -> Any:
    from ldm_vae.codec.codec import LatentCodec
    from ldm_vae.models.loading import check_device
    from ldm_vae.models.reconstruction import exact_float32

    exact_float32()
    if not model:
        raise ConfigError(f"no --model given, and ${MODEL_VARIABLE} is not set")
    check_device(device)
    return LatentCodec.from_pretrained(model, device=device, workers=workers)


def read(name: str) -> bytes:
    return sys.stdin.buffer.read() if name == STREAM else Path(name).read_bytes()


def write(name: str, data: bytes) -> None:
    if name == STREAM:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    with atomic(Path(name)) as out:
        out.write(data)


def compress_file(command: Compress) -> str | None:
    """The message for a warning, if any."""
    from ldm_vae.codec.picture import read_picture
    from ldm_vae.codec.search import compress_to
    from ldm_vae.models.interface import channels_of

    codec = load_codec(command.model, command.device, command.workers)
    channels = channels_of(codec.vae)
    scratch = scratch_of(command.output) if codec.exact else None
    source = read(STREAM) if command.input == STREAM else Path(command.input)
    given = read_picture(source, channels=channels, max_pixels=command.max_pixels, scratch=scratch)
    command.limits().check(given.pixels.shape[1], given.pixels.shape[0])
    if command.target_bpp is None and command.target_psnr is None:
        data = codec.compress(given, quality=command.quality, strip=command.strip, limits=command.limits())
    else:
        targets = {"target_bpp": command.target_bpp, "target_psnr": command.target_psnr}
        data = compress_to(codec, given, **targets, strip=command.strip, scratch=scratch)
    write(command.output, data)
    return None


def scratch_of(name: str) -> Path:
    """A folder for images that are not to lie in memory as a whole: where the output goes."""
    return Path(tempfile.gettempdir()) if name == STREAM else Path(name).parent


def write_parts(name: str, found: Any, parts: Iterator[Any]) -> None:
    """A PNG of which the pixels come in parts."""
    import numpy as np

    from ldm_vae.data.large import write_large

    def with_alpha() -> Iterator[Any]:
        row = 0
        for part in parts:
            below = row + len(part)
            yield part if found.alpha is None else np.concatenate([part, found.alpha[row:below, :, None]], axis=2)
            row = below

    shape = (*found.pixels.shape[:2], found.pixels.shape[2] + (found.alpha is not None))
    with nullcontext(sys.stdout.buffer) if name == STREAM else atomic(Path(name)) as out:
        write_large(out, with_alpha(), shape, folder=scratch_of(name), icc=found.icc, exif=found.exif)


def decompress_file(command: Decompress) -> str | None:
    from ldm_vae.codec.codec import filled
    from ldm_vae.codec.picture import check_extension, encode_picture
    from ldm_vae.data.large import LARGE

    extension = command.extension if command.output == STREAM else Path(command.output).suffix.lower()
    check_extension(extension)
    codec = load_codec(command.model, command.device, command.workers)
    damage: list[str] | None = [] if command.salvage else None
    data = read(command.input)
    parts = codec.parts(data, region=command.region, limits=command.limits(), damage=damage)
    found = next(parts)
    if extension == ".png" and found.pixels[:, :, 0].size > LARGE and found.pixels.shape[2] in (1, 3):
        write_parts(command.output, found, parts)
    else:
        write(command.output, encode_picture(filled(found, parts), extension))
    return "; ".join(damage) if damage else None


# Folders -------------------------------------------------------------------------------------------------------------


def in_worker(act: Callable[[Any], str | None], command: Any) -> str | None:
    """One file in a process of its own: errors come back as themselves, and torch keeps to one thread."""
    import torch

    torch.set_num_threads(1)
    return act(command)


def transfer_folder(act: Callable[[Any], str | None], command: Command, pairs: Sequence[tuple[Path, Path]]) -> None:
    """Every pair of files on all workers, with progress. Raises DataError at the end when some could not be done."""
    load_codec(command.model, command.device, 1)  # what is wrong with it is said once
    jobs = []
    for source, target in pairs:
        if command.overwrite or not target.exists():
            check_writable(target.parent)
            jobs.append(replace(command, input=str(source), output=str(target), workers=1))
    failed = 0
    workers = min(command.workers or os.cpu_count() or 1, len(jobs))
    with tqdm(total=len(jobs), unit="file") as bar:
        for job, outcome in outcomes(act, jobs, workers):
            bar.update()
            if outcome is not None:
                failed += 1
                tqdm.write(f"{job.input}: {outcome}", file=sys.stderr)
    skipped = f", {len(pairs) - len(jobs)} were there" if len(jobs) < len(pairs) else ""
    print(f"{len(jobs) - failed} of {len(jobs)} files done{skipped}; they are in {command.output}", file=sys.stderr)
    if failed:
        raise DataError(f"{failed} of {len(jobs)} files could not be done, or not whole: see above")


def outcomes(
    act: Callable[[Any], str | None], jobs: Sequence[Command], workers: int
) -> Iterator[tuple[Command, str | None]]:
    """Each job with what went wrong, None for nothing, as they are done."""
    if workers <= 1:
        for job in jobs:
            yield job, said_by(partial(act, job))
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        futures: dict[Future[str | None], Command] = {pool.submit(in_worker, act, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], said_by(future.result)
    finally:
        pool.shutdown(cancel_futures=True)  # what has not begun when somebody stops it does not begin


def said_by(call: Callable[[], str | None]) -> str | None:
    """What went wrong with one file, whatever it was: the others go on."""
    try:
        return call()
    except (LdmVaeError, ValueError, OSError) as error:
        return " ".join(str(error).split())
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def pairs_of(source: Path, target: Path, *, inputs: Callable[[str], bool], extension: str) -> list[tuple[Path, Path]]:
    """Every file below a folder with its counterpart below another, hidden files and folders left out.

    Two that differ in their extension alone keep it: a.jpg.ldi beside a.png.ldi.

    Raises:
        DataError: no files, or two that would become one.
        ConfigError: an output within the input.
    """
    from ldm_vae.data.file_sources import files_below

    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"the output {target} is inside the input {source}: choose another one")
    found = (source / name for name in files_below(source, lambda n: inputs(PurePath(n).suffix.lower())))
    files = sorted(p for p in found if p.is_file() and not p.name.startswith("."))
    if not files:
        raise DataError(f"{source} has no such files")
    short = [p.relative_to(source).with_suffix(extension) for p in files]
    times = Counter(short)
    names = [
        s if times[s] == 1 else p.relative_to(source).with_name(p.name + extension)
        for p, s in zip(files, short, strict=True)
    ]
    twice = [str(n) for n, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"two files of {source} would both become {twice[0]}: rename one of them")
    return [(p, target / n) for p, n in zip(files, names, strict=True)]


def transfer(
    act: Callable[[Any], str | None], command: Command, *, inputs: Callable[[str], bool], extension: str
) -> None:
    if command.workers < 0:
        raise ConfigError(f"--workers is {command.workers}: it must not be negative")
    if min(command.max_pixels, command.max_side) < 1:
        raise ConfigError("--max-pixels and --max-side must be at least 1")
    if command.input != STREAM and Path(command.input).is_dir():
        if command.output == STREAM:
            raise ConfigError("a folder cannot go to standard output")
        pairs = pairs_of(Path(command.input), Path(command.output), inputs=inputs, extension=extension)
        return transfer_folder(act, command, pairs)
    if command.output != STREAM:
        target = Path(command.output)
        if target.is_dir():
            raise ConfigError(f"{target} is a folder: name the file")
        if target.exists() and not command.overwrite:
            raise ConfigError(f"{target} is there already: add --overwrite to replace it")
        if not target.parent.is_dir():
            raise ConfigError(f"there is no folder {target.parent}")
    warning = act(replace(command, workers=command.workers or os.cpu_count() or 1))
    if warning:
        raise DataError(f"{command.input}: {warning}; the rest was written")
    return None


# Commands ------------------------------------------------------------------------------------------------------------


def compress(command: Compress) -> None:
    from ldm_vae.data.image_files import EXTENSIONS

    given = [command.target_bpp is not None, command.target_psnr is not None, command.quality != 1.0]
    if sum(given) > 1:
        raise ConfigError("give one of --quality, --target-bpp and --target-psnr")
    transfer(compress_file, command, inputs=lambda e: e in EXTENSIONS, extension=EXTENSION)


def decompress(command: Decompress) -> None:
    from ldm_vae.codec.picture import check_extension

    check_extension(command.extension)
    transfer(decompress_file, command, inputs=lambda e: e == EXTENSION, extension=command.extension)


def info(command: Info) -> None:
    data = read(command.file)
    contents = bitstream.unpack(data, limits=Limits(max_pixels=1 << 64, max_side=1 << 32))
    for part in (*contents.sections.values(), *contents.tiles):
        try:
            contents.read(part)
        except CompressedFileError as error:
            raise type(error)(f"{part.name}: {error}") from None
    header = contents.header
    facts = {
        "size": f"{header.width} x {header.height} pixels, {header.colours} channels of {header.depth} bits",
        "bits per pixel": f"{8 * len(data) / (header.width * header.height):.4f} ({len(data)} bytes)",
        "quality": f"{header.quality / 256:g}",
        "latents": f"{header.channels} channels, stride {1 << header.log2_stride}",
        "tiles": f"{len(contents.tiles)} of up to {1 << header.log2_tile} latents a side, {header.lanes} lanes",
        "beside": ", ".join(f"{p.name} ({p.end - p.begin} bytes)" for p in contents.sections.values()) or "nothing",
        "autoencoder": header.weights.hex(),
        "tables": header.tables.hex(),
    }
    for name, fact in facts.items():
        print(f"{name:15} {fact}")


def fit_codec(command: FitCodec) -> None:
    from ldm_vae.codec.fit_tables import QUALITIES, fit_tables
    from ldm_vae.data.sources import check_finite, open_source
    from ldm_vae.files import staged_directory
    from ldm_vae.models.interface import channels_of
    from ldm_vae.models.loading import check_device, load_autoencoder

    if command.num_images < 1:
        raise ConfigError(f"--num-images is {command.num_images}: it must be at least 1")
    if command.output is None and is_hub_id(command.vae) and not Path(command.vae).is_dir():
        raise ConfigError(f"{command.vae} is on the hub: add --output, a folder for a copy of it with its tables")
    target = command.output or Path(command.vae)
    for folder in (target / "codec", *([target / "vae"] if command.output is not None else [])):
        if folder.exists() and not command.overwrite:
            raise ConfigError(
                f"{folder} is there: files that were compressed with it need it. Add --overwrite to replace it, or "
                "choose another --output"
            )
    check_device(command.device)
    vae = load_autoencoder(command.vae).to(command.device)
    check_writable(target)
    source = open_source(command.data, channels=channels_of(vae))
    check_finite(source, command.data, command.num_images)
    tables = fit_tables(
        vae, source, num_images=command.num_images, qualities=command.qualities or QUALITIES, progress=True
    )
    if command.output is not None:
        with staged_directory(target / "vae") as staging:
            vae.cpu().save_pretrained(staging)
    with staged_directory(target / "codec") as staging:
        tables.save(staging)
    print(f"{len(tables.channels)} of {len(tables.sigma)} channels are coded; tables are in {target / 'codec'}")
