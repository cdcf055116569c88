"""The processes of a job: how long they wait for each other, what they agree on, and how they are stopped."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

PATIENCE = InitProcessGroupKwargs(timeout=timedelta(days=7))
"""For jobs that divide their work once: a process that is done waits for the slowest, longer than ten minutes."""


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether `flag` is set in any process; the same answer in all."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum"))


class StopSignal:
    """Remembers a SIGTERM or SIGINT, so that the step can be finished; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.previous: dict[int, Any] = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __enter__(self) -> StopSignal:
        follow_launcher()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def follow_launcher() -> None:
    """Asks Linux for a SIGTERM when `accelerate launch` dies, which does not pass signals on to a single process."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
