"""Train with one process of one thread, and with two of them on two cores: images/s, in turns.

python benchmarks/studies/two_processes.py --output DIR

Beside them two trainings that know nothing of each other, of half the batch each: what two cores of this machine give.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_vae.errors import ConfigError, RunError, one_line_errors
from ldm_vae.files import check_writable, write_json
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import git_revision, versions
from ldm_vae.timing import describe_machine

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ["-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--num_cpu_threads_per_process", "1", "--num_machines", "1", "--main_process_port", "0"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the comparison."""

    output: Path
    steps: int = 60
    batch_size: int = 64
    """Images a step, over all processes."""
    resolution: int = 64
    rounds: int = 5


def start(config: Config, run: Path, *, processes: int, batch_size: int) -> subprocess.Popen[str]:
    words = ["training/train_vae.py", "f8c4", "--data", "procedural:dead-leaves", "--output", str(run)]
    words += ["--steps", str(config.steps), "--batch-size", str(batch_size), "--perceptual", "none"]
    words += ["--resolution", str(config.resolution), "--adversarial", "none", "--mixed-precision", "no"]
    words += ["--num-workers", "0", "--log-every", "5", "--sample-every", "100000", "--checkpoint-every", "100000"]
    launch = [*LAUNCH, "--num_processes", str(processes), *(["--multi_gpu"] if processes > 1 else ["--cpu"])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launch, *words, "--tracker", "none"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


def images_per_second(config: Config, way: str) -> float:
    """Of both trainings together where there are two: medians over the lines of a run's log but the first."""
    work = Path(tempfile.mkdtemp(dir=config.output))
    runs = [work / str(i) for i in range(2 if way == "two apart" else 1)]
    processes = 2 if way == "two" else 1
    share = config.batch_size // len(runs)
    started = [start(config, run, processes=processes, batch_size=share) for run in runs]
    said = [process.communicate()[1] for process in started]
    for process, error in zip(started, said, strict=True):
        if process.returncode:
            raise RunError(f"the trainer failed: {(error.strip().splitlines() or ['no reason given'])[-1]}")
    total = 0.0
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
        total += statistics.median(rates[1:])
    shutil.rmtree(work)
    return total


def main(config: Config) -> None:
    if config.batch_size < 2 or config.batch_size % 2 or config.steps < 15 or config.rounds < 1:
        raise ConfigError("an even --batch-size, at least 15 --steps and at least one of --rounds are needed")
    check_writable(config.output)
    rates: dict[str, list[float]] = {"one": [], "two": [], "two apart": []}
    for _ in range(config.rounds):
        for way, found in rates.items():
            found.append(images_per_second(config, way))
            print(f"{way}: {found[-1]:.1f} images/s", flush=True)
    times = {way: [a / one for a, one in zip(rates[way], rates["one"], strict=True)] for way in rates if way != "one"}
    record: dict[str, Any] = {
        "config": as_json(config),
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "git": git_revision(),
        "images_per_second": rates,
        "times_as_fast": {way: {"median": statistics.median(t), "each": t} for way, t in times.items()},
    }
    write_json(config.output / "two_processes.json", record)
    for way, each in times.items():
        print(f"{way}: {statistics.median(each):.2f} times as fast as one ({min(each):.2f} to {max(each):.2f})")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="One process against two."))
