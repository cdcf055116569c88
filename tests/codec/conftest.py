from __future__ import annotations

import numpy as np
import pytest
from small_vae import make_vae

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.fit_tables import fit_tables
from ldm_vae.data.sources import open_source


@pytest.fixture(scope="session")
def codec() -> LatentCodec:
    vae = make_vae()
    source = open_source("procedural:dead-leaves", channels=3, resolution=96)
    return LatentCodec(vae, fit_tables(vae, source, num_images=6, steps=(0.375, 1, 2)))


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """Pixels uint8 (80, 120, 3) with edges, smooth parts and texture."""
    y, x = np.mgrid[:80, :120]
    smooth = np.stack([y * 2, x * 2, 255 - x - y], axis=2)
    noise = np.random.default_rng(0).integers(0, 60, size=(80, 120, 3))
    return (
        np.where((x > 60)[:, :, None], smooth, (smooth + noise * (y % 16 < 8)[:, :, None]))
        .clip(0, 255)
        .astype(np.uint8)
    )
