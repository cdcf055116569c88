"""A run directory: configuration, metrics, bad images, and checkpoints that survive whatever ends the run."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_vae.errors import DataError, RunError
from ldm_vae.files import (
    atomic,
    check_writable,
    digest_of_json,
    lock,
    said_of,
    sha256,
    staged_directory,
    write_bad_images,
    write_json,
)
from ldm_vae.runs.config import as_json, differences, saved_config

PACKAGES = (
    *("ldm-vae", "torch", "torchvision", "diffusers", "accelerate", "lpips"),
    *("numpy", "pillow", "safetensors", "torchmetrics"),
)
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `Run.save` writes: the next step, tensors by name, and small facts."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Run:
    """A run directory, opened by every process and written by the main one.

    Args:
        directory: created when missing.
        config: a dataclass; its fields must equal those of the run that is resumed.
        free: fields that may differ on resume, because no result depends on them.
        extend: more `steps` than the run was begun with are taken, and stored.
        main: whether this process writes.

    Raises:
        RunError: the directory cannot be written, holds a run with other settings, or is in use by another process.
    """

    extended_from: int | None = None
    """The steps that the run had until now, where it is extended."""

    def __init__(
        self, directory: Path, config: Any, *, free: Sequence[str] = (), extend: bool = False, main: bool = True
    ) -> None:
        self.directory, self.main = directory, main
        if main:
            check_writable(directory)
            self.lock = lock(directory)
        try:
            for folder in ("checkpoints", "samples"):
                (directory / folder).mkdir(parents=True, exist_ok=True)
            saved = saved_config(directory)
            if saved is None and main:
                record = {"config": as_json(config), "versions": versions(), "git": git_revision()}
                write_json(directory / "config.json", record)
        except OSError as error:
            raise RunError(f"cannot write the run directory {directory}: {error.strerror or error}") from None
        if saved is not None:
            self.check(saved, config, free, extend)
        self.seen_bad_images = self.read_bad_images()

    def check(self, saved: Mapping[str, Any], config: Any, free: Sequence[str], extend: bool) -> None:
        """Raises RunError for other settings than the saved ones; stores more steps where they may `extend` the run."""
        before, now = saved.get("steps", 0), as_json(config).get("steps", 0)
        changed = differences(saved, config, free=free)
        if changed and not (before < now and len(changed) == 1):
            raise RunError(
                f"{self.directory} holds a run with other settings ({'; '.join(changed)}): "
                "use those to resume it, or choose another --output"
            )
        if before < now and not extend:
            raise RunError(
                f"{self.directory} holds a run of {before} steps: add --extend to train it on to {now}, or choose "
                f"another --output. From where it stands, its learning rate then follows the cosine of {now} steps, so "
                f"it rises; the result is not that of {now} steps from the start"
            )
        if before < now:
            self.extended_from = before
            if self.main:
                file = self.directory / "config.json"
                record = json.loads(file.read_text())
                record["config"]["steps"] = now
                write_json(file, record | {"extended_from": [*record.get("extended_from", []), before]})

    def release(self) -> None:
        """Lets other processes in."""
        if self.main:
            self.lock.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line to `metrics.jsonl`; values that are not finite become null."""
        if self.main:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            file = self.directory / "metrics.jsonl"
            with said_of(file), open(file, "a") as out:
                out.write(json.dumps({"step": step, **finite}) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops the metrics of steps that are about to be repeated."""
        file = self.directory / "metrics.jsonl"
        if self.main and file.exists():
            lines = [line for line in file.read_text(errors="replace").splitlines() if line_step(line) <= step]
            with atomic(file) as out:
                out.write("".join(line + "\n" for line in lines).encode())

    def read_bad_images(self) -> dict[str, str]:
        file = self.directory / "bad_images.csv"
        if not file.exists():
            return {}
        try:
            with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
                return {row["name"]: row["reason"] or "" for row in csv.DictReader(lines)}
        except (csv.Error, KeyError):
            warnings.warn(f"{file} is damaged: bad images that it named may be named again", stacklevel=2)
            return {}

    def add_bad_images(self, bad_images: Mapping[str, str]) -> None:
        """Adds images to `bad_images.csv` (name,reason); one that is there keeps its reason."""
        new = bad_images.keys() - self.seen_bad_images.keys()
        self.seen_bad_images = {**bad_images, **self.seen_bad_images}
        if self.main and new:
            write_bad_images(self.directory, self.seen_bad_images)

    @contextmanager
    def listing_bad_images(self) -> Iterator[None]:
        """Also lists the bad images of a data set without a good one, which ends the run."""
        try:
            yield
        except DataError as error:
            self.add_bad_images(error.bad_images)
            raise

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes `checkpoints/step-N/` atomically, and removes all but the newest few."""
        if not self.main:
            return
        folder = self.directory / "checkpoints"
        target = folder / f"step-{checkpoint.step}"
        for left in folder.glob(".step-*.ldm-vae.new"):  # of a save that was killed
            shutil.rmtree(left, ignore_errors=True)
        with staged_directory(target) as staging:
            tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
            save_file(tensors, staging / "state.safetensors")
            record = {
                "step": checkpoint.step,
                "facts": checkpoint.facts,
                "sha256": sha256(staging / "state.safetensors"),
            }
            write_json(staging / "state.json", record | {"record_sha256": digest_of_json(record)})
        checkpoints = [f for f in folder.glob("step-*") if step_of(f) >= 0]  # and no copies under other names
        for old in sorted(checkpoints, key=step_of)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def load_newest(self) -> Checkpoint | None:
        """The newest intact checkpoint; damaged ones are skipped with a warning.

        Raises:
            RunError: there are checkpoints, and none of them is intact.
        """
        folders = sorted((self.directory / "checkpoints").glob("step-*"), key=step_of, reverse=True)
        for folder in folders:
            try:
                return read_checkpoint(folder)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                warnings.warn(f"{folder} is damaged ({error}): passed over", stacklevel=2)
        if folders:
            raise RunError(f"none of the checkpoints in {folders[0].parent} is whole: remove them to start anew")
        return None


def saved_facts(directory: Path) -> dict[str, Any]:
    """Of the newest checkpoint whose record can be read; none of a run without checkpoints."""
    for folder in sorted((directory / "checkpoints").glob("step-*"), key=step_of, reverse=True):
        try:
            return dict(json.loads((folder / "state.json").read_text())["facts"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def read_checkpoint(folder: Path) -> Checkpoint:
    """Raises ValueError for a digest that differs, and whatever else reading a damaged file raises."""
    record = json.loads((folder / "state.json").read_text())
    if record.pop("record_sha256") != digest_of_json(record):
        raise ValueError("state.json does not have the digest that it names")
    if sha256(folder / "state.safetensors") != record["sha256"]:
        raise ValueError("state.safetensors does not have the digest that state.json names")
    tensors = load_file(folder / "state.safetensors")
    return Checkpoint(step=int(record["step"]), tensors=tensors, facts=dict(record["facts"]))


def training_seconds(directory: Path) -> float:
    """How long a run has trained, by its metrics, over all its resumptions."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return max(float(json.loads(line).get("seconds", 0.0)) for line in lines)


def step_of(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def line_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut short by a crash


def versions() -> dict[str, str]:
    """Of Python and the packages that results depend on."""
    numbers = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            numbers[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            numbers[package] = "not installed"
    return numbers


def git_revision() -> str | None:
    """The commit of the code, with "-dirty" when files differ from it; None where no repository holds this file."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        described = [*git, "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
