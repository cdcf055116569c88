"""Seconds and memory of the commands on images of 2,048 to 16,384 pixels a side.

python -m tests.endurance.any_size --model RUN_OR_MODEL --output DIR

The model needs a codec's tables. An image of any size is one procedural tile, repeated; each command is a process of
its own, whose peak resident memory is read from /proc.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyvips

from ldm_vae.data.png import stream_png
from ldm_vae.data.procedural import ProceduralSource
from ldm_vae.errors import RunError, one_line_errors
from ldm_vae.files import atomic, check_writable
from ldm_vae.report import markdown_table, provenance, write_report
from ldm_vae.runs.config import Range, check_ranges, parse_flags
from ldm_vae.timing import ROOT, last_line, resident

Row = dict[str, dict[str, float]]
TILE = 1024


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the study of image sizes."""

    model: str
    output: Path
    sides: Annotated[tuple[int, ...], Range(at_least=1)] = (2048, 4096, 8192, 16384)
    """In pixels."""


def write_image(file: Path, side: int, *, transparent: bool = False) -> None:
    """A PNG of side x side pixels: dead leaves, rotated and mirrored from tile to tile.

    With transparency, the darker leaves are cut out.
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
        stream_png(out, rows(), (side, side, tile.shape[2]))


def write_progressive(image: Path, file: Path) -> None:
    """A progressive JPEG, which decoders hold in memory as a whole."""
    pyvips.Image.new_from_file(str(image), access="sequential").jpegsave(str(file), Q=90, interlace=True)


def measure(words: list[str]) -> dict[str, float]:
    """Seconds of a Python command, and its peak resident memory in MiB. Raises RunError."""
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
        while process.poll() is None:  # the peak that wait4 reports would include this process before its fork
            with suppress(OSError):
                peak = max(peak, resident("VmHWM", process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        stderr.seek(0)
        if process.returncode:
            raise RunError(f"{' '.join(words)}: {last_line(stderr.read().decode(errors='replace'))}")
    return {"seconds": seconds, "resident_mib": peak / 2**20}


def measure_side(side: int, work: Path, model: str) -> Row:
    """Every command on an image of this size, in an empty folder."""
    (work / "in").mkdir()
    image, compressed = work / "in" / "image.png", str(work / "image.ldi")
    options = ["--model", model, "--workers", "1", "--overwrite"]
    compress = ["-m", "ldm_vae.cli", "compress", str(image), compressed, *options]
    decompress = ["-m", "ldm_vae.cli", "decompress", compressed, str(work / "back.png"), *options]
    reconstruct = ["pipelines/reconstruct.py", "--vae", model, "--input", str(work / "in"), "--output"]
    write_image(image, side)
    row = {"compress": measure(compress), "decompress": measure(decompress)}
    row["reconstruct"] = measure([*reconstruct, str(work / "reconstructed")])
    write_progressive(image, image.with_suffix(".jpg"))
    image.unlink()
    row["reconstruct, from a progressive JPEG"] = measure([*reconstruct, str(work / "from-jpeg")])
    write_image(image, side, transparent=True)
    row["compress, with transparency"] = measure(compress)
    return row | {"decompress, with transparency": measure(decompress)}


def table(results: dict[str, Row]) -> str:
    rows = []
    for side, row in results.items():
        cells = {"side": side, "pixels": f"{int(side) ** 2 / 1e6:.1f} M"}
        for name, figures in row.items():
            cells |= {f"{name}, s": f"{figures['seconds']:.1f}", f"{name}, MiB": f"{figures['resident_mib']:.0f}"}
        rows.append(cells)
    return markdown_table(rows)


def main(config: Config) -> None:
    check_ranges(config)
    check_writable(config.output)
    results: dict[str, Row] = {}
    for side in config.sides:
        with tempfile.TemporaryDirectory(dir=config.output) as work:
            results[str(side)] = measure_side(side, Path(work), config.model)
        print(side, results[str(side)], flush=True)
    write_report(config.output, provenance(config), {"results": results}, table(results))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Seconds and memory of the commands on images of many sizes."))
