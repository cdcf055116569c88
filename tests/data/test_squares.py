from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_vae.data.images import Sample, centre_square
from ldm_vae.data.sources import open_source
from ldm_vae.data.squares import shuffled_squares


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 images of 20x12 whose grey is their number, 16-bit ones among them, and two that are damaged."""
    for i in range(30):
        path = tmp_path / ("even" if i % 2 == 0 else "odd") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        grey = np.full((12, 20), i * 257 if i % 5 == 0 else i, np.uint16 if i % 5 == 0 else np.uint8)
        Image.fromarray(grey).save(path)
    for name in ("bad.png", "worse.png"):
        (tmp_path / "odd" / name).write_bytes(b"damage")
    return tmp_path


def read(folder: Path, *, seed: int = 0, limit: int = 99) -> tuple[list[Sample], dict[str, str]]:
    bad: dict[str, str] = {}
    source = open_source(str(folder), channels=1)
    return list(shuffled_squares(source, resolution=8, seed=seed, limit=limit, bad_images=bad)), bad


def test_each_usable_image_comes_once_as_a_square_of_bytes_with_its_class(folder: Path) -> None:
    samples, bad = read(folder)
    assert sorted(s.name for s in samples) == sorted(f"{'odd' if i % 2 else 'even'}/{i:02d}.png" for i in range(30))
    for sample in samples:
        number = int(Path(sample.name).stem)
        assert sample.pixels.dtype == np.uint8
        assert np.array_equal(sample.pixels, np.full((8, 8, 1), number))
        assert sample.label == number % 2
    assert sorted(bad) == ["odd/bad.png", "odd/worse.png"]


def test_a_part_is_the_beginning_of_the_whole_in_an_order_of_the_seed(folder: Path) -> None:
    whole = [s.name for s in read(folder)[0]]
    assert [s.name for s in read(folder, limit=7)[0]] == whole[:7]
    assert [s.name for s in read(folder, seed=1)[0]] != whole
    assert len({name[:3] for name in whole[:8]}) == 2  # of both classes


def test_the_square_is_that_of_the_other_benchmarks(photos: Path) -> None:
    source = open_source(str(photos))
    for sample in shuffled_squares(source, resolution=24, seed=0, limit=3, bad_images={}):
        original = np.asarray(Image.open(photos / sample.name))
        assert np.array_equal(sample.pixels, centre_square(original, 24))
