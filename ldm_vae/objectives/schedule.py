"""The learning rate as a function of the step: there is no scheduler whose state could be lost."""

from __future__ import annotations

import math


def learning_rate_at(step: int, peak: float, *, steps: int, warmup_steps: int) -> float:
    """Linear warm-up to `peak` over `warmup_steps`, times a cosine that is zero at `steps` (Loshchilov 2017)."""
    warmup = min(1.0, (step + 1) / max(warmup_steps, 1))
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
