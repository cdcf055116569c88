"""Processes that make batches ahead of the trainer, and hand them over as arrays.

Each is a new interpreter, not a copy of the trainer: it imports what its rows need, of which torch is no part, so that
it is small (017); nothing of the trainer's threads, GPU or locks is in it; and it ends when the trainer does.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

STOP = {signal.SIGINT, signal.SIGTERM}
"""They often go to all processes of a group or a job, and workers are needed until the step is done."""
AHEAD = 4
"""Batches that each worker has been asked for, at most."""


class Worker:
    """A process that makes `make(item)` of one item after another. Nothing of it may need the script's own module."""

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
        self.make: bytes | None = pickle.dumps(make)

    def ask(self, item: Any) -> bytes:
        """`make(item)`, or what it raised, as `serve` sends it. Raises RuntimeError when the process is gone."""
        try:
            if self.make is not None:  # here, as it waits until the worker can read
                self.connection.send_bytes(self.make)
                self.make = None
            self.connection.send(item)
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            code = self.process.wait()
            raise RuntimeError(f"a worker process terminated abruptly, with code {code}") from None


def serve(descriptor: int) -> None:
    """The life of a worker."""
    connection, make = Connection(descriptor), None
    try:
        given = connection.recv_bytes()
        while True:
            item = connection.recv()
            try:
                make = make or pickle.loads(given)
                answer = pickle.dumps((make(item), None), protocol=5)
            except Exception as error:
                error.add_note("In a worker:\n" + traceback.format_exc())
                answer = pickle.dumps((None, error))
            connection.send_bytes(answer)
    except (EOFError, ConnectionError):
        pass  # the trainer is gone


def made_ahead(make: Callable[[Any], Any], order: Iterable[Any], *, num_workers: int) -> Iterator[Any]:
    """`make(item)` for each item of `order`, in its order, by worker processes; by this one if there are none.

    `make` and what it gives go through pickle.
    """
    if num_workers == 0:
        yield from map(make, order)
        return
    workers = [Worker(make) for _ in range(num_workers)]
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)
    ending = partial(end, workers)
    atexit.register(ending)

    def ask(item: Any) -> Any:
        worker = idle.get()
        try:
            answer = worker.ask(item)
        finally:
            idle.put(worker)
        made, error = pickle.loads(answer)  # while the worker is at the next one
        if error is not None:
            raise error
        return made

    threads = ThreadPoolExecutor(num_workers + 1)
    items, pending = iter(order), deque[Future[Any]]()
    try:
        pending.extend(threads.submit(ask, item) for item in islice(items, AHEAD * num_workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(threads.submit(ask, item) for item in islice(items, 1))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        ending()  # and those threads end that wait for an answer
        atexit.unregister(ending)


def end(workers: list[Worker]) -> None:
    while workers:
        process = workers.pop().process
        process.kill()
        process.wait()


def default_workers() -> int:
    """As many as this training process has cores beside its own, between 1 and 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # training processes; torch's launcher says so
    return min(max(cores // on_this_machine - 1, 1), 8)
