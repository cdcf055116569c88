from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ldm_vae.data.corruption import UNKNOWN_LEVEL, parse_corruption
from ldm_vae.data.loader import CropDataset, collate, with_tensors
from ldm_vae.data.sources import open_source
from ldm_vae.errors import BadImageError, ConfigError

GREY = np.full((80, 90, 3), 128, np.uint8)


def applied(text: str, pixels: np.ndarray = GREY, seed: int = 0) -> tuple[np.ndarray, float]:
    pair = parse_corruption(text)(pixels, np.random.default_rng(seed))
    assert pair.target is pixels
    return pair.input, pair.noise_level


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_gaussian_noise_has_the_deviation_asked_for_in_every_type(dtype: type) -> None:
    top = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    pixels = np.full((80, 90, 3), top / 2).astype(dtype)
    damaged, level = applied("gaussian:20", pixels)
    assert damaged.dtype == dtype
    assert level == 20
    error = (damaged.astype(float) - pixels) / top * 255
    assert error.std() == pytest.approx(20, rel=0.03)
    assert abs(error.mean()) < 1


def test_a_range_is_drawn_from_evenly_and_the_level_is_told() -> None:
    levels = [applied("gaussian:10-50", GREY[:4, :4], seed)[1] for seed in range(400)]
    assert min(levels) >= 10
    assert max(levels) <= 50
    assert np.mean(levels) == pytest.approx(30, abs=2)


def test_masking_makes_that_share_of_places_grey() -> None:
    pixels = np.zeros((100, 100, 3), np.uint8)
    damaged, level = applied("masking:0.3", pixels)
    assert level == UNKNOWN_LEVEL
    assert set(np.unique(damaged)) == {0, 128}
    hidden = (damaged == 128).all(axis=2)
    assert hidden.mean() == pytest.approx(0.3, abs=0.02)
    assert ((damaged == 128).any(axis=2) == hidden).all()  # all channels of a place together


def test_shot_noise_has_a_variance_in_proportion_to_the_light() -> None:
    for value in (64, 192):
        damaged, _ = applied("poisson:100", np.full((200, 200, 1), value, np.uint8))
        share = value / 255
        assert damaged.mean() == pytest.approx(value, rel=0.01)
        assert damaged.std() == pytest.approx(255 * np.sqrt(share / 100), rel=0.05)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows_of_that_quality(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(24, 32, channels), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "JPEG", quality=20)
    assert np.array_equal(applied("jpeg:20", pixels)[0].squeeze(), np.asarray(Image.open(file)))
    with pytest.raises(BadImageError, match="2 channels"):
        applied("jpeg:20", pixels[:, :, :1].repeat(2, axis=2))


@pytest.mark.parametrize(
    "text", ["", "gaussian", "gaussian:", "gaussian:-3", "gaussian:9-3", "blur:3", "masking:1.5", "jpeg:0", "poisson:0"]
)
def test_what_is_no_corruption_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match="--corruption"):
        parse_corruption(text)


def test_crops_are_damaged_by_their_position_and_every_second_is_told_its_level() -> None:
    source = open_source("procedural:dead-leaves", resolution=32)
    corruption = parse_corruption("gaussian:5-50")
    plain = CropDataset(source, seed=3, resolution=16)
    noisy = CropDataset(source, seed=3, resolution=16, pairing=corruption.told_half_the_time)
    batch = with_tensors(collate([noisy[i] for i in range(200)]))
    assert batch.inputs is not None
    assert batch.noise_levels is not None
    again = with_tensors(collate([noisy[i] for i in reversed(range(200))]))
    assert (again.inputs.flip(0) == batch.inputs).all()
    assert (batch.images.numpy() == collate([plain[i] for i in range(200)]).images).all()  # the targets are clean
    told = batch.noise_levels >= 0
    assert 70 < told.sum() < 130
    middle = (batch.images.abs() < 0.4).all(dim=1, keepdim=True).expand_as(batch.images)  # where nothing is clipped
    for i in told.nonzero().flatten()[:20].tolist():
        error = (batch.inputs[i] - batch.images[i])[middle[i]] * 127.5
        if len(error) > 200:
            assert error.std().item() == pytest.approx(batch.noise_levels[i].item(), rel=0.25)
    assert collate([plain[0]]).inputs is None
