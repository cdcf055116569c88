"""What training gains by a start from the box: tables and plots of the runs of benchmarks/recipes/warm_start.sh.

python benchmarks/studies/warm_start.py --runs RUNS --output DIR

RUNS/FOLDER/START-STEPS is an autoencoder's run, with `reconstruction/`, what benchmarks/reconstruction.py says of it on
held-out images; START is `box` or `nothing`, and box-0 the model of the box as it is. RUNS/clothing/START is a
diffusion model's run. Runs that are not there yet are left out. Gains are means over the images, each compared with
itself, with a 95 % interval.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ldm_vae.errors import DataError, one_line_errors
from ldm_vae.files import check_writable
from ldm_vae.metrics import mean_with_interval
from ldm_vae.report import logged_values, markdown_table, provenance, write_report
from ldm_vae.runs.config import parse_flags, saved_config

METRICS = {"psnr": ("PSNR (dB)", ".2f"), "ssim": ("SSIM", ".3f"), "ssimulacra2": ("SSIMULACRA2", ".1f")}
STARTS = {"nothing": "from nothing", "box": "from the box"}
SHEET_WIDTH = 1000
"""Pixels of one grid of samples, two of which lie side by side."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    runs: Path
    output: Path


def measured(record: Path) -> Row:
    """An autoencoder's run and its figures, from RUNS/FOLDER/START-STEPS/reconstruction/results.json."""
    run = record.parent.parent
    start, steps = run.name.split("-")
    [result] = json.loads(record.read_text())["results"].values()
    with (record.parent / "per_image.csv").open() as lines:
        images = {line["image"]: {metric: float(line[metric]) for metric in METRICS} for line in csv.DictReader(lines)}
    return {
        "folder": run.parent.name,
        "start": start,
        "steps": int(steps),
        "seconds": logged_values(run, "seconds")[-1][1] if int(steps) else 0.0,
        "metrics": {metric: result["metrics"][metric] for metric in METRICS},
        "images": images,
        "training": saved_config(run),
    }


def gains(box: Row, nothing: Row) -> Row:
    """By how much the run from the box is ahead, image by image."""
    both = sorted(set(box["images"]) & set(nothing["images"]))
    return {
        metric: mean_with_interval(np.array([box["images"][i][metric] - nothing["images"][i][metric] for i in both]))
        for metric in METRICS
    }


def compared(rows: list[Row]) -> list[dict[str, Row]]:
    """The runs of one folder and number of steps, by their start."""
    groups: dict[tuple[str, int], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: (row["folder"], row["steps"])):
        groups.setdefault((row["folder"], row["steps"]), {})[row["start"]] = row
    return list(groups.values())


def table(pairs: list[dict[str, Row]]) -> str:
    lines = []
    for pair in pairs:
        any_row = next(iter(pair.values()))
        line = {"folder": any_row["folder"], "steps": str(any_row["steps"])}
        line |= {f"seconds, {STARTS[s]}": f"{pair[s]['seconds']:.0f}" if s in pair else "-" for s in STARTS}
        for metric, (name, style) in METRICS.items():
            for s in STARTS:
                cell = format(pair[s]["metrics"][metric]["mean"], style) if s in pair else "-"
                line[f"{name}, {STARTS[s]}"] = cell
        lines.append(line)
    return markdown_table(lines)


def plot(rows: list[Row], file: Path) -> None:
    """A line of plots for each folder: each metric against the minutes of training."""
    folders = sorted({row["folder"] for row in rows})
    figure = Figure(figsize=(10, 3.2 * len(folders)), layout="constrained")
    axes = figure.subplots(len(folders), len(METRICS), squeeze=False)
    for line, folder in zip(axes, folders, strict=True):
        for panel, (metric, (name, _)) in zip(line, METRICS.items(), strict=True):
            for start, colour in zip(STARTS, ("tab:gray", "tab:blue"), strict=True):
                points = sorted(
                    (row["seconds"] / 60, row["metrics"][metric]["mean"])
                    for row in rows
                    if (row["folder"], row["start"]) == (folder, start)
                )
                trained = [point for point in points if point[0]]
                if trained:
                    panel.plot(*zip(*trained, strict=True), marker="o", color=colour, label=STARTS[start])
                for _, value in points[: len(points) - len(trained)]:
                    panel.axhline(value, color=colour, ls=":", label="the box as it is")
            panel.set(xscale="log", xlim=(0.8, 30), xlabel="minutes of training on one core", ylabel=name, title=folder)
            panel.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"], minor=False)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=90)


def of_diffusion(runs: Path) -> list[Row]:
    """Of each start that has been trained: seconds, and the validation loss by step."""
    return [
        {
            "start": start,
            "seconds": logged_values(runs / start, "seconds")[-1][1],
            "val_loss": dict(logged_values(runs / start, "val_loss")),
            "training": saved_config(runs / start),
        }
        for start in STARTS
        if (runs / start / "metrics.jsonl").exists()
    ]


def loss_table(rows: list[Row]) -> str:
    return markdown_table(
        [
            {"start": STARTS[row["start"]], "seconds": f"{row['seconds']:.0f}"}
            | {f"val_loss, step {step}": f"{loss:.3f}" for step, loss in row["val_loss"].items()}
            for row in rows
        ]
    )


def sheets(runs: Path, rows: list[Row]) -> Image.Image:
    """The last grids of samples, side by side."""
    grids = [Image.open(runs / row["start"] / "samples" / f"step-{max(row['val_loss'])}.png") for row in rows]
    small = [grid.resize((SHEET_WIDTH, round(grid.height * SHEET_WIDTH / grid.width))) for grid in grids]
    both = Image.new("RGB", (SHEET_WIDTH * len(small), max(grid.height for grid in small)), "white")
    for i, grid in enumerate(small):
        both.paste(grid, (i * SHEET_WIDTH, 0))
    return both


def main(config: Config) -> None:
    rows = [measured(record) for record in sorted(config.runs.glob("*/*-*/reconstruction/results.json"))]
    diffusion = of_diffusion(config.runs / "clothing")
    if not rows and not diffusion:
        raise DataError(f"{config.runs} has no runs: benchmarks/recipes/warm_start.sh makes them")
    check_writable(config.output)
    pairs = compared(rows)
    gained = [
        {"folder": pair["box"]["folder"], "steps": pair["box"]["steps"], **gains(pair["box"], pair["nothing"])}
        for pair in pairs
        if len(pair) == len(STARTS)
    ]
    autoencoders = [{name: value for name, value in row.items() if name != "images"} for row in rows]
    record = {"autoencoders": autoencoders, "gains": gained, "diffusion": diffusion}
    tables = [table(pairs)] if rows else []
    if rows:
        plot(rows, config.output / "warm_start.png")
    if diffusion:
        tables.append(loss_table(diffusion))
        sheets(config.runs / "clothing", diffusion).save(config.output / "clothing.jpg", quality=85)
    write_report(config.output, provenance(config), record, "\n".join(tables))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="What training gains by a start from the box."))
