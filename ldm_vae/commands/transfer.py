"""From files, a folder of files or standard input to the same kind: what `compress`, `decompress`, `reconstruct` and
`denoise` share.

No torch here: it is imported with the model, once the command line is known to be right.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Self

from tyro.conf import Positional, arg

from ldm_vae.codec.bitstream import DEFAULT_MODEL, EXTENSION, MODEL_VARIABLE, TUNINGS, Limits
from ldm_vae.commands.folders import result_names, run_jobs, totals
from ldm_vae.data.image_files import Listing
from ldm_vae.errors import CompressedFileError, ConfigError, DataError
from ldm_vae.files import atomic, check_writable, is_special
from ldm_vae.runs.config import Range, check_ranges

STREAM = "-"


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """From files, a folder or standard input (-) to the same kind.

    The engine does one file at a time: of a command with one path, which is its input, and an output.
    """

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH ...")]
    """FILE, FILE OUTPUT, FILE FILE ... FOLDER, or FOLDER OUTPUT; - is standard input or output."""
    output: Annotated[str, arg(aliases=["-o"])] = ""
    """Instead of the last path: a file, or the folder for several. Without any output, it is beside the one input."""
    model: str = os.environ.get(MODEL_VARIABLE, DEFAULT_MODEL)
    """Run directory, model folder or hub id with fitted tables, or box:codec, which comes with the package;
    $LDM_VAE_MODEL unless given."""
    device: str = "cpu"
    workers: Annotated[int, Range(at_least=0)] = 0
    """Processes for a folder's files, or for the tiles of one large image; 0: one a core."""
    overwrite: bool = False
    """Replace files that are there; without it, a folder's are skipped, and a single one is an error."""
    keep_times: bool = False
    """Give the output the time at which the input was last changed."""
    strict: bool = False
    """Write nothing for a file of which something would be lost, instead of a line that says what."""
    max_pixels: Annotated[int, Range(at_least=1)] = Limits().max_pixels
    max_side: Annotated[int, Range(at_least=1)] = Limits().max_side

    @property
    def input(self) -> str:
        return self.paths[0]

    def results(self) -> list[Path]:
        """What one file may become."""
        return [Path(self.output)]

    def names_of_results(self, names: Sequence[str], extension: str) -> list[str]:
        """Of a folder's files, in their order."""
        return result_names(names, extension)

    def check_name(self) -> None:
        """Raises ConfigError for an output's name that says another kind than the command writes."""

    def loaded(self, workers: int) -> Any:
        """The codec of the model, or whatever a command needs of it; loaded once."""
        return load_codec(self.model, self.device, workers)

    def for_model(self, model: Any) -> Self:
        """With what depends on the model settled; what is to be said of it is said."""
        return self

    @property
    def scratch(self) -> Path:
        """Where large images are kept: where the output goes."""
        return Path(tempfile.gettempdir()) if is_nameless(self.output) else Path(self.output).parent

    def limits(self) -> Limits:
        return Limits(max_pixels=self.max_pixels, max_side=self.max_side)


Act = Callable[[Any], str | None]
"""Does one file of a command, and returns what is to be said of it."""


@cache
def load_codec(model: str, device: str, workers: int, tune: str = TUNINGS[0]) -> Any:
    from ldm_vae.codec.codec import LatentCodec

    if device != "cpu":
        from ldm_vae.models.reconstruction import exact_float32

        exact_float32()
    return LatentCodec.from_pretrained(model, tune=tune, device=device, workers=workers)


def is_nameless(output: str) -> bool:
    """Whether an output's name says nothing of its kind: standard output, a pipe, a device."""
    return output == STREAM or is_special(Path(output))


def read(name: str) -> bytes:
    return sys.stdin.buffer.read() if name == STREAM else Path(name).read_bytes()


def write(name: str, data: bytes) -> None:
    if name == STREAM:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    with atomic(Path(name)) as out:
        out.write(data)


def transfer_file(act: Act, command: Transfer) -> str | None:
    """act(command), unless it would write over its input; then the times, if they are to be kept.

    Raises:
        ConfigError: the output is the input, under whatever name.
    """
    before = os.fstat(0) if command.input == STREAM else os.stat(command.input)
    if command.output != STREAM and is_input(command.output, 0 if command.input == STREAM else command.input):
        raise ConfigError(f"{command.output} is the input itself: name another output")
    note = act(command)
    for result in command.results() if command.keep_times else ():
        if result.exists():
            os.utime(result, ns=(before.st_atime_ns, before.st_mtime_ns))
    return note


def is_input(output: str, source: str | int) -> bool:
    """Whether an output that is there is a command's input (a path, or 0), under whatever name."""
    return os.path.exists(output) and os.path.exists(source) and os.path.samefile(output, source)


def named_files(files: Sequence[str]) -> dict[str, Path]:
    """Files by their names, without folders. Raises ConfigError for what cannot go into one folder."""
    for file in files:
        if file == STREAM or Path(file).is_dir():
            what = "standard input" if file == STREAM else f"the folder {file}"
            raise ConfigError(f"{what} is among several inputs: give it by itself")
    name, count = Counter(Path(file).name for file in files).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{count} inputs are called {name}: in one folder only one of them would be left")
    return {Path(file).name: Path(file) for file in files}


def files_of_folder(source: Path, target: Path, inputs: Callable[[Path], Listing]) -> dict[str, Path]:
    """Every file below the input folder, by its name there.

    Raises:
        DataError: no files.
        ConfigError: an output within the input.
    """
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"the output {target} is inside the input {source}: choose another one")
    listing = inputs(source)
    names = sorted(name for name in listing.names if (source / name).is_file())
    if not names:
        raise DataError(f"{source} holds no images{f' ({listing})' if listing.not_read else ''}")
    if listing.not_read:
        print(f"{source}: {listing}", file=sys.stderr)
    return {name: source / name for name in names}


def transfer_files(
    act: Act, command: Transfer, files: Mapping[str, Path], results: Sequence[str], *, show_sizes: bool
) -> None:
    """Each of the named files, to a result of that name below the output folder.

    Raises:
        DataError: at the end, when some could not be done.
    """
    command = command.for_model(command.loaded(1))  # what is wrong with it is said once
    jobs, target = {}, Path(command.output)
    for name, result in zip(files, results, strict=True):
        job = replace(command, paths=(str(files[name]),), output=str(target / result), workers=1)
        if command.overwrite or is_input(job.output, job.input) or not any(file.exists() for file in job.results()):
            check_writable((target / result).parent)
            jobs[name] = job
    failures = run_jobs(partial(transfer_file, act), jobs, workers=min(command.workers, len(jobs)))
    said = totals(len(jobs), failures, target, skipped=len(files) - len(jobs))
    done = [job for name, job in jobs.items() if name not in failures]
    print(said + (sizes(done) if show_sizes and done else ""), file=sys.stderr)
    if failures:
        raise DataError(f"{len(failures)} of {len(jobs)} files could not be done, or not whole: see above")


def sizes(done: Sequence[Transfer]) -> str:
    """Of files that were compressed: bytes before and after, and how many did not become smaller."""
    pairs = [(os.path.getsize(job.input), next(p for p in job.results() if p.exists())) for job in done]
    before, after = sum(size for size, _ in pairs), sum(os.path.getsize(result) for _, result in pairs)
    grew = sum(os.path.getsize(result) > size for size, result in pairs)
    copied = sum(result.suffix.lower() != EXTENSION for _, result in pairs)
    counts = [f"{grew} grew"] * (grew > 0) + [f"{copied} copied as they were"] * (copied > 0)
    return "; " + ", ".join([f"{before} -> {after} bytes ({after / before - 1:+.1%})", *counts])


def check_output(command: Transfer) -> None:
    """Raises ConfigError for a single file's output that cannot be, or is there already."""
    if command.output == STREAM:
        if sys.stdout.isatty():
            raise ConfigError("standard output is a terminal: name a file, or send it to one: > FILE")
        if command.keep_times:
            raise ConfigError("standard output has no times to keep: name a file")
        return
    target = Path(command.output)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder: name the file")
    command.check_name()
    if target.exists() and not command.overwrite and not is_special(target):
        raise ConfigError(f"{target} is there already: add --overwrite to replace it")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent}")


def is_folder(output: str) -> bool:
    """Whether an output is a folder, or is named like one."""
    return output != STREAM and (output.endswith(("/", os.sep)) or Path(output).is_dir())


def inputs_and_output(command: Transfer) -> tuple[tuple[str, ...], str]:
    """The inputs, and the output or "". Raises ConfigError where the paths leave it open which is which."""
    paths, output = command.paths, command.output
    if not output and len(paths) > 1:
        paths, output = paths[:-1], paths[-1]
    if not paths:
        raise ConfigError("name a file or a folder")
    if len(paths) > 1 and not is_folder(output):
        raise ConfigError(
            f"{output} is not a folder, and there are {len(paths)} inputs: name a folder last, or with -o; one that is "
            "not there yet is made if its name ends with /"
        )
    if not output and (paths[0] == STREAM or Path(paths[0]).is_dir()):
        raise ConfigError("name the output, too: only a single file's is beside it unless given")
    return paths, output


def transfer(
    act: Act, command: Transfer, *, inputs: Callable[[Path], Listing], extension: str, beside: str | None = None
) -> None:
    """A folder or several files by `transfer_files`; a file, or standard input, by `transfer_file`.

    Args:
        inputs: the files below a folder that the command takes.
        extension: of results in a folder.
        beside: of the result beside its input; as in a folder unless given.
    """
    check_ranges(command)
    paths, output = inputs_and_output(command)
    command = replace(command, paths=paths, output=output, workers=command.workers or os.cpu_count() or 1)
    if len(paths) > 1:
        files = named_files(paths)
        transfer_files(act, command, files, result_names(list(files), extension), show_sizes=extension == EXTENSION)
        return
    source = Path(command.input)
    if command.input != STREAM and source.is_dir():
        if output == STREAM:
            raise ConfigError("a folder cannot go to standard output")
        files = files_of_folder(source, Path(output), inputs)
        results = command.names_of_results(list(files), extension)
        transfer_files(act, command, files, results, show_sizes=extension == EXTENSION)
        return
    if not output:
        command = replace(command, output=str(source.with_suffix(beside or extension)))
    elif is_folder(output) and command.input != STREAM:
        check_writable(Path(output))
        command = replace(command, output=str(Path(output) / source.with_suffix(extension).name))
    check_output(command)
    command = command.for_model(command.loaded(command.workers))
    name = "standard input" if command.input == STREAM else command.input
    try:
        note = transfer_file(act, command)
    except (DataError, CompressedFileError) as error:
        raise type(error)(f"{name}: {error}") from None
    if note:
        print(f"{name}: {note}", file=sys.stderr)
