"""Quality, 1 to 100, as users choose it, and the quantiser's step that it stands for."""

from __future__ import annotations

import math

from ldm_vae.errors import ConfigError

USUAL_QUALITY = 75
"""Where none is given."""
USUAL_STEP = 0.38
"""The step at the usual quality."""
HALVING = 22.0
"""So many points of quality halve the step. benchmarks/studies/quality_scale.py measures both numbers."""


def step_of_quality(quality: float) -> float:
    """The step of a quality. Raises ConfigError outside 1 to 100."""
    if not 1 <= quality <= 100:
        raise ConfigError(f"quality {quality:g} cannot be: it goes from 1 to 100, more is better; or give a step")
    return USUAL_STEP * 2.0 ** ((USUAL_QUALITY - quality) / HALVING)


def quality_of_step(step: float) -> float:
    """The quality of a step above 0; of a very coarse one below 1, of a very fine one above 100."""
    return USUAL_QUALITY - HALVING * math.log2(step / USUAL_STEP)
