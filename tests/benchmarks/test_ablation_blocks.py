from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.ablation_blocks import ChannelRMSNorm, main, psnr


def test_the_norm_is_that_of_the_equation() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = x / x.square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(ChannelRMSNorm(3)(x), expected, rtol=1e-4, atol=1e-5)


def test_psnr_is_of_the_centre_after_rounding() -> None:
    class OffByTwo(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.sample = x + 2.2 / 127.5
            return self  # type: ignore[return-value]

    photo = np.full((300, 280, 3), 255, np.uint8)  # where values are clipped; the centre is dark
    photo[22:278, 12:268] = 100
    expected = 10 * np.log10(255**2 / 4)  # 2.2 rounds to 2
    assert psnr(OffByTwo(), [photo]) == pytest.approx(expected)  # type: ignore[arg-type]


def test_variants_are_trained_for_the_time_given_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for folder, count in (("train", 16), ("val", 1)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
            small.resize((320, 260), Image.Resampling.BICUBIC).save(tmp_path / folder / f"{i}.jpg")
    words = ["--train", tmp_path / "train", "--val", tmp_path / "val", "--output", tmp_path / "out", "--seconds", 2]
    words += ["--only", "no norm, relu", "convnext"]
    monkeypatch.setattr(sys, "argv", ["ablation_blocks.py", *map(str, words)])
    main()
    rows = json.loads((tmp_path / "out" / "ablation_blocks.json").read_text())["rows"]
    assert [r["variant"] for r in rows] == ["no norm, relu", "convnext"]
    for row in rows:
        steps = row["images_per_second"] * 2 / 16
        assert steps == pytest.approx(round(steps))
        assert steps >= 1
        assert 5 < row["held_out_psnr"] < 40
        assert 5 < row["val_psnr"] < 40
