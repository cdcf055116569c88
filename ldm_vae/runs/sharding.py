"""Networks whose parameters are sharded over processes (FSDP2): from shards to whole tensors, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(network: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in network.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this process may hold a shard. Called by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one of which this process may hold a shard. Called by all processes."""
    if isinstance(target, DTensor):
        local = value.to(target.device, target.dtype)
        target.copy_(distribute_tensor(local, target.device_mesh, target.placements))
    else:
        target.copy_(value)


@contextmanager
def averaged_copy(ema: EMAModel, copy: Any, device: torch.device) -> Iterator[Any]:
    """The averaged weights of a sharded network in an unsharded copy, in the process that has one.

    Entered by all processes; those without a copy get None.
    """
    for shadow, parameter in zip(ema.shadow_params, repeat(None) if copy is None else copy.parameters(), strict=False):
        average = whole(shadow)
        if parameter is not None:
            parameter.data.copy_(average)
    if copy is not None:
        copy.to(device).eval()
    yield copy
    if copy is not None:
        copy.cpu()
