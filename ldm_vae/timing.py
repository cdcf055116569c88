"""How long a call takes, how much memory it needs, and what the machine could do at best."""

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


def seconds_of_script(script: Path, *words: object) -> float:
    """Wall seconds of a Python script of ours with these flags, whose output is shown.

    Raises:
        RunError: it failed; with the last line that it wrote to standard error.
    """
    began = time.perf_counter()
    command = [sys.executable, str(script), *map(str, words)]
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"{script.name}: {last.removeprefix('error: ')}")
    return time.perf_counter() - began


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
        return_free_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        call()
        return max(resident("VmHWM") - before, 0)
    except OSError:
        return None


def return_free_memory() -> None:
    """glibc keeps what was freed; give it back, so that the call has to take it again and is seen to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident(field: str, process: int | str = "self") -> int:
    """Bytes, by /proc. Raises OSError where it does not say, as of processes that have ended."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/{process}/status")


def peak_flops(device: torch.device, dtype: torch.dtype, *, seconds: float = 2.0) -> float:
    """Floating-point operations a second of a large matrix product or convolution, whichever is faster here."""
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
