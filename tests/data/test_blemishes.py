from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.data import blemishes
from ldm_vae.data.blemishes import blemished, with_blemishes

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
        pair = with_blemishes(pixels, np.random.default_rng(seed))
        assert pair.input.dtype == dtype
        assert set(np.unique(pair.target)) <= {0, 255}
        where = pair.target[:, :, 0] == 255
        change = np.abs(pair.input.astype(float) - pixels).max(axis=2) / top * 255
        assert change[where].min(initial=9) > 2.5
        assert change[~where].max(initial=0) < 3.5
        clean += not where.any()
    assert 30 < clean < 85  # a fourth has none, and some are too faint


def test_another_light_is_no_blemish() -> None:
    lights = []
    for seed in range(50):
        pair = with_blemishes(GREY, np.random.default_rng(seed), most=0)
        assert not pair.target.any()
        lights.append(pair.input.mean())
        assert np.abs(np.diff(pair.input.astype(int), axis=0)).max() < 25
    assert np.std(lights) > 10


@pytest.mark.parametrize("side", [1, 2, 5, 300])
def test_images_of_every_size_can_have_blemishes(side: int) -> None:
    for seed in range(20):
        pair = with_blemishes(np.full((side, 3, 1), 99, np.uint8), np.random.default_rng(seed))
        assert pair.input.shape == pair.target.shape == (side, 3, 1)


def test_blemishes_are_regions_of_all_sizes_that_are_darker_brighter_or_from_elsewhere() -> None:
    stripes = np.tile(np.repeat([40, 200], 4), 8) / 255  # vertical ones
    values = np.tile(stripes, (64, 1))[:, :, None].repeat(3, axis=2).astype(np.float32)
    changed, across = [], []
    for seed in range(60):
        damaged = blemished(values, np.random.default_rng(seed)).clip(0, 1)
        changed.append((np.abs(damaged - values) > 0.5 / 255).any(axis=2).mean())
        across.append(np.abs(np.diff(damaged[:, :, 0], axis=0)).max() > 120 / 255)  # a stripe turned, or its end
    assert max(changed) < 0.9
    assert np.percentile(changed, 10) < 0.01 < 0.1 < np.percentile(changed, 90)  # radii from 1 pixel to 0.4 of the side
    assert 0.2 < np.mean(across) < 0.8
    grey = GREY.astype(np.float32) / 255
    changes = [blemished(grey, np.random.default_rng(seed)) - grey for seed in range(60)]
    assert all((c > -1e-5).all() or (c < 1e-5).all() for c in changes)
    assert 0.2 < np.mean([c.max() > 0.5 / 255 for c in changes]) < 0.8
    assert blemished(values[:40], np.random.default_rng(1)).dtype == np.float32  # not square
