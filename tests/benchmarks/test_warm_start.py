"""Runs are compared with those of as many steps from the other start; the runs here are written by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.studies import warm_start
from ldm_vae.errors import DataError


def write_run(folder: Path, values: dict[str, float], *, seconds: float) -> None:
    """A run that reconstructs each image with the PSNR given."""
    (folder / "reconstruction").mkdir(parents=True)
    mean = sum(values.values()) / len(values)
    metrics = {metric: {"mean": mean, "low": 0.0, "high": 0.0} for metric in warm_start.METRICS}
    record = {"results": {"some model": {"metrics": metrics}}}
    (folder / "reconstruction" / "results.json").write_text(json.dumps(record))
    with (folder / "reconstruction" / "per_image.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["image", *warm_start.METRICS])
        rows.writerows([name, *[value] * len(warm_start.METRICS)] for name, value in values.items())
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": seconds}))


def test_the_gain_is_that_of_the_same_images_after_as_many_steps(tmp_path: Path) -> None:
    runs, output = tmp_path / "runs", tmp_path / "out"
    write_run(runs / "tiles" / "nothing-100", {"a": 20.0, "b": 30.0}, seconds=60)
    write_run(runs / "tiles" / "box-100", {"b": 31.0, "a": 23.0}, seconds=61)
    write_run(runs / "tiles" / "box-500", {"a": 40.0, "b": 40.0}, seconds=300)  # its counterpart is not there yet
    write_run(runs / "tiles" / "box-0", {"a": 22.0, "b": 22.0}, seconds=0)
    warm_start.main(warm_start.Config(runs=runs, output=output))
    record = json.loads((output / "results.json").read_text())
    assert len(record["autoencoders"]) == 4
    [gain] = record["gains"]
    assert (gain["folder"], gain["steps"]) == ("tiles", 100)
    assert (gain["psnr"]["mean"], gain["psnr"]["low"], gain["psnr"]["high"]) == pytest.approx((2, 1, 3))
    lines = (output / "table.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    psnr = [dict(zip(("folder", "steps", "nothing", "box"), (*c[:2], c[4], c[5]), strict=True)) for c in cells]
    assert [(line["steps"], line["nothing"], line["box"]) for line in psnr] == [
        ("0", "-", "22.00"),
        ("100", "25.00", "27.00"),
        ("500", "-", "40.00"),
    ]
    assert Image.open(output / "warm_start.png").width == 900


def test_of_diffusion_models_losses_and_the_last_samples_are_side_by_side(tmp_path: Path) -> None:
    runs, output = tmp_path / "runs", tmp_path / "out"
    for start, loss in (("nothing", 0.9), ("box", 0.7)):
        run = runs / "clothing" / start
        (run / "samples").mkdir(parents=True)
        lines = [{"step": 10, "val_loss": 1.0}, {"step": 300, "val_loss": loss}, {"step": 300, "seconds": 320.0}]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        Image.new("RGB", (200, 100), "red" if start == "box" else "black").save(run / "samples" / "step-300.png")
    warm_start.main(warm_start.Config(runs=runs, output=output))
    assert (output / "table.md").read_text().splitlines()[2:] == [
        "| from nothing | 320 | 1.000 | 0.900 |",
        "| from the box | 320 | 1.000 | 0.700 |",
    ]
    sheet = np.asarray(Image.open(output / "clothing.jpg"))
    assert sheet.shape == (500, 2000, 3)
    assert sheet[250, 500, 0] < 50 < 200 < sheet[250, 1500, 0]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"warm_start\.sh makes them"):
        warm_start.main(warm_start.Config(runs=tmp_path, output=tmp_path / "out"))
