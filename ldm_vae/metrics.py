"""Image quality on rounded pixels: every figure is of one image, so no figure depends on a batch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytorch_msssim
import torch
from PIL import Image
from torch import Tensor

from ldm_vae.data.images import Pixels

SMALLEST_FOR_SSIM = 11
SMALLEST_FOR_MS_SSIM = 161
"""Five scales of an 11-pixel window need (11 - 1) * 2^4 + 1 pixels."""


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
    if min(pixels.shape[:2]) < SMALLEST_FOR_MS_SSIM:
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


def bootstrap_interval(values: np.ndarray, *, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, from resampled images (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
