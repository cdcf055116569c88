"""A folder of files to a folder of results: the results' names, one job a file, and what went wrong with each.

No torch here: the codec's commands start fast.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any

from ldm_vae.errors import BadImageError, LdmVaeError
from ldm_vae.progress import progress

Errors = tuple[type[Exception], ...]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""For processes that share the cores; what is already loaded here does not look again."""


def numbered(names: Iterable[str]) -> list[str]:
    """The same names; of those that come again, which archives and shards can have, a.jpg becomes a (2).jpg."""
    distinct: dict[str, None] = {}
    for name in names:
        path, number = PurePosixPath(name), 1
        while name in distinct:
            number += 1
            name = str(path.with_name(f"{path.stem} ({number}){path.suffix}"))
        distinct[name] = None
    return list(distinct)


def result_names(names: Sequence[str], extension: str) -> list[str]:
    """Of files whose names are distinct: a.jpg -> a.png. The results' names are distinct, too.

    a.jpg and a.tif beside each other keep their extensions: a.jpg.png, a.tif.png.
    """
    short = [str(PurePosixPath(name).with_suffix(extension)) for name in names]
    taken = Counter(short) + Counter(name + extension for name in names)
    return [s if taken[s] == 1 else name + extension for name, s in zip(names, short, strict=True)]


def stays_inside(name: str) -> bool:
    """Whether a name, which may come from an archive, leads to no other folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def run_jobs(
    act: Callable[[Any], str | None],
    jobs: Mapping[str, Any],
    *,
    workers: int = 1,
    errors: Errors = (Exception,),
    show: bool = True,
) -> dict[str, str]:
    """act(job) for each of the named jobs; what went wrong: name -> reason.

    That, and what a job has to say, is printed in a line each as it happens.

    Args:
        act: does one file, and returns what is to be said of it, or None.
        workers: processes, each with one thread; with 1, this process does all.
        errors: what concerns one file alone, so that the others are done; any other error ends everything.
        show: whether a bar shows the progress.
    """
    failures: dict[str, str] = {}
    with progress(total=len(jobs), unit="file", show=show) as bar:
        for name, note, failure in outcomes(act, jobs, workers, errors):
            bar.update()
            if failure is not None:
                failures[name] = failure
            for line in (note, failure):
                if line is not None:
                    bar.write(f"{name}: {line}", file=sys.stderr)
    return failures


def in_one_line(notes: Sequence[str], *, strict: bool) -> str | None:
    """What is to be said of a file; None for nothing. Raises BadImageError for any note if `strict`."""
    line = "; ".join(notes) or None
    if line and strict:
        raise BadImageError(f"{line} (--strict)")
    return line


def outcomes(
    act: Callable[[Any], str | None], jobs: Mapping[str, Any], workers: int, errors: Errors
) -> Iterator[tuple[str, str | None, str | None]]:
    """Each job's name, its note and its error, or None for either, in the order in which they are done."""
    if workers <= 1:
        for name, job in jobs.items():
            yield name, *outcome(partial(act, job), errors)
        return
    os.environ |= ONE_THREAD
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        names = {pool.submit(act, job): name for name, job in jobs.items()}
        for future in as_completed(names):
            yield names[future], *outcome(future.result, errors)
    finally:
        pool.shutdown(cancel_futures=True)  # what has not begun when somebody stops it does not begin


def outcome(call: Callable[[], str | None], errors: Errors) -> tuple[str | None, str | None]:
    """What `call` returns, and the text of its error in one line."""
    try:
        return call(), None
    except errors as error:
        text = " ".join(((isinstance(error, OSError) and error.strerror) or str(error)).split())
        plain = isinstance(error, (LdmVaeError, ValueError, OSError))
        return None, text if plain else f"{type(error).__name__}: {text}"


def totals(num_jobs: int, failures: Mapping[str, str], output: Path | str, *, skipped: int) -> str:
    """The last line of a command."""
    there = f", {skipped} were there" if skipped else ""
    return f"{num_jobs - len(failures)} of {num_jobs} files done{there}; they are in {output}"
