"""`ldm-vae compress | decompress | info`: one file, a folder of files, or standard input."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePath
from typing import Annotated, Any

from tyro.conf import Positional

from ldm_vae.codec import bitstream
from ldm_vae.codec.bitstream import EXTENSION, MODEL_VARIABLE, Limits
from ldm_vae.commands.folders import result_names, run_jobs, totals
from ldm_vae.data.image_files import files_below, is_image
from ldm_vae.errors import CompressedFileError, ConfigError, DataError
from ldm_vae.files import atomic, check_writable
from ldm_vae.runs.config import Range, check_ranges

STREAM = "-"


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """From a file, a folder or standard input (-) to the same kind."""

    input: Positional[str]
    output: Positional[str]
    model: str = os.environ.get(MODEL_VARIABLE, "")
    """Run directory, model folder or hub id with fitted tables; $LDM_VAE_MODEL unless given."""
    device: str = "cpu"
    workers: Annotated[int, Range(at_least=0)] = 0
    """Processes for a folder's files, or for the tiles of one large image; 0: one a core."""
    overwrite: bool = False
    """Replace files that are there; without it, a folder's are skipped, and a single one is an error."""
    max_pixels: Annotated[int, Range(at_least=1)] = Limits().max_pixels
    max_side: Annotated[int, Range(at_least=1)] = Limits().max_side

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


def compress_file(command: Compress) -> None:
    from ldm_vae.codec.picture import read_picture
    from ldm_vae.codec.search import compress_to

    codec = load_codec(command.model, command.device, command.workers)
    scratch = None
    if codec.network.finite:  # then large images need not lie in memory: they are kept where the output goes
        scratch = Path(tempfile.gettempdir()) if command.output == STREAM else Path(command.output).parent
    file = read(STREAM) if command.input == STREAM else Path(command.input)
    picture = read_picture(file, channels=codec.network.channels, max_pixels=command.max_pixels, scratch=scratch)
    command.limits().check(picture.pixels.shape[1], picture.pixels.shape[0])
    bpp, psnr = command.target_bpp, command.target_psnr
    if bpp is None and psnr is None:
        data = codec.compress(picture, quality=command.quality, strip=command.strip, limits=command.limits())
    else:
        data = compress_to(codec, picture, target_bpp=bpp, target_psnr=psnr, strip=command.strip, scratch=scratch)
    write(command.output, data)


def decompress_file(command: Decompress) -> str | None:
    """What is damaged, if anything."""
    from ldm_vae.codec.picture import check_extension, encode_picture, fill, with_alpha
    from ldm_vae.data.large import LARGE
    from ldm_vae.data.png import stream_png

    extension = command.extension if command.output == STREAM else Path(command.output).suffix.lower()
    check_extension(extension)
    codec = load_codec(command.model, command.device, command.workers)
    damage: list[str] | None = [] if command.salvage else None
    picture, bands = codec.decompress_bands(
        read(command.input), region=command.region, limits=command.limits(), damage=damage
    )
    height, width, colours = picture.pixels.shape
    if extension == ".png" and height * width > LARGE and colours in (1, 3):
        shape, parts = (height, width, colours + (picture.alpha is not None)), with_alpha(bands, picture.alpha)
        with nullcontext(sys.stdout.buffer) if command.output == STREAM else atomic(Path(command.output)) as out:
            stream_png(out, parts, shape, icc=picture.icc, exif=picture.exif)
    else:
        write(command.output, encode_picture(fill(picture, bands), extension))
    return "; ".join(damage) if damage else None


def transfer_folder(
    act: Callable[[Any], str | None], command: Transfer, *, inputs: Callable[[str], bool], extension: str
) -> None:
    """Every file below the input folder, to a file of the same name below the output.

    Raises:
        DataError: no files; and at the end, when some could not be done.
        ConfigError: an output within the input.
    """
    source, target = Path(command.input), Path(command.output)
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"the output {target} is inside the input {source}: choose another one")
    names = sorted(name for name in files_below(source, inputs) if (source / name).is_file())
    if not names:
        raise DataError(f"{source} has no such files")
    load_codec(command.model, command.device, 1)  # what is wrong with it is said once
    jobs = {}
    for name, result in zip(names, result_names(names, extension), strict=True):
        if command.overwrite or not (target / result).exists():
            check_writable((target / result).parent)
            jobs[name] = replace(command, input=str(source / name), output=str(target / result), workers=1)
    failures = run_jobs(act, jobs, workers=min(command.workers, len(jobs)))
    print(totals(len(jobs), failures, target, skipped=len(names) - len(jobs)), file=sys.stderr)
    if failures:
        raise DataError(f"{len(failures)} of {len(jobs)} files could not be done, or not whole: see above")


def transfer(
    act: Callable[[Any], str | None], command: Transfer, *, inputs: Callable[[str], bool], extension: str
) -> None:
    """A folder by `transfer_folder`; a file, or standard input, by act(command), which may return a warning."""
    check_ranges(command)
    command = replace(command, workers=command.workers or os.cpu_count() or 1)
    if command.input != STREAM and Path(command.input).is_dir():
        if command.output == STREAM:
            raise ConfigError("a folder cannot go to standard output")
        transfer_folder(act, command, inputs=inputs, extension=extension)
        return
    if command.output != STREAM:
        target = Path(command.output)
        if target.is_dir():
            raise ConfigError(f"{target} is a folder: name the file")
        if target.exists() and not command.overwrite:
            raise ConfigError(f"{target} is there already: add --overwrite to replace it")
        if not target.parent.is_dir():
            raise ConfigError(f"there is no folder {target.parent}")
    if warning := act(command):
        raise DataError(f"{command.input}: {warning}; the rest was written")


def is_compressed(name: str) -> bool:
    """By its extension; hidden files are not."""
    path = PurePath(name)
    return path.suffix.lower() == EXTENSION and not path.name.startswith(".")


def compress(command: Compress) -> None:
    if sum([command.target_bpp is not None, command.target_psnr is not None, command.quality != 1.0]) > 1:
        raise ConfigError("give one of --quality, --target-bpp and --target-psnr")
    transfer(compress_file, command, inputs=is_image, extension=EXTENSION)


def decompress(command: Decompress) -> None:
    from ldm_vae.codec.picture import check_extension

    check_extension(command.extension)
    transfer(decompress_file, command, inputs=is_compressed, extension=command.extension)


def info(command: Info) -> None:
    data = read(command.file)
    contents = bitstream.unpack(data, limits=Limits(max_pixels=1 << 64, max_side=1 << 32))
    for part in (*contents.sections.values(), *contents.tiles):
        try:
            contents.read(part)
        except CompressedFileError as error:
            bitstream.report(error, part.name, None)
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
