from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ldm_vae import metrics

RNG = np.random.default_rng(0)


def pair(height: int, width: int, channels: int, strength: int) -> tuple[np.ndarray, np.ndarray]:
    coarse = RNG.integers(0, 256, (height // 8 + 1, width // 8 + 1, channels))
    image = np.kron(coarse, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)
    noisy = np.clip(image + RNG.normal(0, strength, image.shape), 0, 255).astype(np.uint8)
    return image, noisy


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [2, 20, 80])
def test_psnr_and_ssim_are_those_of_scikit_image(channels: int, strength: int) -> None:
    image, noisy = pair(61, 83, channels, strength)
    assert metrics.psnr(image[None], noisy[None])[0] == pytest.approx(
        peak_signal_noise_ratio(image, noisy, data_range=255), abs=1e-9
    )
    reference = structural_similarity(
        image,
        noisy,
        data_range=255,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert metrics.ssim(image, noisy) == pytest.approx(reference, abs=1e-6)


def test_equal_images_have_the_best_of_every_metric_and_noise_lowers_it() -> None:
    image, _ = pair(192, 176, 3, 0)
    assert np.isinf(metrics.psnr(image[None], image[None])[0])
    for metric, best in ((metrics.ssim, 1), (metrics.ms_ssim, 1), (metrics.ssimulacra2, 100)):
        values = [metric(image, image)] + [metric(image, pair_of(image, s)) for s in (5, 20, 60)]
        assert values[0] == pytest.approx(best, abs=1e-3)
        assert values == sorted(values, reverse=True)


def pair_of(image: np.ndarray, strength: int) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, strength, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def test_images_too_small_for_a_metric_have_none() -> None:
    image, noisy = pair(9, 9, 3, 5)
    assert np.isnan(metrics.ssim(image, noisy))
    assert np.isnan(metrics.ms_ssim(image, noisy))
    assert np.isnan(metrics.ssimulacra2(image[:5], noisy[:5]))
    assert np.isnan(metrics.ssimulacra2(image[:, :, :1], noisy[:, :, :1]))


def test_the_bootstrap_interval_is_that_of_the_standard_error() -> None:
    values = RNG.normal(30, 4, 400)
    low, high = metrics.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.08)
    assert (low, high) == metrics.bootstrap_interval(values)
