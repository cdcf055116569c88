"""The mean and deviation of latents per channel, measured over a data set. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(kw_only=True)
class Statistics:
    """Count, mean and sum of squared deviations per channel, in float64.

    Merged by the parallel form of Welford's algorithm (Chan, Golub & LeVeque 1979, equations 2.1), which does not
    cancel like a difference of sums, and gives the same however the latents are split, up to rounding.
    """

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, moments: np.ndarray) -> Statistics:
        """Of latents *sampled* from posteriors with these moments (B, 2c, h, w), in expectation.

        The variance of a sample is that of the means and, by the law of total variance, the mean of the variances.
        """
        channels = moments.shape[1] // 2
        rows = moments.astype(np.float64).swapaxes(0, 1).reshape(2 * channels, -1)  # (2c, B*h*w)
        mean, logvar = rows[:channels], rows[channels:]
        centre = mean.mean(axis=1)
        squares = np.square(mean - centre[:, None]).sum(axis=1) + np.exp(logvar.clip(-30, 20)).sum(axis=1)
        return cls(count=mean.shape[1], mean=centre, squares=squares)

    def __add__(self, other: Statistics) -> Statistics:
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        return Statistics(
            count=count,
            mean=self.mean + delta * other.count / count,
            squares=self.squares + other.squares + delta**2 * self.count * other.count / count,
        )

    @property
    def std(self) -> np.ndarray:
        """1e-6 at least, so that a constant channel is not divided by zero."""
        return np.maximum(np.sqrt(self.squares / max(self.count, 1)), 1e-6)

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Statistics:
        return cls(count=int(record["count"]), mean=np.array(record["mean"]), squares=np.array(record["squares"]))
