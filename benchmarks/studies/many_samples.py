"""Start and resume on the index of very many samples: seconds to the first batch, and memory.

python benchmarks/studies/many_samples.py --output DIR

The index is real, its rows point at the same few images again and again. Each measurement begins with a new process.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_vae.commands.shards import Pack, pack
from ldm_vae.data.loader import CropDataset, MicroBatches, collate, load_batches
from ldm_vae.data.shards import FACTS, ROW, ROWS, build_index, index_folder
from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError, one_line_errors
from ldm_vae.files import check_writable, write_json
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.runs.run import git_revision, versions
from ldm_vae.timing import describe_machine, resident

IMAGES = 1000
BATCH = 16
POSITIONS = (0, 10**11)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the benchmark of many samples."""

    output: Path
    samples: int = 100_000_000
    num_workers: int = 2
    at: int | None = None
    """Measure this position alone, on an index that is there, and print it: what the benchmark runs anew each time."""


def make_index(config: Config) -> None:
    """A shard of IMAGES images, and so many rows in their own random order."""
    import imagecodecs

    images = config.output / "images"
    images.mkdir(exist_ok=True)
    source = open_source("procedural:dead-leaves", resolution=64)
    for i in range(IMAGES):
        (images / f"{i}.jpg").write_bytes(imagecodecs.jpeg_encode(source[i].pixels, level=90))
    pack(Pack(input=images, output=config.output / "shards", overwrite=True))
    shards = [str(config.output / "shards" / "images-000000.tar")]
    folder = build_index(shards)
    rows = np.load(folder / ROWS)
    digest = hashlib.sha256()
    rng = np.random.default_rng(0)
    with open(folder / ROWS, "wb") as out:
        head = {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (config.samples,)}
        np.lib.format.write_array_header_2_0(out, head)
        for begin in range(0, config.samples, 1 << 20):
            part = rows[rng.integers(IMAGES, size=min(1 << 20, config.samples - begin))].tobytes()
            digest.update(part)
            out.write(part)
    facts = json.loads((folder / FACTS).read_text())
    write_json(folder / FACTS, facts | {"samples": config.samples, "rows": digest.hexdigest()})


def children() -> set[str]:
    """The processes that this one has started."""
    return {p for file in Path("/proc/self/task").glob("*/children") for p in file.read_text().split()}


def held(process: str) -> dict[str, float]:
    """MiB; of what it shares with other processes Rss counts all, Pss this one's part, and Private nothing."""
    smaps = Path(f"/proc/{process}/smaps_rollup").read_text()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in smaps.splitlines()[1:]}


def measure(config: Config, position: int) -> dict[str, Any]:
    """Of this process from here on: imports are done."""
    before, others = resident("VmRSS"), children()
    began = time.perf_counter()
    source = open_source(str(config.output / "shards"))
    opened = time.perf_counter() - began
    crops = CropDataset(source, seed=0, resolution=64)
    step = position // BATCH
    order = MicroBatches(
        first_step=step, last_step=step + 1000, batch_size=BATCH, rank=0, num_processes=1, accumulation=1
    )
    batches = load_batches(crops, order, collate=collate, num_workers=config.num_workers, pin_memory=False)
    first = next(batches)
    seconds = time.perf_counter() - began
    for _ in range(500):
        next(batches)
    workers = children() - others
    return {
        "position": position,
        "samples": len(source),
        "first": first.positions[0],
        "open_seconds": opened,
        "first_batch_seconds": seconds,
        "before_mib": before / 2**20,
        "resident_mib": resident("VmRSS") / 2**20,
        "worker_resident_mib": max(held(c)["Rss"] for c in workers),
        "worker_share_mib": max(held(c)["Pss"] for c in workers),
        "worker_private_mib": max(held(c)["Private_Clean"] + held(c)["Private_Dirty"] for c in workers),
    }


def main(config: Config) -> None:
    if min(config.samples, config.num_workers) < 1:
        raise ConfigError("--samples and --num-workers must be at least 1")
    if config.at is not None:
        print(json.dumps(measure(config, config.at)))
        return
    check_writable(config.output)
    make_index(config)
    rows = []
    for position in POSITIONS:
        words = ["--output", config.output, "--at", position, "--num-workers", config.num_workers]
        began = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout) | {"process_seconds": time.perf_counter() - began})
    index = index_folder([str(config.output / "shards" / "images-000000.tar")])
    record = {
        "config": as_json(config),
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "git": git_revision(),
        "index_bytes": (index / ROWS).stat().st_size,
        "results": rows,
    }
    write_json(config.output / "results.json", record)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Start and resume on very many samples."))
