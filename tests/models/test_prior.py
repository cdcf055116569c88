from __future__ import annotations

import pytest
import torch
from torch.distributions import TransformedDistribution, Uniform
from torch.distributions.transforms import AffineTransform, SigmoidTransform

from ldm_vae.models.prior import CausalPrior, interval_nats


def random_prior(channels: int) -> CausalPrior:
    torch.manual_seed(0)
    prior = CausalPrior(channels)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return prior


def test_a_value_is_coded_with_what_the_codec_decodes_before_it_alone() -> None:
    """Which inputs change which outputs, beside the taps that contexts may have."""
    prior = random_prior(3)
    values = torch.randn(1, 3, 5, 5)
    before = prior(values, torch.ones(1)).detach()
    for c in range(3):
        changed = values.clone()
        changed[0, c, 2, 2] += 1
        moved = (prior(changed, torch.ones(1)) - before).abs()[0] > 1e-7
        for other in range(3):
            for y in range(5):
                for x in range(5):
                    dc, dy, dx = c - other, 2 - y, 2 - x  # where the changed value lies, seen from this one
                    near = abs(dy) <= 1 and abs(dx) <= 1
                    is_tap = near and (dc < 0 or (dc == 0 and dx + 2 * dy < 0))
                    itself = (dc, dy, dx) == (0, 0, 0)
                    assert bool(moved[other, y, x]) == (is_tap or itself), (dc, dy, dx)


def test_probabilities_of_all_integers_sum_to_one() -> None:
    integers = torch.arange(-400, 401).float()
    for scale in (0.05, 1.0, 20.0):
        for mean in (0.0, 0.3, -7.5):
            total = torch.exp(-interval_nats(integers - mean, torch.tensor(scale))).sum()
            assert float(total) == pytest.approx(1, abs=1e-4)


def test_nats_are_those_of_a_logistic_distribution() -> None:
    logistic = TransformedDistribution(
        Uniform(torch.tensor(0.0).double(), torch.tensor(1.0).double()),
        [SigmoidTransform().inv, AffineTransform(0.4, 1.7)],
    )
    values = torch.linspace(-6, 6, 25).double()
    expected = -(logistic.cdf(values + 0.5) - logistic.cdf(values - 0.5)).log()
    assert torch.allclose(interval_nats(values - 0.4, torch.tensor(1.7).double()), expected, atol=1e-6)


def test_the_scale_follows_the_step() -> None:
    prior = CausalPrior(1)
    with torch.no_grad():
        prior.spread_by_quality.fill_(-1.0)
    values = torch.zeros(2, 1, 1, 1)
    fine, coarse = prior(values, torch.tensor([0.5, 2.0])).flatten().tolist()
    assert fine > coarse
