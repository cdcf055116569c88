"""From a file, a folder of files or standard input to the same kind: what `compress` and `decompress` share.

No torch here: it is imported with the codec, once the command line is known to be right.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from ldm_vae.codec.bitstream import DEFAULT_MODEL, EXTENSION, MODEL_VARIABLE, Limits
from ldm_vae.commands.folders import result_names, run_jobs, totals
from ldm_vae.data.image_files import Listing
from ldm_vae.errors import ConfigError, DataError
from ldm_vae.files import atomic, check_writable, is_special
from ldm_vae.runs.config import Range, check_ranges

STREAM = "-"


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """From a file, a folder or standard input (-) to the same kind."""

    input: Positional[str]
    output: Positional[str] = ""
    """Beside the input, with another ending, unless given."""
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

    def results(self) -> list[Path]:
        """What one file may become."""
        return [Path(self.output)]

    def limits(self) -> Limits:
        return Limits(max_pixels=self.max_pixels, max_side=self.max_side)


Act = Callable[[Any], str | None]
"""Does one file of a command, and returns what is to be said of it."""


@cache
def load_codec(model: str, device: str, workers: int) -> Any:
    from ldm_vae.codec.codec import LatentCodec

    if device != "cpu":
        from ldm_vae.models.reconstruction import exact_float32

        exact_float32()
    return LatentCodec.from_pretrained(model, device=device, workers=workers)


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
    there = command.output != STREAM and os.path.exists(command.output)
    if there and os.path.samestat(before, os.stat(command.output)):
        raise ConfigError(f"{command.output} is the input itself: name another output")
    note = act(command)
    for result in command.results() if command.keep_times else ():
        if result.exists():
            os.utime(result, ns=(before.st_atime_ns, before.st_mtime_ns))
    return note


def transfer_folder(act: Act, command: Transfer, *, inputs: Callable[[Path], Listing], extension: str) -> None:
    """Every file below the input folder, to a file of the same name below the output.

    Raises:
        DataError: no files; and at the end, when some could not be done.
        ConfigError: an output within the input.
    """
    source, target = Path(command.input), Path(command.output)
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"the output {target} is inside the input {source}: choose another one")
    listing = inputs(source)
    names = sorted(name for name in listing.names if (source / name).is_file())
    if not names:
        raise DataError(f"{source} has no such files{f' ({listing})' if listing.not_read else ''}")
    if listing.not_read:
        print(f"{source}: {listing}", file=sys.stderr)
    load_codec(command.model, command.device, 1)  # what is wrong with it is said once
    jobs = {}
    for name, result in zip(names, result_names(names, extension), strict=True):
        job = replace(command, input=str(source / name), output=str(target / result), workers=1)
        if command.overwrite or not any(file.exists() for file in job.results()):
            check_writable((target / result).parent)
            jobs[name] = job
    failures = run_jobs(partial(transfer_file, act), jobs, workers=min(command.workers, len(jobs)))
    said = totals(len(jobs), failures, target, skipped=len(names) - len(jobs))
    done = [job for name, job in jobs.items() if name not in failures]
    print(said + (sizes(done) if extension == EXTENSION and done else ""), file=sys.stderr)
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
    if target.exists() and not command.overwrite and not is_special(target):
        raise ConfigError(f"{target} is there already: add --overwrite to replace it")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent}")


def transfer(act: Act, command: Transfer, *, inputs: Callable[[Path], Listing], extension: str) -> None:
    """A folder by `transfer_folder`; a file, or standard input, by `transfer_file`."""
    check_ranges(command)
    command = replace(command, workers=command.workers or os.cpu_count() or 1)
    if not command.output:
        if command.input == STREAM or Path(command.input).is_dir():
            raise ConfigError("name the output, too: only a single file's is beside it unless given")
        command = replace(command, output=str(Path(command.input).with_suffix(extension)))
    if command.input != STREAM and Path(command.input).is_dir():
        if command.output == STREAM:
            raise ConfigError("a folder cannot go to standard output")
        transfer_folder(act, command, inputs=inputs, extension=extension)
        return
    check_output(command)
    if note := transfer_file(act, command):
        print(f"{'standard input' if command.input == STREAM else command.input}: {note}", file=sys.stderr)
