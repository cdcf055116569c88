"""Jobs in processes of their own: on several at once, killed, waited for.

A process that imports torch and diffusers takes five seconds of a core. `launch` and `run_until_killed` take theirs
from a server that has imported them once and forks. What is about the launch itself runs the command.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from ldm_vae.errors import one_line_errors
from ldm_vae.models.autoencoder import ARCHITECTURES
from ldm_vae.models.unet import DENOISERS, make_denoiser

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("ldm_vae.objectives.vae", "ldm_vae.objectives.denoising", "ldm_vae.pipeline", "ldm_vae.codec.codec"),
        *("matplotlib.figure", "pytest", "tensorboard.backend.event_processing.event_accumulator"),
    ]
)


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


ON_CPU = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}


@dataclass(frozen=True)
class Launched:
    """The first exit code that is not 0, and what all processes said."""

    returncode: int
    stdout: str
    stderr: str


class Forked:
    """A function of a module, such as a script's `main`, on so many processes that meet over gloo."""

    def __init__(self, job: Callable[..., None], *args: Any, processes: int = 1) -> None:
        self.said = TemporaryDirectory()
        shared = ON_CPU | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        self.processes = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            environment = shared | own if processes > 1 else ON_CPU
            said = Path(self.said.name) / str(rank)
            self.processes.append(FORKS.Process(target=run_forked, args=(job, args, environment, said)))
            self.processes[-1].start()

    def poll(self) -> int | None:
        """An exit code; None while all run."""
        return next((p.exitcode for p in self.processes if p.exitcode is not None), None)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid is not None]

    def wait(self) -> Launched:
        for process in self.processes:
            process.join(300)
        assert all(process.exitcode is not None for process in self.processes), "not finished after five minutes"
        files = [sorted(Path(self.said.name).glob(pattern)) for pattern in ("*.out", "*.err")]
        said = ["".join(file.read_text() for file in of_one_kind) for of_one_kind in files]
        self.said.cleanup()
        return Launched(next((p.exitcode for p in self.processes if p.exitcode), 0), *said)


def run_forked(job: Callable[..., None], args: tuple[Any, ...], environment: dict[str, str], said: Path) -> None:
    os.setsid()  # so that it can be signalled with the workers that it starts
    for descriptor, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(said.with_suffix(end), os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    hurry()
    with nullcontext() if job in (run_script, accelerate_launch) else one_line_errors():  # these handle their own
        job(*args)


def launch(job: Callable[..., None], *args: Any, processes: int = 1) -> Launched:
    return Forked(job, *args, processes=processes).wait()


def run_script(script: str, *words: str) -> None:
    """For `launch`: a script of this repository, as Python runs it."""
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def hurry() -> None:
    """Little time for what no test looks at: starting workers, grids of untrained denoisers, timing, widths."""
    from benchmarks import rate_distortion, reconstruction  # late: the hub's library is told to stay offline before
    from ldm_vae.commands import folders
    from training import train_diffusion

    rate_distortion.get_context = folders.get_context = lambda _: FORKS  # pickled all the same, but imported once
    train_diffusion.SAMPLE_STEPS = 2
    train_diffusion.make_denoiser = narrow_denoiser
    reconstruction.TIMED_SECONDS = 0.01


def narrow(architecture: str, divisor: int = 2) -> Any:
    """Within this, new autoencoders of the preset are of a fraction of its width."""
    widths = ARCHITECTURES[architecture].get("block_out_channels", (64, 128))
    return patch.dict(ARCHITECTURES[architecture], block_out_channels=tuple(width // divisor for width in widths))


def narrow_denoiser(preset: str, **shape: Any) -> UNet2DModel:
    """The preset at half its width, normalised in as large groups."""
    widths = tuple(width // 2 for width in DENOISERS[preset]["block_out_channels"])
    with patch.dict(DENOISERS[preset], block_out_channels=widths, norm_num_groups=16):
        return make_denoiser(preset, **shape)


def run_until_killed(job: Callable[..., None], *args: Any) -> None:
    """A job that ends with `kill_at` or the like."""
    done = launch(job, *args)
    assert done.returncode == -signal.SIGKILL, done.stderr


def kill_at(call: int, module: Any, name: str) -> None:
    """Has this process killed with signal 9 by the so-many-th call of a module's function."""
    calls, real = 0, getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, counted)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch_machines(script: str, words: list[str], machines: int) -> list[Forked]:
    """An `accelerate launch` for each of so many machines, as it is given on each, here all on this one."""
    command = ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    command += ["--num_processes", str(machines), "--num_machines", str(machines)]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    return [Forked(accelerate_launch, *command, "--machine_rank", str(m), script, *words) for m in range(machines)]


def accelerate_launch(*words: str) -> None:
    from accelerate.commands.launch import main

    sys.argv = ["accelerate launch", *words]
    main()


def trainer_below(launcher: Forked) -> int:
    """The process that an `accelerate launch` of one process started."""
    (pid,) = launcher.pids
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])


def wait_for(condition: Any, process: subprocess.Popen[str] | Forked) -> None:
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
