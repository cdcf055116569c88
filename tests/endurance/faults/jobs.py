"""The real commands, each in its own process, and the results that they must give whatever happens to them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_vae.data.procedural import ProceduralSource
from ldm_vae.errors import RunError
from ldm_vae.files import sha256, write_json
from ldm_vae.timing import ROOT, last_line

CLOCK = {"seconds", "images_per_second", "waiting_for_data"}
"""Metrics that differ from run to run; all others must be the same."""
PATIENCE_S = 300


class Process:
    """A command and its children in a process group of their own, on one thread, for the same results each time."""

    def __init__(self, command: list[str]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        self.popen = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)

    def end(self, seconds: float = PATIENCE_S) -> tuple[int, str]:
        """Waits: exit code and standard error. Raises subprocess.TimeoutExpired."""
        stderr = self.popen.communicate(timeout=seconds)[1]
        return self.popen.returncode, stderr

    def signal_group(self, number: int) -> None:
        os.killpg(self.popen.pid, number)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if self.popen.poll() is not None or time.monotonic() > end:
                raise RunError(f"the command ended before it was disturbed: {self.popen.communicate()[1]}")
            time.sleep(0.02)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A real command that writes a directory, named {output} in its words, and its result files."""

    name: str
    words: tuple[str, ...]
    results: tuple[str, ...]
    """Patterns of files whose bytes count; only the last checkpoint, since a stop saves another one beside it."""

    def start(self, output: Path, *more: str) -> Process:
        return Process([sys.executable, *(w.format(output=output) for w in self.words), *more])

    def run(self, output: Path, *more: str) -> tuple[int, str]:
        """Exit code and standard error."""
        return self.start(output, *more).end()

    def digests(self, output: Path) -> dict[str, Any]:
        """The digest of each result, and the metrics but for those of CLOCK."""
        files = sorted({file for pattern in self.results for file in output.glob(pattern) if file.is_file()})
        digests: dict[str, Any] = {str(file.relative_to(output)): sha256(file) for file in files}
        metrics = output / "metrics.jsonl"
        if metrics.exists():
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            digests["metrics"] = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
        return digests


TRAINER = "--batch-size 8 --num-workers 1 --mixed-precision no --tracker none --log-every 1 --sample-every 20".split()


def jobs(work: Path) -> dict[str, Job]:
    """In order: each may need the output of those before it."""
    photos, vae, cache = (str(work / name) for name in ("photos", "undisturbed/vae", "undisturbed/cache"))
    losses = "--perceptual none --disc-start 10".split()
    return {
        job.name: job
        for job in (
            Job(
                name="vae",
                words=("training/train_vae.py", "demo", "--data", photos, "--output", "{output}", *losses, *TRAINER)
                + ("--steps", "80", "--resolution", "32", "--checkpoint-every", "4", "--cache-gib", "0"),
                results=("checkpoints/step-80/state.safetensors", "samples/*.png", "vae/*"),
            ),
            Job(
                name="cache",
                words=("training/cache_latents.py", "--vae", vae, "--data", photos, "--output", "{output}")
                + tuple("--resolution 64 --batch-size 1 --shard-size 1 --num-workers 1".split()),
                results=("shard-*.safetensors", "index.json", "plan.json", "vae/*"),
            ),
            Job(
                name="diffusion",
                words=("training/train_diffusion.py", "tiny", "--latents", cache, "--output", "{output}", *TRAINER)
                + ("--steps", "16", "--checkpoint-every", "2"),
                results=("checkpoints/step-16/state.safetensors", "samples/*.png", "pipeline/*/*", "pipeline/*.json"),
            ),
            Job(
                name="codec",
                words=("-m", "ldm_vae.cli", "fit-codec", "--vae", vae, "--data", photos, "--output", "{output}")
                + tuple("--num-images 8 --steps 1 --overwrite".split()),
                results=("codec/*", "vae/*"),
            ),
            Job(
                name="reconstruct",
                words=("pipelines/reconstruct.py", "--vae", vae, "--input", photos, "--output", "{output}"),
                results=("*.png",),
            ),
            Job(
                name="compress",
                words=("-m", "ldm_vae.cli", "compress", photos, "{output}", "--workers", "1")
                + ("--model", str(work / "undisturbed/codec")),
                results=("*.ldi",),
            ),
            Job(
                name="generate",
                words=("pipelines/generate.py", "--model", str(work / "undisturbed/diffusion"), "--output", "{output}")
                + tuple("--num-images 24 --steps 2".split()),
                results=("*.png",),
            ),
        )
    }


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A job's digests, and the seconds from its start until its directory was there and until it was done."""

    digests: dict[str, Any]
    began: float
    seconds: float


class Workshop:
    """A folder with images, the jobs, and the results of each job when nothing disturbs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.photos = self.folder / "photos"
        write_photos(self.photos)
        self.jobs = jobs(self.folder)

    def undisturbed(self, job: Job) -> Undisturbed:
        """Its results and times; the jobs before it are run first."""
        for earlier in self.jobs.values():
            record = self.folder / f"{earlier.name}.json"
            if not record.exists():
                output = emptied(self.folder / "undisturbed" / earlier.name)
                start = time.perf_counter()
                process = earlier.start(output)
                process.wait_for(lambda output=output: any(output.glob("*")))  # type: ignore[misc]
                began = time.perf_counter() - start
                code, stderr = process.end()
                if code:
                    raise RunError(f"{earlier.name} fails undisturbed: {stderr}")
                seconds = time.perf_counter() - start
                write_json(record, {"digests": earlier.digests(output), "began": began, "seconds": seconds})
            if earlier is job:
                break
        return Undisturbed(**json.loads((self.folder / f"{job.name}.json").read_text()))

    def difference(self, job: Job, output: Path, *more: str) -> str:
        """Runs the job to its end; says what differs from its undisturbed results, "" when nothing does."""
        code, stderr = job.run(output, *more)
        if code:
            return f"cannot be resumed: {last_line(stderr)}"
        expected, digests = self.undisturbed(job).digests, job.digests(output)
        differing = [name for name in sorted({*expected, *digests}) if expected.get(name) != digests.get(name)]
        return f"differing: {', '.join(differing)}" if differing else ""


def write_photos(folder: Path) -> None:
    source = ProceduralSource("dead-leaves", seed=1, size=96, channels=3)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(48):
        if not (folder / f"{i:02d}.png").exists():
            Image.fromarray(source[i].pixels).save(folder / f"{i:02d}.png")


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def unclean_error(code: int, stderr: str, message: str) -> str:
    """What is wrong with the end of a command that had to fail with this message in one line; "" for nothing."""
    problems = []
    if code != 2:
        problems.append(f"exit code {code}")
    if "Traceback" in stderr or message not in stderr:
        problems.append(f"said {last_line(stderr)}")
    return ", ".join(problems)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of this many bytes, in memory. Raises PermissionError without the right to mount it."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        raise PermissionError
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
