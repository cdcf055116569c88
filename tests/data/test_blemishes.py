from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.data import blemishes
from ldm_vae.data.blemishes import with_blemishes

GREY = np.full((80, 90, 3), 128, np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_blemishes_are_where_the_map_says(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nowhere else; one in four images has none."""
    monkeypatch.setattr(blemishes, "relit", lambda values, rng: values)
    top = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    noise = np.random.default_rng(0).uniform(0.2, 0.8, (48, 40, 3))
    pixels = (noise * top).round(0 if dtype != np.float32 else 9).astype(dtype)
    clean = 0
    for seed in range(200):
        damaged, where = with_blemishes(pixels, np.random.default_rng(seed))
        assert damaged.dtype == dtype
        change = np.abs(damaged.astype(float) - pixels).max(axis=2) / top * 255
        assert change[where].min(initial=9) > 2.5
        assert change[~where].max(initial=0) < 3.5
        clean += not where.any()
    assert 30 < clean < 85  # a fourth has none, and some are too faint


def test_another_light_is_no_blemish() -> None:
    lights = []
    for seed in range(50):
        damaged, where = with_blemishes(GREY, np.random.default_rng(seed), most=0)
        assert not where.any()
        lights.append(damaged.mean())
        assert np.abs(np.diff(damaged.astype(int), axis=0)).max() < 25
    assert np.std(lights) > 10


@pytest.mark.parametrize("side", [1, 2, 5, 300])
def test_images_of_every_size_can_have_blemishes(side: int) -> None:
    for seed in range(20):
        damaged, where = with_blemishes(np.full((side, 3, 1), 99, np.uint8), np.random.default_rng(seed))
        assert damaged.shape == (side, 3, 1)
        assert where.shape == (side, 3)
