"""How long a person waits for the first reconstruction grids of a folder, from the command to the picture.

python benchmarks/studies/first_grid.py --data FOLDER --output DIR
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm_vae.errors import RunError, one_line_errors
from ldm_vae.files import write_json
from ldm_vae.runs.config import parse_flags
from ldm_vae.timing import describe_machine

TRAINER = Path(__file__).parent.parent.parent / "training" / "train_vae.py"
LIMIT = 300.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the wait for the first grids."""

    data: str
    output: Path
    steps: tuple[int, ...] = (10, 100)
    """The grids that are waited for."""


def main(config: Config) -> None:
    command = [sys.executable, str(TRAINER), "f8c4", "--data", config.data, "--output", str(config.output / "run")]
    command += ["--resolution", "64", "--shorter-side", "256", "--batch-size", "16", "--learning-rate", "2e-3"]
    command += ["--perceptual", "none", "--adversarial", "none", "--steps", "2000"]
    start = time.perf_counter()
    waits = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as trainer:
        for step in config.steps:
            while not (config.output / "run" / "samples" / f"step-{step}.png").exists():
                if trainer.poll() is not None or time.perf_counter() - start > LIMIT:
                    trainer.kill()
                    raise RunError(f"no grid of step {step} after {time.perf_counter() - start:.0f} s")
                time.sleep(0.05)
            waits[f"seconds_to_the_grid_of_step_{step}"] = time.perf_counter() - start
        trainer.terminate()
    write_json(config.output / "first_grid.json", {"machine": describe_machine(torch.device("cpu")), **waits})
    print(waits)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Measure the wait for the first reconstruction grids."))
