from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.studies import quality_scale
from benchmarks.studies.quality_scale import fitted_scale, step_like

OURS = [{"step": step, "ssimulacra2": 70 - 10 * math.log2(step)} for step in (0.25, 0.5, 1.0, 2.0, 4.0)]


def test_the_step_that_looks_the_same_lies_between_those_measured_on_a_logarithmic_scale() -> None:
    assert step_like(75, OURS) == pytest.approx(2**-0.5)
    assert step_like(50, OURS) == pytest.approx(4)
    assert math.isnan(step_like(91, OURS))
    assert math.isnan(step_like(49, OURS))


def test_the_scale_of_qualities_whose_looks_are_known_is_found() -> None:
    """By 22 points a step, from 0.46 at 75; the looks of 100 are out of reach."""
    others = [
        {"format": kind, "quality": quality, "ssimulacra2": 70 - 10 * (math.log2(0.46) + (75 - quality) / 22) + more}
        for quality in (30, 50, 75, 90, 100)
        for kind, more in (("WEBP", -4), ("AVIF", 4), ("JPEG", 17))
    ]
    assert fitted_scale(others, OURS) == pytest.approx({"usual_step": 0.46, "halving": 22})
    assert fitted_scale(others[-3:], OURS) == {}


def test_all_settings_are_measured_and_the_record_has_them(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    y, x = np.mgrid[:64, :64]
    Image.fromarray(np.stack([4 * y, 4 * x, 128 + 0 * x], axis=2).astype(np.uint8)).save(tmp_path / "in" / "a.png")
    quality_scale.main(
        quality_scale.Config(
            data=str(tmp_path / "in"), output=tmp_path / "out", qualities=(75,), steps=(0.4, 4.0), num_images=1
        )
    )
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["step"] for row in record["ours"]] == [0.4, 4.0]
    assert record["ours"][0]["ssimulacra2"] > record["ours"][1]["ssimulacra2"]
    assert {row["format"] for row in record["others"]} == {"JPEG", "WEBP", "AVIF"}
    assert len((tmp_path / "out" / "table.md").read_text().splitlines()) == 2 + 3 + 2
