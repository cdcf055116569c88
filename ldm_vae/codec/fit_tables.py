"""Measure a VAE's posterior over a data set, and fit a codec's tables to what it encodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from ldm_vae.codec.fit_contexts import fit_contexts
from ldm_vae.codec.quality import step_of_quality
from ldm_vae.codec.tables import Floats, Tables, fixed_point
from ldm_vae.data.conversion import to_images
from ldm_vae.data.sources import Source, shuffled, usable
from ldm_vae.errors import ConfigError, ModelError, nothing_usable
from ldm_vae.models.interface import encode_moments, fingerprint, is_variational, stride_of
from ldm_vae.progress import progress

STEPS = tuple(step_of_quality(100 - 16.5 * i) for i in range(7))
"""Those of the qualities 100 to 1, evenly apart."""
LARGEST = 768
"""Pixels a side: of larger images the middle is taken, so that hundreds of latents fit into memory."""
RAREST = 1e-4
"""A channel with fewer symbols other than 0, at the finest step, is not coded."""


def fit_tables(
    vae: Any,
    source: Source,
    *,
    num_images: int = 400,
    steps: Sequence[float] = STEPS,
    show: bool = False,
) -> Tables:
    """Tables for a VAE from images of a source, in the order of training with seed 0.

    Args:
        steps: at which contexts are fitted; those in between take the nearest.
        show: whether bars show the progress.

    Raises:
        ModelError: a VAE without a posterior, or with one that says nothing.
        DataError: no usable image.
    """
    if not is_variational(vae):
        raise ModelError(f"{type(vae).__name__} has no posterior to take the quantiser's steps from")
    fixed = sorted({fixed_point(step) for step in steps})
    if not fixed:
        raise ConfigError("no steps are given")
    means, sigma = measure(vae, source, num_images, show)
    if not (np.isfinite(sigma).all() and (sigma > 0).all()):
        raise ModelError("the VAE's posterior deviations are not finite and above 0")
    latents_mean = np.concatenate([m.reshape(len(m), -1) for m in means], axis=1).mean(axis=1, dtype=np.float64)
    step_of_1 = np.allclose(sigma, 12**-0.5)  # as codec training has it: rounded to multiples of the step itself
    centres = np.zeros(len(sigma)) if step_of_1 else latents_mean
    tables = Tables(
        vae=fingerprint(vae),
        sigma=sigma,
        means=centres,
        channels=tuple(range(len(sigma))),
        steps=tuple(fixed),
        contexts=(),
    )
    used = np.concatenate([tables.quantise(m, fixed[0]).reshape(len(m), -1) != 0 for m in means], axis=1).mean(axis=1)
    channels = tuple(c for c in tables.channels if used[c] >= RAREST) or (0,)  # in the order of the prior's training
    coded = np.isin(np.arange(len(sigma)), channels)
    tables = replace(tables, channels=channels, means=np.where(coded, centres, latents_mean))
    bar = progress(fixed, description="fitting", unit="step", show=show)
    fitted = tuple(fit_contexts([tables.quantise(m, q) for m in means]) for q in bar)
    return replace(tables, contexts=fitted)


@torch.inference_mode()
def measure(vae: Any, source: Source, num_images: int, show: bool) -> tuple[list[Floats], Floats]:
    """Posterior means (c, h, w) of the images' middles, cut to the stride, and the deviations' rms (c,)."""
    stride, device = stride_of(vae), next(vae.parameters()).device
    means: list[Floats] = []
    bad: dict[str, str] = {}
    variance, count = np.zeros(1), 0
    indices = list(islice(shuffled(source, seed=0), num_images))
    bar = progress(indices, description="measuring", unit="image", show=show)
    for index, sample in usable(source, bad, indices=bar):
        pixels = sample.pixels
        height, width = (min(n, LARGEST) // stride * stride for n in pixels.shape[:2])
        if not height or not width:
            bad[source.name(index)] = f"smaller than the stride of {stride}"
            continue
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        images = to_images(pixels[top : top + height, left : left + width])[None].to(device)
        mean, logvar = encode_moments(vae, images).float().chunk(2, dim=1)
        means.append(mean[0].cpu().numpy())
        variance = variance + logvar.clamp(-30, 20).double().exp().sum(dim=(0, 2, 3)).cpu().numpy()
        count += means[-1][0].size
    if not means:
        raise nothing_usable(bad)
    return means, np.sqrt(variance / count)
