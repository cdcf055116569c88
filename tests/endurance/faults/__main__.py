"""Breaks the real commands in many ways, and checks that nothing is lost.

python -m tests.endurance.faults --output DIR [--only kill disk ...]

Each command runs once undisturbed. Whatever happens to it afterwards, running the same command again must give the same
bytes. Full and read-only disks are small ones in memory, which only root can mount: without that right their rows say
"not tried". Faults that were finished are not repeated.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from ldm_vae.errors import ConfigError, RunError, one_line_errors
from ldm_vae.files import atomic, check_writable, write_json
from ldm_vae.report import markdown_table, provenance
from ldm_vae.runs.config import Range, check_ranges, parse_flags
from ldm_vae.runs.run import Checkpoint, Run, read_checkpoint
from ldm_vae.timing import last_line
from tests.endurance.faults.jobs import Job, Workshop, emptied, remount, small_disk, unclean_error


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the harness."""

    output: Path
    only: tuple[str, ...] = ()
    """Some of kill, term, disk, read-only, two-at-once, checkpoint, source, nan; by default all."""
    kills: Annotated[int, Range(at_least=1)] = 50
    """Signals 9 in all, over training the VAE, caching and training the denoiser."""
    tries: Annotated[int, Range(at_least=1)] = 3
    """Of each command, with a stop signal and with a full disk."""
    positions: Annotated[int, Range(at_least=1)] = 200
    """Places at which a checkpoint is damaged."""
    seed: int = 0


Row = dict[str, Any]


def row(fault: str, command: str, tried: int, happened: str, lost: list[str]) -> Row:
    return {"fault": fault, "command": command, "tried": tried, "happened": happened, "lost": [w for w in lost if w]}


# The faults ---------------------------------------------------------------------------------------------------------


def kill(shop: Workshop, config: Config) -> Iterator[Row]:
    """Signal 9 to all processes at random moments of the work; one in five also during the imports."""
    shares = {"vae": 0.4, "cache": 0.2, "diffusion": 0.4}
    for name, share in shares.items():
        job, rng = shop.jobs[name], random.Random(f"{config.seed} {name}")
        known = shop.undisturbed(job)
        count, done, writing, finals = max(round(share * config.kills), 1), 0, 0, 0
        lost: list[str] = []
        output = emptied(shop.folder / "killed" / name)
        while done < count:
            process = job.start(output)
            try:
                code, stderr = process.end(rng.uniform(known.began if done % 5 else 0, known.seconds))
            except subprocess.TimeoutExpired:
                process.signal_group(signal.SIGKILL)
                process.end()
                done += 1
                writing += any(p.name != ".lock" for p in output.rglob(".*"))
            else:
                lost.append(f"ended with {code}: {stderr[-200:]}" if code else shop.difference(job, output))
                finals += 1
                output = emptied(output)
        lost.append(shop.difference(job, output))
        happened = f"{finals + 1} times to the end; {writing} kills left something half written"
        yield row("killed (signal 9)", name, count, happened, lost)


def term(shop: Workshop, config: Config) -> Iterator[Row]:
    """SIGTERM, at random moments of the work."""
    for name in ("vae", "cache", "diffusion"):
        job, rng = shop.jobs[name], random.Random(f"{config.seed} {name}")
        known = shop.undisturbed(job)
        lost, ways = [], []
        for _ in range(config.tries):
            output = emptied(shop.folder / "stopped" / name)
            process = job.start(output)
            try:
                code, _ = process.end(rng.uniform(known.began, known.seconds))
            except subprocess.TimeoutExpired:
                process.popen.terminate()
                code, _ = process.end()
            ways.append({0: "finished its step and saved", -signal.SIGTERM: "ended at once"}.get(code, str(code)))
            lost.append(shop.difference(job, output))
        happened = ", ".join(f"{way}: {ways.count(way)}" for way in sorted(set(ways)))
        yield row("stopped (SIGTERM)", name, config.tries, happened, lost)


def disk(shop: Workshop, config: Config) -> Iterator[Row]:
    """A disk that is full after a random share of what the command writes, and then is enlarged."""
    for name in ("vae", "cache", "diffusion", "reconstruct", "compress", "generate"):
        job, rng = shop.jobs[name], random.Random(f"{config.seed} {name}")
        shop.undisturbed(job)
        whole = shop.folder / "undisturbed" / name
        size = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
        lost = []
        for _ in range(config.tries):
            mounted = emptied(shop.folder / "disk")
            try:
                with small_disk(mounted, int(rng.uniform(0.05, 0.95) * size)):
                    lost.append(unclean_error(*job.run(mounted / name), "No space left on device"))
                    remount(mounted, f"size={4 * size + 2**24}")
                    lost.append(shop.difference(job, mounted / name))
            except PermissionError:
                yield row("full disk", name, 0, "not tried: no right to mount", [])
                return
        yield row("full disk", name, config.tries, "one line, exit code 2; with room it goes on", lost)


def read_only(shop: Workshop, config: Config) -> Iterator[Row]:
    """A read-only disk, at the start and when a run is resumed."""
    for name in ("vae", "cache", "diffusion", "reconstruct", "generate"):
        job = shop.jobs[name]
        shop.undisturbed(job)
        mounted = emptied(shop.folder / "disk")
        try:
            with small_disk(mounted, 2**30):
                remount(mounted, "ro")
                lost = [unclean_error(*job.run(mounted / name), "Read-only file system")]
                remount(mounted, "rw")
                lost.append(shop.difference(job, mounted / name))
                remount(mounted, "ro")
                lost.append(unclean_error(*job.run(mounted / name), "Read-only file system"))
        except PermissionError:
            yield row("read-only directory", name, 0, "not tried: no right to mount", [])
            return
        yield row("read-only directory", name, 2, "one line, exit code 2", lost)


def two_at_once(shop: Workshop, config: Config) -> Iterator[Row]:
    """The same command on the same directory while the first one runs, and again after that one was killed."""
    begun = {"vae": "checkpoints/step-*/state.json", "cache": "shard-*.json"}
    for name, sign in (*begun.items(), ("diffusion", begun["vae"])):
        job = shop.jobs[name]
        shop.undisturbed(job)
        output = emptied(shop.folder / "two" / name)
        first = job.start(output)
        first.wait_for(lambda output=output, sign=sign: any(output.glob(sign)))  # type: ignore[misc]
        first.signal_group(signal.SIGSTOP)
        lost = [unclean_error(*job.run(output), "another process is at work in")]
        first.signal_group(signal.SIGKILL)
        first.end()
        lost.append(shop.difference(job, output))
        happened = "the second is refused, exit code 2; the first killed, it goes on"
        yield row("two on one directory", name, 1, happened, lost)


def checkpoint(shop: Workshop, config: Config) -> Iterator[Row]:
    """A bit of a checkpoint flipped, or its end cut off, at random places: the one before is loaded, or the same."""
    job, rng = shop.jobs["vae"], random.Random(config.seed)
    shop.undisturbed(job)
    output = emptied(shop.folder / "damaged")
    shutil.copytree(shop.folder / "undisturbed" / "vae", output)
    older, newest = sorted((output / "checkpoints").iterdir(), key=lambda p: int(p.name.removeprefix("step-")))
    whole = {folder: read_checkpoint(folder) for folder in (older, newest)}
    outcomes = {"passed over": 0, "as it was": 0}
    lost = []
    for number in range(config.positions):
        file = newest / rng.choice(["state.safetensors", "state.safetensors", "state.json"])
        data = file.read_bytes()
        at = rng.randrange(len(data))
        flipped = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        file.write_bytes(flipped if number % 2 else data[:at])
        loaded = newest_of(output)
        if same(loaded, whole[older]):
            outcomes["passed over"] += 1
        elif same(loaded, whole[newest]):
            outcomes["as it was"] += 1
        else:
            lost.append(f"{file.name} at {at}: something else was loaded")
        if number in (0, 1):  # by the command, too; in a copy, since it writes the newest again
            copied = emptied(shop.folder / "damaged, resumed")
            shutil.copytree(output, copied)
            lost.append(shop.difference(job, copied))
        file.write_bytes(data)
    happened = ", ".join(f"{how}: {times}" for how, times in outcomes.items())
    yield row("damaged checkpoint", "vae", config.positions, happened, lost)


def newest_of(run: Path) -> Checkpoint | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = Run.__new__(Run)
        opened.directory = run
        return opened.load_newest()


def same(a: Checkpoint | None, b: Checkpoint) -> bool:
    if a is None or (a.step, a.facts) != (b.step, b.facts) or a.tensors.keys() != b.tensors.keys():
        return False
    return all(torch.equal(a.tensors[name], b.tensors[name]) for name in b.tensors)


def source(shop: Workshop, config: Config) -> Iterator[Row]:
    """While a command reads a folder, a third of its images vanishes and a third is overwritten with other bytes."""
    signs = {"vae": "checkpoints/step-*/state.json", "cache": "shard-*.json"}
    for name, sign in signs.items():
        images = emptied(shop.folder / "changing" / "photos")
        shutil.copytree(shop.photos, images)
        job = shop.jobs[name]
        shop.undisturbed(job)
        words = tuple(w if w != str(shop.photos) else str(images) for w in job.words)
        changing = Job(name=name, words=words, results=job.results)
        output = emptied(shop.folder / "changing" / name)
        process = changing.start(output)
        process.wait_for(lambda output=output, sign=sign: any(output.glob(sign)))  # type: ignore[misc]
        files = sorted(images.iterdir())
        for i, file in enumerate(files):
            if i % 3 == 0:
                file.unlink()
            elif i % 3 == 1:
                file.write_bytes(b"something else")
        code, stderr = process.end()
        lost = [f"exit code {code}: {last_line(stderr)}"] if code else []
        listed = (output / "bad_images.csv").read_text() if (output / "bad_images.csv").exists() else ""
        bad, good = listed.count(".png"), [f.name for i, f in enumerate(files) if i % 3 == 2 and f.name in listed]
        if not bad or good or (name == "vae" and bad < 32):  # that one meets every image again
            lost.append(f"bad_images.csv names {bad} images, and {len(good)} that are whole")
        if name == "cache":
            lost.append(unclean_error(*changing.run(output), "something else"))
        yield row("source changed", name, 32, f"run to the end; bad_images.csv names {bad} of 32 met again", lost)


def nan(shop: Workshop, config: Config) -> Iterator[Row]:
    """Images with NaN and infinity, and steps whose gradient is not finite."""
    images = emptied(shop.folder / "nan" / "photos")
    shutil.copytree(shop.photos, images)
    for i, value in enumerate((np.nan, np.inf, -np.inf)):
        array = np.full((64, 64, 3), 0.5, np.float32)
        array[i, i, i] = value
        np.save(images / f"bad-{i}.npy", array)
    for name in ("vae", "cache"):
        job = shop.jobs[name]
        shop.undisturbed(job)  # the cache's autoencoder
        words = tuple(w if w != str(shop.photos) else str(images) for w in job.words)
        output = emptied(shop.folder / "nan" / name)
        code, stderr = Job(name=name, words=words, results=()).run(output)
        listed = (output / "bad_images.csv").read_text() if (output / "bad_images.csv").exists() else ""
        lost = [] if code == 0 and listed.count("bad-") == 3 else [f"exit code {code}, {listed or last_line(stderr)}"]
        yield row("NaN, infinity in an image", name, 3, "left out, and listed in bad_images.csv", lost)
    output = emptied(shop.folder / "nan" / "run")
    words = ("--learning-rate", "1e30", "--checkpoint-every", "1")
    lost = [unclean_error(*shop.jobs["vae"].run(output, *words), "not finite in 3 steps in a row")]
    kept = newest_of(output)
    if kept is None or not all(t.isfinite().all() for t in kept.tensors.values()):
        lost.append("the checkpoint has values that are not finite")
    yield row("NaN in a gradient", "vae", 1, "skipped; back to a checkpoint; one line, exit code 2", lost)


FAULTS: Mapping[str, Callable[[Workshop, Config], Iterator[Row]]] = {
    "kill": kill,
    "term": term,
    "disk": disk,
    "read-only": read_only,
    "two-at-once": two_at_once,
    "checkpoint": checkpoint,
    "source": source,
    "nan": nan,
}


def table(rows: list[Row]) -> str:
    cells = []
    for r in rows:
        line = {"fault": r["fault"], "command": r["command"], "tried": str(r["tried"]), "what happened": r["happened"]}
        cells.append(line | {"lost": "; ".join(r["lost"]) or "nothing"})
    return markdown_table(cells)


def read_record(file: Path) -> dict[str, Any]:
    """Raises RunError for a file of another kind."""
    try:
        record = json.loads(file.read_text())
        if isinstance(record["counts"], dict) and isinstance(record["faults"], dict):
            return dict(record)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RunError(f"{file} is no record of this test: choose another --output") from None


def main(config: Config) -> None:
    check_ranges(config)
    unknown = [name for name in config.only if name not in FAULTS]
    if unknown:
        raise ConfigError(f"--only {unknown[0]} is not known: try {', '.join(FAULTS)}")
    check_writable(config.output)
    file, work = config.output / "results.json", config.output / "work"
    counts = {"kills": config.kills, "tries": config.tries, "positions": config.positions, "seed": config.seed}
    record: dict[str, Any] = read_record(file) if file.exists() else {"counts": counts, "faults": {}}
    if record["counts"] != counts:
        raise RunError(f"{file} has other counts ({record['counts']}): choose another --output")
    if not file.exists() and work.exists():
        raise RunError(f"{work} is not from this test: choose another --output")
    record |= provenance(config)
    write_json(file, record)
    shop = Workshop(work)
    rows_of: dict[str, list[Row]] = dict(record["faults"])
    for name in config.only or FAULTS:
        if name not in rows_of:
            rows = list(FAULTS[name](shop, config))
            print(table(rows), flush=True)
            rows_of[name] = rows
            if all(r["tried"] for r in rows):
                record["faults"] = {**record["faults"], name: rows}
                write_json(file, record)
    every = [r for name in FAULTS for r in rows_of.get(name, [])]
    with atomic(config.output / "table.md") as out:
        out.write(table(every).encode())
    lost = [r for r in every if r["lost"]]
    if lost:
        raise RunError(f"{len(lost)} of {len(every)} rows lost something: see {config.output / 'table.md'}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Break the real commands, and see whether anything is lost."))
