"""Every error that a user can meet. All are LdmVaeError; each says what was given, what is wrong and what to do."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn


class LdmVaeError(Exception):
    """Something that the user can put right."""


class ConfigError(LdmVaeError):
    """A flag, or a combination of flags, that cannot work."""


class DataError(LdmVaeError):
    """A data set that cannot be opened, or holds nothing usable; `bad_images` says why: name -> reason."""

    def __init__(self, message: str, bad_images: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.bad_images = dict(bad_images or {})


def nothing_usable(bad_images: Mapping[str, str]) -> DataError:
    """The error for images of which none can be used."""
    name, reason = next(iter(bad_images.items()))
    return DataError(
        f"no usable image: all {len(bad_images)} that were tried are bad, such as {name}: {reason}", bad_images
    )


class BadImageError(DataError):
    """One image that cannot be used; the message is the reason, for `bad_images.csv`."""


class ModelError(LdmVaeError):
    """A model that is not there, or is not what was asked for."""


class RunError(LdmVaeError):
    """A run directory that cannot be written or resumed."""


class CompressedFileError(LdmVaeError):
    """A compressed image that cannot be decompressed."""


class NotThisFormatError(CompressedFileError):
    """It does not begin as a compressed image of ours does."""


class UnsupportedVersionError(CompressedFileError):
    """Written by a later version of the format."""


class ModelMismatchError(CompressedFileError):
    """Written with another model, or with other tables."""


class LimitExceededError(CompressedFileError):
    """Larger than the limits that the caller set."""


class TruncatedError(CompressedFileError):
    """It ends before all that its header announces."""


class CorruptError(CompressedFileError):
    """Its bytes contradict each other; the message says where."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends a script with one line on standard error, and exit code 2 when the user can put the error right.

    Where another process of the launch is gone, the code is 1; where nobody reads the output any longer, there is no
    line, and the code is 141, as for programs that the system ends (128 + SIGPIPE).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files can be no text
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what is left is not printed at the exit
        raise SystemExit(141) from None
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if isinstance(error.filename, str) else str(error))
    except (LdmVaeError, ValueError) as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
            fail(
                "another process of this launch is gone or out of reach: look for its own message. The same command "
                f"goes on from the last checkpoint. ({str(error).splitlines()[0]})",
                code=1,
            )
        if isinstance(error, RuntimeError) and LOST_WORKER.search(str(error)):
            fail(
                "the system ended a worker process, mostly for want of memory: fewer workers or smaller images need "
                f"less, and the same command goes on. ({str(error).splitlines()[0]})"
            )
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
        fail(f"not enough memory: {str(error).splitlines()[0] if str(error) else 'try tiles, or a smaller image'}")


NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")
"""What torch says on GPUs and CPUs."""
LOST_PEER = re.compile("gloo/transport|NCCL error|ncclRemoteError|Watchdog caught collective operation timeout")
"""What gloo and NCCL say."""
LOST_WORKER = re.compile("terminated abruptly")
"""What Python's pools say, and our workers."""


def fail(message: str, *, code: int = 2) -> NoReturn:
    print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(code) from None
