"""Quality of single images, on pixels rounded to 8 bits, and distances between two sets of images, by their features.

No figure depends on batches: an image is measured alone, and a set from all of its features at once.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_msssim
import torch
from PIL import Image
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn

from ldm_vae.data.images import Pixels

SMALLEST_FOR_SSIM = 11
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
SMALLEST_SET = NEIGHBOURS + 1
"""Fewest images in a set for which every distance between sets is defined."""
DISTANCE_ROWS = 1024
"""Points whose distances are computed at a time."""


def psnr(pixels: Pixels, reconstructions: Pixels) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of uint8 (N, H, W, C): (N,); infinite for equal images.

    One mean squared error over all values of an image, peak 255.
    """
    difference = pixels.astype(np.float64) - reconstructions.astype(np.float64)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / np.square(difference).mean(axis=(1, 2, 3)))


def as_float_batch(pixels: Pixels) -> Tensor:
    """uint8 (H, W, C) -> float64 (1, C, H, W) in 0..255."""
    return torch.from_numpy(np.moveaxis(pixels, 2, 0)[None].astype(np.float64))


def ssim(pixels: Pixels, reconstruction: Pixels) -> float:
    """Structural similarity of two uint8 (H, W, C) (Wang et al. 2004): Gaussian window of 11, sigma 1.5, range 255.

    The mean over channels and over the places where the window fits; NaN for images smaller than the window.
    """
    if min(pixels.shape[:2]) < SMALLEST_FOR_SSIM:
        return float("nan")
    return float(pytorch_msssim.ssim(as_float_batch(reconstruction), as_float_batch(pixels), data_range=255))


def ms_ssim(pixels: Pixels, reconstruction: Pixels) -> float:
    """Multi-scale SSIM of two uint8 (H, W, C) (Wang et al. 2003), five scales; NaN below 161 pixels."""
    if min(pixels.shape[:2]) < 161:  # five scales of an 11-pixel window need (11 - 1) * 2^4 + 1 pixels
        return float("nan")
    return float(pytorch_msssim.ms_ssim(as_float_batch(reconstruction), as_float_batch(pixels), data_range=255))


def ssimulacra2(pixels: Pixels, reconstruction: Pixels) -> float:
    """SSIMULACRA2 of two uint8 (H, W, 3), by the `ssimulacra2` package: 100 is equal, 70 is good, below 0 is poor.

    NaN for other channel counts and for images under 8 pixels.
    """
    from ssimulacra2 import compute_ssimulacra2

    if pixels.shape[2] != 3 or min(pixels.shape[:2]) < 8:
        return float("nan")
    with tempfile.TemporaryDirectory() as folder:  # the package reads files
        paths = [str(Path(folder) / name) for name in ("original.png", "reconstruction.png")]
        for path, image in zip(paths, (pixels, reconstruction), strict=True):
            Image.fromarray(image).save(path, compress_level=1)
        return float(compute_ssimulacra2(*paths))


def mean_with_interval(values: np.ndarray) -> dict[str, float]:
    """Mean, its 95 % percentile bootstrap interval (Efron 1979), and the number of images.

    Over the finite values; NaN without any.
    """
    finite = values[np.isfinite(values)].astype(float)
    if not len(finite):
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "images": 0}
    resamples = np.random.default_rng(0).integers(len(finite), size=(2000, len(finite)))
    low, high = np.percentile(finite[resamples].mean(axis=1), [2.5, 97.5])
    return {"mean": float(finite.mean()), "low": float(low), "high": float(high), "images": len(finite)}


def ratio_of_medians(values: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """The ratio of two sets' medians, and its 95 % percentile bootstrap interval, both sets drawn anew."""
    generator = np.random.default_rng(0)

    def medians(numbers: np.ndarray) -> np.ndarray:
        drawn = generator.integers(len(numbers), size=(2000, len(numbers)))
        return np.median(numbers[drawn], axis=1)

    low, high = np.percentile(medians(values) / medians(others), [2.5, 97.5])
    return {"ratio": float(np.median(values) / np.median(others)), "low": float(low), "high": float(high)}


def bjontegaard_rate(
    rates: Sequence[float],
    fidelities: Sequence[float],
    reference_rates: Sequence[float],
    reference_fidelities: Sequence[float],
    *,
    between: tuple[float, float] = (0.0, math.inf),
) -> float:
    """Mean difference in rate at equal fidelity, in percent: -40 is 40 % fewer bits than the reference.

    Bjøntegaard 2001 (VCEG-M33), with piecewise cubic Hermite curves of log-rate over fidelity, as in ITU-T's later
    spreadsheets: they do not overshoot. NaN where the curves share no fidelity.

    Args:
        rates, fidelities: points of a curve, in any order; fidelity rises with the rate. Of equal fidelities, the
            fewest bits count.
        between: bits per pixel. Only fidelities count that both curves reach at a rate within.
    """
    curves, lows, highs = [], [], []
    for r, f in ((rates, fidelities), (reference_rates, reference_fidelities)):
        order = np.lexsort((r, f))
        x, first = np.unique(np.asarray(f, float)[order], return_index=True)
        y = np.log(np.asarray(r, float)[order][first])
        if len(x) < 2 or not np.isfinite(x).all():
            return math.nan
        curve = PchipInterpolator(x, y)
        grid = np.linspace(x[0], x[-1], 4001)
        rate = np.exp(curve(grid))
        inside = grid[(rate >= between[0]) & (rate <= between[1])]
        if not len(inside):
            return math.nan
        curves.append(curve)
        lows.append(inside[0])
        highs.append(inside[-1])
    low, high = max(lows), min(highs)
    if low >= high:
        return math.nan
    means = [curve.integrate(low, high) / (high - low) for curve in curves]
    return float(100 * (math.exp(means[0] - means[1]) - 1))


class PrecomputedFeatures(nn.Identity):
    """Features (N, D) in the place where torchmetrics expects a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features  # otherwise torchmetrics runs a random image to find D


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to features (N, D) and (M, D), by torchmetrics (Heusel et al. 2017).

    Squared distance of means plus tr(S1 + S2 - 2 sqrt(S1 S2)), in float64, covariances over N - 1. It is biased
    upwards, the more the fewer images there are, and S1, S2 are singular for N <= D: compare at one N only.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=PrecomputedFeatures(features.shape[1]))
    metric.update(features.double().cpu(), real=True)
    metric.update(others.double().cpu(), real=False)
    return max(float(metric.compute()), 0.0)  # rounding can take equal sets slightly below zero


def kernel_distance(features: Tensor, others: Tensor, *, seed: int = 0) -> float:
    """Unbiased squared maximum mean discrepancy of features (N, D) and (M, D), through torchmetrics.

    Kernel (x.y / D + 1)^3 (Bińkowski et al. 2018, "Demystifying MMD GANs", section 4), in float64. Being unbiased, it
    can be negative, and is for equal sets. Sets of up to 1000 images are compared as a whole, larger ones as the mean
    over 100 pairs of subsets of 1000, drawn from `seed`.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    whole = len(features) == len(others) <= KERNEL_SUBSET_SIZE
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # it uses torch's global generator
        warnings.simplefilter("ignore")  # that it keeps the features
        torch.random.default_generator.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=PrecomputedFeatures(features.shape[1]),
            subsets=1 if whole else KERNEL_SUBSETS,
            subset_size=min(len(features), len(others), KERNEL_SUBSET_SIZE),
        )
        metric.update(features.double().cpu(), real=True)
        metric.update(others.double().cpu(), real=False)
        return float(metric.compute()[0])


def precision_recall(features: Tensor, generated: Tensor) -> tuple[float, float]:
    """Shares of generated (M, D) near real features (N, D), and of real ones near generated (Kynkäänniemi et al. 2019).

    Near: within the ball around a point of the other set that reaches to its third nearest neighbour there
    ("Improved Precision and Recall Metric for Assessing Generative Models", equations 1 and 2), in float64.
    """
    real, fake = features.double().cpu(), generated.double().cpu()
    precision = within_balls(fake, real, neighbour_distances(real)).double().mean()
    recall = within_balls(real, fake, neighbour_distances(fake)).double().mean()
    return float(precision), float(recall)


def exact_distances(points: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances (N, M), exactly zero between equal points, as |x|^2 + |y|^2 - 2 x.y would not be."""
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_distances(points: Tensor) -> Tensor:
    """From each of (N, D) to the third nearest of the others: (N,)."""
    rows = points.split(DISTANCE_ROWS)
    return torch.cat([exact_distances(r, points).kthvalue(NEIGHBOURS + 1, dim=1).values for r in rows])  # 1st: itself


def within_balls(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Which of the points (N, D) lie in a ball around one of the centres (M, D): (N,) of bool."""
    rows = points.split(DISTANCE_ROWS)
    return torch.cat([(exact_distances(r, centres) <= radii).any(dim=1) for r in rows])
