"""Files and folders that are written whole or not at all, locks, and tables."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from ldm_vae.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


def sha256(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def digest_of_json(value: Mapping[str, Any]) -> str:
    """sha256 of the value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_writable(directory: Path) -> None:
    """Creates the directory and tries to write there, before a long job does. Raises RunError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise RunError(f"cannot write to {directory}: {error.strerror or error}") from None


def lock(directory: Path) -> IO[bytes]:
    """Locks a directory for this process, until the file is closed or the process ends.

    Raises:
        RunError: another process holds the lock.
    """
    file = open(directory / LOCK, "ab")  # noqa: SIM115  # it is kept
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process's: data loaders' workers do not inherit it
    except (BlockingIOError, PermissionError):
        file.close()
        raise RunError(f"another process is at work in {directory}: wait for it, or choose another --output") from None
    except OSError as error:
        warnings.warn(f"{directory} cannot be locked ({error.strerror}): see to it that one run is there", stacklevel=2)
    return file


@contextmanager
def atomic(file: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file for bytes, which replaces `file`, flushed, when the block ends without an error.

    A file that was there leaves its mode, a symbolic link stays and gets another target. What is no regular file, such
    as a pipe or a device, is written straight into.

    Raises:
        RunError: it cannot be written; an older file is unharmed.
    """
    with said_of(file):
        if is_special(file):
            with open(file, "wb") as out:
                yield out
            return
        target = resolved(file)
        beside = beside_of(target, f"{secrets.token_hex(4)}.part")
        try:
            with open(beside, "xb") as out:
                yield out
                flush(out)
            if target.exists():
                os.chmod(beside, stat.S_IMODE(target.stat().st_mode))
            os.replace(beside, target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def resolved(path: Path) -> Path:
    """Where symbolic links lead, which stay as they are. Raises OSError for one that leads to itself."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, "a symbolic link that leads to itself")
    return target


def is_special(file: Path) -> bool:
    """Whether it is there and neither a regular file nor a folder: a pipe, a socket or a device."""
    return file.exists() and not file.is_file() and not file.is_dir()


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A temporary folder, which replaces `target`, flushed, when the block ends without an error.

    For one process at a time.

    Raises:
        RunError: it cannot be written; an older folder is unharmed, or restored by the next call.
    """
    with said_of(target):
        target = resolved(target)
        staging, old = beside_of(target, "new"), beside_of(target, "old")
        if old.exists() and not target.exists():  # killed between the two renames below
            os.rename(old, target)
        for left in (staging, old):
            shutil.rmtree(left, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            for file in staging.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as data:
                        os.fsync(data.fileno())
                else:
                    flush_directory(file)
            flush_directory(staging)
            if target.exists():
                os.rename(target, old)
            try:
                os.rename(staging, target)
            except OSError:
                if old.exists():
                    os.rename(old, target)
                raise
            flush_directory(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def beside_of(target: Path, what: str) -> Path:
    """A hidden name of ours in the same folder, short enough for any file system."""
    short = target.name.encode(errors="surrogateescape")[:200].decode(errors="ignore")
    return target.parent / f".{short}.ldm-vae.{what}"


@contextmanager
def said_of(target: Path) -> Iterator[None]:
    """Errors of the system, or of safetensors, as a RunError that names the target; not that of a closed pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from None


def flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, value: Any) -> None:
    with atomic(file) as out:
        out.write((json.dumps(value, indent=2) + "\n").encode())


def write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys; without any, the head of a list of bad images."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["name", "reason"])
    writer.writeheader()
    writer.writerows(rows)
    with atomic(file) as out:
        out.write(text.getvalue().encode(errors="surrogateescape"))


def write_bad_images(folder: Path, bad_images: Mapping[str, str]) -> Path:
    """`bad_images.csv` in a folder, from name -> reason."""
    file = folder / "bad_images.csv"
    write_csv(file, [{"name": name, "reason": reason} for name, reason in sorted(bad_images.items())])
    return file
