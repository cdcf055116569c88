"""Send images of 2,048 to 16,384 pixels a side through the real commands: how long, and in how much memory.

python benchmarks/studies/any_size.py --model RUN_OR_MODEL --output DIR

The model needs a codec's tables. Each size is one procedural picture, repeated; each command is a process of its own,
of which /proc says how much of its memory was resident at most.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import torch

from ldm_vae.data.large import write_large
from ldm_vae.data.procedural import ProceduralSource
from ldm_vae.errors import ConfigError, RunError, one_line_errors
from ldm_vae.files import atomic, check_writable, write_json
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import git_revision, versions
from ldm_vae.timing import describe_machine, resident

ROOT = Path(__file__).parent.parent.parent
TILE = 1024


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the measurement of sizes."""

    model: str
    output: Path
    sides: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """In pixels."""


def write_picture(file: Path, side: int, *, transparent: bool = False) -> None:
    """A picture of side x side pixels as PNG: dead leaves, turned and mirrored from tile to tile.

    Where it is to be transparent, the darker leaves are cut out.
    """
    tile = ProceduralSource("dead-leaves", seed=0, size=TILE, channels=3)[0].pixels
    if transparent:
        opaque = np.where(tile.mean(axis=2, keepdims=True) > 100, 255, 0).astype(np.uint8)
        tile = np.concatenate([tile, opaque], axis=2)
    kinds = [np.rot90(t, k) for t in (tile, tile[:, ::-1]) for k in range(4)]

    def rows() -> Iterator[Any]:
        for y in range(0, side, TILE):
            row = np.concatenate([kinds[(3 * y // TILE + 5 * x) % 8] for x in range(-(-side // TILE))], axis=1)
            yield row[: side - y, :side]

    with atomic(file) as out:
        write_large(out, rows(), (side, side, tile.shape[2]), folder=file.parent)


def write_progressive(picture: Path, file: Path) -> None:
    """The kind of JPEG that decoders hold as a whole."""
    pyvips.Image.new_from_file(str(picture), access="sequential").jpegsave(str(file), Q=90, interlace=True)


def measured(words: list[str]) -> dict[str, float]:
    """Seconds of a command, and the peak of its resident memory in MiB. Raises RunError."""
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:  # what the system says of it in the end is at least what this process has held
            with suppress(OSError):
                peak = max(peak, resident("VmHWM", process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        raise RunError(f"{' '.join(words)}: {(lines or ['no reason given'])[-1]}")
    return {"seconds": seconds, "resident_mib": peak / 2**20}


def table(results: dict[str, Any], sides: tuple[int, ...]) -> str:
    lines = ["| side | pixels | " + " | ".join(f"{n}, s | MiB" for n in results[str(sides[0])]) + " |"]
    lines.append("|" + " --- |" * (2 + 2 * len(results[str(sides[0])])))
    for side in sides:
        cells = [f"{r['seconds']:.1f} | {r['resident_mib']:.0f}" for r in results[str(side)].values()]
        lines.append(f"| {side} | {side**2 / 1e6:.1f} M | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    check_writable(config.output)
    if min(config.sides, default=0) < 1:
        raise ConfigError("--sides must be at least 1")
    results: dict[str, Any] = {}
    for side in config.sides:
        work = Path(tempfile.mkdtemp(dir=config.output))
        (work / "in").mkdir()
        picture, packed = work / "in" / "picture.png", work / "picture.ldi"
        write_picture(picture, side)
        one = ["-m", "ldm_vae.cli"]
        model = ["--model", config.model, "--workers", "1"]
        again = ["--vae", config.model, "--input", str(work / "in"), "--output", str(work / "again")]
        try:
            results[str(side)] = {
                "compress": measured([*one, "compress", str(picture), str(packed), *model]),
                "decompress": measured([*one, "decompress", str(packed), str(work / "back.png"), *model]),
                "reconstruct": measured(["pipelines/reconstruct.py", *again]),
            }
            write_progressive(picture, picture.with_suffix(".jpg"))
            picture.unlink()
            shutil.rmtree(work / "again")
            results[str(side)]["reconstruct, from a progressive JPEG"] = measured(["pipelines/reconstruct.py", *again])
            write_picture(picture, side, transparent=True)
            there = [*one, "compress", str(picture), str(packed), "--overwrite", *model]
            back = [*one, "decompress", str(packed), str(work / "back.png"), "--overwrite", *model]
            results[str(side)] |= {f"{words[2]}, with transparency": measured(words) for words in (there, back)}
        finally:
            shutil.rmtree(work)
        print(side, results[str(side)], flush=True)
    record = {
        "config": as_json(config),
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "git": git_revision(),
        "results": results,
    }
    write_json(config.output / "results.json", record)
    with atomic(config.output / "table.md") as out:
        out.write(table(results, config.sides).encode())
    print(table(results, config.sides))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Images of many sizes through the commands: seconds and memory."))
