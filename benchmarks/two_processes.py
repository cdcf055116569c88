"""Train with one process of one thread, and with two of them on two cores: images/s, in turns.

python benchmarks/two_processes.py --output DIR
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_vae.config import as_json, parse_flags
from ldm_vae.errors import RunError, one_line_errors
from ldm_vae.files import check_writable, write_json
from ldm_vae.runs import git_revision, versions
from ldm_vae.timing import describe_machine

ROOT = Path(__file__).parent.parent
LAUNCH = ["-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--num_cpu_threads_per_process", "1", "--num_machines", "1", "--main_process_port", "0"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the comparison."""

    output: Path
    steps: int = 60
    batch_size: int = 32
    """Images a step, over all processes."""
    resolution: int = 64
    rounds: int = 3


def images_per_second(config: Config, processes: int) -> float:
    """The median over the lines of a run's log, the first of which is left out."""
    run = config.output / "run"
    shutil.rmtree(run, ignore_errors=True)
    words = ["training/train_vae.py", "f8c4", "--data", "procedural:dead-leaves", "--output", str(run)]
    words += ["--steps", str(config.steps), "--batch-size", str(config.batch_size), "--perceptual", "none"]
    words += ["--resolution", str(config.resolution), "--adversarial", "none", "--mixed-precision", "no"]
    words += ["--num-workers", "0", "--log-every", "5", "--sample-every", "100000", "--checkpoint-every", "100000"]
    launch = [*LAUNCH, "--num_processes", str(processes), *(["--multi_gpu"] if processes > 1 else ["--cpu"])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launch, *words, "--tracker", "none"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RunError(f"the trainer failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    shutil.rmtree(run)
    return statistics.median(rates[1:])


def main(config: Config) -> None:
    check_writable(config.output)
    rates: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(config.rounds):
        for processes, found in rates.items():
            found.append(images_per_second(config, int(processes)))
            print(f"{processes} processes: {found[-1]:.1f} images/s", flush=True)
    times = [two / one for one, two in zip(rates["1"], rates["2"], strict=True)]
    record: dict[str, Any] = {
        "config": as_json(config),
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "git": git_revision(),
        "images_per_second": rates,
        "times_as_fast": {"median": statistics.median(times), "each": times},
    }
    write_json(config.output / "two_processes.json", record)
    print(
        f"two processes are {statistics.median(times):.2f} times as fast as one ({min(times):.2f} to {max(times):.2f})"
    )


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="One process against two."))
