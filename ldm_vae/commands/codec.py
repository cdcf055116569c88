"""`ldm-vae compress | decompress`: files, a folder of files, or standard input."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

from ldm_vae.codec.bitstream import EXTENSION
from ldm_vae.codec.quality import USUAL_QUALITY
from ldm_vae.commands.folders import in_one_line, numbered, result_names
from ldm_vae.commands.transfer import STREAM, Transfer, is_nameless, load_codec, read, transfer, write
from ldm_vae.data.image_files import Listing, files_below, images_below, is_hidden
from ldm_vae.data.reader import ReadOptions
from ldm_vae.errors import ConfigError, DataError
from ldm_vae.files import atomic
from ldm_vae.runs.config import Range


@dataclass(frozen=True, kw_only=True)
class Compress(Transfer):
    """Compress images to .ldi files."""

    quality: Annotated[float | None, Range(at_least=1, at_most=100)] = None
    """1 to 100, more is better; 75 unless given, which looks like AVIF's and WebP's 75."""
    step: Annotated[float | None, Range(above=0)] = None
    """Step of the quantiser, instead of --quality: 0.25 is fine, 4 is coarse."""
    tune: Literal["visual", "psnr"] = "visual"
    """For the eye, or for the least squared error, where the model has a second network for it, as box:codec has."""
    effort: Annotated[int, Range(at_least=0, at_most=3)] = 0
    """0 to 3: takes seconds or tens of them, for fewer bytes of the same look."""
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

    def targets(self) -> tuple[float | None, float | None, int | None]:
        """Bits per pixel, dB, bytes."""
        return self.target_bpp, self.target_psnr, num_bytes(self.target_size)

    def check_name(self) -> None:
        target = Path(self.output)
        if target.suffix.lower() != EXTENSION and not (is_nameless(self.output) or self.force):
            raise ConfigError(
                f"{target} is not named {EXTENSION}: do so, or add --force to write it all the same; several images go "
                "into a folder, named last or with -o"
            )

    def loaded(self, workers: int) -> Any:
        return load_codec(self.model, self.device, workers, self.tune)

    def for_model(self, model: Any) -> Self:
        if self.step is not None or any(target is not None for target in self.targets()):
            return self
        notes: list[str] = []
        step = model.tables.step_at(USUAL_QUALITY if self.quality is None else self.quality, notes)
        for note in notes:
            print(note, file=sys.stderr)
        return replace(self, quality=None, step=step)


@dataclass(frozen=True, kw_only=True)
class Decompress(Transfer):
    """Make images of .ldi files again."""

    region: tuple[int, int, int, int] | None = None
    """Left, top, width and height in pixels: only this part."""
    salvage: bool = False
    """Decode what is whole of a damaged file, and mark the rest."""
    extension: str = ".png"
    """Of images beside their files or in a folder, and of what has no name: standard output, a pipe, a device."""

    def names_of_results(self, names: Sequence[str], extension: str) -> list[str]:
        """Those that `compress` has copied keep theirs."""
        copies = [name for name in names if not is_compressed(name)]
        images = result_names([name for name in names if is_compressed(name)], extension)
        results = iter(numbered([*copies, *images]))
        found = {name: next(results) for name in [*copies, *filter(is_compressed, names)]}
        return [found[name] for name in names]

    def check_name(self) -> None:
        from ldm_vae.codec.picture import check_extension

        extension = Path(self.output).suffix.lower()
        if extension == EXTENSION:
            raise ConfigError(
                f"{self.output} is named like a compressed file: name an image file, such as .png; several files go "
                "into a folder, named last or with -o"
            )
        if not is_nameless(self.output):
            check_extension(extension)


def compress_file(command: Compress) -> str | None:
    """What is to be said of it, if anything."""
    from ldm_vae.codec.picture import read_picture
    from ldm_vae.codec.search import compress_to
    from ldm_vae.codec.transparency import smooth_transparent

    codec = command.loaded(command.workers)
    scratch = command.scratch if codec.network.finite else None  # then large images need not lie in memory
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
    if command.step is not None:
        data = codec.compress(
            picture, step=command.step, effort=command.effort, strip=command.strip, limits=command.limits()
        )
    else:
        bpp, psnr, size = command.targets()
        data = compress_to(
            codec, picture, target_bpp=bpp, target_psnr=psnr, target_size=size, strip=command.strip, scratch=scratch
        )
    if command.only_if_smaller and len(data) >= Path(command.input).stat().st_size:
        target, copy = command.results()
        copy_file(command.input, copy)
        target.unlink(missing_ok=True)  # of another quality
    else:
        write(command.output, data)
    return note


def copy_file(source: str, target: Path) -> None:
    with open(source, "rb") as original, atomic(target) as out:
        shutil.copyfileobj(original, out)


def num_bytes(size: str | None) -> int | None:
    """100k -> 100,000. Raises ConfigError."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKM]?)B?", size)
    if not match:
        raise ConfigError(f"--target-size {size} is no number of bytes: try 100k")
    return int(float(match[1]) * {"": 1, "k": 1000, "K": 1000, "M": 1_000_000}[match[2]])


def decompress_file(command: Decompress) -> str | None:
    """What is to be said of it, if anything. Raises DataError for what is damaged; the rest has been written then."""
    from ldm_vae.codec.picture import encode_picture, fill, with_alpha
    from ldm_vae.data.large import LARGE
    from ldm_vae.data.png import stream_png

    target = Path(command.output)
    extension = command.extension if is_nameless(command.output) else target.suffix.lower()
    codec = command.loaded(command.workers)
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


def restore_file(command: Decompress) -> str | None:
    """Of a folder: `decompress_file`, and what `compress` has copied is copied. Raises DataError as that."""
    if is_compressed(command.input):
        return decompress_file(command)
    if command.region is not None:
        raise DataError("it is no compressed file, of which --region takes a part")
    copy_file(command.input, Path(command.output))
    return None


def is_compressed(name: str) -> bool:
    """By its extension."""
    return PurePath(name).suffix.lower() == EXTENSION


def compressed_below(folder: Path) -> Listing:
    """The compressed files below a folder, by their extension, and its images, which are copies."""
    compressed = files_below(folder, lambda name: is_compressed(name) and not is_hidden(name))
    images = images_below(folder)
    del images.not_read[EXTENSION]
    return Listing([*compressed, *images.names], images.not_read)


def compress(command: Compress) -> None:
    given = command.quality, command.step, *command.targets()
    if sum(number is not None for number in given) > 1:
        raise ConfigError("give one of --quality, --step, --target-bpp, --target-psnr and --target-size")
    if command.effort and any(target is not None for target in command.targets()):
        raise ConfigError("--effort is for --quality and --step: a target is found by many files")
    command.options()  # what is wrong with a flag is said once
    if command.only_if_smaller and not any(Path(path).is_dir() for path in command.paths[:1]):
        raise ConfigError("--only-if-smaller is for folders")
    transfer(compress_file, command, inputs=images_below, extension=EXTENSION)


def decompress(command: Decompress) -> None:
    from ldm_vae.codec.picture import check_extension

    check_extension(command.extension)
    of_folder = any(Path(path).is_dir() for path in command.paths[:1])
    act = restore_file if of_folder else decompress_file
    transfer(act, command, inputs=compressed_below, extension=command.extension)
