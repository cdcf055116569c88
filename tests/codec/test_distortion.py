from __future__ import annotations

import math

import pytest
import torch

from ldm_vae.codec import distortion


def test_masked_errors_count_less_where_an_image_is_lively_and_more_the_coarser_they_are() -> None:
    weights = torch.tensor([1.0, 3.0])
    flat = torch.full((2, 3, 32, 32), 0.5)
    shifted = flat + 0.1  # an error at every scale: 1 + 1 + 2 + 4 times 0.01, where the least deviation divides
    expected = (1 + 3) / 2 * 8 * 0.01 * 0.1 / 0.04
    assert float(distortion.masked_error(shifted, flat, weights)) == pytest.approx(expected, rel=1e-5)
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
    fine = flat + 0.1 * checks  # gone at half the size
    assert float(distortion.masked_error(fine, flat, weights)) == pytest.approx(expected / 8, rel=1e-5)
    lively = 0.5 * checks.expand(2, 3, 32, 32)
    deviation = math.sqrt(0.25 - (0.5 / 81) ** 2 + 0.04**2)  # 41 and 40 of the 81 values around each
    seen = float(distortion.masked_error(lively + 0.1, lively, weights))
    assert seen == pytest.approx(expected * 0.04 / deviation, rel=2e-3)


def test_squared_errors_are_weighted_by_image() -> None:
    images, others = torch.randn(2, 3, 3, 16, 24).unbind()
    weights = torch.tensor([1.0, 2.0, 0.5])
    fine = float((weights[:, None, None, None] * (images - others).square()).mean())
    assert float(distortion.weighted_squared_error(images, others, weights)) == pytest.approx(fine, rel=1e-6)
