from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.studies import effort


def test_a_gain_is_the_rate_that_is_saved_at_equal_quality() -> None:
    saved = {"a": (1.0, 0.9), "b": (1.0, 0.7)}  # of the bits, by effort
    rows = [
        {"image": image, "effort": made, "bpp": rate * saved[image][made], "psnr": 30 + 5 * rate}
        for image in saved
        for made in (0, 1)
        for rate in (0.5, 1.0, 2.0)
    ]
    gain = effort.gain(rows, 1, "psnr")
    assert gain["mean"] == pytest.approx(-20)
    assert (gain["low"], gain["high"]) == pytest.approx((-30, -10))


def test_all_efforts_are_measured_and_the_table_has_them(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    y, x = np.mgrid[:32, :32]
    Image.fromarray(np.stack([8 * y, 8 * x, 128 + 0 * x], axis=2).astype(np.uint8)).save(tmp_path / "in" / "a.png")
    effort.main(effort.Config(data=str(tmp_path / "in"), output=tmp_path / "out", steps=(1.0,), num_images=1))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [figures["effort"] for figures in record["efforts"]] == [0, 1, 2, 3]
    assert len(record["rows"]) == 4
    assert len((tmp_path / "out" / "table.md").read_text().splitlines()) == 2 + 4
