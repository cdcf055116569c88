"""The study of editing: its sheets, and the visibility of a hole's edge as a number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.studies.editing import Config, edge_contrast, main
from ldm_vae.errors import ConfigError, DataError
from tests.pipelines.test_generate import save_pipeline


def test_the_contrast_of_an_edge_is_that_of_the_pixels_on_its_two_sides() -> None:
    images = torch.zeros(1, 3, 12, 12)
    images[:, :, 3:9, 3:9] = 10 / 127.5
    images[:, :, 5:7, 5:7] = 1.0  # not at the edge
    assert edge_contrast(images, slice(3, 9)).item() == pytest.approx(10, abs=1e-4)
    assert edge_contrast(torch.ones(1, 3, 12, 12), slice(3, 9)).item() == 0


def test_photos_are_varied_filled_and_joined(photos: Path, tmp_path: Path) -> None:
    model = save_pipeline(tmp_path / "model", classes=("first class", "zweite Klasse ü"))
    main(Config(model=model, data=str(photos), output=tmp_path / "edited", steps=2))
    sizes = {sheet.stem: Image.open(sheet).size for sheet in (tmp_path / "edited").glob("*.png")}
    assert sizes.keys() == {"strengths", "holes", "between"}
    assert sizes["strengths"][0] == sizes["holes"][0] < sizes["between"][0]  # 4 photos, and 2 with 7 frames between
    edge = json.loads((tmp_path / "edited" / "results.json").read_text())["edge"]
    assert 0 < edge["reconstruction"] < 255
    with pytest.raises(DataError, match=r"has other classes than .*model, which knows first class, zweite Klasse ü"):
        main(Config(model=model, data="procedural:shapes", output=tmp_path / "other"))
    unconditional = save_pipeline(tmp_path / "plain")
    with pytest.raises(ConfigError, match="plain has no classes"):
        main(Config(model=unconditional, data=str(photos), output=tmp_path / "other"))
