"""How a training step updates a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


def learning_rate_at(step: int, peak: float, *, steps: int, warmup_steps: int) -> float:
    """Linear warm-up to `peak` over `warmup_steps`, times a cosine that is zero at `steps` (Loshchilov 2017)."""
    warmup = min(1.0, (step + 1) / max(warmup_steps, 1))
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; through pinned memory, from which a GPU copies without being waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextmanager
def averaged(network: Any, ema: EMAModel) -> Iterator[Any]:
    """The network with its averaged weights in place, for measuring and saving."""
    parameters = list(network.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    network.eval()
    try:
        yield network
    finally:
        ema.restore(parameters)
        network.train()
