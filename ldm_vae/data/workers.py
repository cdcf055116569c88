"""Processes that prepare batches ahead of the trainer, and hand them over as arrays.

Each is a new interpreter, not a copy of the trainer. It imports what its rows need, which is not torch, so it is small
(017); it inherits none of the trainer's threads, GPU or locks; and it ends when the trainer does.
"""

from __future__ import annotations

import atexit
import errno
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle, islice
from tempfile import TemporaryFile
from typing import Any, NoReturn

from ldm_vae.errors import LdmVaeError

STOP = {signal.SIGINT, signal.SIGTERM}
"""Signals that often go to all processes of a job; workers ignore them, as the step needs them to its end."""
AHEAD = 4
"""Batches that a worker has been asked for, at most."""
CAN_SEND_FILES = hasattr(socket, "send_fds")
"""Not on Windows."""
LOST = (EOFError, BrokenPipeError, ConnectionResetError)
"""How the end of the other process shows."""


def made_ahead(make: Callable[[Any], Any], order: Iterable[Any], *, num_workers: int) -> Iterator[Any]:
    """`make(item)` for each item of `order`, in its order, by worker processes; by this one if there are none.

    `make`, the items and the results are pickled, so none of them may be defined in the script that runs.

    Raises:
        RuntimeError: a worker was killed.
        LdmVaeError: a worker failed; and whatever `make` raises.
    """
    if num_workers == 0 or not CAN_SEND_FILES:
        yield from map(make, order)
        return
    workers: list[Worker] = []
    turns, waited_for = zip(cycle(workers), order, strict=False), deque[Worker]()
    ending = partial(end, workers)
    atexit.register(ending)
    try:
        pickled = pickle.dumps(make)
        workers.extend(Worker(pickled) for _ in range(num_workers))
        ask(islice(turns, AHEAD * num_workers), waited_for)
        while waited_for:
            yield waited_for.popleft().answer()
            ask(islice(turns, 1), waited_for)
    finally:
        ending()
        atexit.unregister(ending)


class Worker:
    """A process that makes `make(item)` of one item after another; `pickled` is `make`."""

    def __init__(self, pickled: bytes) -> None:
        import fcntl  # not on Windows

        self.socket, theirs = socket.socketpair()
        descriptor = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 3)  # none of the three that are for words
        program = f"import sys; sys.path[:] = {sys.path}; from ldm_vae.data.workers import serve; serve({descriptor})"
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # which the new process inherits, and keeps
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.DEVNULL, pass_fds=[descriptor]
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            os.close(descriptor)
        self.ask(pickled)

    def ask(self, item: Any) -> None:
        try:
            send(self.socket, item)
        except LOST:
            self.gone()

    def answer(self) -> Any:
        """To the first item that it was asked about and has not answered yet."""
        try:
            result, error = received(self.socket)
        except LOST:
            self.gone()
        if error is None:
            return result
        try:
            raise error
        finally:
            del error  # which holds this frame

    def gone(self) -> NoReturn:
        code = self.process.wait()
        if code < 0:
            raise RuntimeError(f"a worker process terminated abruptly, by signal {-code}") from None
        raise LdmVaeError(f"a worker process failed, with code {code}: it says above why") from None


def ask(turns: Iterable[tuple[Worker, Any]], waited_for: deque[Worker]) -> None:
    for worker, item in turns:
        worker.ask(item)
        waited_for.append(worker)


def end(workers: list[Worker]) -> None:
    while workers:
        worker = workers.pop()
        worker.process.kill()
        worker.process.wait()
        worker.socket.close()


def serve(descriptor: int) -> None:
    """The life of a worker."""
    trainer, make = socket.socket(fileno=descriptor), None
    try:
        pickled = received(trainer)
        while True:
            item = received(trainer)
            result, raised = None, None
            try:
                if make is None:
                    make, pickled = pickle.loads(pickled), None
                result = make(item)
            except Exception as error:
                raised = error
                raised.add_note("In a worker:\n" + traceback.format_exc())
            send(trainer, (result, None if raised is None else sendable(raised)))
    except LOST:
        pass  # the trainer is gone


def sendable(error: Exception) -> Exception:
    """The same, or what it says and its notes where it does not go through pickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        for note in error.__notes__:
            plain.add_note(note)
        return plain
    return error


NOTICE = struct.Struct("<QQ")
"""All that goes through the socket beside the memory's descriptor: where its table of contents begins and ends."""
ALIGNMENT = 64
"""Of arrays in memory, in bytes, as torch has it."""
SMALL = 1 << 20
"""Bytes: up to so many are copied, as memory that is shared keeps a descriptor for as long as it lasts."""


def send(to: socket.socket, value: Any) -> None:
    """Through memory that both see, so that nobody waits for the other to read."""
    arrays: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    places, at = [], 0
    with open(os.memfd_create("batch"), "w+b") if hasattr(os, "memfd_create") else TemporaryFile() as shared:
        for part in (memoryview(rest), *(a.raw() for a in arrays)):
            shared.seek(at)
            shared.write(part)
            places.append((at, at + len(part)))
            at = -(-(at + len(part)) // ALIGNMENT) * ALIGNMENT
        shared.seek(at)
        table = pickle.dumps(places)
        shared.write(table)
        shared.flush()
        socket.send_fds(to, [NOTICE.pack(at, at + len(table))], [shared.fileno()])


def received(sender: socket.socket) -> Any:
    """Its arrays are in that memory, which lasts as long as they, or in a copy. Raises EOFError at the end."""
    notice, descriptors, _, _ = socket.recv_fds(sender, NOTICE.size, 1)
    if not notice:
        raise EOFError
    if not descriptors:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    begin, end = NOTICE.unpack(notice)
    with open(descriptors[0], "r+b") as shared:
        if end > SMALL:
            whole = memoryview(mmap.mmap(shared.fileno(), end))
        else:
            whole = memoryview(bytearray(end))
            shared.seek(0)  # from where its sender was
            shared.readinto(whole)
    rest, *arrays = (whole[a:b] for a, b in pickle.loads(whole[begin:end]))
    return pickle.loads(rest, buffers=arrays)


def default_workers() -> int:
    """As many as this training process has cores beside its own, between 1 and 8; none on Windows."""
    if not CAN_SEND_FILES:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # training processes; torch's launcher says so
    return min(max(cores // on_this_machine - 1, 1), 8)
