"""The real commands in processes of their own, where they are broken, and what they come to undisturbed."""

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

ROOT = Path(__file__).parent.parent.parent.parent
CLOCK = {"seconds", "images_per_second", "waiting_for_data"}
"""Of metrics: all else must be the same again."""
PATIENCE_S = 300


class Process:
    """With all that it starts in a group of its own, on one thread so that it always computes the same."""

    def __init__(self, command: list[str]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        self.popen = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)

    def end(self, seconds: float = PATIENCE_S) -> tuple[int, str]:
        said = self.popen.communicate(timeout=seconds)[1]
        return self.popen.returncode, said

    def signal_group(self, number: int) -> None:
        os.killpg(self.popen.pid, number)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if self.popen.poll() is not None or time.monotonic() > end:
                raise RunError(f"the command ended before it was to be disturbed: {self.popen.communicate()[1]}")
            time.sleep(0.02)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A real command that writes a directory, named {output} in its words, and the files that it must come to."""

    name: str
    words: tuple[str, ...]
    results: tuple[str, ...]
    """Patterns of files whose bytes count; of checkpoints the last, as a stop leaves one of its own step beside it."""

    def start(self, output: Path, *more: str) -> Process:
        return Process([sys.executable, *(w.format(output=output) for w in self.words), *more])

    def run(self, output: Path, *more: str) -> tuple[int, str]:
        """Exit code and what it said on standard error."""
        return self.start(output, *more).end()

    def came_to(self, output: Path) -> dict[str, Any]:
        """The digest of each result, and the metrics without what a clock says."""
        files = sorted({file for pattern in self.results for file in output.glob(pattern) if file.is_file()})
        found: dict[str, Any] = {str(file.relative_to(output)): sha256(file) for file in files}
        metrics = output / "metrics.jsonl"
        if metrics.exists():
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            found["metrics"] = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
        return found


TRAINER = "--batch-size 8 --num-workers 1 --mixed-precision no --tracker none --log-every 1 --sample-every 20".split()


def jobs(work: Path) -> dict[str, Job]:
    """In the order in which each needs what those before have made."""
    photos, vae, cache = (str(work / name) for name in ("photos", "undisturbed/vae", "undisturbed/cache"))
    losses = "--perceptual none --disc-start 10 --spectral-norm".split()
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
                + tuple("--num-images 8 --qualities 1 --overwrite".split()),
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
    """A job's results, and the seconds after its start when its directory was there and when it was done."""

    came_to: dict[str, Any]
    began: float
    seconds: float


class Workshop:
    """Where things are broken: pictures, the commands, and what each comes to when nobody disturbs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.photos = self.folder / "photos"
        write_photos(self.photos)
        self.jobs = jobs(self.folder)

    def undisturbed(self, job: Job) -> Undisturbed:
        """What it comes to, and when; the jobs that it needs are run before it."""
        for one in self.jobs.values():
            record = self.folder / f"{one.name}.json"
            if not record.exists():
                output = emptied(self.folder / "undisturbed" / one.name)
                start = time.perf_counter()
                process = one.start(output)
                process.wait_for(lambda output=output: any(output.glob("*")))  # type: ignore[misc]
                began = time.perf_counter() - start
                code, said = process.end()
                if code:
                    raise RunError(f"{one.name} fails undisturbed: {said}")
                seconds = time.perf_counter() - start
                write_json(record, {"came_to": one.came_to(output), "began": began, "seconds": seconds})
            if one is job:
                break
        return Undisturbed(**json.loads((self.folder / f"{job.name}.json").read_text()))

    def other_than_undisturbed(self, job: Job, output: Path, *more: str) -> str:
        """Runs the job to its end; what is not as it must be, in words, empty for nothing."""
        code, said = job.run(output, *more)
        if code:
            return f"cannot be gone on with: {last_line(said)}"
        expected, found = self.undisturbed(job).came_to, job.came_to(output)
        differing = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
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


def last_line(said: str) -> str:
    return (said.strip().splitlines() or ["nothing was said"])[-1]


def clean_error(code: int, said: str, words: str) -> str:
    """What is wrong with how a command ended that had to refuse, empty for nothing."""
    wrong = []
    if code != 2:
        wrong.append(f"exit code {code}")
    if "Traceback" in said or words not in said:
        wrong.append(f"said {last_line(said)}")
    return ", ".join(wrong)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes, in memory. Raises PermissionError without the right to mount it."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        raise PermissionError
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
