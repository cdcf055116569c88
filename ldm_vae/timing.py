"""How long a call takes, how much memory it needs, and the highest speed that the machine reaches."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ldm_vae.errors import RunError

ROOT = Path(__file__).parent.parent
"""The repository, when the package is used from a checkout."""


def describe_machine(device: torch.device) -> str:
    """Processor or GPU, cores and threads in use, versions of Python and torch, in one line."""
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


def seconds_of_script(script: str, *words: object) -> float:
    """Wall-clock seconds of a script, by its path in the repository, with these flags. Its output is shown.

    Raises:
        RunError: it failed; with the last line of its standard error.
    """
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        raise RunError(f"{Path(script).name}: {last_line(done.stderr).removeprefix('error: ')}")
    return time.perf_counter() - began


def last_line(stderr: str) -> str:
    """The reason that a failed process gave."""
    return (stderr.strip().splitlines() or ["no reason given"])[-1]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], *, device: torch.device, seconds: float, warmup: int = 2) -> list[float]:
    """Duration of each call after the warm-up; calls are repeated for `seconds`, and at least three times."""
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
    """Peak memory of a call in bytes, beyond what was in use before it.

    On a CPU: resident memory (Linux's VmHWM, reset before the call); None where it cannot be read.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
            trim(0)  # freed memory goes back to the system: what the call asks for again is counted
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        call()
        return max(resident("VmHWM") - before, 0)
    except OSError:
        return None


def resident(field: str, process: int | str = "self") -> int:
    """Bytes from /proc/PROCESS/status. Raises OSError when the field is missing, as for processes that have ended."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/{process}/status")


def peak_flops(device: torch.device, dtype: torch.dtype, *, seconds: float = 2.0) -> float:
    """Floating-point operations per second of a large matrix product or convolution, whichever is faster here."""
    size, side = (8192, 256) if device.type == "cuda" else (2048, 64)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    images = torch.randn(8, 256, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weights = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        product = seconds_of(lambda: a @ b, device=device, seconds=seconds)
        convolution = seconds_of(
            lambda: torch.nn.functional.conv2d(images, weights, padding=1), device=device, seconds=seconds
        )
    flops = 2 * 8 * side**2 * 256 * 256 * 9
    return max(2 * size**3 / statistics.median(product), flops / statistics.median(convolution))
