"""Processes that make batches ahead of the trainer, and hand them over as arrays.

Each is a new interpreter, not a copy of the trainer: it imports what its rows need, of which torch is no part, so that
it is small (017); nothing of the trainer's threads, GPU or locks is in it; and it ends when the trainer does.
"""

from __future__ import annotations

import atexit
import mmap
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle, islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from tempfile import TemporaryFile
from typing import Any, NoReturn

STOP = {signal.SIGINT, signal.SIGTERM}
"""They often go to all processes of a group or a job, and workers are needed until the step is done."""
AHEAD = 4
"""Batches that each worker has been asked for, at most."""
ALIGNMENT = 64
"""Of arrays in memory, in bytes, as torch has it."""


def made_ahead(make: Callable[[Any], Any], order: Iterable[Any], *, num_workers: int) -> Iterator[Any]:
    """`make(item)` for each item of `order`, in its order, by worker processes; by this one if there are none.

    `make`, the items and what is made of them go through pickle, and nothing of them may be of the script's own module.

    Raises:
        RuntimeError: a worker is gone; and whatever `make` raises.
    """
    if num_workers == 0:
        yield from map(make, order)
        return
    workers = [Worker(make) for _ in range(num_workers)]
    turns, waited_for = zip(cycle(workers), order, strict=False), deque[Worker]()
    ending = partial(end, workers)
    atexit.register(ending)
    try:
        ask(islice(turns, AHEAD * num_workers), waited_for)
        while waited_for:
            yield waited_for.popleft().answer()
            ask(islice(turns, 1), waited_for)
    finally:
        ending()
        atexit.unregister(ending)


class Worker:
    """A process that makes `make(item)` of one item after another."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.connection, theirs = Pipe()
        path = [os.path.abspath(p) for p in sys.path]
        program = f"import sys; sys.path[:] = {path}; from ldm_vae.data.workers import serve; serve({theirs.fileno()})"
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # which the new process inherits, and keeps
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        send(self.connection, pickle.dumps(make))

    def ask(self, item: Any) -> None:
        try:
            send(self.connection, item)
        except OSError:
            self.gone()

    def answer(self) -> Any:
        """To the first item that it was asked about and has not answered yet."""
        try:
            made, error = received(self.connection)
        except (EOFError, OSError):
            self.gone()
        if error is not None:
            raise error
        return made

    def gone(self) -> NoReturn:
        raise RuntimeError(f"a worker process terminated abruptly, with code {self.process.wait()}") from None


def ask(turns: Iterable[tuple[Worker, Any]], waited_for: deque[Worker]) -> None:
    for worker, item in turns:
        worker.ask(item)
        waited_for.append(worker)


def end(workers: list[Worker]) -> None:
    while workers:
        process = workers.pop().process
        process.kill()
        process.wait()


def serve(descriptor: int) -> None:
    """The life of a worker."""
    connection, make = Connection(descriptor), None
    try:
        given = received(connection)
        while True:
            item = received(connection)
            try:
                make = make or pickle.loads(given)
                made, raised = make(item), None
            except Exception as error:
                error.add_note("In a worker:\n" + traceback.format_exc())
                made, raised = None, error
            send(connection, (made, raised))
    except (EOFError, ConnectionError):
        pass  # the trainer is gone


# Memory that both processes see ---------------------------------------------------------------------------------------


def send(connection: Connection, value: Any) -> None:
    """Through memory that both see, so that nobody waits for the other to read."""
    arrays: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    places, end = [], 0
    with open(os.memfd_create("batch"), "w+b") if hasattr(os, "memfd_create") else TemporaryFile() as shared:
        for part in (memoryview(rest), *(a.raw() for a in arrays)):
            shared.seek(end)
            shared.write(part)
            places.append((end, end + len(part)))
            end = -(-(end + len(part)) // ALIGNMENT) * ALIGNMENT
        shared.truncate(end)
        connection.send(places)
        send_handle(connection, shared.fileno(), None)


def received(connection: Connection) -> Any:
    """Its arrays are in that memory, which lasts as long as they."""
    places = connection.recv()
    handle = recv_handle(connection)
    whole = memoryview(mmap.mmap(handle, 0))
    os.close(handle)
    rest, *arrays = (whole[begin:end] for begin, end in places)
    return pickle.loads(rest, buffers=arrays)


def default_workers() -> int:
    """As many as this training process has cores beside its own, between 1 and 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # training processes; torch's launcher says so
    return min(max(cores // on_this_machine - 1, 1), 8)
