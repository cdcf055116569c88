"""The timestep of each training image: a pure function of its position. No torch here."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ldm_vae.data.order import Stream, generator_at

Prediction = Literal["flow", "v", "epsilon"]
NUM_TIMESTEPS = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02
"""Linear between them: Ho et al. 2020, section 4."""


def timestep_at(prediction: Prediction, seed: int, position: int) -> float:
    """The timestep of the image at a position: in (0, 1000).

    flow: t is logit-normal, sigmoid of a standard normal (Esser et al. 2024, equation 19 with m = 0, s = 1).
    v, epsilon: uniform over 0..999.
    """
    rng = generator_at(seed, position, Stream.TIME)
    if prediction == "flow":
        return float(NUM_TIMESTEPS / (1 + np.exp(-rng.standard_normal())))
    return float(rng.integers(NUM_TIMESTEPS))
