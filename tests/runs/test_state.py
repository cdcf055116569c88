from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load, save

from ldm_vae.runs.state import load_state, state_tensors


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_goes_on_bit_identically_from_a_flat_dictionary(
    fused: bool, memory_format: torch.memory_format
) -> None:
    def make() -> dict[str, object]:
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 1, 3))
        network.to(memory_format=memory_format)
        return {
            "network": network,
            "ema": EMAModel(network.parameters(), decay=0.9, foreach=True),
            "optimizer": torch.optim.AdamW(network.parameters(), 1e-2, fused=fused),
            "weight": torch.zeros(()),
        }

    def train(parts: dict, steps: range) -> None:
        for step in steps:
            images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(step))
            parts["network"](images).square().mean().backward()
            parts["optimizer"].step()
            parts["optimizer"].zero_grad()
            parts["ema"].step(parts["network"].parameters())
            parts["weight"].add_(1)

    whole, first, second = make(), make(), make()
    train(whole, range(7))
    train(first, range(4))
    saved = save({k: v.contiguous() for k, v in state_tensors(first).items()})
    load_state(second, load(saved))
    train(second, range(4, 7))
    x, y = state_tensors(whole), state_tensors(second)
    assert x.keys() == y.keys()
    for key in x:
        assert torch.equal(x[key], y[key]), key
    moments = second["optimizer"].state[next(iter(second["network"].parameters()))]["exp_avg"]
    assert moments.is_contiguous(memory_format=memory_format)
    assert second["weight"].item() == 7
