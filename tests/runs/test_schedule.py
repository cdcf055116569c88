from __future__ import annotations

import pytest

from ldm_vae.runs.step import learning_rate_at


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine_to_zero() -> None:
    rates = [learning_rate_at(step, 2.0, steps=1000, warmup_steps=10) for step in range(1001)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4] == pytest.approx(1.0, rel=1e-3)
    assert rates[500] == pytest.approx(1.0)
    assert rates[1000] == 0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate_at(0, 2.0, steps=10, warmup_steps=0) == 2.0
