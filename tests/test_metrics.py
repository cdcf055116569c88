from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from ssimulacra2 import compute_ssimulacra2
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

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


def test_ms_ssim_is_that_of_torchmetrics() -> None:
    image, noisy = pair(200, 180, 3, 30)
    a, b = (torch.from_numpy(p.astype(np.float64)).permute(2, 0, 1)[None] for p in (noisy, image))
    ways = {"data_range": 255.0, "gaussian_kernel": True, "sigma": 1.5, "kernel_size": 11}
    reference = multiscale_structural_similarity_index_measure(a, b, **ways)
    assert metrics.ms_ssim(image, noisy) == pytest.approx(float(reference), abs=2e-3)


def test_the_metrics_of_an_image_and_its_negative_are_numbers() -> None:
    """Their structures are opposite: the product over scales has negative factors, whose powers are no numbers."""
    for image in (pair(192, 176, 3, 0)[0], np.tile(np.uint8([[0, 255]]), (192, 96))[:, :, None].repeat(3, axis=2)):
        assert 0 <= metrics.ms_ssim(image, 255 - image) < 0.1
        assert -1 <= metrics.ssim(image, 255 - image) < 0.1


@pytest.mark.parametrize("count", [2, 3])
def test_distances_of_few_images_are_numbers_where_they_are_defined(count: int) -> None:
    features, others = (torch.randn(count, 5, generator=torch.Generator().manual_seed(i)) for i in range(2))
    assert metrics.frechet_distance(features, others) > 0
    assert np.isfinite(metrics.kernel_distance(features, others))
    assert metrics.SMALLEST_SET == 4  # what benchmarks/generation.py asks for: the third neighbour needs four


def test_ssimulacra2_is_told_which_image_is_the_original(tmp_path: Path) -> None:
    """It is not symmetric."""
    image, noisy = pair(96, 120, 3, 25)
    for name, pixels in (("image", image), ("noisy", noisy)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    right, wrong = (
        compute_ssimulacra2(str(tmp_path / f"{a}.png"), str(tmp_path / f"{b}.png"))
        for a, b in (("image", "noisy"), ("noisy", "image"))
    )
    assert metrics.ssimulacra2(image, noisy) == right != wrong


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
    interval = metrics.mean_with_interval(values)
    low, high = interval["low"], interval["high"]
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.08)
    assert interval == metrics.mean_with_interval(values)


def features(count: int, width: int, *, seed: int, spread: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated, far from zero, not Gaussian, float32 as networks give them."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    return torch.from_numpy(np.maximum(rng.normal(size=(count, width)), 0) @ mixing * spread + 3 + shift).float()


def frechet_by_scipy(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s + t - 2 * root))


def unbiased_mmd(a: Tensor, b: Tensor) -> float:
    """Bińkowski et al. 2018, equation 4, term by term."""
    x, y = a.double().numpy(), b.double().numpy()
    m, n, width = len(x), len(y), x.shape[1]
    xx, yy, xy = ((u @ v.T / width + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx)) / (m * (m - 1)) + (yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * xy.mean())


@pytest.mark.parametrize(("count", "other"), [(500, 500), (400, 90)])
def test_the_frechet_distance_is_that_of_scipys_matrix_root(count: int, other: int) -> None:
    a, b = features(count, 24, seed=0), features(other, 24, seed=1, spread=1.3, shift=0.2)
    assert metrics.frechet_distance(a, b) == pytest.approx(frechet_by_scipy(a, b), rel=1e-7)
    assert metrics.frechet_distance(b, a) == pytest.approx(metrics.frechet_distance(a, b), rel=1e-7)


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    """Points whose sample mean and covariance are exact: |m - n|^2 + sum (sqrt(s) - sqrt(t))^2 for diagonal ones."""
    noise = np.random.default_rng(0).normal(size=(64, 9))
    white = np.linalg.qr(np.column_stack([np.ones(64), noise]))[0][:, 1:] * np.sqrt(63)
    s, t = np.arange(1, 10) / 3, np.arange(9, 0, -1) / 2
    a, b = torch.from_numpy(white * np.sqrt(s) + 1), torch.from_numpy(white[:, ::-1] * np.sqrt(t) - 0.5)
    closed = 9 * 1.5**2 + np.square(np.sqrt(s) - np.sqrt(t)).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("count", [200, 10])
def test_the_frechet_distance_of_equal_sets_is_zero_also_with_fewer_images_than_features(count: int) -> None:
    a = features(count, 32, seed=0)
    assert 0 <= metrics.frechet_distance(a, a.flip(0)) < 1e-6


def test_the_kernel_distance_is_the_unbiased_discrepancy_in_double_precision() -> None:
    a, b = features(300, 24, seed=0), features(300, 24, seed=1, spread=1.2)
    assert metrics.kernel_distance(a, b) == pytest.approx(unbiased_mmd(a, b), rel=1e-9)
    assert metrics.kernel_distance(a + 100, b + 100) == pytest.approx(unbiased_mmd(a + 100, b + 100), rel=1e-5)
    same = [metrics.kernel_distance(features(100, 8, seed=i), features(100, 8, seed=i + 50)) for i in range(50)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(50)  # without bias, and so below zero as well as above
    assert min(same) < 0 < max(same)


def test_the_kernel_distance_of_many_images_is_near_that_of_all_and_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "KERNEL_SUBSET_SIZE", 100)
    a, b = features(300, 24, seed=0), features(250, 24, seed=1, spread=1.2)
    state = torch.get_rng_state()
    first = metrics.kernel_distance(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert metrics.kernel_distance(a, b) == first
    assert metrics.kernel_distance(a, b, seed=1) != first
    assert first == pytest.approx(unbiased_mmd(a, b), rel=0.1)


def test_precision_and_recall_of_constructed_sets() -> None:
    """On a line: around a point of 0, 1, 2, ... the third nearest is 2 away, at the ends 3 and at the next 2."""
    real = torch.arange(10.0)[:, None]
    assert metrics.precision_recall(real, real) == (1.0, 1.0)
    assert metrics.precision_recall(real, real + 100) == (0.0, 0.0)
    half = torch.cat([real[:5], real[:5] + 100])  # one half of the generated is real, one half of the real is generated
    assert metrics.precision_recall(real, half)[0] == 0.5
    assert metrics.precision_recall(real, torch.tensor([[-3.0], [-3.01], [12.0], [12.01]]))[0] == 0.5  # balls of 3
    few = torch.tensor([[4.0], [4.1], [4.2], [4.3]])  # balls of 0.3, 0.2, 0.2 and 0.3 have no real point but 4
    assert metrics.precision_recall(real, few) == (1.0, 0.1)


def test_a_generator_that_makes_one_image_has_no_recall() -> None:
    real = features(50, 6, seed=0)
    assert metrics.precision_recall(real, real[:1].expand(50, -1)) == (1.0, 1 / 50)


def test_precision_and_recall_do_not_depend_on_how_many_rows_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(70, 6, seed=0), features(60, 6, seed=1, spread=1.5)
    whole = metrics.precision_recall(a, b)
    assert 0 < whole[0] < 1
    monkeypatch.setattr(metrics, "DISTANCE_ROWS", 7)
    assert metrics.precision_recall(a, b) == whole


def test_bjontegaard_rate_of_curves_that_are_a_factor_apart() -> None:
    rates, fidelities = np.array([0.1, 0.2, 0.4, 0.8]), np.array([26.0, 28.5, 31.0, 34.0])
    assert metrics.bjontegaard_rate(0.6 * rates, fidelities, rates, fidelities) == pytest.approx(-40)
    assert metrics.bjontegaard_rate(1.25 * rates[::-1], fidelities[::-1], rates, fidelities) == pytest.approx(25)
    within = metrics.bjontegaard_rate(0.6 * rates, fidelities, rates, fidelities, between=(0.15, 0.6))
    assert within == pytest.approx(-40)


def test_bjontegaard_rate_is_the_mean_over_the_fidelities_that_both_reach() -> None:
    """Straight lines of log-rate: their mean distance, by hand."""
    fidelities = np.linspace(20, 30, 6)
    reference = np.exp(0.2 * fidelities)
    steeper = np.exp(0.25 * fidelities - 1.0)
    assert metrics.bjontegaard_rate(steeper, fidelities, reference, fidelities) == pytest.approx(
        100 * (np.exp(0.25) - 1), rel=1e-3
    )
    low, high = float(np.exp(0.2 * 22)), float(np.exp(0.2 * 26))
    limited = metrics.bjontegaard_rate(steeper, fidelities, reference, fidelities, between=(low, high))
    first, last = max(22, (np.log(low) + 1) / 0.25), min(26, (np.log(high) + 1) / 0.25)
    expected = 0.05 * (first + last) / 2 - 1
    assert limited == pytest.approx(100 * (np.exp(expected) - 1), abs=0.1)


def test_bjontegaard_rate_of_curves_that_share_nothing_is_not_a_number() -> None:
    assert np.isnan(metrics.bjontegaard_rate([1, 2], [20, 21], [1, 2], [30, 31]))
    assert np.isnan(metrics.bjontegaard_rate([1], [20], [1, 2], [20, 31]))


def test_bjontegaard_rate_counts_the_fewest_bits_of_equal_fidelities() -> None:
    reference = [1, 2, 4], [20, 25, 30]
    assert metrics.bjontegaard_rate([2, 1, 2, 2.5, 4], [25, 20, 20, 25, 30], *reference) == pytest.approx(0)


def test_the_ratio_of_medians_has_an_interval_that_narrows_with_the_number_of_values() -> None:
    rng = np.random.default_rng(0)
    few, many = (metrics.ratio_of_medians(3 * rng.gamma(9, size=n), rng.gamma(9, size=n)) for n in (50, 5000))
    assert metrics.ratio_of_medians(np.array([1.0, 4.0, 9.0]), np.array([2.0, 2.0]))["ratio"] == 2
    for found in (few, many):
        assert found["low"] < 3 < found["high"]
    assert many["high"] - many["low"] < 0.2 < few["high"] - few["low"]
