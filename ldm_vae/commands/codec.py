"""`ldm-vae compress | decompress | info`: one file, a folder of files, or standard input."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePath

from tyro.conf import Positional

from ldm_vae.codec import bitstream
from ldm_vae.codec.bitstream import EXTENSION, Limits
from ldm_vae.commands.folders import in_one_line
from ldm_vae.commands.transfer import STREAM, Transfer, is_nameless, load_codec, read, transfer, write
from ldm_vae.data.image_files import Listing, files_below, images_below
from ldm_vae.data.reader import ReadOptions
from ldm_vae.errors import CompressedFileError, ConfigError, DataError
from ldm_vae.files import atomic


@dataclass(frozen=True, kw_only=True)
class Compress(Transfer):
    """Compress images to .ldi files."""

    quality: float = 1.0
    """Step of the quantiser: 0.5 is fine, 4 is coarse."""
    target_bpp: float | None = None
    """The best quality with at most so many bits per pixel, instead of --quality."""
    target_psnr: float | None = None
    """The smallest file with at least so many dB, instead of --quality."""
    target_size: str | None = None
    """The best quality with at most so many bytes, instead of --quality; k and M are thousands and millions."""
    strip: bool = False
    """Leave out metadata: colour profile, EXIF, XMP, texts, resolution."""
    pages_as_channels: bool = False
    """Take the pages of a TIFF as channels; otherwise its first page is the image."""
    value_range: tuple[float, float] | None = None
    """Values of black and white in images of floats, or of more than 8 bits."""
    exact: bool = False
    """Keep the colours of fully transparent pixels, which are filled smoothly otherwise."""
    force: bool = False
    """Write to a name that does not end in .ldi."""
    only_if_smaller: bool = False
    """Of a folder's files, copy those that would not become smaller."""

    def options(self) -> ReadOptions:
        return ReadOptions(keep_colour=True, pages_as_channels=self.pages_as_channels, value_range=self.value_range)

    def results(self) -> list[Path]:
        """What one file may become: with `only_if_smaller` also a copy, beside the others, by its own name."""
        target = Path(self.output)
        return [target, target.with_name(PurePath(self.input).name)][: 1 + self.only_if_smaller]


@dataclass(frozen=True, kw_only=True)
class Decompress(Transfer):
    """Make images of .ldi files again."""

    region: tuple[int, int, int, int] | None = None
    """Left, top, width and height in pixels: only this part."""
    salvage: bool = False
    """Decode what is whole of a damaged file, and mark the rest."""
    extension: str = ".png"
    """Of a folder's images, and of what has no name of its own: standard output, a pipe, a device."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Say what an .ldi file holds, and whether it is whole. Needs no model."""

    file: Positional[str]


def compress_file(command: Compress) -> str | None:
    """What is to be said of it, if anything."""
    from ldm_vae.codec.picture import read_picture
    from ldm_vae.codec.search import compress_to
    from ldm_vae.codec.transparency import smooth_transparent

    codec = load_codec(command.model, command.device, command.workers)
    scratch = None
    if codec.network.finite:  # then large images need not lie in memory: they are kept where the output goes
        scratch = Path(tempfile.gettempdir()) if is_nameless(command.output) else Path(command.output).parent
    file = read(STREAM) if command.input == STREAM else Path(command.input)
    notes: list[str] = []
    picture = read_picture(
        file,
        channels=codec.network.channels,
        max_pixels=command.max_pixels,
        options=command.options(),
        scratch=scratch,
        notes=notes,
    )
    note = in_one_line(notes, strict=command.strict)
    command.limits().check(picture.pixels.shape[1], picture.pixels.shape[0])
    if not command.exact:
        picture = smooth_transparent(picture)
    bpp, psnr, size = command.target_bpp, command.target_psnr, num_bytes(command.target_size)
    if (bpp, psnr, size) != (None, None, None):
        data = compress_to(
            codec, picture, target_bpp=bpp, target_psnr=psnr, target_size=size, strip=command.strip, scratch=scratch
        )
    else:
        data = codec.compress(picture, quality=command.quality, strip=command.strip, limits=command.limits())
    if command.only_if_smaller and len(data) >= Path(command.input).stat().st_size:
        target, copy = command.results()
        with open(command.input, "rb") as original, atomic(copy) as out:
            shutil.copyfileobj(original, out)
        target.unlink(missing_ok=True)  # of another quality
    else:
        write(command.output, data)
    return note


def num_bytes(size: str | None) -> int | None:
    """100k -> 100,000. Raises ConfigError."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)B?", size)
    if not match:
        raise ConfigError(f"--target-size {size} is no number of bytes: try 100k")
    return int(float(match[1]) * {"": 1, "k": 1000, "M": 1_000_000}[match[2]])


def decompress_file(command: Decompress) -> str | None:
    """What is to be said of it, if anything. Raises DataError for what is damaged; the rest has been written then."""
    from ldm_vae.codec.picture import check_extension, encode_picture, fill, with_alpha
    from ldm_vae.data.large import LARGE
    from ldm_vae.data.png import stream_png

    target = Path(command.output)
    extension = command.extension if is_nameless(command.output) else target.suffix.lower()
    check_extension(extension)
    codec = load_codec(command.model, command.device, command.workers)
    damage: list[str] | None = [] if command.salvage else None
    picture, bands = codec.decompress_bands(
        read(command.input), region=command.region, limits=command.limits(), damage=damage
    )
    height, width, colours = picture.pixels.shape
    notes: list[str] = []
    note = None
    if extension == ".png" and height * width > LARGE and colours in (1, 3):
        shape, parts = (height, width, colours + (picture.alpha is not None)), with_alpha(bands, picture.alpha)
        with nullcontext(sys.stdout.buffer) if command.output == STREAM else atomic(target) as out:
            stream_png(out, parts, shape, metadata=picture.metadata)
    else:
        data = encode_picture(fill(picture, bands), extension, notes)
        note = in_one_line(notes, strict=command.strict)
        write(command.output, data)
    if damage:
        raise DataError(f"{'; '.join(damage)}; the rest was written")
    return note


def compressed_below(folder: Path) -> Listing:
    """The compressed files below a folder, by their extension, but for hidden ones."""
    kinds: dict[str, list[str]] = {}
    for name in files_below(folder, lambda name: not PurePath(name).name.startswith(".")):
        kinds.setdefault(PurePath(name).suffix.lower(), []).append(name)
    names = kinds.pop(EXTENSION, [])
    return Listing(names, Counter({kind or "without extension": len(others) for kind, others in kinds.items()}))


def compress(command: Compress) -> None:
    targets = command.target_bpp, command.target_psnr, command.target_size
    if sum(target is not None for target in targets) + (command.quality != 1.0) > 1:
        raise ConfigError("give one of --quality, --target-bpp, --target-psnr and --target-size")
    num_bytes(command.target_size)  # what is wrong with a flag is said once
    command.options()
    if not Path(command.input).is_dir():
        target = Path(command.output)
        if target.suffix.lower() != EXTENSION and not (is_nameless(command.output) or target.is_dir() or command.force):
            raise ConfigError(f"{target} is not named {EXTENSION}: do so, or add --force to write it all the same")
        if command.only_if_smaller:
            raise ConfigError("--only-if-smaller is for folders")
    transfer(compress_file, command, inputs=images_below, extension=EXTENSION)


def decompress(command: Decompress) -> None:
    from ldm_vae.codec.picture import check_extension

    check_extension(command.extension)
    transfer(decompress_file, command, inputs=compressed_below, extension=command.extension)


def info(command: Info) -> None:
    from ldm_vae.codec.picture import named
    from ldm_vae.codec.sections import unpack_metadata

    data = read(command.file)
    contents = bitstream.unpack(data, limits=Limits(max_pixels=1 << 64, max_side=1 << 32))
    for part in (*contents.sections.values(), *contents.tiles):
        try:
            contents.read(part)
        except CompressedFileError as error:
            bitstream.report(error, part.name, None)
    header, metadata = contents.header, contents.sections.get(bitstream.METADATA)
    facts = {
        "size": f"{header.width} x {header.height} pixels, {header.colours} channels of {header.depth} bits",
        "bits per pixel": f"{8 * len(data) / (header.width * header.height):.4f} ({len(data)} bytes)",
        "quality": f"{header.quality / 256:g}",
        "latents": f"{header.channels} channels, stride {1 << header.log2_stride}",
        "tiles": f"{len(contents.tiles)} of up to {1 << header.log2_tile} latents a side",
        "beside": ", ".join(f"{p.name} ({p.end - p.begin} bytes)" for p in contents.sections.values()) or "nothing",
        "metadata": ", ".join(named(unpack_metadata(contents.read(metadata))) if metadata else []) or "none",
        "model": header.model.hex(),
    }
    for name, fact in facts.items():
        print(f"{name:15} {fact}")
