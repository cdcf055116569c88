"""How long a call takes, how much memory it needs, and what the machine could do at best."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> str:
    """The processor or card, with the cores in use, in words."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = f"{model}, {cores} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({name})"
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], *, device: torch.device, seconds: float, warmup: int = 2) -> list[float]:
    """The duration of each call, repeated for `seconds` and at least three times, the warm-up left out."""
    for _ in range(warmup):
        call()
    durations: list[float] = []
    synchronise(device)
    end = time.perf_counter() + seconds
    while len(durations) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        synchronise(device)
        durations.append(time.perf_counter() - start)
    return durations


def peak_memory_of(call: Callable[[], object], *, device: torch.device) -> int | None:
    """Bytes that a call takes at its peak beyond what was held before it.

    On a CPU that is resident memory (Linux's VmHWM, reset before the call); None where it cannot be read.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        call()
        return max(resident("VmHWM") - before, 0)
    except OSError:
        return None


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def peak_flops(device: torch.device, dtype: torch.dtype, *, size: int, seconds: float = 2.0) -> float:
    """Floating-point operations a second of a large matrix product: the practical ceiling of this machine."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    durations = seconds_of(lambda: a @ b, device=device, seconds=seconds)
    return 2 * size**3 / statistics.median(durations)
