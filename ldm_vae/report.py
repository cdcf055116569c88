"""What a benchmark leaves in its output folder: results.json with the machine that made it, and table.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ldm_vae.files import atomic, write_json
from ldm_vae.runs.config import as_json
from ldm_vae.runs.run import git_revision, versions
from ldm_vae.timing import describe_machine

CPU = torch.device("cpu")


def provenance(config: Any, device: torch.device = CPU) -> dict[str, Any]:
    """How results were made: flags (with the seed), machine, package versions, commit and date."""
    return {
        "config": as_json(config),
        "machine": describe_machine(device),
        "versions": versions(),
        "git": git_revision(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_report(folder: Path, origin: Mapping[str, Any], results: Mapping[str, Any], table: str = "") -> None:
    """Writes results.json (`origin` as `provenance` gives it, then the results) and table.md, and prints the table."""
    write_json(folder / "results.json", {**origin, **results})
    if table:
        with atomic(folder / "table.md") as out:
            out.write(table.encode())
        print(table)


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Cells by column; the columns are all keys of all rows, and a cell that a row does not have is "-"."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "-") for column in columns] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def with_interval(figure: Mapping[str, float], style: str) -> str:
    """`mean [low, high]` in a format such as ".4g"."""
    return "{} [{}, {}]".format(*(format(figure[key], style) for key in ("mean", "low", "high")))


def logged_values(run: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) from each line of a run's metrics.jsonl that has the metric."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
