"""Training scripts in processes of their own: launched on several, killed, waited for."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def flags(config: Any, preset: Any) -> list[str]:
    """The flags that make `config` of a preset's configuration."""
    words = []
    for name, value in vars(config).items():
        if value != getattr(preset, name):
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
ON_CPU = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}


def launch(script: str, words: list[str], processes: int) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of the real script on so many processes, over gloo where there is no GPU."""
    command = [*LAUNCH, "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    return subprocess.run([*command, script, *words], env=ON_CPU, cwd=ROOT, capture_output=True, text=True, timeout=300)


def launch_machines(script: str, words: list[str], machines: int) -> list[subprocess.Popen[str]]:
    """An `accelerate launch` for each of so many machines, as it is given on each, here all on this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*LAUNCH, "--num_processes", str(machines), "--num_machines", str(machines)]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([*command, "--machine_rank", str(m), script, *words], env=ON_CPU, cwd=ROOT, **pipes)
        for m in range(machines)
    ]


def trainer_below(launcher: subprocess.Popen[str]) -> int:
    """The process that an `accelerate launch` of one process started."""
    return int(Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()[-1])


def run_until_killed(program: str, words: list[str]) -> None:
    """A Python program that kills itself with signal 9."""
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "state.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], parts: tuple[str, ...]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a if k.split("/")[0] in parts)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
